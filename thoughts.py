"""Quiet-STaR: think before every token, keep what helps (Zelikman et al. 2024, arXiv 2403.09629).

After every position j of a text a thought is sampled, at all positions in parallel; the prediction
made after the thought is mixed with the one made without it; REINFORCE makes thoughts likelier
that made the true text likelier.

                       x_0 .. x_j | start  t_1 .. t_K  end  x_{j+1} .. x_{j+A-1}      (one thought)
    step s                        |   1    2 .. K+1   K+2   K+3  ..  K+A+1
    rotary position    0   ..  j  |  j+1              ...              j+K+A+1
    what its output predicts      |  t_1   t_2 ..  -  x_{j+1}   ..   x_{j+A}

Letters of the shape comments, beside those of model.py (the paper's name in brackets):
    N    thoughts per position [n_thoughts]
    K    sampled tokens of a thought, without start and end [t]
    A    true tokens ahead that a thought is scored on [n_true]
    J    positions that think: all that have A targets, or any subset
    P    J * N thoughts of a sequence as rows, the N of a position next to each other
    R    B * Hkv, heads of keys in the whole batch; G = H / Hkv queries share one
    S    K + A + 1 steps of a thought, s of them so far

Positions are 0-based here: position j has read ids[:, : j + 1] and predicts ids[:, j + 1].
"nll" is a negative log-likelihood in nats, "logp" a log-probability in nats.

The file reads bottom-up: config, pure functions (the equations), the module, loading and saving.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import (
    Cache,
    Mistral,
    at_least_float32,
    build_mistral,
    in_window,
    load_weights,
    open_tensors,
    read_config,
    read_json,
    read_tensors,
    read_weights,
    save_mistral,
    weight_files,
    write_json,
    write_tensors,
)

NEVER = -1e10  # logit of a meta token: probability 0 in float32, and no 0 * inf = NaN in a loss


@dataclass(frozen=True)
class ThoughtConfig:
    """How a model thinks and what it learns from it. Numbers default to the paper's."""

    n_thoughts: int = 2  # thoughts sampled at every position (N)
    thought_length: int = 9  # sampled tokens of a thought, start and end not counted (K)
    n_true: int = 4  # true tokens ahead that a thought is scored on (A)
    start_id: int | None = None  # id of <|startofthought|>; none: outside the vocabulary
    end_id: int | None = None  # id of <|endofthought|>; none: outside the vocabulary
    init_id: int | None = None  # token whose embedding both begin as, the em dash; none: random
    embedding_scale: float = 100.0  # both are stored divided by this: Adam moves them faster
    reinforce_temperature: float = 3.0  # of log p(thought) in REINFORCE; sampling has its own
    base_weight: float = 0.5  # of the loss without thoughts, against that with thoughts
    policy_weight: float | None = None  # of REINFORCE; none: 1e6 / K
    drop_negative: bool = True  # learn only from thoughts that beat the mean of their position

    def __post_init__(self):
        allowed = {
            "n_thoughts": (self.n_thoughts >= 1, "at least 1"),
            "thought_length": (self.thought_length >= 0, "at least 0"),
            "n_true": (self.n_true >= 1, "at least 1"),
            "embedding_scale": (0 < self.embedding_scale < math.inf, "positive"),
            "reinforce_temperature": (0 < self.reinforce_temperature < math.inf, "positive"),
            "base_weight": (0 <= self.base_weight <= 1, "between 0 and 1"),
            "policy_weight": (0 <= (self.policy_weight or 0) < math.inf, "at least 0"),
            "end_id": (self.end_id is None or self.end_id != self.start_id, "unlike start_id"),
        }
        check_settings(self, allowed)


def check_settings(settings: object, allowed: dict[str, tuple[bool, str]]) -> None:
    """ValueError for the first setting whose entry (whether it is allowed, what is) is False."""
    for name, (good, what) in allowed.items():
        if not good:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be {what}")


class Output(NamedTuple):
    """What QuietStar.forward returns."""

    thought_ids: Tensor  # [B, N, J, K] int64
    thought_logp: Tensor  # [B, N, J, K] of the masked logits / reinforce_temperature
    base_nll: Tensor  # [B, T-1] of ids[:, 1:] without thoughts; 0 where it is no target
    talk_nll: Tensor  # [A, B, N, J] of ids[:, j+1+a] after the thought at j; 0 where not valid
    weight: Tensor  # [A, B, N, J] the mixing weight w: 1 = the thought is ignored
    valid: Tensor  # [A, B, J] bool: the target exists and is one
    positions: Tensor  # [J] int64
    target_mask: Tensor  # [B, T] bool


class Counts(NamedTuple):
    """How many entries the means of the loss run over: the whole batch's, if it is split."""

    base: int  # targets predicted without thought
    positions: int  # (sequence, thinking position) that have all A targets


# ----------------------------------------------------------------------- which keys a thought sees


def text_visible(positions: Tensor, step: int, T: int, window: int | None) -> Tensor:
    """Which text keys step `step` of the thoughts at `positions` sees -> [J, T] bool.

    Paper: section 4.2. The text up to the thought's origin j, within the sliding window as
    counted from the step's rotary position j + step. (Who lets a thought see more must widen
    attention_blocks too: it leaves out what nobody sees.)
    """
    keys = torch.arange(T, device=positions.device)
    before = keys <= positions[:, None]  # [J, T]
    return before & in_window(positions[:, None] + step, keys, window)


