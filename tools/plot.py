"""Draw the training curves of a run of train.py, or of tools.experiments. Needs matplotlib.

    python -m tools.plot runs/1 --out curves.png
    python -m tools.plot runs/controls --only K0 K4 full K8 K12 --out lengths.png

The second picture shows the right answers after greedy thoughts (as Figure 2 of the paper): mean
and standard deviation over the seeds in the folder.
"""

import argparse
import statistics
from pathlib import Path

from support.files import json_object, read_utf8
from support.terminal import execute, make_parser
from tools.experiments import EXPERIMENTS

CURVES = {  # title of a panel: metrics in it, with their labels
    "loss per token (nats)": {
        "init_nll": "without thoughts",
        "talk_nll": "with thoughts",
        "eval_init_nll": "held-out text, without",  # these two only with --eval-data
        "eval_talk_nll": "held-out text, with",
    },
    "reward in REINFORCE (nats)": {"reward": "reward"},
    "mixing weight (1: thoughts ignored)": {"weight": "w"},
    "entropy per thought token (nats)": {"entropy": "entropy"},
    "shares": {
        "rewarded": "rewards other than 0",
        "distinct": "distinct thoughts",
        "eval_right": "right answers",  # only on the built-in corpus
    },
}
COLORS = ("#c8650a", "#2470b8")  # the page's orange and blue, darker for thin lines
Metrics = dict[str, list[tuple[float, float]]]  # {name: [(step, value), ...]}


def read_metrics(run: Path) -> Metrics:
    """The metrics in CURVES that Quiet-STaR's steps have logged in a run's folder.

    An unfinished last line is skipped. Raises ValueError for other bad lines or without metrics.
    """
    path, metrics = run / "metrics.jsonl", {}
    for number, line in enumerate(read_utf8(path).split("\n")[:-1], 1):
        row = json_object(line, f"{path}, line {number}")
        for name in [name for panel in CURVES.values() for name in panel if name in row]:
            try:
                point = float(row["step"]), float(row[name])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {name} has no value: {error!r}") from None
            metrics.setdefault(name, []).append(point)
    if not metrics:
        raise ValueError(f"{path} has no step with thoughts yet, so there is nothing to draw")
    return metrics


def read_right(out: Path, name: str) -> dict[float, list[float]]:
    """{step: right answers in % of every seed} of an experiment, at the steps that all have logged.

    out: folder of tools.experiments. Raises ValueError if there is no such step.
    """
    runs = [path.parent for path in sorted(out.glob(f"seed*/{name}/metrics.jsonl"))]
    curves = [dict(read_metrics(run).get("eval_right", [])) for run in runs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        raise ValueError(f"{out} has no right answers by step of {name}")
    return {step: [100 * curve[step] for curve in curves] for step in steps}


def new_figure(width: float):
    """An empty matplotlib Figure [width x 3.6 inches]. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("matplotlib is missing: pip install matplotlib") from None
    return Figure(figsize=(width, 3.6), layout="constrained")


def finish(axes, title: str) -> None:
    """Title, labels and legend of a panel."""
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:  # a legend below the axes, where it covers no curve
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)


def draw(metrics: Metrics):
    """A Figure with a panel for each kind of metric."""
    panels = {title: names for title, names in CURVES.items() if {*names} & {*metrics}}
    figure = new_figure(3.4 * len(panels))
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, (name, label) in enumerate(panels[title].items()):
            if name in metrics:
                style = ".--" if name.startswith("eval_") else "-"
                color = COLORS[i % 2 - len(panels[title]) % 2]
                axes.plot(*zip(*metrics[name], strict=True), style, color=color, label=label)
        finish(axes, title)
    return figure


def draw_right(experiments: dict[str, dict[float, list[float]]]):
    """A Figure of {experiment: read_right of it}: mean and standard deviation over seeds."""
    figure = new_figure(6)
    axes = figure.subplots()
    for name, right in experiments.items():
        means = [statistics.mean(values) for values in right.values()]
        spreads = [statistics.stdev(values) if values[1:] else 0.0 for values in right.values()]
        axes.errorbar([*right], means, spreads, label=EXPERIMENTS[name].label)
    finish(axes, "right answers after greedy thoughts (%)")
    return figure


def run(options: argparse.Namespace) -> None:
    """Read the metrics and write the picture."""
    folder, names = Path(options.run), options.only
    if names:
        figure = draw_right({name: read_right(folder, name) for name in names})
    else:
        figure = draw(read_metrics(folder))
    figure.savefig(options.out, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="FOLDER", help="folder of the run; with --only: of the experiments")
    add("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help="experiments to compare")
    add("--out", required=True, metavar="FILE", help="picture: .png, .svg, .pdf")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
