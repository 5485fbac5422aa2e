"""Quiet-STaR: think before every token, keep what helps (Zelikman et al. 2024, arXiv 2403.09629).

Algorithm 1 of the paper, for a text x_0 .. x_{T-1} and all its positions j in parallel, with
a = 0 .. A-1 true tokens ahead:

    1 base    h_init_j: the state after x_0 .. x_j                       QuietStar.forward   (4.1)
    2 think   sample N thoughts of K tokens after x_0 .. x_j, start      QuietStar.think     (4.2)
    3 talk    h_thought_{j,a}: after thought, end, x_{j+1} .. x_{j+a}    QuietStar.talk      (4.4)
    4 mix     log p_talk = w log p_init_{j+a} + (1 - w) log p_thought    mixing_weight, mix  (4.3)
    5 reward  r_j: by how much a thought beat its siblings               reward              (4.4)
    6 loss    L = c L_base + (1 - c) L_NLL + policy_weight L_REINFORCE   quiet_star_loss     (4.4)

The steps of one thought (which keys each of them sees, Figure 3, is thought_mask):

                       x_0 .. x_j | start  t_1 .. t_K  end  x_{j+1} .. x_{j+A-1}
    step                          |   1    2 .. K+1   K+2   K+3  ..  K+A+1
    rotary position    0   ..  j  |  j+1              ...              j+K+A+1
    what its output predicts      |  t_1   t_2 ..  -  x_{j+1}   ..   x_{j+A}

At the start w = 1: no thought is heard, only the last layer of the mixing head learns, and then the
rest. Letters of the shape comments, beside those of model.py (the paper's names in brackets):
    N    thoughts per position [n_thoughts]
    K    sampled tokens of a thought, without start and end [t]
    A    true tokens ahead that a thought is scored on [n_true]
    J    positions that think: all that have A targets, or any subset
    NJ   N * J thoughts as one axis, those of one i < N side by side

Positions are 0-based: position j has read ids[:, : j + 1] and predicts ids[:, j + 1]. "nll" is a
negative log-likelihood, "logp" a log-probability, both in nats.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, einsum, nn

from data import check_at_least, read_json, settings_from, write_file, write_json
from formats import read_tensors, read_weights
from model import (
    KVCache,
    Mistral,
    assign_weights,
    in_window,
    load_mistral,
    read_config,
    save_mistral,
)

NEVER = -1e10  # logit of a meta token: probability 0 in float32, and no 0 * inf = NaN in a loss


@dataclass(frozen=True)
class ThoughtConfig:
    """How a model thinks and what it learns from it; the authors' numbers for Mistral 7B."""

    n_thoughts: int = 2  # thoughts sampled at every position (N)
    thought_length: int = 9  # sampled tokens of a thought, start and end not counted (K)
    n_true: int = 4  # true tokens ahead that a thought is scored on (A)
    start_id: int | None = None  # id of <|startofthought|>; none: V, outside the vocabulary
    end_id: int | None = None  # id of <|endofthought|>; none: V + 1, likewise
    init_id: int | None = None  # token whose embedding both begin as, the em dash; none: random
    embedding_scale: float = 100.0  # both are stored divided by this: Adam moves them faster
    reinforce_temperature: float = 3.0  # of log p(thought) in REINFORCE; sampling has its own
    base_weight: float = 0.5  # of the loss without thoughts, against that with thoughts
    policy_weight: float | None = None  # of REINFORCE; none: 1e6 / K
    drop_negative: bool = True  # learn only from thoughts that beat the mean of their position

    def __post_init__(self):
        check_at_least(self, n_thoughts=1, thought_length=0, n_true=1, policy_weight=0)
        check_at_least(self, embedding_scale=1e-9, reinforce_temperature=1e-9, base_weight=0)
        check_at_least(self, start_id=0, end_id=0, init_id=0)
        if self.start_id is not None and self.start_id == self.end_id:
            raise ValueError(f"start_id and end_id are both {self.start_id}")
        if self.base_weight > 1:
            raise ValueError(f"base_weight is {self.base_weight}; it must be between 0 and 1")

    @property
    def reinforce_weight(self) -> float:
        """policy_weight, or the authors' 1e6: theirs is for a mean over the K tokens, not a sum."""
        default = 1e6 / max(self.thought_length, 1)
        return default if self.policy_weight is None else self.policy_weight


