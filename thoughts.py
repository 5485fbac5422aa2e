"""Quiet-STaR: think before every token, keep what helps (Zelikman et al. 2024, arXiv 2403.09629).

Algorithm 1 of the paper, for a text x_0 .. x_{T-1} and all its positions j in parallel, with
a = 0 .. A-1 true tokens ahead:

    1 base    h_init_j: hidden state after x_0 .. x_j                    QuietStar.forward   (4.1)
    2 think   sample N thoughts of K tokens after x_0 .. x_j, start      QuietStar.think     (4.2)
    3 talk    h_thought_{j,a}: after thought, end, x_{j+1} .. x_{j+a}    QuietStar.talk      (4.4)
    4 mix     log p_talk = w log p_init_{j+a} + (1 - w) log p_thought    mixing_weight, mix  (4.3)
    5 reward  r_j: how much better a thought is than the mean thought    reward              (4.4)
    6 loss    L = c L_base + (1 - c) L_NLL + policy_weight L_REINFORCE   quiet_star_loss     (4.4)

start and end are the meta tokens <|startofthought|> and <|endofthought|>. A thought is read in
K + 1 passes. Each of the first K passes reads one token and samples the next one. The last pass
reads t_K, end and the true tokens together, because all of them are known then (teacher forcing).
If K = 0, this pass reads start in place of t_K.
thought_mask says which keys each step of a thought attends to (Figure 3):

                        x_0 .. x_j | start  t_1 .. t_{K-1} | t_K  end  x_{j+1} .. x_{j+A-1}
    step                           |   1     2  ..   K     | K+1  K+2   K+3   ..   K+A+1
    rotary position     0  ..  j   |  j+1          ..                              j+K+A+1
    its output predicts            |  t_1   t_2 ..  t_K    |  -  x_{j+1}   ..     x_{j+A}
    pass                  base     |   1     2  ..   K     |            K+1

The mixing weight w is 1 at initialisation, so p_talk = p_init and thoughts have no effect. The
gradient then reaches the model, through p_init, and the last layer of the mixing head. start, end
and the other layers of the mixing head get a gradient as soon as w is not 1.

Letters of the shape comments, beside those of model.py (names of the paper in brackets):
    N    thoughts per position [n_thoughts]
    K    sampled tokens of a thought, without start and end [t]
    A    true tokens ahead that a thought is scored on [n_true]
    J    positions that think; by default all that have A targets
    NJ   the N * J thoughts as one axis: thought n at positions[i] has index n * J + i
    n    steps of a thought that one pass reads: 1, or A + 1 in the last pass

Positions are 0-based: position j has read ids[:, : j + 1] and predicts ids[:, j + 1]. "nll" is a
negative log-likelihood, "logp" a log-probability, both in nats. "Ours:" marks what the paper does
not specify, or does differently. The file is ordered from the parts to the whole: mask and cache,
sampling, mixing, the model, reward, loss. One can also begin at QuietStar.forward. It imports
nothing of this repository but model.py.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, einsum, nn

from model import (
    KVCache,
    Mistral,
    assign_weights,
    check_range,
    in_window,
    load_mistral,
    read_tensors,
    save_mistral,
)

NEVER = -1e10  # logit of an excluded token: its p is 0. Not -inf, because 0 * -inf is NaN


@dataclass(frozen=True)
class ThoughtConfig:
    """How a model thinks and how it learns to. Defaults: the authors' values for Mistral 7B."""

    n_thoughts: int = 2  # thoughts sampled at every position (N)
    thought_length: int = 9  # sampled tokens of a thought, start and end not counted (K)
    n_true: int = 4  # true tokens ahead that a thought is scored on (A)
    start_id: int | None = None  # id of <|startofthought|>; none: V, outside of the vocabulary
    end_id: int | None = None  # id of <|endofthought|>; none: V + 1
    init_id: int | None = None  # token whose embedding initialises both: em_dash_id; none: random
    embedding_scale: float = 100.0  # start and end are stored divided by this: they change faster
    reinforce_temperature: float = 3.0  # of log p(thought) in REINFORCE; sampling does not use it
    base_weight: float = 0.5  # c, of the loss without thoughts; the loss with them has 1 - c
    policy_weight: float | None = None  # of REINFORCE; none: 1e6 / K
    drop_negative: bool = True  # learn only from thoughts that beat the mean of their position

    def __post_init__(self):
        check_range(self, 1, 10_000, "n_thoughts", "n_true")
        check_range(self, 0, 10_000, "thought_length")
        check_range(self, 0, 1, "base_weight")
        check_range(self, 0, math.inf, "start_id", "end_id", "init_id")
        check_range(self, 0, 1e9, "policy_weight")
        check_range(self, 1e-9, 1e9, "embedding_scale", "reinforce_temperature")
        if self.start_id is not None and self.start_id == self.end_id:
            raise ValueError(f"start_id and end_id are both {self.start_id}")

    @property
    def reinforce_weight(self) -> float:
        """policy_weight; by default the authors' 1e6 / K, since they average over K and we sum."""
        default = 1e6 / max(self.thought_length, 1)
        return default if self.policy_weight is None else self.policy_weight


