"""Training curves: the metrics that are read, the panels, and the messages for bad input."""

import json
import sys

import pytest
from commands import refused

from tools import plot
from tools.plot import CURVES, draw, read_metrics

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
        "reward": [(1, 0.25), (2, -0.5)],
        "weight": [(1, 0.75), (2, 0.75)],
    }


def test_a_metric_has_points_only_at_steps_that_logged_it(tmp_path):
    looked = step(2, eval_init_nll=2.5, entropy=1.25)
    metrics = read_metrics(write(tmp_path, step(1), looked, step(3)))
    assert (metrics["eval_init_nll"], metrics["entropy"]) == ([(2, 2.5)], [(2, 1.25)])
    assert len(metrics["talk_nll"]) == 3


def test_an_unfinished_last_line_is_skipped(tmp_path):
    assert read_metrics(write(tmp_path, step(1), step(2)[:30], end=""))["reward"] == [(1, 0.25)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([BASE], "has no step with thoughts yet"),
        ([step(1), "{"], "line 2 is no"),
        (["[]"], "line 1 is no"),
        ([step(1, reward=None)], "line 1: reward has no value"),
        (['{"stage": "quiet_star", "reward": 1}'], "line 1: reward has no value"),
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
    assert f"cannot read {tmp_path / 'nowhere' / 'metrics.jsonl'}" in error
    assert error.count("\n") == 1


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(write(tmp_path, step(1))), "--out", str(tmp_path / "curves.png")])
    assert stopped.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err


NEW = {
    "eval_init_nll": 2.5,
    "eval_talk_nll": 2.25,
    "entropy": 1.5,
    "rewarded": 0.5,
    "distinct": 1,
    "eval_right": 0.75,
}


@pytest.mark.parametrize(("more", "panels"), [({}, 3), (NEW, 5)])
def test_every_metric_in_the_file_is_a_curve(tmp_path, more, panels):
    """Its points are those of the file, and its label is in a legend or it is alone."""
    pytest.importorskip("matplotlib")
    metrics = read_metrics(write(tmp_path, step(1, **more), step(2, **more)))
    axes = draw(metrics).axes
    assert [ax.get_title() for ax in axes] == [*CURVES][:panels]
    lines = {line.get_label(): line.get_xydata().tolist() for ax in axes for line in ax.lines}
    assert lines == {
        label: [[*point] for point in metrics[name]]
        for panel in CURVES.values()
        for name, label in panel.items()
        if name in metrics
    }
    assert all((ax.get_legend() is not None) == (len(ax.lines) > 1) for ax in axes)


@pytest.mark.parametrize("steps", [1, 3])
def test_legends_cover_no_curve_and_steps_are_whole_numbers(tmp_path, steps):
    pytest.importorskip("matplotlib")
    figure = draw(read_metrics(write(tmp_path, *(step(n + 1, **NEW) for n in range(steps)))))
    figure.draw_without_rendering()
    for ax in figure.axes:
        assert all(tick == round(tick) for tick in ax.get_xticks())
        if legend := ax.get_legend():
            assert not any(legend.get_window_extent().overlaps(other.bbox) for other in figure.axes)


def test_right_answers_are_those_of_all_seeds(tmp_path):
    """Mean and standard deviation at steps that both seeds have logged; one seed has no spread."""
    pytest.importorskip("matplotlib")
    for seed, name, rights in ((0, "K4", [0.25, 0.5]), (1, "K4", [0.75]), (1, "full", [1.0, 0.5])):
        folder = tmp_path / f"seed{seed}" / name
        folder.mkdir(parents=True)
        write(folder, step(5), *(step(10 * i, eval_right=r) for i, r in enumerate(rights, 1)))
    right = {name: plot.read_right(tmp_path, name) for name in ("K4", "full")}
    assert right == {"K4": {10: [25, 75]}, "full": {10: [100], 20: [50]}}
    [axes] = plot.draw_right(right).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[10, 50]],
        [[10, 100], [20, 50]],
    ]
    spreads = [bars.get_segments()[0][:, 1] for bars in axes.collections]
    assert [high - low for low, high in spreads] == pytest.approx([2 * 1250**0.5, 0])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [plot.EXPERIMENTS[name].label for name in right]
    plot.main([str(tmp_path), "--only", "K4", "--out", str(tmp_path / "right.png")])
    assert (tmp_path / "right.png").read_bytes().startswith(b"\x89PNG")


def test_no_right_answers(tmp_path, capsys):
    (tmp_path / "seed0" / "K4").mkdir(parents=True)
    write(tmp_path / "seed0" / "K4", step(1))
    for name, message in (("K4", "no right answers by step of K4"), ("A1", "by step of A1")):
        options = [str(tmp_path), "--only", name, "--out", str(tmp_path / "right.png")]
        assert message in refused(capsys, plot.main, options)


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    plot.main([str(write(tmp_path, step(1))), "--out", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
