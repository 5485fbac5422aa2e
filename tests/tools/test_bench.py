"""The benchmark runs, and its floor counts M as docs/cost.md does."""

import pytest
from commands import refused
from tiny import tiny_quiet_star

from model import MistralConfig
from support.tokenizer import save_byte_tokenizer
from thoughts import save_quiet_star

pytest.importorskip("fast.attention")  # it compares both paths

from tools import bench


def test_tokens_of_a_step():
    """T + N J (K + A + 1) with J = T - A: 256 + 2 * 252 * 14."""
    assert bench.Case(256).tokens == 7312
    assert bench.Case(10, K=0, A=1, N=3).tokens == 10 + 3 * 9 * 2


def test_saved_bytes_of_one_linear_layer_more(monkeypatch):
    """A wider MLP saves exactly its wider activations more: gate, up, silu's input and output."""
    sizes = []
    for width in (32, 48):
        monkeypatch.setattr(bench, "SMALL", MistralConfig(50, 16, width, 1, 2, 1))
        sizes.append(bench.saved_bytes(bench.Case(20)))
    assert sizes[1] - sizes[0] == 4 * 20 * 16 * 4


@pytest.mark.skipif(not bench.Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_table(monkeypatch, capsys):
    """A row for each path, with the memory of the same step; a real process measures the last."""
    asked, measured = [], bench.in_its_own_process

    def in_its_own_process(measure, *given):
        asked.append((measure, *given))
        return measured(measure, *given) if given[1] == "plain" else 7e6

    monkeypatch.setattr(bench, "in_its_own_process", in_its_own_process)
    monkeypatch.setattr(bench, "SMALL", MistralConfig(50, 16, 32, 1, 2, 1))
    bench.main(["--context", "16", "--repeats", "1", "--thought-length", "2", "--n-true", "2"])
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[7] for row in rows] == ["fast", "plain"]
    assert rows[0].split()[-3:-1] == ["7", "MB"]
    assert all(float(row.split()[10]) > 0 for row in rows)
    case = bench.Case(16, 2, 2)
    assert asked == [(bench.peak_bytes, case, path) for path in ("fast", "plain")]


def test_no_option_of_steps_is_ignored(monkeypatch, capsys):
    """Also without --context: the four cases, changed."""
    seen = []
    monkeypatch.setattr(bench, "show_row", lambda *given: seen.append(given))
    bench.main(["--n-true", "2", "--positions", "8", "--checkpointing", "--repeats", "5"])
    assert [(case.T, case.K) for case, *_ in seen] == [(64, 9), (256, 9), (512, 9), (512, 13)]
    assert all((case.A, case.positions) == (2, 8) for case, *_ in seen)
    assert all(rest == [["fast, checkpointing"], 5] for _, *rest in seen)


def test_positions_cost_in_proportion():
    assert bench.Case(2048, positions=64).tokens == 2048 + 2 * 64 * 14


def test_generation(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SMALL", MistralConfig(50, 16, 32, 1, 2, 1))
    bench.main(["generation", "--repeats", "1", "--thought-length", "1"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [int(row.split()[0]) for row in rows] == [64, 1024]


def test_operations(monkeypatch, capsys):
    """Those of support.memory, a line for each path; here of a single layer."""
    one = bench.replace(bench.SMALL, num_hidden_layers=1)
    monkeypatch.setattr(bench.memory, "of_all_layers", lambda shape, cost_of: cost_of(one))
    bench.main(["operations", "--context", "24", "--thought-length", "1", "--n-true", "1"])
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:]]
    counts = {name: int(count) for name, count, *_ in rows}
    assert [*counts] == [
        "language-model step",
        *(name for name in bench.PATHS if name != "attention"),
    ]
    assert counts["language-model step"] < counts["plain"] < counts["fast, checkpointing"]


def test_bfloat16(tmp_path, capsys):
    """A row for each result. The rounding is visible, and small beside the results."""
    save_quiet_star(tiny_quiet_star(V=258), tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The hand of the clock. " * 40)
    data = ["--data", str(tmp_path / "text.txt"), "--context", "24"]
    bench.main(["bfloat16", "--model", str(tmp_path / "model"), *data])
    rows = [line.rsplit(maxsplit=5) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [name.split()[0] for name, *_ in rows] == [
        "log",
        "nll",
        "nll",
        "w",
        "reward",
        "gradient",
    ]
    for name, _, deviation, error, _, correlation in rows:
        assert 0 < float(error) < 0.1 * float(deviation), name
        assert float(correlation) > 0.99, name
    assert "bfloat16 needs --model" in refused(capsys, bench.main, ["bfloat16", "--model", "x"])


OTHERS = ["--preset mistral-7b", "--model x", "--data x", "--positions 1"]


@pytest.mark.parametrize("option", OTHERS)
def test_an_option_of_another_bench_is_refused(option, capsys):
    name, _ = option.split()
    assert f"{name} is for " in refused(capsys, bench.main, ["generation", *option.split()])
    error = refused(capsys, bench.main, ["tricks", "--checkpointing"])
    assert "--checkpointing is for steps" in error
