"""The tricks of fast/ where their own parts can go wrong; test_same.py has the rest."""

import pytest
import test_parallel_thoughts as parallel
import torch
from tiny import random_ids, tiny_quiet_star

import fast
from fast import attention
from model import KVCache, MistralConfig
from thoughts import QuietStar, ThoughtConfig, quiet_star_loss, thought_mask

CACHES = [attention.FastThoughtCache, attention.RecomputingThoughtCache]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("passes", [[1, 1, 1, 1, 1], [1, 1, 3], [5]])
@pytest.mark.parametrize("window", [None, 4, 1])
def test_both_caches_equal_the_dense_mask(window, passes, cache, monkeypatch):
    """That of a CPU, with blocks smaller than the positions, and that of other devices.

    The test that is called asserts.
    """
    monkeypatch.setattr(attention, "BLOCK", 2)
    monkeypatch.setattr(QuietStar, "thought_cache", cache)
    parallel.test_thought_cache_equals_dense_mask(window, passes)


def test_a_wrong_mask_is_found(monkeypatch):
    """The test above fails if the fast attention does not follow the mask."""
    monkeypatch.setattr(attention, "thought_mask", lambda *a: thought_mask(*a).roll(1, 2))
    with pytest.raises(AssertionError):
        monkeypatch.setattr(QuietStar, "thought_cache", attention.FastThoughtCache)
        parallel.test_thought_cache_equals_dense_mask(None, [5])


def test_gradient_is_the_derivative(monkeypatch):
    """The backward pass written by hand against finite differences, in float64, two passes."""
    monkeypatch.setattr(attention, "BLOCK", 1)
    torch.manual_seed(0)
    shapes = [(1, 2, 4, 6)] * 2 + [(1, 4, 4, 6), (1, 2, 4, 6), (1, 2, 4, 6)]
    shapes += [(1, 4, 8, 6), (1, 2, 8, 6), (1, 2, 8, 6)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attend(text_k, text_v, *steps):
        text = KVCache(MistralConfig(23, 16, 32, 1, 4, 2))
        text.layers = [(text_k, text_v)]
        cache = attention.FastThoughtCache(text, torch.tensor([0, 2]), ThoughtConfig(2, 1, 1))
        return cache.attend(0, *steps[:3]), cache.attend(0, *steps[3:])

    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


def test_blocks_leave_out_what_nobody_sees():
    """Positions 0, 2 and 5 of 7 tokens, two at a time, two thoughts each, three queries each."""
    visible = torch.arange(7) <= torch.tensor([0, 2, 5]).repeat(2)[:, None]
    blocks = [(b.rows, b.keys) for b in attention.blocks_of(visible[:, None].expand(6, 3, 7), 2)]
    assert blocks == [(slice(0, 9), slice(0, 6)), (slice(9, 18), slice(0, 6))]


def test_a_changed_mask_is_followed(monkeypatch):
    """Who edits thought_mask edits both paths: here a thought sees every other token only."""
    import thoughts

    mask = thoughts.thought_mask

    def every_other(origin, steps, T, window):
        visible = mask(origin, steps, T, window)
        visible[..., 1:T:2] = False  # none of the odd text keys
        visible[:, [step > 1 for step in steps], T] = False  # nor start, after it
        return visible

    for module in (thoughts, attention):
        monkeypatch.setattr(module, "thought_mask", every_other)
    results = []
    for apply in (False, True):
        model = tiny_quiet_star()
        if apply:
            fast.apply(model)
        loss, _ = quiet_star_loss(model(random_ids(2, 9), temperature=0), model.config)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, quick in zip(*results, strict=True):
        assert (plain - quick).abs().max() < 1e-5 * max(1, plain.abs().max())


@pytest.mark.parametrize("window", [None, 3])
def test_checkpointing_changes_nothing(window):
    """The same loss and, to the last bit but rounding, the same gradient."""
    results = []
    for checkpointing in (False, True):
        model = tiny_quiet_star(window=window)
        fast.apply(model, checkpointing=checkpointing)
        output = model(random_ids(2, 9), generator=torch.Generator().manual_seed(0))
        loss, _ = quiet_star_loss(output, model.config)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        assert (plain - again).abs().max() < 1e-6