def em_dash_id(tokenizer) -> int:
    """Id of the token "—", with whose embedding start and end are initialised. Paper: section 4.4.

    If the vocabulary has no such token: the first token of its encoding that is not white space.
    """
    try:
        return tokenizer.token_id("—")
    except ValueError:
        ids = tokenizer.encode("—")
        return next((token for token in ids if tokenizer.decode([token]).strip()), ids[0])


class Output(NamedTuple):
    """The result of QuietStar.forward."""

    thought_ids: Tensor  # [B, N, J, K] int64
    thought_logp: Tensor  # [B, N, J, K] of these tokens, at reinforce_temperature
    base_nll: Tensor  # [B, T-1] of ids[:, 1:] without thoughts; 0 where it is no target
    talk_nll: Tensor  # [A, B, N, J] of ids[:, j+1+a] after the thought at j; 0 where not valid
    weight: Tensor  # [A, B, N, J] the mixing weight w; 1: the thought is ignored
    valid: Tensor  # [A, B, J] bool: ids[:, j+1+a] exists and is a target
    positions: Tensor  # [J] int64
    target_mask: Tensor  # [B, T] bool


# ------------------------------------------------------------------------ 2 think: mask and cache


def thought_mask(origin: Tensor, steps: range, T: int, window: int | None) -> Tensor:
    """Figure 3 of the paper (section 4.2) as a function: the keys that steps of thoughts attend to.

    origin [NJ]: the position j that each thought follows. steps: range of n steps; start is step 1.
    Returns [NJ, n, T + last step] bool: the T keys of the text, then the keys of the thought's own
    steps. A step attends to the text up to position j and to its own thought up to itself; it
    attends to no other thought and to no later text. The sliding window applies to both, by rotary
    position, which is j + step. (At inference, think_last gets the same from the KVCache.)
    """
    text = torch.arange(T, device=origin.device)
    own = origin[:, None] + torch.arange(1, steps.stop, device=origin.device)  # [NJ, last step]
    query = own[:, steps.start - 1 :, None]  # [NJ, n, 1] rotary positions
    sees_text = (text <= origin[:, None, None]) & in_window(query, text, window)
    sees_own = in_window(query, own[:, None], window)  # [NJ, n, last step]
    return torch.cat([sees_text, sees_own], dim=-1)