class Output(NamedTuple):
    """What QuietStar.forward returns."""

    thought_ids: Tensor  # [B, N, J, K] int64
    thought_logp: Tensor  # [B, N, J, K] of the masked logits / reinforce_temperature
    base_nll: Tensor  # [B, T-1] of ids[:, 1:] without thoughts; 0 where it is no target
    talk_nll: Tensor  # [A, B, N, J] of ids[:, j+1+a] after the thought at j; 0 where not valid
    weight: Tensor  # [A, B, N, J] the mixing weight w: 1 = the thought is ignored
    valid: Tensor  # [A, B, J] bool: ids[:, j+1+a] exists, and target_mask allows it as a target
    positions: Tensor  # [J] int64
    target_mask: Tensor  # [B, T] bool


# ------------------------------------------------------------------- 2 think: what a thought sees


def thought_mask(origin: Tensor, step: int, T: int, window: int | None) -> Tensor:
    """Figure 3 of the paper as a function: which keys step `step` of some thoughts sees.

    origin [thoughts]: the position after which each began -> [thoughts, T + step] bool: of the
    text's T keys, and of the keys of the thought's own steps 1 .. step. It sees the text up to its
    origin and its own thought so far; no other thought, nothing of the text that it is to foretell.
    Both within the sliding window, counted from its rotary position origin + step.
    (think_last, one thought at the end of a text, sees the same by reading through the KVCache.)
    """
    text = torch.arange(T, device=origin.device)
    own = origin[:, None] + torch.arange(1, step + 1, device=origin.device)  # [thoughts, step]
    rotary = origin[:, None] + step  # [thoughts, 1]
    sees_text = (text <= origin[:, None]) & in_window(rotary, text, window)  # [thoughts, T]
    return torch.cat([sees_text, in_window(rotary, own, window)], dim=1)


class ThoughtCache:
    """What a query of a thought sees: keys of the text, and those of its own thought so far.

    All N thoughts at all J positions take a step together, as the NJ queries of one pass. The
    text's keys stand once for all of them; each thought has its own keys besides. Paper: section
    4.2. (fast/ computes the same attention for less.)
    """

    def __init__(self, text: KVCache, positions: Tensor, config: ThoughtConfig):
        self.text = text
        self.origin = positions.repeat(config.n_thoughts)  # [NJ]
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values of thoughts' steps

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One step of all thoughts in a layer: q [B, H, NJ, Dh] -> the same shape.

        k, v [B, Hkv, NJ, Dh] are the step's own key and value, which the cache keeps.
        """
        k, v = k[:, :, :, None], v[:, :, :, None]  # [B, Hkv, NJ, 1, Dh]
        if layer in self.own:
            before_k, before_v = self.own[layer]
            k, v = torch.cat([before_k, k], dim=3), torch.cat([before_v, v], dim=3)
        self.own[layer] = k, v  # [B, Hkv, NJ, step, Dh]
        text_k, text_v = self.text.layers[layer]  # [B, Hkv, T, Dh]
        T, step = text_k.shape[2], k.shape[3]

        q = q.unflatten(1, (k.shape[1], -1)) / math.sqrt(q.shape[-1])  # [B, Hkv, H/Hkv, NJ, Dh]
        # h: heads of keys, g: queries that share one, i: thoughts, t: text, s: steps, d: head size
        to_text = einsum("bhgid,bhtd->bhgit", q, text_k)  # the same keys for all thoughts
        to_own = einsum("bhgid,bhisd->bhgis", q, k)  # every thought's own
        visible = thought_mask(self.origin, step, T, self.text.window)  # [NJ, T + step]
        scores = torch.cat([to_text, to_own], dim=-1).masked_fill(~visible, -math.inf)
        p = scores.float().softmax(-1).to(q.dtype)  # one softmax over both kinds of keys
        p_text, p_own = p.split([T, step], dim=-1)
        out = einsum("bhgit,bhtd->bhgid", p_text, text_v) + einsum("bhgis,bhisd->bhgid", p_own, v)
        return out.flatten(1, 2)  # [B, H, NJ, Dh]


# ------------------------------------------------------------------------ 2 think: which token next


def token_logits(h: Tensor, head: Tensor, excluded: tuple[int, ...] = ()) -> Tensor:
    """Logits [..., V] in float32 of hidden states h [..., D] under head [V, D].

    The tokens in excluded (meta tokens, where one is to be sampled) get the logit NEVER.
    """
    logits = (h @ head.mT).float()
    if excluded:
        logits[..., list(excluded)] = NEVER
    return logits


def token_logp(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log p of tokens ids [...] under softmax(logits [..., V] / temperature) -> [...] in nats."""
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(-1, ids[..., None]).squeeze(-1)


