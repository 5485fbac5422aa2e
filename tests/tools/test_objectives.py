"""Other objectives on numbers worked out by hand, and the thoughts of the controls."""

import math
from dataclasses import replace

import pytest
import torch
from test_reward import BASE_NLL, POSITIONS, TALK_NLL, VALID
from tiny import random_ids, tiny_quiet_star

import train
from thoughts import (
    Output,
    ThoughtConfig,
    count_targets,
    load_quiet_star,
    quiet_star_loss,
    save_quiet_star,
)
from tools import objectives

# B = 2, N = 3: S = -2, -3, -7 and -1, -2, -3 in test_reward; here exp(S) is
P = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 1 / 2]])  # means 1/3 and 1/4
LOGP = -torch.arange(1.0, 7).view(2, 3, 1, 1) * torch.tensor([0.25, 0.75])  # of K = 2 tokens
CONFIG = ThoughtConfig(3, 2, 2, base_weight=0.25, policy_weight=10.0)
BASE = 40.75 / 8  # the mean of BASE_NLL


def output_of(talk_nll=TALK_NLL, valid=VALID):
    return Output(
        thought_ids=torch.zeros(2, 3, 1, 2, dtype=torch.long),
        thought_logp=LOGP,
        base_nll=BASE_NLL,
        talk_nll=talk_nll,
        weight=torch.full((2, 2, 3, 1), 0.25),
        valid=valid,
        positions=POSITIONS,
        target_mask=torch.ones(2, 5, dtype=torch.bool),
    )


def with_probabilities():
    """The first true token has nll 1; the second makes exp(S) what P says."""
    first = torch.ones(2, 3, 1)
    return output_of(torch.stack([first, -P[..., None].log() - first]))


def language(output):
    """base_weight L_base + (1 - base_weight) L_NLL."""
    return 0.25 * BASE + 0.75 * output.talk_nll.mean().item()


ALL = [
    objectives.all_advantages,
    objectives.base_as_baseline,
    objectives.log_mean,
    objectives.probability_reward,
    objectives.rlp,
]


@pytest.mark.parametrize(
    ("objective", "output", "policy", "r"),
    [
        # r = 2, 1, -3 and 1, 0, -1; thought n of 6 has log p = -n
        (objectives.all_advantages, output_of(), (2 + 2 - 9 + 4 - 0 - 6) / 6, 0),
        # b = -3.5 and -1.25: r = 1.5, 0.5, -3.5 and 0.25, -0.75, -1.75
        (objectives.base_as_baseline, output_of(), (1.5 + 2 * 0.5 + 4 * 0.25) / 6, 2.25),
        # r = 1/6, -1/12, -1/12 and -1/8, -1/8, 1/4
        (objectives.probability_reward, with_probabilities(), (1 / 6 + 6 / 4) / 6, 1 / 6 + 1 / 4),
    ],
)
def test_another_advantage(objective, output, policy, r):
    """The language losses stay; policy loss: mean of -r log p; reward: mean of the r it used."""
    loss, metrics = objective(output, CONFIG)
    assert metrics["reward"].item() == pytest.approx(r / 6, abs=1e-6)
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)
    assert loss.item() == pytest.approx(language(output) + 10 * policy, rel=1e-5)
    assert metrics["loss"].item() == loss.item()


def test_negatives_are_kept_if_asked():
    """-3.5, -0.75 and -1.75 against the base model; -1/12, -1/12, -1/8 and -1/8 of the means."""
    config = replace(CONFIG, drop_negative=False)
    _, metrics = objectives.base_as_baseline(output_of(), config)
    policy = (1.5 + 2 * 0.5 - 3 * 3.5 + 4 * 0.25 - 5 * 0.75 - 6 * 1.75) / 6
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)
    _, metrics = objectives.probability_reward(with_probabilities(), config)
    policy = (1 / 6 - 2 / 12 - 3 / 12 - 4 / 8 - 5 / 8 + 6 / 4) / 6
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "output", "r"),
    [
        (objectives.all_advantages, output_of(), [[2, 1, -3], [1, 0, -1]]),
        (objectives.base_as_baseline, output_of(), [[1.5, 0.5, 0], [0.25, 0, 0]]),
        (objectives.log_mean, output_of(), [[2, 1, 0], [1, 0, 0]]),
        (objectives.probability_reward, with_probabilities(), [[1 / 6, 0, 0], [0, 0, 1 / 4]]),
        (objectives.rlp, output_of(), [[3, 1.5, -4.5], [1.5, 0, -1.5]]),
    ],
)
@pytest.mark.parametrize("policy_weight", [10.0, None])
def test_policy_gradient(objective, output, r, policy_weight):
    """d loss / d log p of a token = - weight r / 6; without a weight, the authors' 1e6 / K."""
    logp = LOGP.clone().requires_grad_()
    config = replace(CONFIG, policy_weight=policy_weight)
    loss, _ = objective(output._replace(thought_logp=logp), config)
    loss.backward()
    expected = -(policy_weight or 5e5) * torch.tensor(r) / 6  # [B, N]
    assert torch.allclose(logp.grad, expected[..., None, None].expand(2, 3, 1, 2), rtol=1e-4)


