"""Attention of thoughts that keeps no probabilities, and every key once.

One softmax runs over the text's keys, which all thoughts share, and over the thought's own, of
which each has others. Each part is attended to on its own; exp(lse of the part - lse of both) puts
them together, where lse is the log-sum-exp of the scores, the logarithm of the softmax'
denominator. A part's gradient needs only the lse of both, so the backward pass takes the parts one
by one again and computes their probabilities anew, as FlashAttention does (Dao et al. 2022,
arXiv 2205.14135):

    P = exp(q k' / sqrt(Dh) - lse)    dS = P * (do v' - sum(do * o)) / sqrt(Dh)
    dq = dS k    dk = dS' q    dv = P' do

Letters beside those of thoughts.py: R = B * Hkv heads of keys in the batch, G = H / Hkv queries
that share one, S = K + A + 1 steps of a thought, s of them so far.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model import KVCache
from thoughts import ThoughtCache, ThoughtConfig, thought_mask

FUSED = ("cpu",)  # devices on which PyTorch's fused attention is used (a private operator)
BLOCK = 64  # positions whose queries are multiplied together


class Block(NamedTuple):
    """Some thoughts, next to each other, and the stretch of the text that any of them sees."""

    rows: slice  # of the NJ thoughts
    keys: slice  # of the T text keys


def blocks_of(visible: Tensor, n_thoughts: int) -> list[Block]:
    """Cut thoughts that see visible [NJ, T] of the text into blocks.

    On average half of the text comes after a position, and its thoughts must not see it: whole
    blocks of it need not be multiplied at all. (Positions in rising order profit; any are right.)
    """
    J = len(visible) // n_thoughts
    blocks = []
    for begin in range(0, J, BLOCK):
        end = min(begin + BLOCK, J)
        seen = visible[begin:end].any(0).nonzero().flatten().tolist() or [0]  # at least one key
        keys = slice(seen[0], seen[-1] + 1)
        blocks += [Block(slice(n * J + begin, n * J + end), keys) for n in range(n_thoughts)]
    return blocks


def float32_or_more(x: Tensor) -> Tensor:
    """x in float32 if it is in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [R, G, p, Dh] over keys k and values v [R, t, Dh] with bias [p, t].

    Returns what is attended to, like q, and lse [R, G, p]. PyTorch's public fused attention does
    not return it; its kernel for the CPU does, and never writes the scores to memory. Elsewhere
    the last three lines do the same.
    """
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))  # the same for all G
    if q.device.type in FUSED:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    scores = float32_or_more(q @ k.mT) / math.sqrt(q.shape[-1]) + bias
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).to(v.dtype) @ v, lse


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of attend, where out and lse are those over these keys *and* more."""
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    if q.device.type in FUSED:
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, False, attn_mask=bias
        )
    else:
        scale = 1 / math.sqrt(q.shape[-1])
        p = torch.exp(float32_or_more(q @ k.mT) * scale + bias - lse[..., None])
        overlap = float32_or_more(d_out * out).sum(-1, keepdim=True)
        d_scores = (p * (d_out @ v.mT - overlap) * scale).to(q.dtype)
        d_q, d_k, d_v = d_scores @ k, d_scores.mT @ q, p.to(q.dtype).mT @ d_out
    return d_q, d_k.sum(1), d_v.sum(1)


def own_scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """Scores [R, NJ, s, G] of each thought's G queries [R, G, NJ, Dh] for its keys [R, NJ, s, Dh].

    hidden [NJ, s] bool: keys that it must not see; None: it sees them all.
    """
    scores = float32_or_more(k @ q.permute(0, 2, 3, 1)) / math.sqrt(q.shape[-1])
    return scores if hidden is None else scores.masked_fill_(hidden[..., None], -1e30)


class View(NamedTuple):
    """What one step of the thoughts sees, of the text and of themselves."""

    bias: Tensor  # [NJ, T]: 0 where the text is visible, the smallest finite number where not
    blocks: list[Block]
    slots: slice  # of the own steps: from the oldest that is seen to this one
    hidden: Tensor | None  # [NJ, slots] bool: which of these are not seen; None: all are


