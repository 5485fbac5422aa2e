"""The counted cost of a step against that of a step that is run."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import fast
import train
from fast.attention import RecomputingThoughtCache
from model import Mistral, MistralConfig
from support import memory
from thoughts import QuietStar, ThoughtCache, ThoughtConfig, quiet_star_loss

SHAPE = MistralConfig(199, 48, 80, 5, 4, 2)
# All log p have a gradient, which is most memory: negative rewards are kept.
THOUGHTS = ThoughtConfig(2, 2, 1, init_id=0, policy_weight=1.0, drop_negative=False)


def apply(model, checkpointing):
    """fast.apply as on a GPU."""
    fast.apply(model, checkpointing=checkpointing)
    model.thought_cache = RecomputingThoughtCache if checkpointing else ThoughtCache


PATHS = {
    "plain": None,
    "fast": partial(apply, checkpointing=False),
    "checkpointing": partial(apply, checkpointing=True),
}


def really(path, shape, sequences, T, J, dtype=torch.float32):
    """A step on real tensors: what memory.Watch sees, and the bytes that autograd saves."""
    torch.manual_seed(0)
    model = QuietStar(Mistral(shape).to(dtype), THOUGHTS)
    torch.nn.init.normal_(model.mixing_head[4].weight)
    if PATHS[path]:
        PATHS[path](model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    watch, saved = memory.Watch(model), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(shape.vocab_size, (sequences, T))
    with (
        mock.patch.object(F, "scaled_dot_product_attention", memory.one_kernel_attention),
        mock.patch.object(F, "rms_norm", memory.one_kernel_norm),
        watch,
    ):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(ids, positions=torch.arange(J))
            loss = quiet_star_loss(output, THOUGHTS, (sequences * (T - 1), sequences * J))[0]
        del output
        loss.backward()
    return watch, sum(saved.values())


@pytest.mark.parametrize(
    ("path", "sequences", "T", "J", "dtype"),
    [
        ("plain", 1, 40, 38, torch.float32),
        ("fast", 3, 24, 10, torch.float32),
        ("checkpointing", 1, 40, 38, torch.float32),
        ("checkpointing", 1, 90, 8, torch.bfloat16),
    ],
)
def test_memory_is_what_a_step_keeps(path, sequences, T, J, dtype):
    """Within 10 % of the peak of all tensors that are alive, and never below it."""
    planned = memory.step_bytes(SHAPE, THOUGHTS, sequences, T, J, dtype, PATHS[path])
    watch, saved = really(path, SHAPE, sequences, T, J, dtype)
    assert watch.peak <= planned <= 1.1 * watch.peak
    if path == "plain":  # checkpointing and log p without logits save what hooks do not see
        assert saved < planned
        assert saved > 0.5 * planned


def test_counts_are_linear_in_layers():
    """Of 5 layers, from 3 and 4."""
    step = THOUGHTS, 1, 20, 8, torch.float32, PATHS["checkpointing"]
    planned = memory.step_operations(SHAPE, *step)
    assert planned == memory.run_step(SHAPE, *step, memory.Watch).operations
    watch, _ = really("checkpointing", SHAPE, 1, 20, 8)
    assert abs(watch.operations / planned - 1) < 0.01


def test_flops_are_those_of_the_matrix_products():
    """6 per weight and token of the layers and of the head, and of the mixing head."""
    T, J, N, K, A, D, V = 20, 8, 2, 2, 1, 48, 199
    layer = D * D * 2 + D * 24 * 2 + 3 * D * 80
    M = T + N * J * (K + A + 1)
    weights = M * 5 * layer + V * D * (T - 1 + N * J * (K + A)) + N * J * A * (3 * D * D + D)
    attention = 12 * 5 * 4 * 12 * (T * T / 2 + N * J * 4 * (T + 5 / 2))
    flops = memory.step_flops(SHAPE, THOUGHTS, T, J)
    assert 6 * weights < flops < 1.1 * (6 * weights + attention)


@pytest.mark.parametrize(
    ("dtype", "masters", "options"),
    [("float32", True, {}), ("bfloat16", True, {"fast": True}),
     ("bfloat16", False, {"fast": True})],
)  # fmt: skip
def test_weights_and_optimiser(monkeypatch, dtype, masters, options):
    monkeypatch.setattr(memory, "step_bytes", lambda *step: 7.0)
    settings = train.Settings(dtype=dtype, masters=masters, context=16, batch_size=1, **options)
    plan = memory.memory_plan(SHAPE, THOUGHTS, settings, PATHS["fast"])
    model = QuietStar(Mistral(SHAPE).to(memory.DTYPES[dtype]), THOUGHTS)
    AdamW = fast.apply(model, masters=masters) if options else torch.optim.AdamW
    optimizer = train.make_optimizer(model, settings, AdamW)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values()]
    state = sum(x.nbytes for x in state if isinstance(x, torch.Tensor) and x.dim())
    assert plan["optimiser"] == state
    assert plan["weights"] == plan["gradients"] == sum(p.nbytes for p in model.parameters())
    assert plan["activations"] == 7
    assert plan["total"] == sum(size for name, size in plan.items() if name != "total")


def test_operations_do_not_rise(monkeypatch):
    """Of Mistral 7B with the preset, as in docs/cost.md; a language-model step for comparison.

    Counted with one and with two layers, where operations, unlike bytes, are linear already.
    """

    def of_all_layers(shape, cost_of):
        one, two = (cost_of(replace(shape, num_hidden_layers=layers)) for layers in (1, 2))
        return one + (shape.num_hidden_layers - 1) * (two - one)

    monkeypatch.setattr(memory, "of_all_layers", of_all_layers)
    shape = MistralConfig(32000, 4096, 14336, 32, 32, 8, sliding_window=4096)
    step, dtype = (shape, ThoughtConfig(), 1, 256), torch.bfloat16
    assert memory.step_operations(*step, 252, dtype, PATHS["fast"]) <= 32_200
    assert memory.step_operations(*step, 252, dtype, PATHS["checkpointing"]) <= 41_100
    assert memory.step_operations(*step, 0, dtype, None) <= 2_250


def test_advice_fits(monkeypatch):
    """The first options that fit; a setting that is so already is not advised."""

    def plan(shape, thoughts, settings, apply):
        size = settings.micro_batch or settings.batch_size
        size *= (settings.positions or 64) / (2 if settings.checkpointing else 1)
        return {"total": 1e9 * size / (2 if settings.dtype == "bfloat16" else 1)}

    monkeypatch.setattr(memory, "memory_plan", plan)
    settings = train.Settings(context=68, batch_size=8)
    given = SHAPE, THOUGHTS, settings, train.fast_path
    assert memory.advice(*given, 100e9) == "--micro-batch 1 needs 64.0 GB"
    assert memory.advice(*given, 40e9) == "--micro-batch 1 --fast --checkpointing needs 32.0 GB"
    assert memory.advice(*given, 10e9) == (
        "--micro-batch 1 --fast --checkpointing --positions 32 --dtype bfloat16 --no-masters "
        "needs 8.0 GB"
    )
    assert "smaller --context" in memory.advice(*given, 1e9)
    few = train.Settings(context=68, batch_size=1, positions=20)
    line = memory.advice(SHAPE, THOUGHTS, few, train.fast_path, 10e9)
    assert line == "--micro-batch 1 --fast --checkpointing needs 10.0 GB"
    short = train.Settings(context=18, batch_size=1)  # 16 positions: 32 are not advised
    line = memory.advice(SHAPE, THOUGHTS, short, train.fast_path, 17e9)
    expected = "--micro-batch 1 --fast --checkpointing --dtype bfloat16 --no-masters needs 16.0 GB"
    assert line == expected
    monkeypatch.setattr(memory, "free_memory", lambda device: 100e9)
    with pytest.raises(ValueError, match=r"needs 512.0 GB and 100.0 are free on cpu: --micro-b"):
        memory.check_memory(*given, "cpu")
    monkeypatch.setattr(memory, "free_memory", lambda device: 600e9)
    memory.check_memory(*given, "cpu")
