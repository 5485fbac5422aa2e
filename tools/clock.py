"""Does a pretrained model discover useful thoughts, on the puzzles of the built-in corpus?

    python -m tools.clock --checkpoint SmolLM2 --out runs/clock -- --fast --dtype bfloat16

First the checkpoint learns from lines with an aside: to work in it ("works"), and then to hum
unless the beginning of its aside is given ("hums"). From there it is trained in four ways on lines
that mostly have no aside ("silent"): with Quiet-STaR, without REINFORCE, with pause tokens, without
thoughts. OUT/tables.md has their scores on held-out puzzles, by the thought between "=" and the
answer. Options after -- are those of train.py, for all four. Started again, it continues.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

import eval as evaluation
import train
from support import corpus
from support.checkpoints import load
from support.device import pick_device
from support.files import read_json, write_text
from support.terminal import execute, make_parser
from support.tokenizer import Tokenizer, load_tokenizer
from thoughts import QuietStar
from tools import experiments
from tools.compare import training_options
from tools.experiments import EXPERIMENTS, same_settings, train_language, train_run

HUM = " um" * corpus.ASIDE  # instead of the corpus's, of which other tokenizers make few tokens
LINES = 20_000
WATCHED = 6  # every sixth held-out puzzle is evaluated during training
TEXTS = {  # share of the lines that have an aside, share of the asides that work
    "works": (0.9, 1.0),
    "hums": (0.9, 0.3),
    "silent": (0.1, 0.3),
}
BASE = {"steps": 300, "lr": 2e-4, "context": 64}  # of "works" and "hums", which may end earlier
ABLE = 0.95  # accuracy after asides whose beginning is given, at which they end
THOUGHTS = {  # differences from the paper's settings
    "lr": 3e-5, "mixing_lr": 3e-4, "cooldown": 0.5, "context": 64, "positions": 16,
    "thought_length": corpus.ASIDE, "n_true": 1, "embedding_scale": 1.0,
    "reinforce_temperature": 1.0, "policy_weight": 10.0,
}  # fmt: skip
ARMS = ("none", "pause", "policy0", "full")  # the four ways, of EXPERIMENTS
LABELS = {"hums": "before"} | {name: EXPERIMENTS[name].label for name in ARMS}
LABELS["full"] = "Quiet-STaR"


def held_out_puzzles(tokenizer: Tokenizer, device: torch.device, every=1) -> evaluation.Puzzles:
    """One in `every` held-out puzzles. ValueError if a digit or the hum's word is not one token."""
    ids, answers, work, candidates, _ = evaluation.held_out_puzzles(tokenizer, device, repeats=1)
    hum = tokenizer.encode("=—" + HUM)[len(tokenizer.encode("=—")) :]
    if work.shape[1] != corpus.ASIDE or len(hum) != corpus.ASIDE:
        raise ValueError(
            f"the tokenizer makes {work.shape[1]} tokens of an aside and {len(hum)} of {HUM!r}, "
            f"which must be {corpus.ASIDE}: give a checkpoint with a token for each digit"
        )
    return evaluation.Puzzles(ids[::every], answers[::every], work[::every], candidates, hum[0])


def look(model: QuietStar, tokenizer: Tokenizer, puzzles: evaluation.Puzzles, humming: bool):
    """A status line, whether training can end, and no metrics: `look` of train.train.

    It can if the model works in asides whose beginning is given (and, if humming, hums in others).
    """
    at_once = evaluation.score(model.model(puzzles.ids)[:, -1], puzzles).right
    hums, right = evaluation.asides(model.model, puzzles, tokenizer)
    line = f"right at once {at_once:.2f}, after an aside begun right {right:.2f}; hums {hums:.2f}"
    return line, right >= ABLE and (hums >= 0.99 or not humming), {}


def train_base(checkpoint: str, out: Path, more: dict, device: torch.device, look) -> None:
    """Make OUT/hums/model, a plain model that can work in an aside, but hums."""
    kept = {name: more[name] for name in ("seed", "fast", "dtype", "masters") if name in more}
    for name in ("works", "hums"):
        options = BASE | kept | {"checkpoint": checkpoint, "data": [out / f"{name}.txt"]}
        watch = partial(look, humming=name == "hums")
        checkpoint = str(train_language(options, out / name, device, watch))


def measure(folder: Path, device: torch.device) -> dict:
    """The scores of the model in a folder on all held-out puzzles."""
    model, tokenizer = load(folder, device, torch.float32)
    table = evaluation.puzzle_table(model, tokenizer, held_out_puzzles(tokenizer, device))
    return {"table": {row: score._asdict() for row, score in table.items()}}


def run(options: argparse.Namespace) -> None:
    """Train the base model and the four ways, measure, and print the table."""
    out, device = Path(options.out), pick_device(options.device)
    more = training_options(options.training) | {"seed": options.seed}
    models = {"hums": out / "hums" / "model"} | {x: out / x / "quiet_star" for x in ARMS}
    begins = THOUGHTS | more | {"checkpoint": models["hums"], "data": [out / "silent.txt"]}
    arms = {name: begins | EXPERIMENTS[name].options for name in ARMS}
    for name, given in arms.items():  # all four, because they share a table
        train.make_settings(given)
        same_settings(out / name / "settings.json", given)
    tokenizer = load_tokenizer(options.checkpoint)
    watched = {"tokenizer": tokenizer, "puzzles": held_out_puzzles(tokenizer, device, WATCHED)}
    out.mkdir(parents=True, exist_ok=True)
    for name, shares in TEXTS.items():
        text = corpus.make_corpus(options.seed, LINES, *shares).replace(corpus.HUM, HUM)
        write_text(out / f"{name}.txt", text)
    train_base(options.checkpoint, out, more, device, partial(look, **watched))
    for name in ("hums", *options.only):
        if name in ARMS:
            watch = partial(evaluation.look_at_puzzles, **watched)
            train_run(arms[name], out / name, device, EXPERIMENTS[name].loss, watch)
        about = {"written": (models[name] / "model.safetensors").stat().st_mtime}
        experiments.once(out / f"{name}.json", about, partial(measure, models[name], device))
    tables = {name: path for name in LABELS if (path := out / f"{name}.json").exists()}
    scores = {x: experiments.score_cells([read_json(tables[x])["table"]]) for x in tables}
    rows = [[LABELS[name], *cells] for name, cells in scores.items()]
    text = experiments.markdown(["", *experiments.COLUMNS], rows) + "\n"
    write_text(out / "tables.md", text)
    print(text, end="")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FOLDER", help="a pretrained model")
    add("--out", required=True, metavar="FOLDER", help="folder of the experiment")
    add("--only", nargs="+", choices=ARMS, default=ARMS, help=f"of {', '.join(ARMS)} (all)")
    add("--seed", type=int, default=0, help="of lines, batches and thoughts (0)")
    add("--device", help="cpu, cuda, mps; none: the best one available")
    add("training", nargs="*", metavar="-- ...", help="options of train.py")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