def parallel_thought_mask(
    T: int, positions: Tensor, n_thoughts: int, steps: int, window: int | None = None
) -> Tensor:
    """The paper's Figure 3 as a matrix: may this row look at that column? [M, M] bool.

    M = T + J * N * steps: the text, then every thought's steps, ordered by origin, thought, step.
    The oracle of the tests; the implementation never builds it.
    """
    text = torch.arange(T)
    origin = positions.cpu().repeat_interleave(n_thoughts * steps)
    thought = torch.arange(len(positions) * n_thoughts).repeat_interleave(steps)
    step = torch.arange(1, steps + 1).repeat(len(positions) * n_thoughts)
    nobody = torch.full((T,), -1)

    rotary = torch.cat([text, origin + step])  # [M] positions as the rotary embedding counts them
    sees_text_up_to = torch.cat([text, origin])
    owner = torch.cat([nobody, thought])
    is_text = owner == -1
    up_to_origin = is_text & (rotary <= sees_text_up_to[:, None])
    same_owner = owner == owner[:, None]
    return (up_to_origin | same_owner) & in_window(rotary[:, None], rotary, window)


class Block(NamedTuple):
    """Some thoughts, next to each other, and the stretch of the text that any of them sees."""

    rows: slice  # of the P thoughts
    keys: slice  # of the T text keys


def attention_blocks(
    positions: Tensor, n_thoughts: int, window: int | None, size: int = 64
) -> list[Block]:
    """Cut the J positions into blocks of `size`, with the keys that any step of them may see.

    On average half of the text comes after a position, and its thoughts must not see it: whole
    blocks of it need not be multiplied at all. (Positions in rising order profit; any are right.)
    The oldest key in a window is that of the first step, whose rotary position is j + 1.
    """
    blocks = []
    for start, block in enumerate(positions.cpu().split(size)):
        first = start * size * n_thoughts
        low, high = int(block.min()), int(block.max())
        oldest = 0 if window is None else min(max(low + 2 - window, 0), high)  # at least one key
        rows = slice(first, first + len(block) * n_thoughts)
        blocks.append(Block(rows, slice(oldest, high + 1)))
    return blocks


FUSED = ("cpu",)  # devices on which PyTorch's fused attention is used (a private operator)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [R, G, p, Dh] over keys k and values v [R, t, Dh] with bias [p, t].

    Returns what is attended to, like q, and lse [R, G, p], the logarithm of the softmax'
    denominator: with it, attention over more keys can be put together from parts. PyTorch's public
    fused attention does not return it; its kernel for the CPU does, and never writes the scores to
    memory. Elsewhere the last three lines do the same.
    """
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))  # the same for all G
    if q.device.type in FUSED:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    scores = at_least_float32(q @ k.mT) / math.sqrt(q.shape[-1]) + bias
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).to(v.dtype) @ v, lse


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of attend, where out and lse are those over these keys *and* more.

    The probabilities are computed again, as FlashAttention does (Dao et al. 2022,
    arXiv 2205.14135):

        P = exp(q k' / sqrt(Dh) - lse)    dS = P * (do v' - sum(do * o)) / sqrt(Dh)
        dq = dS k    dk = dS' q    dv = P' do
    """
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    if q.device.type in FUSED:
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, False, attn_mask=bias
        )
    else:
        scale = 1 / math.sqrt(q.shape[-1])
        p = torch.exp(at_least_float32(q @ k.mT) * scale + bias - lse[..., None])
        overlap = at_least_float32(d_out * out).sum(-1, keepdim=True)
        d_scores = (p * (d_out @ v.mT - overlap) * scale).to(q.dtype)
        d_q, d_k, d_v = d_scores @ k, d_scores.mT @ q, p.to(q.dtype).mT @ d_out
    return d_q, d_k.sum(1), d_v.sum(1)


def own_scores(q: Tensor, k: Tensor) -> Tensor:
    """Scores [R, P, s, G] of every row's G queries [R, G, P, Dh] for its own keys [R, P, s, Dh]."""
    return at_least_float32(k @ q.permute(0, 2, 3, 1)) / math.sqrt(q.shape[-1])


