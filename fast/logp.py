"""log p of tokens without keeping logits over the vocabulary for the backward pass.

The backward pass calls token_logits and token_logp of thoughts.py again, and only for tokens whose
log p has a gradient: dropped rewards and missing targets cost nothing.
"""

import torch
from torch import Tensor

import thoughts

ROWS = 512  # of logits over the vocabulary that are normalised, or computed again, at once


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, head, logits, ids, excluded, temperature):
        ctx.save_for_backward(h, head, ids)
        ctx.excluded, ctx.temperature = excluded, temperature
        parts = zip(logits.flatten(0, -2).split(ROWS), ids.flatten().split(ROWS), strict=True)
        logp = [thoughts.token_logp(rows, targets, temperature) for rows, targets in parts]
        return torch.cat(logp).view(ids.shape)

    @staticmethod
    def backward(ctx, d_logp):
        h, head, ids = ctx.saved_tensors
        used, d_h, d_head = d_logp != 0, torch.zeros_like(h), torch.zeros_like(head)
        parts, chosen = [], (x[used].split(ROWS) for x in (h, ids, d_logp))
        for rows, targets, d_rows in zip(*chosen, strict=True):
            with torch.enable_grad():
                rows, weight = rows.detach().requires_grad_(), head.detach().requires_grad_()
                logits = thoughts.token_logits(rows, weight, ctx.excluded)  # [ROWS, V]
                logp = thoughts.token_logp(logits, targets, ctx.temperature)
            d_part, d_weight = torch.autograd.grad(logp, (rows, weight), d_rows)
            parts.append(d_part)
            d_head += d_weight
        d_h[used] = torch.cat(parts)
        return d_h, d_head, None, None, None, None


def token_logits(h: Tensor, head: Tensor, excluded: tuple[int, ...] = ()) -> Tensor:
    """As thoughts.token_logits, without a gradient; the arguments are stored for token_logp."""
    with torch.no_grad():
        logits = thoughts.token_logits(h, head, excluded)
    logits.made_of = (h, head, excluded, logits._version)
    return logits


def token_logp(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """As thoughts.token_logp, of logits that token_logits above returned.

    Raises ValueError for other logits, because the backward pass could not compute them again.
    """
    made_of = getattr(logits, "made_of", None)
    if made_of is None or made_of[-1] != logits._version:
        raise ValueError("the logits were changed after token_logits; train without --fast")
    h, head, excluded, _ = made_of
    return _TokenLogp.apply(h, head, logits, ids, excluded, temperature)