def sample_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token from softmax(logits [..., V]) -> [...] int64.

    uniform [...] in [0, 1) is the randomness. Ours: one number a token, drawn by the caller on the
    CPU, so that a seed means the same thoughts however the sequences of a batch are split.
    """
    p = torch.softmax(logits.detach(), dim=-1)
    cdf = p.cumsum(-1)
    point = uniform[..., None] * cdf[..., -1:]  # below the sum: torch.rand is at most 1 - 2**-24
    token = torch.searchsorted(cdf, point, right=True)  # [..., 1]
    # A token of p = 0 is never drawn, unless a GPU sums out of order: then the likeliest is taken.
    possible = p.gather(-1, token.clamp(max=p.shape[-1] - 1)) > 0
    return torch.where(possible, token, p.argmax(-1, keepdim=True)).squeeze(-1)


# ------------------------------------------------------------------------------ 3 talk and 4 mix


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


# -------------------------------------------------------------------------- the model that thinks


class Prediction(NamedTuple):
    """What comes next after a text, and what was thought before: QuietStar.think_last."""

    logits: Tensor  # [B, V] float32, mixed; meta tokens excluded
    base_logits: Tensor  # [B, V] float32, without the thought
    thought_ids: Tensor  # [B, K] int64
    weight: Tensor  # [B] the mixing weight w


class QuietStar(nn.Module):
    """A Mistral that thinks. At initialisation it predicts exactly what the Mistral does."""

    # What forward uses; fast.apply puts others here that compute the same for less.
    thought_cache = ThoughtCache
    token_logits, token_logp = staticmethod(token_logits), staticmethod(token_logp)

    def __init__(self, model: Mistral, config: ThoughtConfig):
        super().__init__()
        self.model = model
        self.config = config
        D, V = model.config.hidden_size, model.config.vocab_size
        self.start_id = V if config.start_id is None else config.start_id
        self.end_id = V + 1 if config.end_id is None else config.end_id
        self.excluded = tuple(token for token in (self.start_id, self.end_id) if token < V)

        table = model.embed_tokens.weight.detach()  # [V, D]
        dash = None if config.init_id is None else table[config.init_id]  # section 4.4: em dash
        start, end = torch.randn(2, D).to(table) * table.std() if dash is None else (dash, dash)
        self.start_embedding = nn.Parameter(start / config.embedding_scale)  # [D]
        self.end_embedding = nn.Parameter(end / config.embedding_scale)  # [D]
        self.mixing_head = nn.Sequential(
            nn.Linear(2 * D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1, bias=False)
        ).to(table)
        nn.init.zeros_(self.mixing_head[4].weight)

    def embed_thought(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of a thought's tokens ids [...]: ordinary ones, start or end.

        Paper: appendix A. Both are stored small and used large, so that Adam, whose steps have the
        size of the learning rate, moves them embedding_scale times as far.
        """
        is_start, is_end = ids == self.start_id, ids == self.end_id
        x = self.model.embed_tokens(ids.masked_fill(is_start | is_end, 0))
        x = torch.where(is_start[..., None], self.start_embedding * self.config.embedding_scale, x)
        return torch.where(is_end[..., None], self.end_embedding * self.config.embedding_scale, x)

    def mixing_weight(self, h_init: Tensor, h_thought: Tensor) -> Tensor:
        """w [...] = 1 - MLP([h_init ; h_thought]), both [..., D]. Paper: section 4.3.

        Not squashed: it may leave [0, 1], as in the authors' code. Their talk_head is this MLP and
        multiplies the thought: w = 1 - theirs. The last layer starts at zero, so w at 1.
        """
        return 1 - self.mixing_head(torch.cat([h_init, h_thought], dim=-1)).squeeze(-1)

    def step(self, token: Tensor, step: int, cache: ThoughtCache) -> Tensor:
        """All thoughts read their step-th token [B, N, J] -> hidden states [B, N, J, D]."""
        x = self.embed_thought(token).flatten(1, 2)  # [B, NJ, D]
        return self.model.run(x, cache, cache.origin + step).unflatten(1, token.shape[1:])

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
        of a document); keys are not masked, so padding stands on the right. Raises ValueError for
        positions or thought_ids that do not fit.

        Gradients flow through the base pass (also as the keys that thoughts see), the thoughts'
        tokens and the mixing; sampled ids are constants.
        """
        (B, T), config = ids.shape, self.config
        positions = torch.arange(max(T - config.n_true, 0)) if positions is None else positions
        positions = positions.to(ids.device)
        if not (len(positions) and positions.min() >= 0 and positions.max() <= T - 2):
            raise ValueError(f"positions {positions.tolist()}: give some, all in 0 .. {T - 2}")
        shape = (B, config.n_thoughts, len(positions), config.thought_length)
        if thought_ids is not None and thought_ids.shape != shape:
            raise ValueError(f"thought_ids is {[*thought_ids.shape]}; [B, N, J, K] is {[*shape]}")
        target_mask = torch.ones_like(ids, dtype=torch.bool) if target_mask is None else target_mask

        text = KVCache(self.model.config)
        h_init = self.model.run(self.model.embed_tokens(ids), text)  # [B, T, D]  1 base
        logits = self.token_logits(h_init[:, :-1], self.model.lm_head.weight)  # [B, T-1, V]
        base_nll = -self.token_logp(logits, ids[:, 1:]) * target_mask[:, 1:]  # [B, T-1]

        cache = self.thought_cache(text, positions, config)
        uniform = torch.rand(shape, generator=generator).to(ids.device)
        thought_ids, thought_logp = self.think(cache, uniform, temperature, thought_ids)
        talk_nll, weight = self.talk(cache, ids, positions, h_init)
        valid = valid_targets(target_mask, positions, config.n_true)  # [A, B, J]
        talk_nll = talk_nll * valid[:, :, None]
        return Output(
            thought_ids, thought_logp, base_nll, talk_nll, weight, valid, positions, target_mask
        )

    def think(
        self, cache: ThoughtCache, uniform: Tensor, temperature: float, forced: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """2 think: sample the K tokens of every thought, or follow forced ones; section 4.2.

        uniform [B, N, J, K]: see sample_tokens; forced [B, N, J, K] or None. Returns ids and their
        log p, both [B, N, J, K]. A forced meta token has probability 0; NEVER stands for its log.
        """
        V, tau = self.model.config.vocab_size, self.config.reinforce_temperature
        token = torch.full(uniform.shape[:3], self.start_id, device=uniform.device)  # [B, N, J]
        thought, logp = [token.new_empty(*token.shape, 0)], [uniform[..., :0]]  # for K = 0
        for k in range(self.config.thought_length):
            h = self.step(token, k + 1, cache)  # [B, N, J, D]
            logits = self.token_logits(h, self.model.lm_head.weight, self.excluded)  # [B, N, J, V]
            if forced is not None:
                token = forced[..., k]
            elif temperature == 0:
                token = logits.argmax(-1)
            else:
                token = sample_tokens(logits / temperature, uniform[..., k])
            logp_k = self.token_logp(logits, token.clamp(max=V - 1), tau)  # [B, N, J]
            logp.append(logp_k.where(token < V, NEVER)[..., None])
            thought.append(token[..., None])
        self.step(token, self.config.thought_length + 1, cache)  # what follows sees t_K too
        return torch.cat(thought, dim=-1), torch.cat(logp, dim=-1)

    def talk(
        self, cache: ThoughtCache, ids: Tensor, positions: Tensor, h_init: Tensor
    ) -> tuple[Tensor, Tensor]:
        """3 talk: predict A true tokens after every thought -> nll and weight w [A, B, N, J].

        end and the true tokens x_{j+1} .. x_{j+A-1} are read (teacher forcing; section 4.4). A
        target beyond the text is scored against its last token, for the caller to mask.
        """
        K, T = self.config.thought_length, ids.shape[1]
        shape = (len(ids), self.config.n_thoughts, len(positions))
        token = ids.new_full(shape, self.end_id)
        nll, weight = [], []
        for a in range(self.config.n_true):
            h_thought = self.step(token, K + 2 + a, cache)  # [B, N, J, D]
            ahead = (positions + a).clamp(max=T - 2)  # [J] j + a
            h_ahead = h_init[:, None, ahead].expand_as(h_thought)  # [B, N, J, D] h_init_{j+a}
            w = self.mixing_weight(h_ahead, h_thought)  # [B, N, J]  4 mix
            mixed = mix(h_ahead, h_thought, w)  # [B, N, J, D]
            token = ids[:, None, ahead + 1].expand(shape)  # x_{j+1+a}
            logits = self.token_logits(mixed, self.model.lm_head.weight)  # [B, N, J, V]
            nll.append(-self.token_logp(logits, token))
            weight.append(w)
        return torch.stack(nll), torch.stack(weight)

    @torch.no_grad()
    def think_last(
        self, last: Tensor, cache: KVCache, thought_ids: Tensor | None = None
    ) -> Prediction:
        """Read the text's next token last [B], think greedily, and predict what follows.

        thought_ids [B, K] forces the thought. cache holds the text before `last`; afterwards it
        holds `last` too and nothing of the thought. Paper: section 4.2, greedy at inference. Ours:
        K + 1 passes, [last, start], t_1 .. t_{K-1} one by one, [t_K, end].
        """
        start, end = (last.new_full((len(last), 1), i) for i in (self.start_id, self.end_id))
        x = torch.cat([self.model.embed_tokens(last[:, None]), self.embed_thought(start)], dim=1)
        head, read = self.model.lm_head.weight, cache.length + 1
        states, thought = [], [last.new_empty(len(last), 0)]
        for k in range(self.config.thought_length):
            states.append(self.model.run(x, cache))  # [B, 2 or 1, D]
            greedy = token_logits(states[-1][:, -1:], head, self.excluded).argmax(-1)  # [B, 1]
            thought.append(greedy if thought_ids is None else thought_ids[:, k : k + 1])
            x = self.embed_thought(thought[-1])  # [B, 1, D]
        states.append(self.model.run(torch.cat([x, self.embed_thought(end)], dim=1), cache))
        cache.truncate(read)

        h_init, h_thought = states[0][:, 0], states[-1][:, -1]  # [B, D]
        w = self.mixing_weight(h_init, h_thought)
        logits = token_logits(mix(h_init, h_thought, w), head, self.excluded)
        base_logits = token_logits(h_init, head, self.excluded)
        return Prediction(logits, base_logits, torch.cat(thought, dim=1), w)


# ------------------------------------------------------------------------------ 5 reward, 6 loss


def reward(talk_nll: Tensor, base_nll: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """r_j [B, N, J] in nats: how much likelier a thought made the next A tokens than the mean did.

    talk_nll [A, B, N, J], base_nll [B, T-1], positions [J], valid [A, B, J] as in Output.
    Paper: section 4.4. r_j = R_j minus the mean of R_j over the N thoughts of the position: the
    advantage of group-relative methods, without the division by sigma. For example, with A = 2:

        thought    nll of the two true tokens    R_j     mean    r_j
           1               1.0  1.0             -2.0     -4.0   +2.0
           2               2.0  1.0             -3.0            +1.0
           3               3.0  4.0             -7.0            -3.0   (0 if drop_negative)

    Ours: a thought without siblings (N = 1) is compared with the base model's sum instead. 0 where
    a target is missing. A constant: no gradient.
    """
    R = -talk_nll.detach().sum(0)  # [B, N, J]  R_j = sum_a log p_talk(x_{j+1+a})
    if R.shape[1] > 1:  # as differences, so that equal thoughts get exactly 0: it is scaled by 1e6
        r = (R[:, :, None] - R[:, None]).mean(2)  # [B, N, J]  R_j - mean R_j
    else:
        r = R - base_sum(base_nll, positions, valid)
    return torch.where(valid.all(0)[:, None], r, 0.0)


def base_sum(base_nll: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """R_j without a thought: sum_a log p_init(x_{j+1+a}) [B, 1, J] in nats over valid targets."""
    steps = torch.arange(len(valid), device=positions.device)[:, None]
    nll = base_nll.detach()[:, (positions + steps).clamp(max=base_nll.shape[1] - 1)]  # [B, A, J]
    return -(nll.transpose(0, 1) * valid).sum(0)[:, None]


def count_targets(target_mask: Tensor, positions: Tensor, n_true: int) -> tuple[int, int]:
    """What the means of the loss run over, for a batch with target_mask [B, T].

    Targets predicted without thought, and (sequence, position) pairs that have all A targets.
    """
    valid = valid_targets(target_mask, positions.to(target_mask.device), n_true)  # [A, B, J]
    return int(target_mask[:, 1:].sum()), int(valid.all(0).sum())


def valid_mean(x: Tensor, output: Output, counts: tuple[int, int]) -> Tensor:
    """Mean of x [B, N, J] over thoughts and valid positions, of which counts has the number."""
    return (x * output.valid.all(0)[:, None]).sum() / max(x.shape[1] * counts[1], 1)


def quiet_star_loss(
    output: Output, config: ThoughtConfig, counts: tuple[int, int] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one step, and its metrics (detached scalars, in nats; weight is the mean of w).

    A position is valid if it has all A targets: padding then changes nothing. counts: those of the
    whole batch where output is a part of it, so that losses, gradients and metrics of the parts
    add up to the batch's. The metric init_nll is L_NLL without thoughts, over the same tokens, and
    reward the mean of R_j minus that without a thought, for any N.

    Paper: section 4.4. As in the authors' code: L_base and the weights, the mean over a in L_NLL,
    and R_j and L_NLL as means of log p over thoughts, not logs of mean p.
    """
    counts = counts or count_targets(output.target_mask, output.positions, config.n_true)
    _, _, base_nll, talk_nll, weight, valid, positions, _ = output
    r = reward(talk_nll, base_nll, positions, valid)  # [B, N, J]
    if config.drop_negative:
        r = r.clamp(min=0)

    mean = partial(valid_mean, output=output, counts=counts)
    L_base = base_nll.sum() / max(counts[0], 1)  # - log p_init(x_{j+1})
    L_NLL = mean(talk_nll.mean(0))  # - mean_a log p_talk_{j,a}(x_{j+1+a})
    L_REINFORCE = mean(-r * output.thought_logp.sum(-1))  # - r_j log p(thought_j), r_j a constant
    init_nll = mean(-base_sum(base_nll, positions, valid).expand_as(r) / config.n_true)
    language = config.base_weight * L_base + (1 - config.base_weight) * L_NLL
    metrics = {
        "loss": language + config.reinforce_weight * L_REINFORCE,
        "base_nll": L_base,
        "talk_nll": L_NLL,
        "policy_loss": L_REINFORCE,
        "init_nll": init_nll,
        "reward": config.n_true * (init_nll - L_NLL),
        "weight": mean(weight.float().mean(0)),
    }
    return metrics["loss"], {name: value.detach() for name, value in metrics.items()}


