"""Arithmetic and memory of a step, against what torch counts and what a run needs."""

import pytest
import torch
from tiny import random_ids
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from model import Mistral, MistralConfig, save_mistral
from thoughts import QuietStar, ThoughtConfig, quiet_star_loss

pytest.importorskip("fast.attention")  # the plan is of the fast path

from tools import bench, plan


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_parameters(tied, family):
    config = MistralConfig(50, 16, 32, 3, 4, 2, tie_word_embeddings=tied, model_type=family)
    model = QuietStar(Mistral(config), ThoughtConfig(init_id=0))
    assert plan.parameters(config)[2] == sum(p.numel() for p in model.parameters())


def test_flops_of_a_step():
    """Within 10 % of the matrix products that torch counts, which include what is done twice."""
    aten = torch.ops.aten
    fused = {  # torch counts the fused attention of other devices only
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda d_out, q, k, v, *_, **__: sdpa_backward_flop_count(d_out, q, k, v)
        ),
    }
    config = MistralConfig(64, 64, 128, 2, 4, 2)
    torch.manual_seed(0)
    model = QuietStar(Mistral(config), ThoughtConfig(2, 4, 2, init_id=0, policy_weight=1.0))
    bench.PATHS["fast"](model)
    T, J = 40, 38
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    with counter:
        quiet_star_loss(model(random_ids(1, T, 64)), model.config)[0].backward()
    counted = plan.step_flops(config, model.config, plan.Work(1, 1, T, J))
    assert abs(counter.get_total_flops() / counted - 1) < 0.1


@pytest.mark.skipif(not bench.Path("/proc/self/clear_refs").exists(), reason="Linux only")
@pytest.mark.parametrize(
    ("case", "checkpointing"),
    [
        (bench.Case(96), False),
        (bench.Case(96), True),
        (bench.Case(1024, K=2, A=1, N=1, positions=16), True),
    ],
)
def test_memory_plan_of_a_scaled_down_run(case, checkpointing):
    """What a step of the small model needs over its weights is within a factor 1.6 of the plan.

    The last case is nearly all text: it is checkpointed too.
    """
    path = "fast, checkpointing" if checkpointing else "fast"
    needed = bench.in_its_own_process(bench.peak_bytes, case, path)
    work = plan.Work(1, 1, case.T, case.positions or case.T - case.A)
    thoughts = ThoughtConfig(case.N, case.K, case.A)
    planned = plan.memory_plan(bench.SMALL, thoughts, work, 4, 0, checkpointing)
    assert 1 / 1.6 < needed / (planned["gradients"] + planned["activations"]) < 1.6


def test_mistral_7b_fits_80_gb_with_the_papers_settings():
    shape, settings, thoughts = plan.read_shape({"preset": "mistral-7b"})
    assert thoughts == ThoughtConfig()
    work = plan.work_of(settings, thoughts)
    assert work == plan.Work(batch=8, at_once=1, T=256, J=252)
    planned = plan.memory_plan(shape, thoughts, work, 2, 4, checkpointing=True)
    assert 55e9 < planned["total"] < 80e9
    masters = plan.memory_plan(shape, thoughts, work, 2, 12, checkpointing=True)
    assert masters["total"] > 80e9


def test_peak_and_free_memory():
    assert plan.peak_flops(torch.device("cpu"), torch.float32) > 1e8
    assert plan.free_memory(torch.device("cpu")) > 1e8


# ------------------------------------------------------------------------------ the command line


def planned(monkeypatch, capsys, *options, free=80e9):
    """What is printed where so many bytes are free."""
    monkeypatch.setattr(plan, "free_memory", lambda device: free)
    plan.main([*options, "--device", "cpu"])
    return capsys.readouterr().out


def test_what_fits_and_what_to_try(monkeypatch, capsys):
    """Each hint that is followed is gone."""
    said = planned(monkeypatch, capsys, "--preset", "mistral-7b")
    assert said.startswith("memory plan (GB): weights 14.58, gradients 14.58, optimiser 29.17, ")
    assert "the device has 80.00 free\nit fits\n" in said
    assert "M = 7312 tokens" in said
    said = planned(monkeypatch, capsys, "--preset", "mistral-7b", "--masters")
    assert "optimiser 87.51" in said
    assert "does not fit: try --dtype bfloat16 --no-masters, a smaller --positions" in said
    options = ["--preset", "mistral-7b", "--dtype", "float32", "--masters", "--no-checkpointing"]
    said = planned(monkeypatch, capsys, *options, "--micro-batch", "2")
    assert "weights 29.17, gradients 29.17, optimiser 58.34, " in said
    assert "try --micro-batch 1, --checkpointing, --dtype bfloat16 --no-masters, a smaller" in said
    assert "fit" not in planned(monkeypatch, capsys, free=None)


def test_the_shape_of_a_checkpoint_and_of_the_built_in_corpus(tmp_path, monkeypatch, capsys):
    config = MistralConfig(50, 16, 32, 1, 2, 1)
    save_mistral(Mistral(config), tmp_path)
    shape, settings, thoughts = plan.read_shape({"checkpoint": str(tmp_path), "positions": 7})
    assert shape == config
    assert (settings.context, settings.positions, thoughts.thought_length) == (256, 7, 9)
    shape, settings, thoughts = plan.read_shape({})
    assert (shape, settings.context, thoughts.thought_length) == (plan.BASE, 64, 6)
    assert "it fits" in planned(monkeypatch, capsys, "--checkpoint", str(tmp_path))
    assert "M = 352 tokens" in planned(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere is no checkpoint"),
        (["--preset", "mistral-7b", "--context", "3"], "0 have 4 (n_true) ahead"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        plan.main([*options, "--device", "cpu"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
