"""Paper, section 4.4: the reward, on numbers worked out by hand."""

import torch

from thoughts import Output, ThoughtConfig, quiet_star_loss, reward

# A = 2, B = 2, N = 3, J = 1: nll of the two true tokens after each of three thoughts
TALK_NLL = torch.tensor(
    [
        [[[1.0], [2.0], [3.0]], [[0.5], [0.5], [2.0]]],
        [[[1.0], [1.0], [4.0]], [[0.5], [1.5], [1.0]]],
    ]
)
BASE_NLL = torch.tensor([[9.0, 1.5, 2.0, 9.0], [9.0, 1.0, 0.25, 9.0]])
POSITIONS = torch.tensor([1])
VALID = torch.ones(2, 2, 1, dtype=torch.bool)


def test_three_thoughts_of_two_sequences():
    """R = -2, -3, -7 (mean -4) and -1, -2, -3 (mean -2)."""
    r = reward(TALK_NLL, BASE_NLL, POSITIONS, VALID)
    assert r[..., 0].tolist() == [[2.0, 1.0, -3.0], [1.0, 0.0, -1.0]]


def test_a_lone_thought_is_compared_with_the_base_model():
    """R = -2 and -1; the base model's nll at j and j + 1: 1.5 + 2 and 1 + 0.25."""
    r = reward(TALK_NLL[:, :, :1], BASE_NLL, POSITIONS, VALID)
    assert r[..., 0].tolist() == [[1.5], [0.25]]


def test_a_missing_target_means_no_reward():
    valid = VALID.clone()
    valid[1, 0] = False
    r = reward(TALK_NLL, BASE_NLL, POSITIONS, valid)
    assert r[..., 0].tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]


def test_equal_thoughts_get_exactly_nothing():
    """Not what rounding leaves of R - mean R: the policy weight multiplies it by 1e6."""
    talk = torch.tensor([0.1, 0.7, 1.3]).view(3, 1, 1, 1).expand(3, 1, 7, 1)
    valid = torch.ones(3, 1, 1, dtype=torch.bool)
    assert not reward(talk, BASE_NLL[:1], torch.tensor([0]), valid).any()


def test_the_policy_weight_of_the_authors_is_for_a_mean_over_tokens():
    """1e6 / K of the sum over the K = 2 tokens, with r = 2, 1, 0, 1, 0, 0 and log p = -1 each."""
    output = output_of(-torch.ones(2, 3, 1, 2))
    loss, metrics = quiet_star_loss(output, ThoughtConfig(3, 2, 2))
    language = (metrics["base_nll"] + metrics["talk_nll"]) / 2
    assert abs(metrics["policy_loss"] - 8 / 6) < 1e-6
    assert abs((loss - language) / 5e5 - 8 / 6) < 1e-5


def test_reward_is_a_constant():
    talk = TALK_NLL.clone().requires_grad_(True)
    assert not reward(talk, BASE_NLL, POSITIONS, VALID).requires_grad


def output_of(thought_logp):
    return Output(
        thought_ids=torch.zeros(2, 3, 1, 1, dtype=torch.long),
        thought_logp=thought_logp,
        base_nll=BASE_NLL,
        talk_nll=TALK_NLL,
        weight=torch.tensor([0.5, 0.0]).view(2, 1, 1, 1).expand(2, 2, 3, 1),  # mean 0.25
        valid=VALID,
        positions=POSITIONS,
        target_mask=torch.ones(2, 5, dtype=torch.bool),
    )


def test_loss_by_hand():
    """log p = -1 .. -6; r without negatives 2, 1, 0 and 1, 0, 0; mean over 6 thoughts."""
    logp = -torch.arange(1.0, 7).view(2, 3, 1, 1)
    config = ThoughtConfig(3, 1, 2, base_weight=0.25, policy_weight=10.0)
    loss, metrics = quiet_star_loss(output_of(logp), config)
    base = (9 + 1.5 + 2 + 9 + 9 + 1 + 0.25 + 9) / 8
    talk = (12 / 2 + 6 / 2) / 6
    policy = (2 * 1 + 1 * 2 + 1 * 4) / 6
    assert abs(metrics["base_nll"] - base) < 1e-6
    assert abs(metrics["talk_nll"] - talk) < 1e-6
    assert abs(metrics["policy_loss"] - policy) < 1e-6
    assert abs(loss - (0.25 * base + 0.75 * talk + 10 * policy)) < 1e-5
    assert abs(metrics["reward"] - (2 + 1 + 1) / 6) < 1e-6
    assert metrics["rewarded"] == 1  # in each of both sequences, some thought
    assert abs(metrics["entropy"] - (1 + 2 + 3 + 4 + 5 + 6) / 6) < 1e-6
    assert abs(metrics["weight"] - 0.25) < 1e-6
    # the base model's mean over the two tokens of talk_nll: 3.5 / 2 and 1.25 / 2
    assert abs(metrics["init_nll"] - (1.75 + 0.625) / 2) < 1e-6


def test_negative_rewards_are_kept_if_asked():
    logp = -torch.arange(1.0, 7).view(2, 3, 1, 1)
    config = ThoughtConfig(3, 1, 2, policy_weight=1.0, drop_negative=False)
    _, metrics = quiet_star_loss(output_of(logp), config)
    assert abs(metrics["policy_loss"] - (2 + 2 - 9 + 4 + 0 - 6) / 6) < 1e-6