# ------------------------------------------------------------------------------------- checkpoints


def save_quiet_star(model: QuietStar, folder: str | Path) -> None:
    """Write a folder that save_mistral writes, and quiet_star.{json,safetensors} beside it."""
    save_mistral(model.model, folder)
    own = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("model.")}
    write_file(Path(folder) / "quiet_star.safetensors", lambda path: save_file(own, path))
    write_json(Path(folder) / "quiet_star.json", asdict(model.config))


def read_thought_config(folder: str | Path) -> ThoughtConfig | None:
    """How the model in a folder of save_quiet_star thinks; None if there is no quiet_star.json."""
    path = Path(folder) / "quiet_star.json"
    return settings_from(ThoughtConfig, read_json(path), path) if path.is_file() else None


def load_any(folder: str | Path, dtype=None, device="cpu") -> QuietStar | Mistral:
    """The thinking model in a folder of save_quiet_star or the authors', or the plain one in it.

    dtype None keeps that of the file. Raises ValueError as load_mistral does.
    """
    folder = Path(folder)
    config, shape = read_thought_config(folder), read_config(folder)
    weights = read_weights(folder, shape.num_hidden_layers, shape.head_dim)
    if config:
        own = read_tensors(folder / "quiet_star.safetensors")
    elif "start_embedding" in weights:
        # Their "8 ahead" counts start and end, their ids are the last two of the vocabulary, row 1
        # of an embedding is unused, and their talk_head is our mixing head (see mixing_weight).
        V, D = shape.vocab_size, shape.hidden_size
        config = ThoughtConfig(thought_length=6, start_id=V - 2, end_id=V - 1)
        theirs = [name for name in weights if name.startswith(("talk_head.0.", "start_", "end_"))]
        own = {name.replace("talk_head.0.", "mixing_head."): weights.pop(name) for name in theirs}
        own |= {name: row.flatten()[:D] for name, row in own.items() if "_embedding" in name}
    else:
        return load_mistral(folder, dtype, device, weights)
    if config.init_id is not None and config.init_id >= shape.vocab_size:
        raise ValueError(f"{folder}: init_id is {config.init_id}; it is no token")
    model = QuietStar(load_mistral(folder, dtype, device, weights), config)
    own = {name: tensor.to(model.start_embedding) for name, tensor in own.items()}
    base = {f"model.{name}": parameter for name, parameter in model.model.state_dict().items()}
    assign_weights(model, base | own, folder)
    model.model.tie_head()
    return model


def load_quiet_star(folder: str | Path, dtype=None, device="cpu") -> QuietStar:
    """load_any of a folder that must hold a thinking model; ValueError if it does not."""
    model = load_any(folder, dtype, device)
    if isinstance(model, QuietStar):
        return model
    raise ValueError(f"{folder} holds no thinking model; train.py --checkpoint makes one of it")
