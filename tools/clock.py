"""Does a pretrained model find out that thinking pays? The clock of data.py, on real weights.

    python -m tools.clock --checkpoint SmolLM2 --out runs/clock -- --dtype bfloat16

First the checkpoint learns from lines that mostly explain themselves: to work in an aside, and
then, where most asides hum, to hum unless its aside is begun right. Then it goes on with lines that
mostly do not explain themselves, in four ways: with Quiet-STaR, without REINFORCE (policy weight
0), with pause tokens for thoughts, and without thoughts. OUT/tables.md says what each of them
answers to puzzles never trained on, by what stands between "=" and the answer. Options behind --
are train.py's, for all four. Started again, it continues what was stopped.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch

import eval as evaluation
import train
from model import save_mistral
from support import corpus
from support.checkpoints import load
from support.device import pick_device
from support.files import read_json, write_json, write_text
from support.runs import copy_tokenizer
from support.terminal import execute, make_parser
from support.tokenizer import Tokenizer, load_tokenizer
from thoughts import QuietStar
from tools.compare import training_options
from tools.experiments import COLUMNS, EXPERIMENTS, same_settings, score_cells
from tools.objectives import plain_loss

HUM = " um" * corpus.ASIDE  # in place of the clock's, of which other tokenizers make few tokens
LINES = 20_000
WATCHED = 6  # of the held-out puzzles, one in so many is looked at in training
TEXTS = {  # share of the lines that have an aside, share of these that work; the others hum
    "works": (0.9, 1.0),
    "hums": (0.9, 0.3),
    "silent": (0.1, 0.3),
}
BASE = {"steps": 300, "lr": 2e-4, "context": 64}  # of "works" and "hums": steps at most
ABLE = 0.95  # share of the asides begun right that end so, with which a model goes on
THOUGHTS = {  # what differs from the paper's settings
    "lr": 3e-5, "mixing_lr": 3e-4, "cooldown": 0.5, "context": 64, "positions": 16,
    "thought_length": corpus.ASIDE, "n_true": 1, "embedding_scale": 1.0,
    "reinforce_temperature": 1.0, "policy_weight": 10.0,
}  # fmt: skip
ARMS = {name: EXPERIMENTS[name] for name in ("full", "policy0", "pause", "none")}
LABELS = {
    "hums": "before",
    "none": "trained on without thoughts",
    "pause": "pause tokens in training",
    "policy0": "no REINFORCE (policy weight 0)",
    "full": "Quiet-STaR",
}


# ------------------------------------------------------------------------------------ the puzzles


def held_out_puzzles(tokenizer: Tokenizer, device: torch.device) -> evaluation.Puzzles:
    """Every held-out puzzle once; ValueError if digits and hums are not each a token."""
    puzzles = evaluation.held_out_puzzles(tokenizer, device, repeats=1)
    before = tokenizer.encode("=—")
    hum = tokenizer.encode("=—" + HUM)[len(before) :]
    if puzzles.work.shape[1] != corpus.ASIDE or len(hum) != corpus.ASIDE:
        raise ValueError(
            f"the tokenizer makes {puzzles.work.shape[1]} tokens of an aside and {len(hum)} of "
            f"{HUM!r}, which must be {corpus.ASIDE}: give a checkpoint with a token for each digit"
        )
    return puzzles._replace(hum=hum[0])


def some(puzzles: evaluation.Puzzles) -> evaluation.Puzzles:
    """One in WATCHED of them."""
    ids, answers, work, *rest = puzzles
    return evaluation.Puzzles(ids[::WATCHED], answers[::WATCHED], work[::WATCHED], *rest)


# -------------------------------------------------------------------------------- the command line


def look(model: QuietStar, tokenizer: Tokenizer, puzzles: evaluation.Puzzles, humming: bool):
    """Something to watch while the model learns to work or to hum, whether it can, and {}."""
    plain = model.model
    at_once = evaluation.score(plain(puzzles.ids)[:, -1], puzzles).right
    hums, right = evaluation.asides(plain, puzzles, tokenizer)
    line = f"right at once {at_once:.2f}, after an aside begun right {right:.2f}; hums {hums:.2f}"
    return line, right >= ABLE and (hums >= 0.99 or not humming), {}


def train_base(
    checkpoint: str,
    out: Path,
    more: dict,
    device: torch.device,
    tokenizer: Tokenizer,
    puzzles: evaluation.Puzzles,
) -> None:
    """Make OUT/hums/model, a plain model that can work in an aside, but hums."""
    kept = {name: more[name] for name in ("seed", "dtype") if name in more}
    for name in ("works", "hums"):
        run, folder = out / name, out / name / "model"
        options = BASE | kept | {"checkpoint": checkpoint, "data": [out / f"{name}.txt"]}
        same_settings(run / "settings.json", options)
        if not folder.exists():
            watch = partial(look, tokenizer=tokenizer, puzzles=puzzles, humming=name == "hums")
            print(f"run {run} on {device}")
            chosen = train.make_settings(options)
            model = train.train_thoughts(*chosen, run, device, plain_loss, look=watch)
            new = run / "model.tmp"
            save_mistral(model.model, new)
            copy_tokenizer(run, new)
            os.replace(new, folder)
        checkpoint = str(folder)


def measure(result: Path, folder: Path, device: torch.device) -> None:
    """Write the scores of the model in a folder on the held-out puzzles, once."""
    written = (folder / "model.safetensors").stat().st_mtime
    if not result.exists() or read_json(result).get("written") != written:
        model, tokenizer = load(folder, device, torch.float32)
        table = evaluation.puzzle_table(model, tokenizer, held_out_puzzles(tokenizer, device))
        scores = {row: score._asdict() for row, score in table.items()}
        write_json(result, {"written": written, "table": scores})


def show_tables(tables: dict[str, dict]) -> str:
    """Scores of several models as a table in Markdown."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for name, table in tables.items():
        lines.append(f"| {' | '.join([LABELS[name], *score_cells([table])])} |")
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> None:
    """Teach the checkpoint to work aloud, train on in four ways, print the table."""
    out, device = Path(options.out), pick_device(options.device)
    more = training_options(options.training) | {"seed": options.seed}
    base = out / "hums" / "model"
    begins = THOUGHTS | more | {"checkpoint": base, "data": [out / "silent.txt"]}
    arms = {name: begins | experiment.options for name, experiment in ARMS.items()}
    for name, given in arms.items():  # of those that are not asked for too: one table has them all
        train.make_settings(given)
        same_settings(out / name / "settings.json", given)
    tokenizer = load_tokenizer(options.checkpoint)
    puzzles = some(held_out_puzzles(tokenizer, device))
    out.mkdir(parents=True, exist_ok=True)
    for name, shares in TEXTS.items():
        text = corpus.make_corpus(options.seed, LINES, *shares).replace(corpus.HUM, HUM)
        write_text(out / f"{name}.txt", text)
    train_base(options.checkpoint, out, more, device, tokenizer, puzzles)
    measure(out / "hums.json", base, device)
    watch = partial(evaluation.look_at_puzzles, tokenizer=tokenizer, puzzles=puzzles)
    for name in options.only:
        print(f"run {out / name} on {device}")
        chosen = train.make_settings(arms[name])
        train.train_thoughts(*chosen, out / name, device, ARMS[name].loss, look=watch)
        measure(out / f"{name}.json", out / name / "quiet_star", device)
    there = [name for name in LABELS if (out / f"{name}.json").exists()]
    text = show_tables({name: read_json(out / f"{name}.json")["table"] for name in there})
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
    add("--device", help="cpu, cuda, mps; none: the best there is")
    add("training", nargs="*", metavar="-- ...", help="options of train.py")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
