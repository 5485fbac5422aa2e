"""Padding never changes a loss or gradient."""

import pytest
import torch
from tiny import random_ids, tiny_quiet_star

from thoughts import count_targets, quiet_star_loss


def loss_and_gradient(model, output, counts=None):
    model.zero_grad()
    loss, metrics = quiet_star_loss(output, model.config, counts)
    loss.backward()
    return metrics, {name: p.grad.clone() for name, p in model.named_parameters()}


def same(one, other):
    """Whether two dictionaries of tensors agree, to rounding."""
    assert one.keys() == other.keys()
    scales = {name: max(1.0, value.abs().max().item()) for name, value in one.items()}
    return all((one[name] - other[name]).abs().max() < 2e-6 * scales[name] for name in one)


@pytest.mark.parametrize("n_thoughts", [1, 3])
def test_padding_on_the_right(n_thoughts):
    """The same text with four arbitrary tokens behind it that are no targets."""
    model = tiny_quiet_star(n_thoughts=n_thoughts).double()  # rounding would hide what is small
    ids = random_ids(2, 9)
    padded = torch.cat([ids, random_ids(2, 4, seed=9)], 1)
    mask = torch.arange(13).expand(2, 13) < 9
    alone = loss_and_gradient(model, model(ids, temperature=0))
    together = loss_and_gradient(model, model(padded, target_mask=mask, temperature=0))
    for one, other in zip(alone, together, strict=True):
        assert same(one, other)


def test_a_batch_without_targets_is_no_loss():
    """0, not NaN: documents of one token each, say."""
    model = tiny_quiet_star()
    output = model(random_ids(2, 8), target_mask=torch.zeros(2, 8, dtype=torch.bool))
    loss, metrics = quiet_star_loss(output, model.config)
    assert loss == 0
    assert not any(metrics.values())


def test_sequences_of_different_lengths_are_a_batch():
    """Texts of 6 and 9 tokens in one padded batch = the two alone with the batch's counts."""
    model = tiny_quiet_star().double()
    short, long = random_ids(1, 6), random_ids(1, 9, seed=2)
    padded = torch.cat([torch.cat([short, torch.zeros(1, 3, dtype=torch.long)], 1), long])
    mask = torch.arange(9) < torch.tensor([[6], [9]])
    positions = torch.arange(7)
    counts = count_targets(mask, positions, 2)
    assert counts == (5 + 8, 4 + 7)
    batch = loss_and_gradient(model, model(padded, target_mask=mask, temperature=0))
    parts = [loss_and_gradient(model, model(text, temperature=0), counts) for text in (short, long)]
    for whole, one, other in zip(batch, *parts, strict=True):
        assert same(whole, {name: one[name] + other[name] for name in one})