def test_gradient_of_log_mean():
    """d L_NLL / d nll of a token = its thought's share of the mean p, over A and 2 positions."""
    talk = with_probabilities().talk_nll.clone().requires_grad_()
    loss, _ = objectives.log_mean(output_of(talk), replace(CONFIG, policy_weight=0.0))
    loss.backward()
    share = P / P.sum(1, keepdim=True)  # [B, N]
    assert torch.allclose(talk.grad, (0.75 * share / 2 / 2)[..., None].expand(2, 2, 3, 1))


@pytest.mark.parametrize("objective", [objectives.probability_reward, objectives.rlp])
def test_a_lone_thought_cannot_be_compared(objective):
    with pytest.raises(ValueError, match="n_thoughts is 1"):
        objective(output_of(), replace(CONFIG, n_thoughts=1))


def test_no_valid_position_is_no_loss():
    """Where no position has all its targets, the rest is 0, not NaN."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3] = False
    output = output_of(valid=torch.tensor([[[True], [True]], [[False], [False]]]))
    for objective in ALL:
        loss, _ = objective(output._replace(target_mask=mask), CONFIG)
        assert loss.isfinite(), objective


def test_the_share_of_positions_with_a_reward():
    """S = -2 and -1 against b = -3.5 and -1; the second text has no reward other than 0."""
    output = output_of(torch.tensor([1.0, 0.5]).view(1, 2, 1, 1).expand(2, 2, 3, 1))
    output = output._replace(base_nll=torch.tensor([[9.0, 1.5, 2.0, 9.0], [9.0, 0.5, 0.5, 9.0]]))
    assert objectives.base_as_baseline(output, CONFIG)[1]["rewarded"] == 0.5


def test_log_mean():
    """- (log 1/3 + log 1/4) / 2 over A = 2 tokens; REINFORCE stays Quiet-STaR's."""
    output = with_probabilities()
    loss, metrics = objectives.log_mean(output, CONFIG)
    quiet_star, expected = quiet_star_loss(output, CONFIG)
    L_NLL = (math.log(3) + math.log(4)) / 2 / 2
    rest = quiet_star.item() - 0.75 * output.talk_nll.mean().item()
    assert loss.item() == pytest.approx(rest + 0.75 * L_NLL, rel=1e-5)
    assert metrics["talk_nll"] == expected["talk_nll"]
    assert output.talk_nll.mean() > L_NLL  # Jensen


def test_rlp():
    """1.5 times r = 2, 1, -3 and 1, 0, -1, and no language loss."""
    loss, metrics = objectives.rlp(output_of(), CONFIG)
    assert metrics["reward"] == 0
    policy = 1.5 * (2 + 2 - 9 + 4 - 0 - 6) / 6
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)
    assert loss.item() == pytest.approx(10 * policy, rel=1e-5)


@pytest.mark.parametrize("objective", ALL)
def test_missing_targets_do_not_count(objective):
    """A position without all A targets, whatever its losses are."""
    valid, base_nll = VALID.clone(), BASE_NLL.clone()
    target_mask = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 1] = target_mask[1, 3] = False  # x_3 of the second text: j = 1, a = 1
    base_nll[1, 2] = 0
    losses = []
    for filler in (5.0, 7.0):
        talk = TALK_NLL.clone()
        talk[0, 1] = filler
        output = output_of(talk, valid)._replace(base_nll=base_nll, target_mask=target_mask)
        losses.append(objective(output, CONFIG)[0].item())
    assert losses[0] == losses[1] == objective(output, CONFIG, (7, 1))[0].item()


@pytest.mark.parametrize("objective", ALL)
def test_rewards_are_constants(objective):
    """A policy weight changes nothing of the gradient through the predictions after thoughts."""
    gradients = []
    for weight in (0.0, 10.0):
        talk = TALK_NLL.clone().requires_grad_()
        loss, _ = objective(output_of(talk), replace(CONFIG, policy_weight=weight))
        if loss.requires_grad:
            loss.backward()
        gradients.append(talk.grad)
    assert (gradients[0] is None) == (objective is objectives.rlp)
    assert gradients[0] is None or torch.equal(*gradients)


