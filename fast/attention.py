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
from torch.utils.checkpoint import checkpoint

from model import KVCache
from thoughts import ThoughtCache, ThoughtConfig, thought_mask, widen

BLOCK = 64  # positions whose queries are multiplied together


class Block(NamedTuple):
    """Adjacent thoughts, and the part of the text that any of them attends to."""

    rows: slice  # of the NJ * n queries
    keys: slice  # of the T text keys


def blocks_of(visible: Tensor, n_thoughts: int) -> list[Block]:
    """Cut thoughts that attend to visible [NJ, n, T] of the text into blocks.

    On average half of the text comes after a position, and its thoughts must not attend to it. A
    block leaves out the part that none of its thoughts attends to. (Any order of positions is
    right; a rising one leaves out most.)
    """
    NJ, n, _ = visible.shape
    J = NJ // n_thoughts
    blocks = []
    for begin in range(0, J, BLOCK):
        end = min(begin + BLOCK, J)
        seen = visible[begin:end].any(0).any(0).nonzero().flatten().tolist() or [0]  # at least one
        keys = slice(seen[0], seen[-1] + 1)
        for i in range(n_thoughts):
            blocks.append(Block(slice((i * J + begin) * n, (i * J + end) * n), keys))
    return blocks


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [R, G, p, Dh] over keys k and values v [R, t, Dh] with bias [p, t].

    Returns the output, like q, and lse [R, G, p]. PyTorch's public fused attention does not return
    lse; this kernel does, and never writes the scores to memory.
    """
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))  # the same for all G
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of attend, where out and lse are those over these keys *and* more."""
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse, 0.0, False, attn_mask=bias
    )
    return d_q, d_k.sum(1), d_v.sum(1)


def own_scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """Scores [R, NJ, s, n, G] of queries q [R, NJ, n, G, Dh] for own keys k [R, NJ, s, Dh].

    hidden [NJ, s, n] bool: keys that a query must not attend to; None: it attends to all.
    """
    scores = widen(k @ q.flatten(2, 3).mT).unflatten(-1, q.shape[2:4])
    scores = scores / math.sqrt(q.shape[-1])
    return scores if hidden is None else scores.masked_fill_(hidden[..., None], -1e30)


def by_thought(x: Tensor, n: int) -> Tensor:
    """[R, G, NJ * n, ...] -> [R, NJ, n, G, ...]."""
    return x.unflatten(2, (-1, n)).movedim(1, 3)


class View(NamedTuple):
    """What n steps of the thoughts attend to, in the text and in themselves."""

    bias: Tensor  # [NJ * n, T]: 0 where the text is visible, else the smallest finite number
    blocks: list[Block]
    slots: slice  # of the own steps: from the oldest that is visible to the last one
    n: int
    hidden: Tensor | None  # [NJ, slots, n] bool: which of these are not visible; None: all are


