"""Draw the training curves of a run of train.py. Needs matplotlib.

python -m tools.plot runs/1 --out curves.png
"""

import argparse
from pathlib import Path

from support.files import json_object, read_utf8
from support.terminal import execute, make_parser

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
    "shares": {"rewarded": "rewards other than 0", "distinct": "distinct thoughts"},
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


def draw(metrics: Metrics):
    """A matplotlib Figure with a panel for each kind of metric. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("matplotlib is missing: pip install matplotlib") from None
    panels = {title: names for title, names in CURVES.items() if {*names} & {*metrics}}
    figure = Figure(figsize=(3.4 * len(panels), 3.6), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, (name, label) in enumerate(panels[title].items()):
            if name in metrics:
                style = ".--" if name.startswith("eval_") else "-"
                color = COLORS[i % 2 - len(panels[title]) % 2]
                axes.plot(*zip(*metrics[name], strict=True), style, color=color, label=label)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 1:  # a legend below the axes, where it covers no curve
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return figure


def run(options: argparse.Namespace) -> None:
    """Read the metrics and write the picture."""
    draw(read_metrics(Path(options.run))).savefig(options.out, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("run", metavar="FOLDER", help="folder of the run, with its metrics.jsonl")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture: .png, .svg, .pdf")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
