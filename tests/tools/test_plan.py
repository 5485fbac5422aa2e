"""The plan of a run: what is printed, what fits, and which shape is planned."""

import pytest
import torch

from model import Mistral, MistralConfig, save_mistral
from thoughts import ThoughtConfig
from tools import plan


def test_peak_and_free_memory():
    assert plan.peak_flops(torch.device("cpu"), torch.float32) > 1e8
    assert plan.free_memory(torch.device("cpu")) > 1e8


# ------------------------------------------------------------------------------ the command line


SHORT = ["--thought-length", "1", "--n-true", "1"]  # fewer operations to count


def planned(monkeypatch, capsys, *options, free=80e9):
    """What is printed where so many bytes are free."""
    monkeypatch.setattr(plan, "free_memory", lambda device: free)
    plan.main([*options, "--device", "cpu"])
    return capsys.readouterr().out


def test_mistral_7b_fits_80_gb_with_the_papers_settings(monkeypatch, capsys):
    """Not with float32 masters; the mixing head is in float32."""
    monkeypatch.setattr(plan, "step_flops", lambda *step: 1e14)  # of one sequence
    said = planned(monkeypatch, capsys, "--preset", "mistral-7b")
    assert said.startswith("memory plan (GB): weights 14.68, gradients 14.68, optimiser 29.37, ")
    assert "the device has 80.00 free\nit fits\n" in said
    assert "a step: 8 sequences of M = 7312 tokens, thoughts included; 8e+14 floating" in said
    _, settings, thoughts = plan.read_shape({"preset": "mistral-7b"})
    assert thoughts == ThoughtConfig()
    assert plan.work_of(settings, thoughts) == plan.Work(batch=8, T=256, J=252)


def test_what_fits_and_what_to_try(monkeypatch, capsys):
    monkeypatch.setattr(plan, "step_flops", lambda *step: 1e14)
    said = planned(monkeypatch, capsys, *SHORT, free=2e7)
    assert "it does not fit: --micro-batch 1 needs 0.0 GB" in said
    assert "fit" not in planned(monkeypatch, capsys, *SHORT, free=None)


def test_the_shape_of_a_checkpoint_and_of_the_built_in_corpus(tmp_path, monkeypatch, capsys):
    config = MistralConfig(50, 16, 32, 1, 2, 1)
    save_mistral(Mistral(config), tmp_path)
    shape, settings, thoughts = plan.read_shape({"checkpoint": str(tmp_path), "positions": 7})
    assert shape == config
    assert (settings.context, settings.positions, thoughts.thought_length) == (256, 7, 9)
    shape, settings, thoughts = plan.read_shape({})
    assert (shape, settings.context, thoughts.thought_length) == (plan.BASE, 64, 6)
    assert plan.work_of(settings, thoughts).tokens(thoughts) == 64 + 2 * 16 * 9
    monkeypatch.setattr(plan, "memory_plan", lambda shape, *_: {"total": shape.vocab_size * 1e9})
    monkeypatch.setattr(plan, "advice", lambda *given: "less")
    for given, size in ((["--checkpoint", str(tmp_path)], 50), ([], 258)):
        said = planned(monkeypatch, capsys, *SHORT, *given)
        assert f"total {size}.00; the device has 80.00 free" in said
        assert ("it fits" in said) == (size == 50)
    assert "M = 160 tokens" in said  # 64 + 2 * 16 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere is not a checkpoint"),
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
