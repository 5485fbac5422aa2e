"""Draw the training curves of a run of train.py; needs matplotlib.

python -m tools.plot runs/1 --out curves.png
"""

import argparse
import json
from pathlib import Path

from support.terminal import execute, make_parser

CURVES = {  # title of a panel: metrics drawn in it, with their labels
    "loss of a token (nats)": {
        "init_nll": "without thoughts",
        "talk_nll": "with thoughts",
        "eval_init_nll": "held out, without",  # these two with --eval-data only
        "eval_talk_nll": "held out, with",
    },
    "reward of a thought (nats)": {"reward": "reward"},
    "mixing weight": {"weight": "w (1: not heard)"},
}
COLORS = ("#c8650a", "#2470b8")  # the page's orange and blue, dark enough for thin lines


def read_metrics(run: Path) -> dict[str, list[tuple[float, float]]]:
    """What Quiet-STaR's steps logged in a run's folder: {name: [(step, value), ...]}.

    A last line that is not finished is left out: the run may be writing it. ValueError names a file
    or line that does not fit.
    """
    path = run / "metrics.jsonl"
    try:
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}; give the folder of a run") from None
    metrics: dict[str, list] = {name: [] for panel in CURVES.values() for name in panel}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            if row["stage"] == "quiet_star" and "talk_nll" not in row:
                raise ValueError("a step without thoughts has no curves here")
            if row["stage"] == "quiet_star":
                for name, points in metrics.items():
                    if name in row or not name.startswith("eval_"):
                        points.append((float(row["step"]), float(row[name])))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, line {number} cannot be drawn: {reason}") from None
    if not metrics["talk_nll"]:
        raise ValueError(f"{path} has no step of Quiet-STaR yet")
    return metrics


def draw(metrics: dict[str, list[tuple[float, float]]], out: Path) -> None:
    """Draw the curves into a file, whose name says its format (.png, .svg, .pdf).

    ValueError without matplotlib or for a format that it does not write.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("curves are drawn by matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        there = [name for name in panel if metrics[name]]
        for i, name in enumerate(there):
            style, color = "--" if name.startswith("eval_") else "-", COLORS[(i - len(there)) % 2]
            axes.plot(*zip(*metrics[name], strict=True), style, color=color, label=panel[name])
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel) > 1:
            axes.legend(frameon=False)
    figure.savefig(out, dpi=100)


def run(options: argparse.Namespace) -> None:
    """Read, draw."""
    draw(read_metrics(Path(options.run)), Path(options.out))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("run", metavar="FOLDER", help="folder of the run, with its metrics.jsonl")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