class _ThoughtAttention(torch.autograd.Function):
    """n steps of all thoughts.

    q [R, G, NJ * n, Dh], k, v [R, NJ, n, Dh], text_k, text_v [R, T, Dh] -> like q.

    own [2, R, NJ, S, Dh] has a slot for the key and the value of every step. A pass writes its
    slots in place and returns the tensor. In the backward pass it receives the gradient that later
    passes have for the slots up to its own, and adds to it.
    """

    @staticmethod
    def forward(ctx, q, k, v, text_k, text_v, own, view):
        n = view.n
        own[:, :, :, view.slots.stop - n : view.slots.stop] = torch.stack([k, v])
        ctx.mark_dirty(own)
        out, text_lse = torch.empty_like(q), widen(torch.empty_like(q[..., 0]))
        for rows, keys in view.blocks:
            out[:, :, rows], text_lse[:, :, rows] = attend(
                q[:, :, rows], text_k[:, keys], text_v[:, keys], view.bias[rows, keys]
            )
        own_k, own_v = own[:, :, :, view.slots]  # [R, NJ, s, Dh]
        scores = own_scores(by_thought(q, n), own_k, view.hidden)  # [R, NJ, s, n, G]
        own_lse = scores.logsumexp(2).movedim(3, 1).flatten(2, 3)  # [R, G, NJ * n]
        lse = torch.logaddexp(text_lse, own_lse)
        p = torch.exp(scores - by_thought(lse, n)[:, :, None]).to(q.dtype)  # of both parts together
        own_out = (p.flatten(3).mT @ own_v).unflatten(2, p.shape[3:])  # [R, NJ, n, G, Dh]
        out.mul_(torch.exp(text_lse - lse)[..., None])
        out.add_(own_out.movedim(3, 1).flatten(2, 3))
        ctx.save_for_backward(q, text_k, text_v, out, lse)
        # Not saved for backward: later passes write other slots, which its version check refuses.
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
        slots, n, overlap = ctx.view.slots, ctx.view.n, widen(d_out * out).sum(-1)
        own_k, own_v = ctx.own[:, :, :, slots]  # [R, NJ, s, Dh]
        q, d_o, lse, overlap = (by_thought(x, n) for x in (q, d_out, lse, overlap))
        p = torch.exp(own_scores(q, own_k, ctx.view.hidden) - lse[:, :, None])  # [R, NJ, s, n, G]
        d_p = (own_v @ d_o.flatten(2, 3).mT).unflatten(-1, q.shape[2:4])
        d_scores = p * (d_p - overlap[:, :, None]) / math.sqrt(q.shape[-1])
        d_scores, p = (x.to(q.dtype).flatten(3) for x in (d_scores, p))  # [R, NJ, s, n * G]
        d_q += (d_scores.mT @ own_k).unflatten(2, q.shape[2:4]).movedim(3, 1).flatten(2, 3)
        d_own[0, :, :, slots] += d_scores @ q.flatten(2, 3)
        d_own[1, :, :, slots] += p @ d_o.flatten(2, 3)
        d_k, d_v = d_own[
            :, :, :, slots.stop - n : slots.stop
        ]  # complete: no earlier pass reads them
        return d_q, d_k, d_v, d_text_k, d_text_v, d_own, None


class FastThoughtCache(ThoughtCache):
    """For a CPU: a ThoughtCache that attends by _ThoughtAttention, under any thought_mask."""

    def __init__(self, text: KVCache, positions: Tensor, config: ThoughtConfig):
        super().__init__(text, positions, config)
        self.n_thoughts, self.read = config.n_thoughts, 0
        self.steps = config.thought_length + config.n_true + 1  # S

    @property
    def length(self) -> int:
        """The number of steps that have been read."""
        return self.read

    def look(self, n: int, T: int, dtype: torch.dtype) -> View:
        """What the last n steps attend to in a text of T tokens, and in themselves."""
        steps = range(self.read - n + 1, self.read + 1)
        visible = thought_mask(self.origin, steps, T, self.text.window)  # [NJ, n, T + read]
        of_text, of_own = visible.split([T, self.read], dim=2)
        lowest = torch.finfo(dtype).min  # not -inf: a row may attend to no text at all
        bias = torch.zeros_like(of_text, dtype=dtype).masked_fill_(~of_text, lowest).flatten(0, 1)
        slots = slice(int(of_own.flatten(0, 1).any(0).int().argmax()), self.read)
        hidden = ~of_own[:, :, slots].mT  # [NJ, slots, n]
        blocks = blocks_of(of_text, self.n_thoughts)
        return View(bias, blocks, slots, n, hidden if hidden.any() else None)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As ThoughtCache.attend."""
        text_k, text_v = self.text.layers[layer]  # [B, Hkv, T, Dh]
        n, heads = q.shape[2] // len(self.origin), k.shape[:2]
        if layer == 0:  # the same in all layers
            self.read += n
            self.view = self.look(n, text_k.shape[2], q.dtype)
        grouped = q.unflatten(1, (heads[1], -1)).flatten(0, 1)  # [R, G, NJ * n, Dh]
        k, v, text_k, text_v = (x.flatten(0, 1) for x in (k, v, text_k, text_v))  # [R, .., Dh]
        k, v = (x.unflatten(1, (-1, n)) for x in (k, v))  # [R, NJ, n, Dh]
        if layer == len(self.own):
            self.own.append(k.new_empty(2, *k.shape[:2], self.steps, k.shape[-1]))
        out, self.own[layer] = _ThoughtAttention.apply(
            grouped, k, v, text_k, text_v, self.own[layer], self.view
        )
        return out.unflatten(0, heads).flatten(1, 2)  # [B, H, NJ * n, Dh]


class RecomputingThoughtCache(ThoughtCache):
    """For other devices, with checkpointing: attention is computed again in the backward pass."""

    def attention(self, *tensors: Tensor) -> Tensor:
        """As ThoughtCache.attention."""
        return checkpoint(
            super().attention, *tensors, use_reentrant=False, preserve_rng_state=False
        )
