"""What else thoughts could be learned from: objectives of the same family, side by side.

    python -m tools.experiments --out runs/objectives --only full all-advantages base-baseline \\
        log-mean probability rlp pause none

An objective is a function (output, config, counts) -> loss, metrics, as thoughts.quiet_star_loss
is, of one thoughts.Output. To add one, write it here and give it a row in tools/experiments.py.
With the letters of thoughts.py, for each of the N thoughts of a position:

    S_n = sum_a log p_talk_{j,a}(x_{j+1+a})    how likely the next A tokens are after thought n
    b   = the same without a thought
    r_n   advantage: what log p(thought n) is multiplied with in REINFORCE, a constant

    Quiet-STaR         r_n = S_n - mean S, negatives dropped; L_NLL = - mean_n S_n / A
    all advantages     negatives are kept
    base as baseline   r_n = S_n - b, for any N, negatives dropped
    log mean           L_NLL = - log mean_n exp(S_n) / A
    probability        r_n = exp(S_n) - mean exp(S), negatives dropped
    RLP                r_n = N / (N - 1) (S_n - mean S) alone: no L_base, no L_NLL, w = 0, A = 1

Where a source does more than what stands here, the function says so. Behind the objectives stand
the controls, whose thoughts are not the model's own. All of them are for train.train_thoughts.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import train
from thoughts import (
    Output,
    QuietStar,
    ThoughtConfig,
    base_ahead,
    count_targets,
    log_likelihood,
    quiet_star_loss,
    reward,
    valid_mean,
)

Loss = tuple[Tensor, dict[str, Tensor]]
Counts = tuple[int, int] | None


# ----------------------------------------------------------------------------------- objectives


def counts_of(output: Output, config: ThoughtConfig, counts: Counts) -> tuple[int, int]:
    """The given counts of the whole batch, or those of the output as a batch of its own."""
    return counts or count_targets(output.target_mask, output.positions, config.n_true)


def policy_loss(r: Tensor, output: Output, counts: tuple[int, int]) -> Tensor:
    """L_REINFORCE = mean of - r_n log p(thought n), with advantages r [B, N, J] as constants."""
    return valid_mean(-r.detach() * output.thought_logp.sum(-1), output, counts)


def reinforce(r: Tensor, output: Output, config: ThoughtConfig, counts: Counts) -> Loss:
    """Quiet-STaR's language losses, and REINFORCE with the advantages r [B, N, J].

    Negative ones are dropped if the config says so, as Quiet-STaR's are.
    """
    r = r.clamp(min=0) if config.drop_negative else r
    loss, metrics = quiet_star_loss(output, replace(config, policy_weight=0.0), counts)
    L_REINFORCE = policy_loss(r, output, counts_of(output, config, counts))
    loss = loss + config.reinforce_weight * L_REINFORCE
    return loss, metrics | {"loss": loss.detach(), "policy_loss": L_REINFORCE.detach()}


def check_siblings(config: ThoughtConfig) -> None:
    """ValueError for N = 1, where a thought can be compared with no other."""
    if config.n_thoughts < 2:
        raise ValueError("n_thoughts is 1; this objective compares thoughts: at least 2")


def all_advantages(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """Quiet-STaR, but a thought worse than its siblings is made rarer too.

    RGRA (arXiv 2603.18756) finds that learning from better ones alone limits what is learned. Ours:
    no more of it than that.
    """
    return quiet_star_loss(output, replace(config, drop_negative=False), counts)


def base_as_baseline(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """r_n = S_n - b: the information that a thought gained. Quiet-STaR has it for N = 1 only."""
    base_nll = base_ahead(output.base_nll, output.positions, output.valid)  # [A, B, 1, J]
    r = log_likelihood(output.talk_nll) - log_likelihood(base_nll)  # [B, N, J]
    return reinforce(r, output, config, counts)


def log_mean(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """L_NLL = - log mean_n exp(S_n) / A: the text's likelihood under a thought drawn at random.

    JEPO (arXiv 2503.19618), a tighter bound than - mean_n S_n / A. Ours: its language loss only;
    there, a thought's advantage is the log mean of all N minus the log mean of the others. The
    metric talk_nll stays - mean_n S_n / A, to be compared.
    """
    loss, metrics = quiet_star_loss(output, config, counts)
    S = log_likelihood(output.talk_nll)  # [B, N, J]
    together = S.logsumexp(1, keepdim=True) - math.log(S.shape[1])  # [B, 1, J] log mean_n exp(S_n)
    tighter = S.mean(1, keepdim=True) - together  # at most 0 (Jensen)
    counts = counts_of(output, config, counts)
    loss = loss + (1 - config.base_weight) * valid_mean(tighter / config.n_true, output, counts)
    return loss, metrics | {"loss": loss.detach()}


def probability_reward(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """r_n = exp(S_n) - mean exp(S), with N > 1: the probability of the next tokens, not its log.

    VeriFree (arXiv 2505.21493). From 0.01 to 0.02 is then much less than from 0.4 to 0.8. Ours:
    the language losses stay Quiet-STaR's, where there log p of the answer is weighted by exp(S_n);
    and negatives are dropped and the mean is over all N, where there it is over the other N - 1
    and all advantages are kept.
    """
    check_siblings(config)
    p = log_likelihood(output.talk_nll).exp()  # [B, N, J]
    return reinforce(p - p.mean(1, keepdim=True), output, config, counts)


def rlp(output: Output, config: ThoughtConfig, counts: Counts = None) -> Loss:
    """r_n = N / (N - 1) (S_n - mean S), all advantages, and nothing else is learned.

    RLP (arXiv 2510.01265), with N > 1, A = 1 and a model that hears only its thoughts
    (begin_without_mixing). The paper's reward is S_n - b of a slow copy of the model; b cancels in
    the difference to the mean, and its clipping does nothing with one update a batch. Ours: log p
    of a thought is summed over its tokens, where the paper takes the mean; at a fixed length that
    is a matter of the policy weight.
    """
    check_siblings(config)
    N = config.n_thoughts
    r = N / (N - 1) * reward(output.talk_nll, output.base_nll, output.positions, output.valid)
    L_REINFORCE = policy_loss(r, output, counts_of(output, config, counts))
    loss = config.reinforce_weight * L_REINFORCE
    _, metrics = quiet_star_loss(output, config, counts)
    return loss, metrics | {"loss": loss.detach(), "policy_loss": L_REINFORCE.detach()}


def trained_by(objective: Callable, temperature: float = 1.0) -> Callable:
    """The loss of a batch that train.train takes, of an objective.

    Thoughts are sampled at `temperature`. Where that is not the reinforce_temperature of the
    config, at which log p(thought) is taken, the gradient of REINFORCE is biased.
    """

    def loss_of(model: QuietStar, ids, targets, positions, counts, generator):
        output = model(ids, None, positions, targets, temperature, generator)
        return objective(output, model.config, counts)

    loss_of.__name__ = f"{objective.__name__} of thoughts at temperature {temperature:g}"
    return loss_of


# ------------------------------------------------------------------------------------- controls


def plain_loss(model: QuietStar, *batch) -> Loss:
    """The control that only trains on: the language-model loss of the model inside."""
    return train.language_loss(model.model, *batch)


def pause_loss(model: QuietStar, *batch) -> Loss:
    """After thoughts of K start tokens: learned, and without content (arXiv 2310.02226)."""
    return forced_loss(lambda shape, generator: torch.full(shape, model.start_id), model, *batch)


def random_loss(model: QuietStar, *batch) -> Loss:
    """After thoughts of K tokens, each of the vocabulary as likely, drawn on the CPU."""
    return forced_loss(partial(torch.randint, model.model.config.vocab_size), model, *batch)


def forced_loss(make: Callable, model: QuietStar, ids, targets, positions, counts, generator):
    """The losses after thoughts make([B, N, J, K], generator=generator), and their metrics.

    The model did not choose them, so that nothing can be reinforced: the policy loss is 0.
    """
    shape = (len(ids), model.config.n_thoughts, len(positions), model.config.thought_length)
    output = model(ids, make(shape, generator=generator).to(ids.device), positions, targets)
    output = output._replace(thought_logp=torch.zeros_like(output.thought_logp))
    return quiet_star_loss(output, model.config, counts)


# ------------------------------------------------------------------------- models to begin with


def begin_at_random(*run) -> QuietStar:
    """train.thinking_model of a plain model, but start and end begin as random vectors."""
    model = train.thinking_model(*run)
    if model.config.init_id is None:  # it is this run's own, continued
        return model
    return QuietStar(model.model, replace(model.config, init_id=None))


def begin_without_mixing(*run) -> QuietStar:
    """train.thinking_model, but w = 0 always: what follows is predicted after the thought alone.

    The mixing head's last layer reads one unit, which is always 1, and is not trained.
    """
    model = train.thinking_model(*run)
    _, _, hidden, _, last = model.mixing_head
    nn.init.zeros_(hidden.weight), nn.init.ones_(hidden.bias)
    nn.init.zeros_(last.weight).data[:, 0] = 1
    model.mixing_head.requires_grad_(False)
    return model
