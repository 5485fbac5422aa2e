"""log p of given tokens without keeping logits over the vocabulary for the backward pass.

log p = log_softmax(logits / temperature)[ids], and backward, with the logits computed again,

    d logits = (onehot(ids) - softmax(logits / temperature)) / temperature * d log p

only where d log p is not 0: dropped rewards and missing targets need no work.
"""

import torch
from torch import Tensor

import thoughts


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, head, logits, ids, excluded, temperature):
        ctx.save_for_backward(h, head, ids)
        ctx.excluded, ctx.temperature = excluded, temperature
        scaled = (
            logits if temperature == 1 else logits / temperature
        )  # no copy where none is needed
        logp = torch.log_softmax(scaled, dim=-1)
        return logp.gather(-1, ids[..., None]).squeeze(-1)

    @staticmethod
    def backward(ctx, d_logp):
        h, head, ids = ctx.saved_tensors
        used = d_logp != 0
        rows, scale = h[used], d_logp[used][:, None] / ctx.temperature  # [rows, D], [rows, 1]
        logits = thoughts.token_logits(rows, head, ctx.excluded)  # [rows, V]
        p = torch.softmax(logits.div_(ctx.temperature), dim=-1)
        d_logits = p.mul_(-scale).scatter_add_(-1, ids[used][:, None], scale).to(head.dtype)
        d_h = torch.zeros_like(h)
        d_h[used] = d_logits @ head
        return d_h, d_logits.mT @ rows, None, None, None, None


def token_logits(h: Tensor, head: Tensor, excluded: tuple[int, ...] = ()) -> Tensor:
    """As thoughts.token_logits, outside of the graph; remembers what the logits were made of."""
    with torch.no_grad():
        logits = thoughts.token_logits(h, head, excluded)
    logits.made_of = (h, head, excluded, logits._version)  # for token_logp; no part of the numbers
    return logits


def token_logp(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """As thoughts.token_logp, of what token_logits above returned.

    ValueError for other logits: the backward pass could not make them again.
    """
    made_of = getattr(logits, "made_of", None)
    if made_of is None or made_of[-1] != logits._version:
        raise ValueError("the logits were changed after token_logits; train.py --plain allows it")
    h, head, excluded, _ = made_of
    return _TokenLogp.apply(h, head, logits, ids, excluded, temperature)
