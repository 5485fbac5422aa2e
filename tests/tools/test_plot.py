"""Training curves: what is read from metrics.jsonl, and what is said when something is missing."""

import json
import sys

import pytest

from tools import plot
from tools.plot import read_metrics

BASE = json.dumps({"stage": "base", "step": 1, "loss": 5.0})


def step(number, **changes):
    metrics = {"init_nll": 2.0, "talk_nll": 1.5, "reward": 0.25, "weight": 0.75, "loss": 9.0}
    return json.dumps({"stage": "quiet_star", "step": number} | metrics | changes)


def write(folder, *lines, end="\n"):
    (folder / "metrics.jsonl").write_text("\n".join(lines) + end)
    return folder


def test_only_the_steps_of_quiet_star_are_read(tmp_path):
    metrics = read_metrics(write(tmp_path, BASE, step(1), step(2, reward=-0.5)))
    assert metrics == {
        "init_nll": [(1, 2.0), (2, 2.0)],
        "talk_nll": [(1, 1.5), (2, 1.5)],
        "eval_init_nll": [],
        "eval_talk_nll": [],
        "reward": [(1, 0.25), (2, -0.5)],
        "weight": [(1, 0.75), (2, 0.75)],
    }


def test_held_out_text_has_points_of_its_own(tmp_path):
    looked = step(2, eval_init_nll=2.5, eval_talk_nll=2.25)
    metrics = read_metrics(write(tmp_path, step(1), looked, step(3)))
    assert (metrics["eval_init_nll"], metrics["eval_talk_nll"]) == ([(2, 2.5)], [(2, 2.25)])
    assert len(metrics["talk_nll"]) == 3


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    assert read_metrics(write(tmp_path, step(1), step(2)[:30], end=""))["reward"] == [(1, 0.25)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([BASE], "no step of Quiet-STaR yet"),
        ([step(1), "{"], "line 2 cannot be drawn"),
        (["[]"], "line 1 cannot be drawn"),
        ([step(1, reward=None)], "line 1 cannot be drawn"),
        (
            ['{"stage": "quiet_star", "step": 1}'],
            "line 1 cannot be drawn: ValueError: a step without thoughts has no curves here",
        ),
    ],
)
def test_bad_metrics(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_metrics(write(tmp_path, *lines))


def test_no_run_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "curves.png")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "cannot read" in error
    assert "give the folder of a run" in error
    assert error.count("\n") == 1


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(write(tmp_path, step(1))), "--out", str(tmp_path / "curves.png")])
    assert stopped.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    steps = step(1), step(2, eval_init_nll=2.5, eval_talk_nll=2.25), step(3)
    plot.main([str(write(tmp_path, *steps)), "--out", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
