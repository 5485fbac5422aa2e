"""The tricks of fast/ where their own parts can go wrong; test_same.py has the rest."""

import pytest
import test_parallel_thoughts as parallel
import torch
from tiny import random_ids, tiny_quiet_star

import fast
from fast import attention
from model import KVCache, MistralConfig
from thoughts import QuietStar, ThoughtConfig, quiet_star_loss


@pytest.mark.parametrize("fused", [("cpu",), ()])
@pytest.mark.parametrize("window", [None, 4, 1])
def test_both_kernels_and_several_blocks_equal_the_dense_mask(window, fused, monkeypatch):
    """The private operator and the lines used elsewhere, with blocks smaller than the positions."""
    monkeypatch.setattr(attention, "FUSED", fused)
    monkeypatch.setattr(attention, "BLOCK", 2)
    monkeypatch.setattr(QuietStar, "thought_cache", fast.FastThoughtCache)
    parallel.test_thought_cache_equals_dense_mask(window)


@pytest.mark.parametrize("fused", [("cpu",), ()])
def test_gradient_is_the_derivative(fused, monkeypatch):
    """The backward pass written by hand against finite differences, in float64."""
    monkeypatch.setattr(attention, "FUSED", fused)
    monkeypatch.setattr(attention, "BLOCK", 1)
    torch.manual_seed(0)
    shapes = [(1, 2, 4, 6)] * 2 + [(1, 4, 4, 6), (1, 2, 4, 6), (1, 2, 4, 6)] * 2
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attend(text_k, text_v, *steps):
        text = KVCache(MistralConfig(23, 16, 32, 1, 4, 2))
        text.layers = [(text_k, text_v)]
        cache = fast.FastThoughtCache(text, torch.tensor([0, 2]), ThoughtConfig(2, 0, 1))
        return cache.attend(0, *steps[:3]), cache.attend(0, *steps[3:])

    assert torch.autograd.gradcheck(attend, tensors)


def test_blocks_leave_out_what_nobody_sees():
    """Positions 0, 2 and 5 of 7 tokens, two at a time, two thoughts each."""
    visible = torch.arange(7) <= torch.tensor([0, 2, 5]).repeat(2)[:, None]
    blocks = [(b.rows, b.keys) for b in attention.blocks_of(visible, 2)]
    assert blocks == [(slice(0, 3), slice(0, 6)), (slice(3, 6), slice(0, 6))]


def test_a_changed_mask_is_followed(monkeypatch):
    """Who edits thought_mask edits both paths: here a thought sees every other token only."""
    import thoughts

    mask = thoughts.thought_mask

    def every_other(origin, step, T, window):
        visible = mask(origin, step, T, window)
        visible[:, 1::2] &= torch.arange(1, T + step, 2) >= T  # none of the odd text keys
        visible[:, T : T + step - 1] &= torch.arange(step - 1) % 2 == 0  # nor of the own odd steps
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
        assert (plain - quick).abs().max() < 1e-6 * max(1, plain.abs().max())


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
