"""The script for the first day with a GPU, as far as it runs without one: tiny shapes, the CPU."""

from dataclasses import replace

from model import MistralConfig
from tools import gpu, plan


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.setitem(plan.SHAPES, "mistral-7b", MistralConfig(50, 16, 32, 2, 2, 1))
    for name, settings in gpu.STEPS.items():
        few = settings.positions and 3
        small = replace(settings, context=8, positions=few, batch_size=1, compile=False)
        monkeypatch.setitem(gpu.STEPS, name, small)
    # Counted on the meta device: tests/support/test_memory.py has the test.
    monkeypatch.setattr(gpu.bench, "count_operations", lambda *step: {"fast": 7.0})
    monkeypatch.setattr(gpu.memory, "step_flops", lambda *step: 1e9)
    monkeypatch.setattr(gpu.memory, "memory_plan", lambda *step: {"total": 1e9})
    monkeypatch.setattr(gpu, "command", lambda *arguments: " ".join(arguments))
    monkeypatch.setattr(gpu, "PRESET", replace(gpu.PRESET, context=8))
    gpu.main(["--out", str(tmp_path / "gpu.md"), "--steps", "1", "--device", "cpu"])
    page = (tmp_path / "gpu.md").read_text()
    titles = [line for line in page.splitlines() if line.startswith("#")]
    assert titles[0].startswith("# cpu, torch ")
    assert titles[1:] == [
        "## CUDA tests", "## Operations of a step, one sequence", "## Steps", "## Generation",
        "## The default run",
    ]  # fmt: skip
    rows = [line for line in page.splitlines() if line.startswith("| --preset mistral-7b")]
    assert len(rows) == 3
    assert "| fast | 7 |" in page
    seconds, tokens, mfu, *_ = rows[0].split("|")[2:]
    assert float(seconds) > 0
    assert float(tokens) > 0
    assert mfu.strip().endswith("%")
    assert "train.py --out" in page


def test_a_command_is_reported(tmp_path):
    block = gpu.command("-c", "print('seen'); raise SystemExit(3)")
    assert "exit code 3" in block
    assert "seen" in block
