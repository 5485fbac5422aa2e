"""Other objectives of the same family, and controls whose thoughts are not the model's own.

    python -m tools.experiments --out runs/objectives --only full all-advantages base-baseline \\
        log-mean probability rlp pause none

An objective is a function (output, config, counts) -> loss, metrics of a thoughts.Output, like
quiet_star_loss. One that needs the model is a loss_of of train.train. To add one, write it here and
add an entry to EXPERIMENTS and TABLES in tools/experiments.py. With the letters of thoughts.py, for
the N thoughts of a position:

    S_n = sum_a log p_talk_{j,a}(x_{j+1+a})    log-likelihood of the next A tokens after thought n
    b   = the same without a thought
    r_n = advantage, a constant: L_REINFORCE is the mean of - r_n log p(thought n)

Quiet-STaR has r_n = S_n - mean S without negatives, and L_NLL = - mean_n S_n / A. A docstring says
what differs from this, and after "Ours" what differs from the source.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import thoughts
import train
from thoughts import Output, QuietStar, ThoughtConfig, log_likelihood, valid_mean

Loss = tuple[Tensor, dict[str, Tensor]]
Counts = tuple[int, int] | None


def reinforce(r: Tensor, output: Output, config: ThoughtConfig, counts, language=True) -> Loss:
    """Quiet-STaR's loss with other advantages r [B, N, J]; language: with its language losses."""
    counts = counts or thoughts.count_targets(output.target_mask, output.positions, config.n_true)
    loss, metrics = thoughts.quiet_star_loss(output, replace(config, policy_weight=0.0), counts)
    r = (r.clamp(min=0) if config.drop_negative else r).detach()
    L_REINFORCE = valid_mean(-r * output.thought_logp.sum(-1), output, counts)
    loss = config.reinforce_weight * L_REINFORCE + (loss if language else 0)
    own = {
        "loss": loss.detach(),
        "policy_loss": L_REINFORCE.detach(),
        "reward": valid_mean(r, output, counts),
        "rewarded": valid_mean((r != 0).any(1, keepdim=True).float(), output, counts),
    }
    return loss, metrics | own


def check_several(config: ThoughtConfig) -> None:
    """Raise ValueError if N = 1."""
    if config.n_thoughts < 2:
        raise ValueError("n_thoughts is 1; this objective compares thoughts and needs at least 2")