@pytest.mark.parametrize("objective", ALL)
def test_splitting_a_batch_changes_neither_gradient_nor_loss(objective):
    ids, mask = random_ids(4, 12), torch.ones(4, 12, dtype=torch.bool)
    mask[0, 3] = mask[2, 7:] = False
    loss_of, results = objectives.trained_by(objective), []
    for size in (None, 3):
        model, settings = tiny_quiet_star(), train.Settings(micro_batch=size, positions=5)
        generator = torch.Generator().manual_seed(7)
        metrics = train.batch_gradient(model, loss_of, ids, mask, settings, 2, generator)
        gradient = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((metrics["loss"], gradient))
    (loss, whole), (other, parts) = results
    assert other == pytest.approx(loss, rel=1e-5)
    for name in whole:
        tolerance = 1e-5 * (1 + whole[name].abs().max())
        assert (whole[name] - parts[name]).abs().max() < tolerance, name


def test_thoughts_are_sampled_at_the_temperature_given():
    model, ids = tiny_quiet_star(), random_ids(2, 12)
    mask, positions = torch.ones(2, 12, dtype=torch.bool), torch.arange(10)
    for temperature in (1.0, 3.0):
        seen = []

        def objective(output, config, counts, seen=seen):
            seen.append(output.thought_ids)
            return output.base_nll.sum(), {}

        loss_of = objectives.trained_by(objective, temperature)
        loss_of(model, ids, mask, positions, (22, 20), torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(3)
        expected = model(ids, temperature=temperature, generator=generator).thought_ids
        assert torch.equal(seen[0], expected)


# ------------------------------------------------------------------------------------ the controls


@pytest.mark.parametrize(
    ("loss_of", "tokens"),
    [(objectives.pause_loss, [23]), (objectives.random_loss, list(range(23)))],
)
def test_forced_thoughts(monkeypatch, loss_of, tokens):
    """2 sequences, 3 thoughts of 3 tokens at 40 positions, 23 tokens in the vocabulary."""
    model, ids, positions = tiny_quiet_star(), random_ids(2, 42), torch.arange(40)
    monkeypatch.setattr(
        objectives.thoughts, "quiet_star_loss", lambda output, config, counts: output
    )
    generator = torch.Generator().manual_seed(3)
    targets = torch.ones_like(ids) > 0
    thoughts = loss_of(model, ids, targets, positions, (82, 80), generator).thought_ids
    assert thoughts.shape == (2, 3, 40, 3)
    assert model.start_id == 23
    assert thoughts.unique().tolist() == tokens  # 720 draws: one is missing once in 1e12


@pytest.mark.parametrize("name", ["pause", "random"])
def test_thoughts_of_a_control_are_forced_and_not_reinforced(name):
    """The metrics are those of the language losses after just these thoughts."""
    model, ids = tiny_quiet_star(policy_weight=5.0), random_ids(2, 9)
    generator = torch.Generator().manual_seed(7)
    forced = {
        "pause": torch.full((2, 3, 7, 3), model.start_id),
        "random": torch.randint(23, (2, 3, 7, 3), generator=generator),
    }[name]
    mask, positions = torch.ones(2, 9, dtype=torch.bool), torch.arange(7)
    loss_of, generator = getattr(objectives, f"{name}_loss"), torch.Generator().manual_seed(7)
    counts = count_targets(mask, positions, 2)
    loss, metrics = loss_of(model, ids, mask, positions, counts, generator)
    output = model(ids, forced)
    expected = output.base_nll.mean() / 2 + output.talk_nll.mean() / 2
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == metrics["loss"].item()
    assert metrics["policy_loss"] == 0


# ------------------------------------------------------------------------- models to begin with


def test_without_mixing_only_the_thought_is_heard(tmp_path, monkeypatch):
    """w = 0 exactly, also after saving and loading; the mixing head is not trained."""
    monkeypatch.setattr(train, "thinking_model", lambda *run: tiny_quiet_star())
    model = objectives.begin_without_mixing()
    assert not model(random_ids(2, 9)).weight.any()
    save_quiet_star(model, tmp_path)
    assert not load_quiet_star(tmp_path)(random_ids(2, 9)).weight.any()
    loss, _ = objectives.rlp(model(random_ids(2, 9)), model.config)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.mixing_head.parameters())
    assert model.start_embedding.grad.any()
