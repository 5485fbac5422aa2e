"""Paper, section 4.3: teacher-forced look-ahead. Every target lines up."""

import itertools

import pytest
import torch
from tiny import random_ids, tiny_quiet_star

from thoughts import quiet_star_loss


@pytest.mark.parametrize("changed", range(10))
def test_a_token_changes_only_what_it_may(changed):
    """Change ids[m]: a result moves exactly if it has read position m, or has it as its target."""
    model = tiny_quiet_star(n_true=3)
    ids = random_ids(1, 10)
    positions = torch.arange(9)
    forced = random_ids(27, 3).view(1, 3, 9, 3)
    before = model(ids, thought_ids=forced, positions=positions)
    ids[0, changed] = (ids[0, changed] + 1) % 23
    after = model(ids, thought_ids=forced, positions=positions)

    for t in range(9):
        moved = bool(before.base_nll[0, t] != after.base_nll[0, t])
        assert moved == (changed <= t + 1), f"base_nll[{t}]"
    for j in range(9):
        moved = (before.thought_logp[0, :, j] != after.thought_logp[0, :, j]).all()
        assert bool(moved) == (changed <= j), f"thought_logp at {j}"
        for a in range(3):
            if j + 1 + a > 9:
                continue
            moved = (before.talk_nll[a, 0, :, j] != after.talk_nll[a, 0, :, j]).all()
            assert bool(moved) == (changed <= j + 1 + a), f"talk_nll[{a}] at {j}"
            moved = (before.weight[a, 0, :, j] != after.weight[a, 0, :, j]).all()
            assert bool(moved) == (changed <= j + a), f"weight[{a}] at {j}"


def test_valid_says_which_targets_exist():
    model = tiny_quiet_star(n_true=3)
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 4] = False
    output = model(random_ids(1, 8), positions=torch.tensor([0, 2, 5, 6]), target_mask=mask)
    # targets j + 1 + a; 4 is masked, 8 and 9 are beyond the text
    expected = [[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]]
    assert output.valid[:, 0].int().tolist() == expected
    assert not output.talk_nll[~output.valid[:, :, None].expand_as(output.talk_nll)].any()
    assert output.base_nll[0, 3] == 0
    _, metrics = quiet_star_loss(output, model.config)  # of position 0, the only one with all three
    assert abs(metrics["init_nll"] - output.base_nll[0, :3].mean()) < 1e-6


def test_default_positions_have_all_targets():
    output = tiny_quiet_star(n_true=3)(random_ids(2, 8))
    assert output.positions.tolist() == [0, 1, 2, 3, 4]
    assert output.valid.all()


def test_a_subset_of_positions_estimates_the_same_loss():
    """The mean over all subsets of 2 of 5 positions is the loss and gradient of all 5."""
    model = tiny_quiet_star(n_thoughts=2, thought_length=2, policy_weight=0.7)
    ids, forced = random_ids(1, 7), random_ids(10, 2).view(1, 2, 5, 2)

    def loss_and_gradient(positions):
        index = torch.tensor(positions)
        output = model(ids, thought_ids=forced[:, :, index], positions=index)
        loss, _ = quiet_star_loss(output, model.config)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([loss.detach()[None], *(g.flatten() for g in gradient)])

    subsets = list(itertools.combinations(range(5), 2))
    mean = sum(map(loss_and_gradient, subsets)) / len(subsets)
    everywhere = loss_and_gradient(range(5))
    assert (mean - everywhere).abs().max() < 4e-6 * everywhere.abs().max()