class _ThoughtAttention(torch.autograd.Function):
    """The trick of this file: attention that keeps no probabilities, and every key once.

    One softmax runs over the text's keys, which all thoughts share, and over the thought's own, of
    which every row has others. Each part is attended to on its own; exp(lse of the part - lse of
    both) puts them together, and since a part's gradient needs only the lse of both, the backward
    pass takes the parts one by one again.

    own [2, R, P, S, Dh] has a slot for the key and the value of every step. A step writes its slot
    in place and hands the tensor on. On the way back it receives what the steps after it have to
    say on the slots up to its own, and adds to that.
    """

    @staticmethod
    def forward(ctx, q, k, v, text_k, text_v, own, step, window, bias, blocks):
        own[:, :, :, step - 1] = torch.stack([k, v])
        ctx.mark_dirty(own)
        out, text_lse = torch.empty_like(q), at_least_float32(torch.empty_like(q[..., 0]))
        for rows, keys in blocks:
            out[:, :, rows], text_lse[:, :, rows] = attend(
                q[:, :, rows], text_k[:, keys], text_v[:, keys], bias[rows, keys]
            )
        slots = slice(max(step - window, 0) if window else 0, step)  # the thought's own window
        own_k, own_v = own[:, :, :, slots]  # [R, P, s, Dh]
        scores = own_scores(q, own_k)  # [R, P, s, G]
        lse = torch.logaddexp(text_lse, scores.logsumexp(2).mT)  # [R, G, P]
        p = torch.exp(scores - lse.mT[:, :, None]).to(q.dtype)  # of the softmax over both parts
        out.mul_(torch.exp(text_lse - lse)[..., None]).add_((p.mT @ own_v).transpose(1, 2))
        ctx.save_for_backward(q, text_k, text_v, bias, out, lse)
        # Not saved for backward: later steps write other slots, which its version check refuses.
        ctx.own, ctx.slots, ctx.blocks = own.detach(), slots, blocks
        return out, own

    @staticmethod
    def backward(ctx, d_out, d_own):
        q, text_k, text_v, bias, out, lse = ctx.saved_tensors
        d_q, d_text_k, d_text_v = torch.empty_like(q), *map(torch.zeros_like, (text_k, text_v))
        for rows, keys in ctx.blocks:
            d_o, x, o, denominator = (y[:, :, rows] for y in (d_out, q, out, lse))
            d_q[:, :, rows], d_k, d_v = attend_backward(
                d_o, x, text_k[:, keys], text_v[:, keys], o, denominator, bias[rows, keys]
            )
            d_text_k[:, keys] += d_k
            d_text_v[:, keys] += d_v
        own_k, own_v = ctx.own[:, :, :, ctx.slots]  # [R, P, s, Dh]
        p = torch.exp(own_scores(q, own_k) - lse.mT[:, :, None])  # [R, P, s, G]
        overlap = at_least_float32(d_out * out).sum(-1).mT[:, :, None]  # [R, P, 1, G]
        d_scores = p * (own_v @ d_out.permute(0, 2, 3, 1) - overlap) / math.sqrt(q.shape[-1])
        d_scores, p = d_scores.to(q.dtype), p.to(q.dtype)
        d_q += (d_scores.mT @ own_k).transpose(1, 2)
        d_own[0, :, :, ctx.slots] += d_scores @ q.transpose(1, 2)
        d_own[1, :, :, ctx.slots] += p @ d_out.transpose(1, 2)
        d_k, d_v = d_own[:, :, :, ctx.slots.stop - 1]  # complete; no step before reads this slot
        return d_q, d_k, d_v, d_text_k, d_text_v, d_own, None, None, None, None


def thought_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: tuple[Tensor, Tensor],
    own: Tensor,
    step: int,
    window: int | None,
    bias: Tensor,
    blocks: list[Block],
) -> tuple[Tensor, Tensor]:
    """Attention of one step of all thoughts: q [B, H, P, Dh] -> [B, H, P, Dh], and own.

    k, v [B, Hkv, P, Dh]: the step's own key and value. text: keys and values [B, Hkv, T, Dh] of
    the base pass. own [2, B * Hkv, P, steps, Dh]: those of the thoughts' steps before; afterwards
    with this one's. bias [P, T]: 0 where the text is visible, the smallest finite number where
    not. blocks: see attention_blocks.

    Paper: section 4.2 and Figure 3. Ours: the text's keys are multiplied once for all thoughts and
    nobody's keys are copied, so a step costs at most T + s keys a row, where the masked matrix of
    the paper has T * (s + 1).
    """
    heads = k.shape[:2]
    grouped = q.unflatten(1, (heads[1], -1)).flatten(0, 1)  # [R, G, P, Dh]
    folded = (x.flatten(0, 1) for x in (k, v, *text))  # [R, P or T, Dh]
    out, own = _ThoughtAttention.apply(grouped, *folded, own, step, window, bias, blocks)
    return out.unflatten(0, heads).flatten(1, 2), own


# ----------------------------------------------------------------------------------- the equations


