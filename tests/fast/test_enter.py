"""The check on entering fast/, which leaves model and random numbers as they were; what it applies.

The check finds every difference between the two paths that is more than rounding.
"""

import math

import pytest
import torch
from tiny import random_ids, tiny_quiet_star
from torch import nn

import fast
from fast.adamw import BFloat16AdamW
from fast.layers import again
from fast.linear import linear
from model import Mistral, MistralConfig
from thoughts import QuietStar, ThoughtCache, ThoughtConfig


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


def test_the_check_reads_a_small_copy_in_float32(monkeypatch):
    """Two of three layers, with a tied head; the model keeps its layers and its dtype."""
    torch.manual_seed(0)
    base = Mistral(MistralConfig(23, 16, 32, 3, 4, 2, tie_word_embeddings=True))
    model = QuietStar(base, ThoughtConfig(n_true=2)).bfloat16()
    small = fast.first_layers(model)
    assert len(small.model.layers) == 2 and len(model.model.layers) == 3
    assert small.model.lm_head.weight is small.model.embed_tokens.weight
    theirs = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, theirs[name].float()), name
        assert parameter.data_ptr() != theirs[name].data_ptr(), name
    seen = []
    monkeypatch.setattr(fast, "probe", lambda model, *_: seen.append(model) or {})
    enter(model)
    assert [len(x.model.layers) for x in seen] == [2, 2]
    assert {p.dtype for p in seen[1].parameters()} == {torch.float32}
    assert model.start_embedding.dtype == torch.bfloat16


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


def test_every_output_and_parameter_is_compared(monkeypatch):
    """At three positions, for the targets only; also where the mixing head is still 0.

    No thought is sampled: rounding might change it.
    """
    monkeypatch.setattr("thoughts.sample_tokens", None)
    model, ids = tiny_quiet_star(), random_ids(1, 20)
    nn.init.zeros_(model.mixing_head[4].weight)
    found = fast.probe(model, ids, ids > 3)
    names = "base_nll", "talk_nll", "weight", "thought_logp"
    base_nll, talk_nll, *_ = outputs = [found.pop(name) for name in names]
    assert torch.equal(base_nll != 0, ids[:, 1:] > 3)
    assert talk_nll.shape == (2, 1, 3, 3)
    assert {*found} == {f"the gradient of {name}" for name, _ in model.named_parameters()}
    assert all(value.any() for value in (*outputs, *found.values()))


def test_what_the_check_compares(monkeypatch):
    """Both paths, on the first tokens of two sequences; then all is applied that was asked."""
    calls, ids = [], random_ids(3, 20)

    def apply(model, *options):
        calls.append(options)
        return "AdamW"

    monkeypatch.setattr(fast, "PROBE", 4)
    monkeypatch.setattr(fast, "probe", lambda _, *given: calls.append([*given]) or {})
    monkeypatch.setattr(fast, "apply", apply)
    found = fast.enter(tiny_quiet_star(), ids, ids > 3, True, True, False)
    few, targets = ids[:2, :6], ids[:2, :6] > 3
    [plain, checked, quick, applied] = calls
    assert (checked, applied, found) == ((True,), (True, True, False), "AdamW")
    for probed in (plain, quick):
        assert torch.equal(probed[0], few) and torch.equal(probed[1], targets)


GRADIENT = "the gradient of x"


@pytest.mark.parametrize("name", ["weight", GRADIENT])
def test_what_is_more_than_rounding(monkeypatch, name):
    """Twice the tolerance and NaN are refused by name, half of it is not."""
    model, ids = tiny_quiet_star(), random_ids(1, 20)
    plain = {"weight": torch.ones(4), GRADIENT: torch.ones(4)}

    def check(changes):
        results = iter([plain, plain | {n: plain[n] * (1 + x) for n, x in changes.items()}])
        monkeypatch.setattr(fast, "probe", lambda *_: next(results))
        fast.enter(model, ids, ids >= 0)

    check({name: 0.0005})
    for wrong in (0.002, math.nan):
        with pytest.raises(ValueError, match=f"thoughts.py: {name} differs by"):
            check({name: wrong})
    with pytest.raises(ValueError, match=f"{name} differs by 7e\\+02 %"):
        check({"weight": 4.0, GRADIENT: 4.0, name: 7.0})  # the largest difference


def test_differences_by_hand():
    """Relative to the tensor; a tiny gradient, to a thousandth of all; not where there is none."""
    a, b = "the gradient of a", "the gradient of b"
    plain = {a: torch.tensor([1e-5]), b: torch.tensor([1.0]), "weight": torch.zeros(1)}
    quick = {a: torch.zeros(1), b: torch.tensor([1.25]), "weight": torch.ones(1)}
    assert fast.differences(plain, quick) == pytest.approx({a: 0.01, b: 0.25})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_every_trick_is_applied(monkeypatch, checkpointing, compile):
    compiled, model = [], tiny_quiet_star()
    monkeypatch.setattr(torch, "compile", lambda half: compiled.append(half) or half)
    assert fast.apply(model, checkpointing, compile) is torch.optim.AdamW
    assert model.thought_cache is fast.FastThoughtCache
    assert (model.token_logits, model.token_logp) == (fast.token_logits, fast.token_logp)
    layers = model.model.layers
    inside = {part for part in layers.modules() if isinstance(part, nn.Linear)}
    quick = {part for part in model.modules() if getattr(part.forward, "func", None) is linear}
    assert quick == inside != set()
    halves = [half for layer in layers for half in (layer.before, layer.after)]
    assert {getattr(half, "func", None) is again for half in halves} == {checkpointing}
    assert len(compiled) == (4 if compile else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_on_other_devices(checkpointing):
    model = tiny_quiet_star().to("meta")
    fast.apply(model, checkpointing)
    expected = fast.RecomputingThoughtCache if checkpointing else ThoughtCache
    assert model.thought_cache is expected


@pytest.mark.parametrize("masters", [False, True])
def test_the_optimizer_of_bfloat16_weights(masters):
    AdamW = fast.apply(tiny_quiet_star().bfloat16(), masters=masters)
    assert (AdamW.func, AdamW.keywords) == (BFloat16AdamW, {"masters": masters})