class ThoughtCache:
    """Keys and values of all thoughts, beside those of the text in a KVCache. Section 4.2.

    A pass reads n steps of all thoughts, as NJ * n queries. The keys of the text are stored once
    and shared; each thought has its own keys.
    """

    def __init__(self, text: KVCache, positions: Tensor, config: ThoughtConfig):
        self.text = text
        self.origin = positions.repeat(config.n_thoughts)  # [NJ]
        self.own: list[tuple[Tensor, Tensor]] = []  # per layer [B, Hkv, NJ, length, Dh]

    @property
    def length(self) -> int:
        """The number of steps of a thought that have been read."""
        return self.own[0][0].shape[3] if self.own else 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the next n steps of all thoughts in a layer: q [B, H, NJ * n, Dh] -> same.

        k, v [B, Hkv, NJ * n, Dh] are the keys and values of these steps. They are added to the
        cache.
        """
        q, k, v = (x.unflatten(2, (len(self.origin), -1)) for x in (q, k, v))  # [B, .., NJ, n, Dh]
        if layer == len(self.own):
            self.own.append((k, v))
        else:
            before_k, before_v = self.own[layer]
            k, v = torch.cat([before_k, k], dim=3), torch.cat([before_v, v], dim=3)
            self.own[layer] = k, v  # [B, Hkv, NJ, length, Dh]
        text_k, text_v = self.text.layers[layer]  # [B, Hkv, T, Dh]
        if layer == 0:  # the mask is the same in all layers; added to scores, -inf hides a key
            n, last = q.shape[3], k.shape[3]
            steps, T = range(last - n + 1, last + 1), text_k.shape[2]
            visible = thought_mask(self.origin, steps, T, self.text.window)
            self.bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -math.inf)
        return self.attention(q, k, v, text_k, text_v, self.bias).flatten(2, 3)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, bias: Tensor
    ) -> Tensor:
        """Softmax attention of n steps of every thought over the text and over the thought itself.

        q [B, H, NJ, n, Dh] -> the same shape; own k, v [B, Hkv, NJ, steps, Dh]; text_k, text_v
        [B, Hkv, T, Dh]; bias [NJ, n, T + steps]: 0, or -inf where a key is not visible.
        """
        # b: sequences, h: key heads, i: thoughts, g: the G = H / Hkv query heads of a key head,
        # n: steps of the queries, t: text keys, s: steps of the own keys, d: head size
        q = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3).contiguous()  # [B, Hkv, NJ, G, n, Dh]
        to_text = einsum("bhignd,bhtd->bhignt", q, text_k)  # the same keys for all thoughts
        to_own = einsum("bhignd,bhisd->bhigns", q, k)  # every thought's own keys
        scores = torch.cat([to_text, to_own], dim=-1) / math.sqrt(q.shape[-1])
        scores = scores + bias.unsqueeze(-3)  # the same for all heads
        p = scores.softmax(-1, dtype=torch.float32).to(q.dtype)  # one softmax over both
        p_text, p_own = p.split([text_k.shape[2], k.shape[3]], dim=-1)
        out = einsum("bhignt,bhtd->bhignd", p_text, text_v)
        out = out + einsum("bhigns,bhisd->bhignd", p_own, v)
        out = out.permute(0, 2, 4, 1, 3, 5).flatten(3, 4)  # [B, NJ, n, H, Dh]
        return out.permute(0, 3, 1, 2, 4)  # [B, H, NJ, n, Dh]


# --------------------------------------------------------------------------- 2 think: sampling


def widen(x: Tensor) -> Tensor:
    """Convert x to float32, unless its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_logits(h: Tensor, head: Tensor, excluded: tuple[int, ...] = ()) -> Tensor:
    """Logits [..., V] in float32 of hidden states h [..., D] under head [V, D].

    Tokens in excluded get the logit NEVER: they are never sampled. The product is computed in the
    wider dtype of h and head.
    """
    dtype = torch.promote_types(h.dtype, head.dtype)
    logits = (h.to(dtype) @ head.to(dtype).mT).float()
    if excluded:
        logits[..., list(excluded)] = NEVER
    return logits