def token_logits(h: Tensor, head: Tensor, excluded: tuple[int, ...] = ()) -> Tensor:
    """Logits [..., V] in float32 of hidden states h [..., D] under head [V, D].

    The tokens in excluded get the logit NEVER.
    """
    logits = at_least_float32(h @ head.mT)
    if excluded:
        logits[..., list(excluded)] = NEVER
    return logits


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature; at 1 the logits themselves, for they are large."""
    return logits if temperature == 1 else logits / temperature


class _TokenLogp(torch.autograd.Function):
    """The other trick: log p of given tokens without keeping logits over V for the backward pass.

    log p = log_softmax(logits / temperature)[ids], and backward, with logits computed again,
    d logits = (onehot(ids) - softmax(logits / temperature)) / temperature * d log p.
    """

    @staticmethod
    def forward(ctx, h, head, logits, ids, excluded, temperature):
        ctx.save_for_backward(h, head, ids)
        ctx.excluded, ctx.temperature = excluded, temperature
        logp = torch.log_softmax(at_temperature(logits, temperature), dim=-1)
        return logp.gather(-1, ids[..., None]).squeeze(-1)

    @staticmethod
    def backward(ctx, d_logp):
        h, head, ids = ctx.saved_tensors
        used = d_logp != 0  # dropped rewards and missing targets need no work
        rows, scale = h[used], d_logp[used][:, None] / ctx.temperature  # [rows, D], [rows, 1]
        logits = at_temperature(token_logits(rows, head, ctx.excluded), ctx.temperature)
        p = torch.softmax(logits, dim=-1)
        d_logits = p.mul_(-scale).scatter_add_(-1, ids[used][:, None], scale).to(head.dtype)
        d_h = torch.zeros_like(h)
        d_h[used] = d_logits @ head
        return d_h, d_logits.mT @ rows, None, None, None, None


def token_logp(
    h: Tensor,
    head: Tensor,
    ids: Tensor,
    excluded: tuple[int, ...] = (),
    temperature: float = 1.0,
    logits: Tensor | None = None,
) -> Tensor:
    """log p of tokens ids [...] predicted from h [..., D] under head [V, D] -> [...] in nats.

    logits: token_logits(h, head, excluded), where the caller has them already.
    """
    if logits is None:
        with torch.no_grad():
            logits = token_logits(h, head, excluded)
    return _TokenLogp.apply(h, head, logits, ids, excluded, temperature)


def sample_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token from softmax(logits [..., V]) -> [...] int64.

    uniform [...] in [0, 1) is the randomness. One number a token, drawn by the caller on the CPU:
    a seed then means the same thoughts however a batch is split, up to rounding on every device.
    """
    p = torch.softmax(logits, dim=-1)
    cdf = p.cumsum(-1)
    point = uniform[..., None] * cdf[..., -1:]  # below the sum: torch.rand is at most 1 - 2**-24
    token = torch.searchsorted(cdf, point, right=True)  # [..., 1] never where p is 0,
    possible = p.gather(-1, token.clamp(max=p.shape[-1] - 1)) > 0  # but if a GPU sums out of order
    return torch.where(possible, token, p.argmax(-1, keepdim=True)).squeeze(-1)


def mix(h_init: Tensor, h_thought: Tensor, weight: Tensor) -> Tensor:
    """The hidden state of p_talk: w h_init + (1 - w) h_thought; [..., D], weight [...].

    Paper: section 4.3, log p_talk = w log p_init + (1 - w) log p_thought. Up to a constant over V
    that is this mixture of hidden states, because the head is linear: one head instead of two.
    """
    w = weight[..., None]
    return w * h_init + (1 - w) * h_thought


def valid_targets(target_mask: Tensor, positions: Tensor, n_true: int) -> Tensor:
    """Whether ids[b, j + 1 + a] exists and is a target: target_mask [B, T] -> [A, B, J] bool."""
    T = target_mask.shape[1]
    targets = positions + 1 + torch.arange(n_true, device=positions.device)[:, None]  # [A, J]
    mask = target_mask[:, targets.clamp(max=T - 1)] & (targets < T)  # [B, A, J]
    return mask.transpose(0, 1)


def count_targets(target_mask: Tensor, positions: Tensor, n_true: int) -> Counts:
    """The counts that quiet_star_loss divides by, for a batch with target_mask [B, T]."""
    valid = valid_targets(target_mask, positions, n_true)  # [A, B, J]
    return Counts(int(target_mask[:, 1:].sum()), int(valid.all(0).sum()))