def all_advantages(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """Negative advantages are kept: a thought worse than the mean becomes less likely.

    RGRA (arXiv 2603.18756) finds that learning only from better thoughts limits a model. Ours: only
    this part of it.
    """
    return thoughts.quiet_star_loss(output, replace(config, drop_negative=False), counts)


def base_as_baseline(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """r_n = S_n - b: the information gained by a thought. Quiet-STaR has it for N = 1 only."""
    base_nll = thoughts.base_ahead(output.base_nll, output.positions, output.valid)  # [A, B, 1, J]
    r = log_likelihood(output.talk_nll) - log_likelihood(base_nll)  # [B, N, J]
    return reinforce(r, output, config, counts)


def log_mean(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """L_NLL = - log mean_n exp(S_n) / A, a tighter bound than - mean_n S_n / A.

    JEPO (arXiv 2503.19618). Ours: only its language loss; JEPO's advantage is the log mean of all N
    minus that of the others. The metric talk_nll stays - mean_n S_n / A, to compare runs.
    """
    loss, metrics = thoughts.quiet_star_loss(output, config, counts)
    S = log_likelihood(output.talk_nll)  # [B, N, J]
    log_mean_exp = S.logsumexp(1, keepdim=True) - math.log(S.shape[1])  # [B, 1, J]
    tighter = S.mean(1, keepdim=True) - log_mean_exp  # at most 0 (Jensen)
    counts = counts or thoughts.count_targets(output.target_mask, output.positions, config.n_true)
    loss = loss + (1 - config.base_weight) * valid_mean(tighter / config.n_true, output, counts)
    return loss, metrics | {"loss": loss.detach()}


def probability_reward(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """r_n = exp(S_n) - mean exp(S), N > 1: from the probability of the next tokens, not its log.

    VeriFree (arXiv 2505.21493). Ours: Quiet-STaR's language losses, where VeriFree weights log p of
    the answer by exp(S_n); the mean over all N and no negatives, where VeriFree takes the mean over
    the other N - 1 and keeps all advantages.
    """
    check_several(config)
    p = log_likelihood(output.talk_nll).exp()  # [B, N, J]
    return reinforce(p - p.mean(1, keepdim=True), output, config, counts)


def rlp(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """r_n = N / (N - 1) (S_n - mean S), N > 1, A = 1, negatives kept, no language loss.

    RLP (arXiv 2510.01265), for a model whose w is 0 (begin_without_mixing). RLP's reward is S_n - b
    of a slow copy of the model, but b cancels, and clipping has no effect with one update a batch.
    Ours: log p of a thought is a sum over its tokens, not a mean, which scales the policy weight.
    """
    check_several(config)
    N = config.n_thoughts
    r = (
        N
        / (N - 1)
        * thoughts.reward(output.talk_nll, output.base_nll, output.positions, output.valid)
    )
    return reinforce(r, output, replace(config, drop_negative=False), counts, language=False)


def rlp_base(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """rlp with c L_base, the loss without thoughts, as in Quiet-STaR."""
    loss, metrics = rlp(output, config, counts)
    counts = counts or thoughts.count_targets(output.target_mask, output.positions, config.n_true)
    loss = loss + config.base_weight * output.base_nll.sum() / max(counts[0], 1)
    return loss, metrics | {"loss": loss.detach()}


def watch_hits(model: QuietStar) -> tuple[QuietStar, list[Tensor]]:
    """A copy of a model, which shares its weights, and what its token_logp has seen since.

    Every call adds a bool tensor of the shape of its ids: whether the token is the likeliest. In
    forward, these are the text [B, T-1], t_1 .. t_K [B, N, J] each, and the true tokens after the
    thought [B, N, J, A].
    """
    watched, hits = copy.copy(model), []

    def token_logp(logits: Tensor, ids: Tensor, *temperature: float) -> Tensor:
        hits.append(logits.argmax(-1) == ids)
        return model.token_logp(logits, ids, *temperature)

    watched.token_logp = token_logp
    return watched, hits


def rpt_loss(model: QuietStar, ids, targets, positions, counts, generator) -> Loss:
    """r_n = hit_n - mean hit, N > 1: hit_n is 1 if x_{j+1} is the likeliest token, else 0.

    RPT (arXiv 2506.08007). Ours: Quiet-STaR's language losses and no negatives; the likeliest token
    of p_talk, where RPT samples an answer; r_n is not divided by the standard deviation.
    """
    check_several(model.config)
    watched, hits = watch_hits(model)
    output = watched(ids, None, positions, targets, generator=generator)
    hit = hits[-1][..., 0].float()  # [B, N, J]
    return reinforce(hit - hit.mean(1, keepdim=True), output, model.config, counts)


def kl_loss(model: QuietStar, ids, targets, positions, counts, generator) -> Loss:
    """r_n = R_n - mean R, R_n = S_n - 0.1 (log p(thought n) - log p_reference(thought n)), N > 1.

    LaTRO (arXiv 2411.04282), for a model of begin_with_reference. Ours: Quiet-STaR's L_base, mixing
    and no negatives; the mean over all N, where LaTRO takes that of the other N - 1. log p is at
    reinforce_temperature. The cost in tables leaves out the reference.
    """
    check_several(model.config)
    output = model(ids, None, positions, targets, generator=generator)
    [reference] = model.reference
    with torch.no_grad():
        before = reference(ids, output.thought_ids, positions, targets).thought_logp
    R = log_likelihood(output.talk_nll) - 0.1 * (output.thought_logp - before).sum(-1)  # [B, N, J]
    return reinforce(R - R.mean(1, keepdim=True), output, model.config, counts)


def trained_by(objective: Callable, temperature: float = 1.0) -> Callable:
    """The loss for train.train of an objective, with thoughts sampled at `temperature`.

    The gradient of REINFORCE is biased if this is not the config's reinforce_temperature.
    """

    def loss_of(model: QuietStar, ids, targets, positions, counts, generator):
        output = model(ids, None, positions, targets, temperature, generator)
        return objective(output, model.config, counts)

    loss_of.__name__ = f"{objective.__name__} of thoughts at temperature {temperature:g}"
    return loss_of


def plain_loss(model: QuietStar, *batch) -> Loss:
    """The control without thoughts: the language-model loss of the base model."""
    return train.language_loss(model.model, *batch)


def pause_loss(model: QuietStar, *batch) -> Loss:
    """The control with pause tokens: every thought is K start tokens (arXiv 2310.02226)."""
    return forced_loss(lambda shape, generator: torch.full(shape, model.start_id), model, *batch)


def random_loss(model: QuietStar, *batch) -> Loss:
    """The control with random thoughts: K tokens drawn uniformly from the vocabulary."""
    return forced_loss(partial(torch.randint, model.model.config.vocab_size), model, *batch)


def forced_loss(make: Callable, model: QuietStar, ids, targets, positions, counts, generator):
    """The language losses with thoughts make([B, N, J, K], generator=generator), and metrics.

    The model did not sample these thoughts, so the policy loss is 0.
    """
    shape = (len(ids), model.config.n_thoughts, len(positions), model.config.thought_length)
    output = model(ids, make(shape, generator=generator).to(ids.device), positions, targets)
    output = output._replace(thought_logp=torch.zeros_like(output.thought_logp))
    return thoughts.quiet_star_loss(output, model.config, counts)


def begin_at_random(*run) -> QuietStar:
    """train.thinking_model of a plain model, with random start and end embeddings."""
    model = train.thinking_model(*run)
    if model.config.init_id is None:  # a model of this run, to be continued
        return model
    return QuietStar(model.model, replace(model.config, init_id=None))


def begin_without_mixing(*run) -> QuietStar:
    """train.thinking_model with w = 0: p_talk is p_thought.

    The last layer of the mixing head reads one unit, which is always 1. The head is not trained.
    """
    model = train.thinking_model(*run)
    _, _, hidden, _, last = model.mixing_head
    nn.init.zeros_(hidden.weight), nn.init.ones_(hidden.bias)
    nn.init.zeros_(last.weight).data[:, 0] = 1
    model.mixing_head.requires_grad_(False)
    return model


def begin_with_reference(settings, config: ThoughtConfig, run, device) -> QuietStar:
    """train.thinking_model, with the frozen model of settings.checkpoint as model.reference[0].

    In a tuple, it is no part of the parameters and of what is saved.
    """
    model = train.thinking_model(settings, config, run, device)
    start = train.thinking_model(settings, config, run / "none", device)  # as if not resumed
    model.reference = (start.requires_grad_(False),)
    return model


def begin_squashed(*run) -> QuietStar:
    """train.thinking_model with w = 1 - sigmoid(MLP - 3): between 0 and 1, and 0.953 at first.

    A saved model has Quiet-STaR's w = 1 - MLP when it is loaded elsewhere.
    """
    model = train.thinking_model(*run)
    plain = model.mixing_weight  # 1 - MLP
    model.mixing_weight = lambda *states: torch.sigmoid(2 + plain(*states))
    return model


def gumbel(uniform: Tensor, V: int) -> Tensor:
    """Gumbel noise [B, N, J, V] as a function of uniform [B, N, J]: each text seeds its own."""
    generators = [torch.Generator().manual_seed(int(x * 2**24)) for x in uniform[:, 0, 0].tolist()]
    noise = [torch.empty(*uniform.shape[1:], V).exponential_(generator=g) for g in generators]
    return -torch.stack(noise).log().to(uniform)


class StraightThrough(QuietStar):
    """Straight-through Gumbel softmax (arXiv 1611.01144): a gradient without REINFORCE.

    t_k is the argmax of logits + noise. The next pass reads its embedding, with the gradient of the
    mean embedding under p = softmax(logits + noise).
    """

    def think(self, cache, uniform: Tensor, temperature: float, forced: Tensor | None):
        """As QuietStar.think. cache.through [B, N, J, 1, D] is 0, with the gradient of p."""
        if forced is not None or temperature == 0:
            return super().think(cache, uniform, temperature, forced)
        head, table = self.model.lm_head.weight, self.model.embed_tokens.weight
        token = torch.full(uniform.shape[:3], self.start_id, device=uniform.device)  # [B, N, J]
        thought_ids, logp = torch.zeros_like(uniform, dtype=torch.long), torch.zeros_like(uniform)
        for k in range(self.config.thought_length):
            h = self.read(self.embed_thought(token[..., None]), cache)[..., 0, :]  # [B, N, J, D]
            logits = thoughts.token_logits(h, head, self.excluded)  # [B, N, J, V]
            noisy = logits / temperature + gumbel(uniform[..., k], len(head))
            token, p = noisy.argmax(-1), noisy.softmax(-1)
            cache.through = ((p - p.detach()) @ table)[..., None, :]
            thought_ids[..., k] = token
            logp[..., k] = thoughts.token_logp(logits, token, self.config.reinforce_temperature)
        return thought_ids, logp

    def read(self, x: Tensor, cache) -> Tensor:
        """As QuietStar.read. After the first pass, a pass begins with the token just sampled."""
        if hasattr(cache, "through"):
            x = torch.cat([x[..., :1, :] + cache.through, x[..., 1:, :]], dim=-2)
        return super().read(x, cache)


def begin_straight_through(*run) -> QuietStar:
    """train.thinking_model as a StraightThrough. It is saved as a QuietStar, with equal results."""
    model = train.thinking_model(*run)
    model.__class__ = StraightThrough
    return model
