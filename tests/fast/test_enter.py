"""The check on entering fast/: it leaves the model and the random numbers as they were."""

import pytest
import torch
from tiny import random_ids, tiny_quiet_star

import fast


def enter(model, T=20):
    ids = random_ids(3, T)
    return fast.enter(model, ids, ids >= 0)


def test_the_check_changes_nothing():
    model, state = tiny_quiet_star(), torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    enter(model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name


def test_an_error_in_the_check_leaves_the_mixing_head(monkeypatch):
    model = tiny_quiet_star()
    before = model.mixing_head[4].weight.detach().clone()

    def broken(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "talk", broken)
    with pytest.raises(RuntimeError, match="broken"):
        enter(model)
    assert torch.equal(model.mixing_head[4].weight, before)


def test_more_true_tokens_than_the_probe_has(monkeypatch):
    monkeypatch.setattr(fast, "PROBE", 4)
    enter(tiny_quiet_star(n_true=9))


def test_a_difference_between_sequences_is_found(monkeypatch):
    """Here the second sequence reads the keys of the first."""
    attend = fast.FastThoughtCache.attend

    def mixed(self, layer, q, k, v):
        return attend(self, layer, q, k[:1].expand_as(k), v)

    monkeypatch.setattr(fast.FastThoughtCache, "attend", mixed)
    with pytest.raises(ValueError, match="Leave out --fast"):
        enter(tiny_quiet_star())