def reward(talk_nll: Tensor, base_nll: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """r_j [B, N, J] in nats: how much likelier a thought made the next A tokens than its siblings.

    talk_nll [A, B, N, J], base_nll [B, T-1], positions [J], valid [A, B, J] as in Output.
    Paper: section 4.4. R_j = sum_a log p_talk(x_{j+1+a}), minus its mean over the N thoughts of
    the position. A thought without siblings (N = 1) is compared with the base model's sum instead.
    0 where a target is missing. A constant: no gradient. (The *metric* called reward compares with
    the base model for any N.)
    """
    total = -talk_nll.detach().sum(0)  # [B, N, J] R_j
    if total.shape[1] > 1:
        r = total - total.mean(1, keepdim=True)
    else:
        r = total - base_total(base_nll, positions, valid)
    return torch.where(valid.all(0)[:, None], r, 0.0)


def base_total(base_nll: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """sum_a log p_init(x_{j+1+a}) [B, 1, J] in nats over the valid targets: what R_j must beat."""
    steps = torch.arange(len(valid), device=positions.device)[:, None]
    nll = base_nll.detach()[:, (positions + steps).clamp(max=base_nll.shape[1] - 1)]  # [B, A, J]
    return -(nll.transpose(0, 1) * valid).sum(0)[:, None]


def quiet_star_loss(
    output: Output, config: ThoughtConfig, counts: Counts | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one step and its parts.

        L = base_weight * L_base + (1 - base_weight) * L_NLL + policy_weight * L_REINFORCE
        L_base      = - log p_init(x_{j+1})                  mean over targets
        L_NLL       = - mean_a log p_talk_{j,a}(x_{j+1+a})   mean over valid positions and thoughts
        L_REINFORCE = - r_j * log p(thought_j)               likewise; r_j a constant, its negatives
                                                             set to 0 if drop_negative

    A position is valid if it has all A targets: padding then changes nothing. counts: those of the
    whole batch where output is a part of it, so that losses, gradients and metrics of the parts
    add up to the batch's.

    Paper: section 4.4; L_base and the two weights are the authors' code's. Metrics, detached
    scalars: loss; base_nll, talk_nll and policy_loss, the three parts; reward, nats per thought by
    which thoughts beat the base model: R_j minus its log p of the same tokens; weight, mean of w.
    """
    if counts is None:
        counts = count_targets(output.target_mask, output.positions, config.n_true)
    valid = output.valid.all(0)[:, None]  # [B, 1, J]
    r = reward(output.talk_nll, output.base_nll, output.positions, output.valid)  # [B, N, J]
    if config.drop_negative:
        r = r.clamp(min=0)
    base_sum = base_total(output.base_nll, output.positions, output.valid)  # [B, 1, J]

    def mean(x: Tensor) -> Tensor:
        """Mean of x [B, N, J] over thoughts and valid positions."""
        return (x * valid).sum() / max(config.n_thoughts * counts.positions, 1)

    base = output.base_nll.sum() / max(counts.base, 1)
    talk = mean(output.talk_nll.mean(0))
    policy = mean(-r * output.thought_logp.sum(-1))
    policy_weight = config.policy_weight
    if policy_weight is None:  # the authors' 1e6 is for the mean over the K tokens
        policy_weight = 1e6 / max(config.thought_length, 1)
    loss = config.base_weight * base + (1 - config.base_weight) * talk + policy_weight * policy
    metrics = {
        "loss": loss,
        "base_nll": base,
        "talk_nll": talk,
        "policy_loss": policy,
        "reward": mean(-output.talk_nll.sum(0) - base_sum),
        "weight": mean(output.weight.float().mean(0)),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


# -------------------------------------------------------------------------------------- the module


def check_temperature(temperature: float) -> None:
    """ValueError for a sampling temperature that is neither 0, greedy, nor one to divide by."""
    if temperature != 0 and not 1e-3 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or at least 0.001")


def check_positions(positions: Tensor, last: int) -> None:
    """ValueError for positions that are not [J] whole numbers in 0 .. last."""
    whole = positions.dtype in (torch.int64, torch.int32)
    inside = ((positions >= 0) & (positions <= last)).all()
    if not whole or positions.dim() != 1 or not len(positions) or not inside:
        raise ValueError(
            f"positions must be whole numbers in 0 .. {last}, one dimension, at least one; "
            f"given {positions.tolist()}"
        )


class Workspace(NamedTuple):
    """What all steps of the thoughts of one forward pass share."""

    positions: Tensor  # [J] where the thoughts begin
    blocks: list[Block]
    text: list[tuple[Tensor, Tensor]]  # each layer's keys and values of the base pass
    own: list[Tensor]  # each layer's of the thoughts' steps, [2, R, P, S, Dh]


class QuietStar(nn.Module):
    """A Mistral that thinks. At initialisation it predicts exactly what the Mistral does.

    checkpointing: keep only the layers' inputs and what attention needs of every step, and compute
    the rest again in the backward pass: a fraction of the memory for some more time (README).
    """

    def __init__(self, model: Mistral, config: ThoughtConfig, checkpointing: bool = False):
        super().__init__()
        self.model = model
        self.config = config
        self.checkpointing = checkpointing
        D, V = model.config.hidden_size, model.config.vocab_size
        for name in ("init_id", "start_id", "end_id"):
            token = getattr(config, name)
            if token is not None and token not in range(V):
                raise ValueError(f"{name} is {token}; the model's tokens are 0 .. {V - 1}")
        self.start_id = V if config.start_id is None else config.start_id
        self.end_id = V + 1 if config.end_id is None else config.end_id
        self.excluded = tuple(token for token in (self.start_id, self.end_id) if token < V)

        table = model.embed_tokens.weight.detach()  # [V, D]
        if config.init_id is None:
            start, end = torch.randn(2, D, dtype=table.dtype, device=table.device) * table.std()
        else:
            start = end = table[config.init_id]
        self.start_embedding = nn.Parameter(start / config.embedding_scale)  # [D]
        self.end_embedding = nn.Parameter(end / config.embedding_scale)  # [D]
        self.mixing_head = nn.Sequential(
            nn.Linear(2 * D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1, bias=False)
        ).to(table)
        nn.init.zeros_(self.mixing_head[4].weight)

    def meta_embedding(self, stored: Tensor) -> Tensor:
        """Meta tokens' embeddings [..., D] in use, from the stored parameters.

        Paper: appendix A. Stored small and used large, so that Adam, whose steps have the size of
        the learning rate, moves it embedding_scale times as far.
        """
        return stored * self.config.embedding_scale

    def embed_thought(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of a thought's tokens ids [...]: ordinary ones, start or end."""
        stored = torch.stack([self.start_embedding, self.end_embedding])
        start, end = self.meta_embedding(stored)
        x = self.model.embed_tokens(ids.clamp(max=self.model.config.vocab_size - 1))  # V, V + 1 too
        x = torch.where((ids == self.start_id)[..., None], start, x)
        return torch.where((ids == self.end_id)[..., None], end, x)

    def mixing_weight(self, h_init: Tensor, h_thought: Tensor) -> Tensor:
        """w [...] = 1 - MLP([h_init ; h_thought]), both [..., D]. Paper: section 4.3.

        Ours: no squashing, as in the authors' code; their talk_head is this MLP, and it multiplies
        the thought, so w = 1 - theirs. The last layer starts at zero: w = 1, no thought is heard.
        """
        return 1 - self.mixing_head(torch.cat([h_init, h_thought], dim=-1)).squeeze(-1)

    def _run(self, half: Callable, *arguments: Tensor):
        """Half a layer, whose activations checkpointing computes again in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(half, *arguments, use_reentrant=False, preserve_rng_state=False)
        return half(*arguments)

    def _step(self, x: Tensor, step: int, space: Workspace) -> Tensor:
        """Run step `step` of all thoughts through the model: embeddings x [B, P, D] -> h [B, P, D].

        Its keys and values go into their slot of space.own.
        """
        window, T = self.model.config.sliding_window, space.text[0][0].shape[2]
        N = self.config.n_thoughts
        visible = text_visible(space.positions, step, T, window)  # [J, T]
        lowest = torch.finfo(x.dtype).min  # not -inf: a row may see no text at all
        bias = torch.zeros_like(visible, dtype=x.dtype).masked_fill_(~visible, lowest)
        bias = bias.repeat_interleave(N, dim=0)  # [P, T]
        rotary = self.model.rotary((space.positions + step).repeat_interleave(N))
        for index, layer in enumerate(self.model.layers):
            q, k, v = self._run(layer.project, x, rotary)
            text, own = space.text[index], space.own[index]
            attended, space.own[index] = thought_attention(
                q, k, v, text, own, step, window, bias, space.blocks
            )
            x = self._run(layer.finish, x, attended)
        return self.model.norm(x)

    def forward(
        self,
        ids: Tensor,
        thought_ids: Tensor | None = None,
        positions: Tensor | None = None,
        target_mask: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Output:
        """Think at every position of ids [B, T] in parallel and predict what comes next.

        thought_ids [B, N, J, K] int64: force these thoughts; None samples them at `temperature`
        (0: greedy) with `generator` (on the CPU; None: torch's own). N and K are the config's.
        positions [J] int64, any of 0 .. T-2: where to think; None: all that have A targets,
        0 .. T-1-A. target_mask [B, T] bool: False where a token is no target (padding, the first
        of a document). Raises ValueError for any of these that does not fit.

        Paper: sections 4.2 to 4.4. Gradients flow through the base pass, the thoughts' tokens and
        the mixing; sampled ids are constants.
        """
        positions, target_mask = self._check(ids, thought_ids, positions, target_mask, temperature)
        B, J, N, K = len(ids), len(positions), self.config.n_thoughts, self.config.thought_length
        forced = uniform = None
        if thought_ids is not None:
            forced = thought_ids.transpose(1, 2).flatten(1, 2)  # [B, P, K]
        elif temperature > 0:
            uniform = torch.rand(B, J * N, K, generator=generator).to(ids.device)  # [B, P, K]

        h_init, space = self._read(ids, positions)
        head = self.model.lm_head.weight
        base_nll = -token_logp(h_init[:, :-1], head, ids[:, 1:]) * target_mask[:, 1:]  # [B, T-1]
        thought, logp = self._think(space, B, forced, uniform, temperature)
        talk_nll, weight = self._talk(space, ids, h_init)
        valid = valid_targets(target_mask, positions, self.config.n_true)  # [A, B, J]

        def by_thought(rows: Tensor) -> Tensor:  # [..., P] -> [..., N, J]
            return rows.unflatten(-1, (J, N)).transpose(-2, -1)

        return Output(
            thought_ids=by_thought(thought).movedim(0, -1),  # [K, B, P] -> [B, N, J, K]
            thought_logp=by_thought(logp).movedim(0, -1),
            base_nll=base_nll,
            talk_nll=by_thought(talk_nll) * valid[:, :, None],  # [A, B, P] -> [A, B, N, J]
            weight=by_thought(weight),
            valid=valid,
            positions=positions,
            target_mask=target_mask,
        )

    def _read(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Workspace]:
        """The base pass over ids [B, T] -> h_init [B, T, D], and what thoughts on it share."""
        h_init, text = self.model.hidden_states(self.model.embed_tokens(ids))
        shape, config = self.model.config, self.config
        blocks = attention_blocks(positions, config.n_thoughts, shape.sliding_window)
        rows, steps = len(positions) * config.n_thoughts, config.thought_length + config.n_true + 1
        slots = (2, len(ids) * shape.num_key_value_heads, rows, steps, shape.head_dim)
        return h_init, Workspace(positions, blocks, text, [h_init.new_empty(slots) for _ in text])

    def _think(self, space, B, forced, uniform, temperature):
        """Sample, or follow, the K tokens of every thought: ids and logp [K, B, P].

        Paper: section 4.2. start and K tokens pass through the model; all but the last of them
        predict a token.
        """
        config, head = self.config, self.model.lm_head.weight
        P = len(space.positions) * config.n_thoughts
        token = space.positions.new_full((B, P), self.start_id)
        tokens, logps = [], []
        for k in range(config.thought_length):
            h = self._step(self.embed_thought(token), k + 1, space)
            with torch.no_grad():
                logits = token_logits(h, head, self.excluded)
            if forced is not None:
                token = forced[..., k]
            elif uniform is None:
                token = logits.argmax(-1)
            else:
                token = sample_tokens(at_temperature(logits, temperature), uniform[..., k])
            tokens.append(token)
            logps.append(self._thought_logp(h, head, token, logits))
        self._step(self.embed_thought(token), config.thought_length + 1, space)
        if not tokens:
            return token.new_empty(0, B, P), head.new_empty(0, B, P, dtype=torch.float32)
        return torch.stack(tokens), torch.stack(logps)

    def _thought_logp(self, h, head, token, logits):
        """log p of a thought's tokens [B, P], meta tokens masked, at the REINFORCE temperature.

        A forced meta token has probability 0; NEVER stands for its log.
        """
        tau = self.config.reinforce_temperature
        is_meta = (token == self.start_id) | (token == self.end_id)
        token = token.masked_fill(is_meta, 0)  # whatever is in the vocabulary
        logp = token_logp(h, head, token, self.excluded, tau, logits)
        return torch.where(is_meta, NEVER, logp)

    def _talk(self, space, ids, h_init):
        """Predict A true tokens after every thought: nll and mixing weight [A, B, P].

        Paper: section 4.3. end and the true tokens x_{j+1} .. x_{j+A-1} pass through the model; a
        target beyond the text is scored against some token of it, and masked by the caller.
        """
        config, positions, T = self.config, space.positions, ids.shape[1]
        token = ids.new_full((len(ids), len(positions) * config.n_thoughts), self.end_id)
        nlls, weights = [], []
        for a in range(config.n_true):
            step = config.thought_length + 2 + a
            h_thought = self._step(self.embed_thought(token), step, space)
            here = (positions + a).clamp(max=T - 1)
            h_base = h_init[:, here].repeat_interleave(config.n_thoughts, dim=1)  # [B, P, D]
            token = ids[:, (here + 1).clamp(max=T - 1)]  # [B, J] the true next token
            token = token.repeat_interleave(config.n_thoughts, dim=1)  # [B, P]
            w = self.mixing_weight(h_base, h_thought)
            nlls.append(-token_logp(mix(h_base, h_thought, w), self.model.lm_head.weight, token))
            weights.append(w)
        return torch.stack(nlls), torch.stack(weights)

    def _check(self, ids, thought_ids, positions, target_mask, temperature):
        """positions and target_mask with their defaults; ValueError for what does not fit."""
        if ids.dim() != 2:
            raise ValueError(f"ids has shape {tuple(ids.shape)}; it must be [B, T]")
        (B, T), config = ids.shape, self.config
        check_temperature(temperature)
        if positions is None:
            if config.n_true >= T:
                raise ValueError(
                    f"a text of {T} tokens has no position with {config.n_true} tokens ahead; "
                    "give a longer text, a smaller n_true, or positions"
                )
            positions = torch.arange(T - config.n_true)
        positions = torch.as_tensor(positions, device=ids.device)
        check_positions(positions, T - 2)
        if target_mask is None:
            target_mask = torch.ones_like(ids)
        target_mask = torch.as_tensor(target_mask, device=ids.device).bool()
        if target_mask.shape != ids.shape:
            raise ValueError(
                f"target_mask has shape {tuple(target_mask.shape)}, ids has {tuple(ids.shape)}"
            )
        shape = (B, config.n_thoughts, len(positions), config.thought_length)
        if thought_ids is not None and tuple(thought_ids.shape) != shape:
            raise ValueError(
                f"thought_ids has shape {tuple(thought_ids.shape)}; [B, N, J, K] is {shape}"
            )
        if thought_ids is not None:
            inside = (thought_ids >= 0) & (thought_ids < self.model.config.vocab_size)
            inside |= (thought_ids == self.start_id) | (thought_ids == self.end_id)
            if not inside.all():
                raise ValueError(
                    f"thought_ids holds {int(thought_ids[~inside][0])}; allowed are the model's "
                    f"tokens, start ({self.start_id}) and end ({self.end_id})"
                )
        return positions, target_mask

    @torch.no_grad()
    def think_last(
        self, last: Tensor, cache: Cache, thought_ids: Tensor | None = None
    ) -> "Prediction":
        """Read the text's next token last [B], think greedily, and predict what follows.

        thought_ids [B, K] forces the thought.

        cache holds the text before `last`; afterwards it holds `last` too and nothing of the
        thought. K + 1 passes: [last, start], t_1 .. t_{K-1} one by one, [t_K, end].
        """
        start, end = (last.new_full((len(last), 1), i) for i in (self.start_id, self.end_id))
        embed, head = self.embed_thought, self.model.lm_head.weight
        x = torch.cat([self.model.embed_tokens(last[:, None]), embed(start)], dim=1)  # [B, 2, D]
        states, thought = [], []
        end_of_text = cache.length + 1
        for k in range(self.config.thought_length):
            states.append(self.model.hidden_states(x, cache)[0])
            logits = token_logits(states[-1][:, -1:], head, self.excluded)  # [B, 1, V]
            token = logits.argmax(-1) if thought_ids is None else thought_ids[:, k : k + 1]
            thought.append(token)
            x = embed(token)  # [B, 1, D]
        states.append(self.model.hidden_states(torch.cat([x, embed(end)], dim=1), cache)[0])
        cache.length = end_of_text

        thought_ids = torch.cat([last.new_empty(len(last), 0), *thought], dim=1)
        return self._predict(states[0][:, 0], states[-1][:, -1], thought_ids)

    @torch.no_grad()
    def think_at(self, ids: Tensor, positions: Tensor) -> "Prediction":
        """Think greedily at positions [J] of a text ids [B, T], and predict what follows each.

        What think_last predicts after reading ids[:, : j + 1], for all positions j in parallel.
        positions: any of 0 .. T-1, else ValueError.
        """
        positions = torch.as_tensor(positions, device=ids.device)
        check_positions(positions, ids.shape[1] - 1)
        with thinking_once(self):
            h_init, space = self._read(ids, positions)
            thought, _ = self._think(space, len(ids), None, None, 0)  # [K, B, J]
            end = self.embed_thought(ids.new_full((len(ids), len(positions)), self.end_id))
            h_thought = self._step(end, self.config.thought_length + 2, space)  # [B, J, D]
        return self._predict(h_init[:, positions], h_thought, thought.movedim(0, -1))

    def _predict(self, h_init: Tensor, h_thought: Tensor, thought_ids: Tensor) -> "Prediction":
        """The prediction from hidden states [..., D] before and after the thoughts [..., K]."""
        head, w = self.model.lm_head.weight, self.mixing_weight(h_init, h_thought)
        return Prediction(
            logits=token_logits(mix(h_init, h_thought, w), head, self.excluded),
            base_logits=token_logits(h_init, head, self.excluded),
            thought_ids=thought_ids,
            weight=w,
        )


class Prediction(NamedTuple):
    """What comes next, after a text [B] (think_last) or after positions of it [B, J] (think_at)."""

    logits: Tensor  # [..., V] float32, mixed; meta tokens excluded
    base_logits: Tensor  # [..., V] float32, without the thought
    thought_ids: Tensor  # [..., K] int64
    weight: Tensor  # [...] the mixing weight w


@contextmanager
def thinking_once(model: QuietStar) -> Iterator[None]:
    """One thought per position, scored on one token: what an evaluation needs of it."""
    config, model.config = model.config, replace(model.config, n_thoughts=1, n_true=1)
    try:
        yield
    finally:
        model.config = config


# ------------------------------------------------------------------------------------- checkpoints


OWN = ("start_embedding", "end_embedding", "mixing_head.")  # what a Quiet-STaR adds to a Mistral


def save_quiet_star(model: QuietStar, folder: str | Path) -> None:
    """Write a folder that save_mistral writes, and quiet_star.{json,safetensors} beside it."""
    folder = Path(folder)
    save_mistral(model.model, folder)
    own = {name: p.detach() for name, p in model.named_parameters() if name.startswith(OWN)}
    write_tensors(folder / "quiet_star.safetensors", own)
    write_json(folder / "quiet_star.json", asdict(model.config))


def thinks(folder: Path) -> bool:
    """Whether a checkpoint folder holds a thinking model, ours or the authors'."""
    if (folder / "quiet_star.json").is_file():
        return True
    for file in weight_files(folder):
        with open_tensors(file) as reader:
            if "start_embedding" in list(reader.keys()):
                return True
    return False


def load_quiet_star(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> QuietStar:
    """A thinking model from a folder of save_quiet_star, or from the authors' checkpoint.

    dtype None keeps that of the file. Raises ValueError for a folder that is neither.
    """
    folder = Path(folder)
    shape = read_config(folder)
    weights = read_weights(folder, shape, dtype, device)
    if (folder / "quiet_star.json").is_file():
        config = read_thought_config(folder / "quiet_star.json")
        own = {
            name: tensor.to(device=device, dtype=dtype)
            for name, tensor in read_tensors([folder / "quiet_star.safetensors"])
        }
    elif "start_embedding" in weights:
        # Their "8 ahead" counts start and end, their ids are the last two of the vocabulary, row 1
        # of an embedding is unused, and their talk_head is our mixing head (see mixing_weight).
        V = shape.vocab_size
        config = ThoughtConfig(thought_length=6, start_id=V - 2, end_id=V - 1)
        own = {name: weights.pop(name)[0] for name in ("start_embedding", "end_embedding")}
        for name in [name for name in weights if name.startswith("talk_head.0.")]:
            own[name.replace("talk_head.0.", "mixing_head.")] = weights.pop(name)
    else:
        raise ValueError(
            f"{folder} holds no thinking model: no quiet_star.json and no start_embedding; "
            "a plain model becomes one with train.py --checkpoint"
        )
    model = QuietStar(build_mistral(shape, weights, folder), config)
    base = {f"model.{name}": parameter for name, parameter in model.model.state_dict().items()}
    load_weights(model, base | own, folder)
    model.model.tie_head()
    return model


def read_thought_config(path: Path) -> ThoughtConfig:
    """ThoughtConfig from a quiet_star.json."""
    raw = read_json(path)
    unknown = set(raw) - {field.name for field in fields(ThoughtConfig)}
    if unknown:
        raise ValueError(f"{path}: unknown setting {min(unknown)!r}")
    try:
        return ThoughtConfig(**raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