def token_logp(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log p of tokens ids [...] under softmax(logits [..., V] / temperature) -> [...] in nats."""
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(-1, ids[..., None]).squeeze(-1)


def sample_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample a token from softmax(logits [..., V]) -> [...] int64, by inverse CDF.

    uniform [...]: random numbers in [0, 1), one per token. Ours: the caller draws them on the CPU,
    so that samples do not depend on how a batch is split.
    """
    p = torch.softmax(logits.detach(), dim=-1)
    cdf = p.cumsum(-1)
    point = uniform[..., None] * cdf[..., -1:]  # below the sum: torch.rand is below 1
    token = torch.searchsorted(cdf, point, right=True)  # [..., 1]
    # A parallel cumsum on a GPU may select a token of probability 0: take the argmax instead.
    possible = p.gather(-1, token.clamp(max=p.shape[-1] - 1)) > 0
    return torch.where(possible, token, p.argmax(-1, keepdim=True)).squeeze(-1)


# ----------------------------------------------------------------------------- 3 talk and 4 mix


def mix(h_init: Tensor, h_thought: Tensor, weight: Tensor) -> Tensor:
    """The hidden state of p_talk: w h_init + (1 - w) h_thought, both [..., D] -> float32 [..., D].

    Paper: section 4.3, log p_talk = w log p_init + (1 - w) log p_thought, normalised. The head is
    linear, so mixing hidden states gives the same distribution with one head evaluation, not two.
    weight [...]. Ours: in float32; in bfloat16 a small 1 - w would be lost.
    """
    h_init, h_thought = widen(h_init), widen(h_thought)
    return h_init + (1 - weight[..., None]) * (h_thought - h_init)


def valid_targets(target_mask: Tensor, positions: Tensor, n_true: int) -> Tensor:
    """Whether ids[b, j + 1 + a] exists and is a target: target_mask [B, T] -> [A, B, J] bool."""
    T = target_mask.shape[1]
    targets = positions + 1 + torch.arange(n_true, device=positions.device)[:, None]  # [A, J]
    mask = target_mask[:, targets.clamp(max=T - 1)] & (targets < T)  # [B, A, J]
    return mask.transpose(0, 1)


# ---------------------------------------------------------------------- the model: steps 1 to 4


class QuietStar(nn.Module):
    """A Mistral that thinks. At initialisation it predicts what the Mistral predicts."""

    # forward uses these three; fast/ replaces them. (think_last always uses the plain functions.)
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
        self.mixing_head = nn.Sequential(  # float32, whatever the dtype of the model
            nn.Linear(2 * D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1, bias=False)
        ).to(table.device)
        nn.init.zeros_(self.mixing_head[4].weight)

    def forward(
        self, ids: Tensor, thought_ids: Tensor | None = None, positions: Tensor | None = None,
        target_mask: Tensor | None = None, temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Output:  # fmt: skip
        """Think at many positions of ids [B, T] in parallel, and predict the tokens that follow.

        thought_ids [B, N, J, K] int64: the thoughts to use. None: sample them at `temperature`
        (0: greedy) with `generator` (on the CPU; None: torch's default).
        positions [J] int64, each in 0 .. T-2: where to think. None: all that have A targets,
        0 .. T-1-A.
        target_mask [B, T] bool: False where a token is no target (padding, the first token of a
        document). It does not mask keys, so padding must be on the right.
        Raises ValueError if positions or thought_ids do not fit.

        Gradients flow through every pass and through the mixing. Sampled ids are constants.
        """
        (B, T), config = ids.shape, self.config
        positions = torch.arange(max(T - config.n_true, 0)) if positions is None else positions
        if not (len(positions) and positions.min() >= 0 and positions.max() <= T - 2):
            raise ValueError(f"positions {positions.tolist()}: give some, all in 0 .. {T - 2}")
        shape = (B, config.n_thoughts, len(positions), config.thought_length)
        if thought_ids is not None and thought_ids.shape != shape:
            raise ValueError(f"thought_ids is {[*thought_ids.shape]}; [B, N, J, K] is {[*shape]}")
        target_mask = torch.ones_like(ids, dtype=torch.bool) if target_mask is None else target_mask
        positions = positions.to(ids.device)

        text = KVCache(self.model.config)
        h_init = self.model.run(self.model.embed_tokens(ids), text)  # [B, T, D] 1 base, section 4.1
        logits = self.token_logits(widen(h_init[:, :-1]), self.model.lm_head.weight)
        base_nll = -self.token_logp(logits, ids[:, 1:]) * target_mask[:, 1:]  # [B, T-1]

        cache = self.thought_cache(text, positions, config)
        uniform = torch.rand(shape, generator=generator).to(ids.device)
        thought_ids, thought_logp = self.think(cache, uniform, temperature, thought_ids)
        talk_nll, weight = self.talk(cache, thought_ids, ids, positions, h_init)
        valid = valid_targets(target_mask, positions, config.n_true)  # [A, B, J]
        talk_nll = talk_nll * valid[:, :, None]
        thought = thought_ids, thought_logp
        return Output(*thought, base_nll, talk_nll, weight, valid, positions, target_mask)

    def think(
        self, cache: ThoughtCache, uniform: Tensor, temperature: float, forced: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """2 think: sample the K tokens of every thought, or take forced ones. Paper: section 4.2.

        uniform [B, N, J, K]: see sample_tokens; forced: [B, N, J, K] or None. Returns ids and their
        log p, both [B, N, J, K]. t_K is sampled and not yet read.
        """
        V, tau = self.model.config.vocab_size, self.config.reinforce_temperature
        token = torch.full(uniform.shape[:3], self.start_id, device=uniform.device)  # [B, N, J]
        thought, logp = [token.new_empty(*token.shape, 0)], [uniform[..., :0]]  # for K = 0
        for k in range(self.config.thought_length):
            h = self.read(self.embed_thought(token[..., None]), cache)[..., 0, :]  # [B, N, J, D]
            logits = self.token_logits(h, self.model.lm_head.weight, self.excluded)  # [B, N, J, V]
            if forced is not None:
                token = forced[..., k]
            elif temperature == 0:
                token = logits.argmax(-1)
            else:
                token = sample_tokens(logits / temperature, uniform[..., k])
            # log p(t_k | x_:j, start, t_<k); a forced meta token may be outside of the vocabulary
            logp_k = self.token_logp(logits, token.clamp(max=V - 1), tau)  # [B, N, J]
            logp.append(logp_k.where(token < V, NEVER)[..., None])
            thought.append(token[..., None])
        return torch.cat(thought, dim=-1), torch.cat(logp, dim=-1)

    def talk(
        self, cache: ThoughtCache, thought_ids: Tensor, ids: Tensor, positions: Tensor,
        h_init: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """3 talk, 4 mix: predict A true tokens after every thought. Paper: sections 4.4 and 4.3.

        One pass reads t_K (start if K = 0), end and x_{j+1} .. x_{j+A-1}. Returns the nll of
        x_{j+1} .. x_{j+A} and the mixing weight w, both [A, B, N, J]. After the end of the text,
        the last token is repeated; the caller masks these targets.
        """
        shape, T = (*thought_ids.shape[:3], 1), ids.shape[1]  # [B, N, J, 1]
        start, end = (thought_ids.new_full(shape, token) for token in (self.start_id, self.end_id))
        t_K = torch.cat([start, thought_ids], dim=-1)[..., -1:]  # [B, N, J, 1]
        a = torch.arange(self.config.n_true, device=ids.device)  # 0 .. A-1
        ahead = (positions[:, None] + a).clamp(max=T - 2)  # [J, A] j + a
        true = ids[:, None, ahead + 1].expand(*shape[:3], -1)  # [B, N, J, A] x_{j+1+a}
        thought = self.embed_thought(torch.cat([t_K, end], dim=-1))  # [B, N, J, 2, D]
        truth = self.model.embed_tokens(true[..., :-1])  # [B, N, J, A-1, D]
        h = self.read(torch.cat([thought, truth], dim=-2), cache)  # [B, N, J, A+1, D]
        h_thought = h[..., 1:, :]  # [B, N, J, A, D] h_thought_{j,a}, section 4.4
        h_ahead = h_init[:, None, ahead].expand_as(h_thought)  # h_init_{j+a}
        w = self.mixing_weight(h_ahead, h_thought)  # [B, N, J, A] w_{j,a}, section 4.3
        mixed = mix(h_ahead, h_thought, w)  # [B, N, J, A, D]
        logits = self.token_logits(mixed, self.model.lm_head.weight)  # [B, N, J, A, V]
        nll = -self.token_logp(logits, true)  # - log p_talk_{j,a}(x_{j+1+a})
        return nll.movedim(-1, 0), w.movedim(-1, 0)

    def read(self, x: Tensor, cache: ThoughtCache) -> Tensor:
        """All thoughts read their next n tokens: embeddings x [B, N, J, n, D] -> states like x."""
        steps = cache.length + 1 + torch.arange(x.shape[3], device=x.device)  # [n]
        positions = (cache.origin[:, None] + steps).flatten()  # [NJ * n] j + step
        return self.model.run(x.flatten(1, 3), cache, positions).unflatten(1, x.shape[1:4])

    def embed_thought(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of a thought's tokens ids [...]: ordinary tokens, start or end.

        Paper: appendix A. start and end are stored divided by embedding_scale. Adam changes a
        stored value by about the learning rate, and so the embedding in use by embedding_scale
        times as much.
        """
        is_start, is_end = ids == self.start_id, ids == self.end_id
        x = self.model.embed_tokens(ids.masked_fill(is_start | is_end, 0))
        x = torch.where(is_start[..., None], self.start_embedding * self.config.embedding_scale, x)
        return torch.where(is_end[..., None], self.end_embedding * self.config.embedding_scale, x)

    def mixing_weight(self, h_init: Tensor, h_thought: Tensor) -> Tensor:
        """w [...] = 1 - MLP([h_init ; h_thought]) in float32, both [..., D]. Paper: section 4.3.

        w is not restricted to [0, 1], as in the authors' code. Their talk_head is this MLP, and
        returns 1 - w. The last layer is initialised with zeros, so w is 1 at first.
        """
        both = torch.cat([h_init, h_thought], dim=-1).to(self.mixing_head[0].weight)
        return 1 - widen(self.mixing_head(both)).squeeze(-1)

    @torch.no_grad()
    def think_last(
        self, last: Tensor, cache: KVCache, thought_ids: Tensor | None = None
    ) -> "Prediction":
        """Inference: read the text's next token last [B], think, and predict the token after it.

        thought_ids [B, K]: the thought to use; None: greedy. cache holds the text before `last`;
        afterwards it holds `last` too, and nothing of the thought. Ours: K + 1 passes,
        [last, start], t_1 .. t_{K-1} one by one, [t_K, end].
        """
        start, end = (last.new_full((len(last), 1), i) for i in (self.start_id, self.end_id))
        x = torch.cat([self.model.embed_tokens(last[:, None]), self.embed_thought(start)], dim=1)
        head, length = self.model.lm_head.weight, cache.length + 1
        states, thought = [], [last.new_empty(len(last), 0)]
        for k in range(self.config.thought_length):
            states.append(self.model.run(x, cache))  # [B, 2 or 1, D]
            greedy = token_logits(states[-1][:, -1:], head, self.excluded).argmax(-1)  # [B, 1]
            thought.append(greedy if thought_ids is None else thought_ids[:, k : k + 1])
            x = self.embed_thought(thought[-1])  # [B, 1, D]
        states.append(self.model.run(torch.cat([x, self.embed_thought(end)], dim=1), cache))
        cache.truncate(length)

        h_init, h_thought = states[0][:, 0], states[-1][:, -1]  # [B, D]
        w = self.mixing_weight(h_init, h_thought)
        logits = token_logits(mix(h_init, h_thought, w), head, self.excluded)
        base_logits = token_logits(widen(h_init), head, self.excluded)
        return Prediction(logits, base_logits, torch.cat(thought, dim=1), w)


class Prediction(NamedTuple):
    """The result of QuietStar.think_last: the next token, and the thought before it."""

    logits: Tensor  # [B, V] float32, mixed; meta tokens excluded
    base_logits: Tensor  # [B, V] float32, without the thought
    thought_ids: Tensor  # [B, K] int64
    weight: Tensor  # [B] the mixing weight w


# ------------------------------------------------------------------------------ 5 reward, 6 loss


def log_likelihood(nll: Tensor) -> Tensor:
    """R_j = sum_a log p(x_{j+1+a}), with or without a thought: nll [A, ...] -> [...] in nats.

    Paper: section 4.4.
    """
    return -nll.sum(0)


def base_ahead(base_nll: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """nll without thoughts of the same targets as talk_nll: [B, T-1] -> [A, B, 1, J]."""
    a = torch.arange(len(valid), device=positions.device)[:, None]
    nll = base_nll[:, (positions + a).clamp(max=base_nll.shape[1] - 1)]  # [B, A, J]
    return (nll.transpose(0, 1) * valid)[:, :, None]


def reward(talk_nll: Tensor, base_nll: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """r_j [B, N, J] in nats: R_j of a thought minus the mean R_j of the N thoughts at its position.

    Paper: section 4.4. talk_nll [A, B, N, J], base_nll [B, T-1], positions [J], valid [A, B, J] as
    in Output. r_j is the advantage of GRPO without the division by the standard deviation. For
    example, with A = 2 and N = 3:

        thought    nll of the two true tokens    R_j     mean    r_j
           1               1.0  1.0             -2.0     -4.0   +2.0
           2               2.0  1.0             -3.0            +1.0
           3               3.0  4.0             -7.0            -3.0

    Ours: with N = 1 the baseline is R_j without a thought. r_j is 0 where a target is missing. No
    gradient flows through r_j.
    """
    R = log_likelihood(talk_nll.detach())  # [B, N, J]
    if R.shape[1] > 1:  # r_j = R_j - mean R_j, section 4.4
        r = (R[:, :, None] - R[:, None]).mean(2)  # as a mean of differences: 0 for equal thoughts
    else:
        r = R - log_likelihood(base_ahead(base_nll.detach(), positions, valid))
    return torch.where(valid.all(0)[:, None], r, 0.0)


def count_targets(target_mask: Tensor, positions: Tensor, n_true: int) -> tuple[int, int]:
    """The denominators of the loss for a batch with target_mask [B, T].

    They are the number of targets predicted without a thought, and the number of (sequence,
    position) pairs that have all A targets.
    """
    valid = valid_targets(target_mask, positions.to(target_mask.device), n_true)  # [A, B, J]
    return int(target_mask[:, 1:].sum()), int(valid.all(0).sum())


def valid_mean(x: Tensor, output: Output, counts: tuple[int, int]) -> Tensor:
    """Mean of x [B, N, J] over thoughts and valid positions, of which there are counts[1]."""
    return (x * output.valid.all(0)[:, None]).sum() / max(x.shape[1] * counts[1], 1)


def quiet_star_loss(
    output: Output, config: ThoughtConfig, counts: tuple[int, int] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its metrics (detached scalars). Paper: section 4.4.

    L_base averages over all targets; L_NLL and L_REINFORCE average over thoughts and over positions
    that have all A targets, so that padding changes nothing. Three choices are those of the
    authors' code, not of the paper: L_base with the factors c and 1 - c; the mean over a in L_NLL,
    not the sum; the mean of log p over thoughts, not the logarithm of the mean p.
    counts: count_targets of the whole batch, if output is only a part of it. Losses, gradients and
    metrics then add up over the parts.

    Metrics: loss is the weighted sum; base_nll, talk_nll and policy_loss are its parts; init_nll is
    talk_nll without thoughts (all in nats). reward is the mean of the r_j used, rewarded the share
    of positions where one is not 0. weight is the mean of w. entropy is the mean of -log p of a
    token of a thought, at reinforce_temperature.
    """
    counts = counts or count_targets(output.target_mask, output.positions, config.n_true)
    _, thought_logp, base_nll, talk_nll, weight, valid, positions, _ = output
    mean = partial(valid_mean, output=output, counts=counts)
    r = reward(talk_nll, base_nll, positions, valid)  # [B, N, J]
    r = r.clamp(min=0) if config.drop_negative else r  # section 4.4: keep what helped

    L_base = base_nll.sum() / max(counts[0], 1)  # - log p_init_j(x_{j+1})
    L_NLL = mean(talk_nll.mean(0))  # - mean_a log p_talk_{j,a}(x_{j+1+a}), section 4.4
    L_REINFORCE = mean(-r * thought_logp.sum(-1))  # - r_j log p(t_1 .. t_K | x_:j, start)
    language = config.base_weight * L_base + (1 - config.base_weight) * L_NLL
    loss = language + config.reinforce_weight * L_REINFORCE
    init_nll = base_ahead(base_nll, positions, valid).mean(0).expand_as(r)
    metrics = {"loss": loss, "base_nll": L_base, "talk_nll": L_NLL, "policy_loss": L_REINFORCE}
    metrics |= {"init_nll": mean(init_nll), "reward": mean(r), "weight": mean(weight.mean(0))}
    metrics["rewarded"] = mean((r != 0).any(1, keepdim=True).float())
    metrics["entropy"] = mean(-thought_logp.sum(-1)) / max(config.thought_length, 1)
    return loss, {name: value.detach() for name, value in metrics.items()}


# ----------------------------------------------------------------------------- load and save


def save_quiet_star(model: QuietStar, folder: str | Path) -> None:
    """Write the folder of save_mistral, and quiet_star.json and quiet_star.safetensors into it."""
    save_mistral(model.model, folder)
    own = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("model.")}
    save_file(own, Path(folder) / "quiet_star.safetensors")
    text = json.dumps(asdict(model.config), indent=2)
    (Path(folder) / "quiet_star.json").write_text(text + "\n", encoding="utf-8")


def load_quiet_star(folder: str | Path, dtype=None, device="cpu") -> QuietStar:
    """Load a folder of save_quiet_star that holds a Mistral. Raises ValueError as load_mistral.

    (support.checkpoints.load_any also reads other families and the authors' release.)
    """
    config = json.loads((Path(folder) / "quiet_star.json").read_text(encoding="utf-8"))
    own = read_tensors(Path(folder) / "quiet_star.safetensors")
    return with_thoughts(load_mistral(folder, dtype, device), ThoughtConfig(**config), own, folder)


def with_thoughts(
    base: Mistral, config: ThoughtConfig, own: dict[str, Tensor], source: str | Path
) -> QuietStar:
    """A QuietStar with the weights of base and own (meta embeddings, mixing head).

    Raises ValueError if they do not fit.
    """
    model = QuietStar(base, config)
    like = {n: p for n, p in model.named_parameters() if not n.startswith("model.")}
    own = {name: tensor.to(like.get(name, tensor)) for name, tensor in own.items()}
    base_weights = {f"model.{name}": tensor for name, tensor in base.state_dict().items()}
    assign_weights(model, base_weights | own, Path(source))
    base.tie_head()
    return model
