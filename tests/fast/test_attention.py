"""The tricks of fast/ where their own parts can go wrong; test_same.py has the rest."""

import pytest
import test_parallel_thoughts as parallel
import torch
from tiny import random_ids, tiny_quiet_star
from torch.nn.functional import silu

import fast
import thoughts
from fast import attention, logp
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


def test_blocks_leave_out_what_nobody_sees(monkeypatch):
    """Positions 0, 2 and 5 of 7 tokens, two at a time, two thoughts each, three queries each.

    A query sees three tokens; the second query of a thought is one token ahead.
    """
    monkeypatch.setattr(attention, "BLOCK", 2)
    last = torch.tensor([0, 2, 5]).repeat(2)[:, None, None] + torch.tensor([[0], [1], [0]])
    visible = (torch.arange(7) <= last) & (torch.arange(7) > last - 3)  # [6, 3, 7]
    blocks = [(b.rows, b.keys) for b in attention.blocks_of(visible, 2)]
    first, second = slice(0, 4), slice(3, 7)  # what positions 0 and 2 see, and what 5 sees
    assert blocks == [
        (slice(0, 6), first), (slice(9, 15), first), (slice(6, 9), second), (slice(15, 18), second)
    ]  # fmt: skip


def test_a_changed_mask_is_followed(monkeypatch):
    """Who edits thought_mask edits both paths: here a thought sees every other token only."""
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
def test_checkpointing_changes_nothing(window, monkeypatch):
    """The same loss and, to the last bit but rounding, the same gradient; all layers run twice."""
    results, runs = [], []
    monkeypatch.setattr("model.ACTIVATION", lambda x: runs.append(checkpointing) or silu(x))
    for checkpointing in (False, True):
        model = tiny_quiet_star(window=window)
        fast.apply(model, checkpointing=checkpointing)
        output = model(random_ids(2, 9), generator=torch.Generator().manual_seed(0))
        loss, _ = quiet_star_loss(output, model.config)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        assert (plain - again).abs().max() < 1e-6
    assert runs.count(True) == 2 * runs.count(False) > 0


def test_log_p_in_parts_is_that_of_the_whole(monkeypatch):
    """Excluded tokens, a temperature, 3 rows at once; nothing is computed twice without need."""
    monkeypatch.setattr(logp, "ROWS", 3)
    rows, compute = [], thoughts.token_logits
    monkeypatch.setattr(
        thoughts,
        "token_logits",
        lambda h, *more: rows.append(h[..., 0].numel()) or compute(h, *more),
    )
    torch.manual_seed(0)
    h, head, d_logp = torch.randn(2, 4, 6), torch.randn(9, 6), torch.randn(2, 4)
    d_logp[0, 1] = d_logp[1, :2] = 0
    ids, results = random_ids(2, 4, 7), []
    for path in (thoughts, logp):
        leaves = [x.clone().requires_grad_() for x in (h, head)]
        value = path.token_logp(path.token_logits(*leaves, (7, 8)), ids, 2.5)
        value.backward(d_logp)
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for plain, quick in zip(*results, strict=True):
        assert (plain - quick).abs().max() < 1e-5
    assert rows == [8, 8, 3, 2]


def test_logits_that_were_changed_are_refused():
    """The backward pass would not see the change: other logits, and the same ones in place."""
    logits, ids = fast.token_logits(torch.randn(2, 6), torch.randn(9, 6)), torch.tensor([1, 2])
    fast.token_logp(logits, ids)
    with pytest.raises(ValueError, match="logits were changed"):
        fast.token_logp(logits / 2, ids)
    logits /= 2
    with pytest.raises(ValueError, match="logits were changed"):
        fast.token_logp(logits, ids)