class _ThoughtAttention(torch.autograd.Function):
    """One step of all thoughts: q [R, G, NJ, Dh], k, v [R, NJ, Dh], text_k, text_v [R, T, Dh].

    own [2, R, NJ, S, Dh] has a slot for the key and the value of every step. A step writes its slot
    in place and hands the tensor on. On the way back it receives what the steps after it have to
    say on the slots up to its own, and adds to that.
    """

    @staticmethod
    def forward(ctx, q, k, v, text_k, text_v, own, view):
        own[:, :, :, view.slots.stop - 1] = torch.stack([k, v])
        ctx.mark_dirty(own)
        out, text_lse = torch.empty_like(q), float32_or_more(torch.empty_like(q[..., 0]))
        for rows, keys in view.blocks:
            out[:, :, rows], text_lse[:, :, rows] = attend(
                q[:, :, rows], text_k[:, keys], text_v[:, keys], view.bias[rows, keys]
            )
        own_k, own_v = own[:, :, :, view.slots]  # [R, NJ, s, Dh]
        scores = own_scores(q, own_k, view.hidden)  # [R, NJ, s, G]
        lse = torch.logaddexp(text_lse, scores.logsumexp(2).mT)  # [R, G, NJ]
        p = torch.exp(scores - lse.mT[:, :, None]).to(q.dtype)  # of the softmax over both parts
        out.mul_(torch.exp(text_lse - lse)[..., None]).add_((p.mT @ own_v).transpose(1, 2))
        ctx.save_for_backward(q, text_k, text_v, out, lse)
        # Not saved for backward: later steps write other slots, which its version check refuses.
        ctx.own, ctx.view = own.detach(), view
        return out, own

    @staticmethod
    def backward(ctx, d_out, d_own):
        q, text_k, text_v, out, lse = ctx.saved_tensors
        d_q, d_text_k, d_text_v = torch.empty_like(q), *map(torch.zeros_like, (text_k, text_v))
        for rows, keys in ctx.view.blocks:
            d_o, x, o, denominator = (y[:, :, rows] for y in (d_out, q, out, lse))
            bias = ctx.view.bias[rows, keys]
            d_q[:, :, rows], d_k, d_v = attend_backward(
                d_o, x, text_k[:, keys], text_v[:, keys], o, denominator, bias
            )
            d_text_k[:, keys] += d_k
            d_text_v[:, keys] += d_v
        slots = ctx.view.slots
        own_k, own_v = ctx.own[:, :, :, slots]  # [R, NJ, s, Dh]
        p = torch.exp(own_scores(q, own_k, ctx.view.hidden) - lse.mT[:, :, None])  # [R, NJ, s, G]
        overlap = float32_or_more(d_out * out).sum(-1).mT[:, :, None]  # [R, NJ, 1, G]
        d_scores = p * (own_v @ d_out.permute(0, 2, 3, 1) - overlap) / math.sqrt(q.shape[-1])
        d_scores, p = d_scores.to(q.dtype), p.to(q.dtype)
        d_q += (d_scores.mT @ own_k).transpose(1, 2)
        d_own[0, :, :, slots] += d_scores @ q.transpose(1, 2)
        d_own[1, :, :, slots] += p @ d_out.transpose(1, 2)
        d_k, d_v = d_own[:, :, :, slots.stop - 1]  # complete; no step before reads this slot
        return d_q, d_k, d_v, d_text_k, d_text_v, d_own, None


class FastThoughtCache(ThoughtCache):
    """A ThoughtCache that attends by _ThoughtAttention. Whatever thought_mask says is done."""

    def __init__(self, text: KVCache, positions: Tensor, config: ThoughtConfig):
        super().__init__(text, positions, config)
        self.n_thoughts, self.step = config.n_thoughts, 0
        self.steps = config.thought_length + config.n_true + 1  # S

    def look(self, T: int, dtype: torch.dtype) -> View:
        """What the current step sees of a text of T tokens."""
        visible = thought_mask(self.origin, self.step, T, self.text.window)
        of_text, of_own = visible.split([T, self.step], dim=1)
        lowest = torch.finfo(dtype).min  # not -inf: a row may see no text at all
        bias = torch.zeros_like(of_text, dtype=dtype).masked_fill_(~of_text, lowest)
        slots = slice(int(of_own.any(0).int().argmax()), self.step)
        hidden = ~of_own[:, slots]
        blocks = blocks_of(of_text, self.n_thoughts)
        return View(bias, blocks, slots, hidden if hidden.any() else None)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As ThoughtCache.attend."""
        text_k, text_v = self.text.layers[layer]  # [B, Hkv, T, Dh]
        if layer == 0:  # the same for all layers
            self.step += 1
            self.view = self.look(text_k.shape[2], q.dtype)
        heads = k.shape[:2]
        grouped = q.unflatten(1, (heads[1], -1)).flatten(0, 1)  # [R, G, NJ, Dh]
        k, v, text_k, text_v = (x.flatten(0, 1) for x in (k, v, text_k, text_v))  # [R, .., Dh]
        if layer not in self.own:
            self.own[layer] = k.new_empty(2, *k.shape[:2], self.steps, k.shape[-1])
        out, self.own[layer] = _ThoughtAttention.apply(
            grouped, k, v, text_k, text_v, self.own[layer], self.view
        )
        return out.unflatten(0, heads).flatten(1, 2)  # [B, H, NJ, Dh]
