"""Other objectives of the same family, and controls whose thoughts are not the model's own.

    python -m tools.experiments --out runs/objectives --only full all-advantages base-baseline \\
        log-mean probability rlp pause none

An objective is a function (output, config, counts) -> loss, metrics of a thoughts.Output, like
quiet_star_loss. To add one, write it here and add an entry to EXPERIMENTS and TABLES in
tools/experiments.py. With the letters of thoughts.py, for the N thoughts of a position:

    S_n = sum_a log p_talk_{j,a}(x_{j+1+a})    log-likelihood of the next A tokens after thought n
    b   = the same without a thought
    r_n = advantage, a constant: L_REINFORCE is the mean of - r_n log p(thought n)

Quiet-STaR has r_n = S_n - mean S without negatives, and L_NLL = - mean_n S_n / A. A docstring says
what differs from this, and after "Ours" what differs from the source.
"""

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
