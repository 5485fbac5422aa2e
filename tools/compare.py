"""What thoughts bring a pretrained model, against as much training without them.

    python -m tools.compare --checkpoint SmolLM2 --data maths.txt train.jsonl --out runs/smollm2 \\
        --gsm8k test.jsonl --csqa dev.jsonl -- --steps 200 --positions 64

The last tenth of every text is held out. On the rest train, with every seed on the same batches,
Quiet-STaR (OUT/seed0/thoughts), the same with pause tokens for thoughts (pause: as much computing)
and the language-model loss only (none: as much text). Options behind -- are train.py's, for all.
OUT/report.md compares them with each other and with the model before: loss on held-out text, every
difference with its interval and how large it had to be to be seen, the gain by difficulty, scores
of eval.py's tasks, twenty thoughts as they came. Started again, it continues what was stopped.
"""

import argparse
import copy
import json
import math
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import eval as evaluation
import model
import train
from model import KVCache, Mistral
from sample import describe_thought
from support.checkpoints import load
from support.device import DTYPES, pick_device
from support.files import read_json, read_utf8, write_json, write_text
from support.settings import add_settings
from support.terminal import execute, make_parser, show_status
from support.text import Tokens, read_documents, tokenize
from support.tokenizer import Tokenizer, load_tokenizer
from thoughts import QuietStar, ThoughtConfig
from tools.experiments import EXPERIMENTS, same_settings

HELD_OUT = 10  # one in so many
THOUGHTS = 20  # shown, one in each of the first held-out sequences read
READ = 8  # held-out sequences at once
ARMS = {  # a run's folder: what is trained
    "none": EXPERIMENTS["none"],
    "pause": EXPERIMENTS["pause"],
    "thoughts": EXPERIMENTS["full"],
}
LABELS = {  # (model, what it thinks when it is evaluated): its name in the report
    ("before", "without"): "before",
    ("none", "without"): "trained without thoughts",
    ("pause", "without"): "pause tokens, not used",
    ("pause", "with"): "pause tokens",
    ("thoughts", "without"): "Quiet-STaR, no thoughts",
    ("thoughts", "with"): "Quiet-STaR, greedy thoughts",
    ("thoughts", "shuffled"): "Quiet-STaR, thoughts of other sequences",
}
THINKS, PLAIN = ("thoughts", "with"), ("none", "without")
DIFFERENCES = [  # first against second
    (THINKS, ("thoughts", "without")),
    (THINKS, ("thoughts", "shuffled")),
    (THINKS, ("pause", "with")),
    (THINKS, PLAIN),
    (("thoughts", "without"), PLAIN),
    (("pause", "with"), PLAIN),
    (PLAIN, ("before", "without")),
]
POWER = 1.96 + 0.84  # standard errors: a gain that a 95 % interval shows in 80 % of such runs


def split_text(files: list[str]) -> tuple[list[str], list[str]]:
    """The documents of the files, and their last tenth, held out.

    Of several documents the last ones, of a single one the last lines.
    """
    known: list[str] = []
    held_out: list[str] = []
    for file in files:
        documents = read_documents([file])
        single = len(documents) == 1
        parts = documents[0].splitlines(keepends=True) if single else documents
        cut = len(parts) - len(parts) // HELD_OUT
        for side, part in ((known, parts[:cut]), (held_out, parts[cut:])):
            side += ["".join(part)] if single else part
    if not any(held_out):
        raise ValueError(
            f"{', '.join(files)}: fewer than {HELD_OUT} lines; nothing can be held out"
        )
    return known, held_out


def training_options(arguments: list[str]) -> dict:
    """Options of train.py as make_settings takes them; ValueError for those that are set here."""
    parser, own = make_parser(None), ("out", "resume", "device", "checkpoint", "data", "seed")
    for name in own[:3]:
        parser.add_argument(f"--{name}", nargs="?", default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=train.PRESETS, default=argparse.SUPPRESS)
    add_settings(parser, train.Settings, {})
    add_settings(parser, ThoughtConfig, {})
    given = vars(parser.parse_args(arguments))
    for name in own:
        if name in given:
            raise ValueError(f"--{name} behind -- is set by this script; leave it out")
    return train.PRESETS.get(given.pop("preset", None), {}) | given


# ------------------------------------------------------------------------------- one of the models


def pausing(model: QuietStar) -> QuietStar:
    """The same model, but it thinks K start tokens in place of greedy thoughts."""
    paused = copy.copy(model)  # shares all weights

    def think_last(last: Tensor, cache: KVCache):
        thought = last.new_full((len(last), model.config.thought_length), model.start_id)
        return model.think_last(last, cache, thought)

    paused.think_last = think_last
    return paused


@torch.no_grad()
def held_out_nll(
    model: QuietStar, arm: str, ids: Tensor, mask: Tensor, positions: Tensor
) -> dict[str, Tensor]:
    """nll in nats [n, J] of the token after each of the positions [J]; NaN if it is no target.

    ids, target mask [n, T]. "without" a thought, and for those that think "with" a greedy one (or
    the arm's pause tokens), "shuffled": with those of another sequence.
    """
    once, ways = evaluation.thinking_once(model), [way for name, way in LABELS if name == arm]
    if ways == ["without"]:
        once.config = replace(once.config, thought_length=0)
    parts: dict[str, list[Tensor]] = {way: [] for way in ways}
    generator, K = torch.Generator().manual_seed(0), once.config.thought_length
    parts_of = max(len(ids) // READ, 1)  # so that no part has a single sequence
    batches = list(zip(ids.tensor_split(parts_of), mask.tensor_split(parts_of), strict=True))
    for count, (part, targets) in enumerate(batches, 1):
        think = partial(once, part, positions=positions, target_mask=targets, temperature=0)
        shape = (len(part), 1, len(positions), K)
        output = think(part.new_full(shape, model.start_id) if arm == "pause" else None)
        nll = {"without": output.base_nll[:, positions], "with": output.talk_nll[0, :, 0]}
        if "shuffled" in ways:
            order = torch.randperm(len(positions), generator=generator).to(part.device)
            others = output.thought_ids.roll(1, 0)[:, :, order]  # of the sequence before
            nll["shuffled"] = think(others).talk_nll[0, :, 0]
        for way in ways:
            if not nll[way].isfinite().all():
                raise ValueError("the losses are not finite: weights are broken")
            parts[way].append(nll[way].float().masked_fill(~output.valid[0], math.nan).cpu())
        line = f"held-out text: {count} of {len(batches)} batches"
        show_status(line, count, len(batches), sys.stderr)
    return {way: torch.cat(part) for way, part in parts.items()}


def measure(
    arm: str, folder: Path, out: Path, options: argparse.Namespace, held_out: tuple[Tensor, ...]
) -> dict[str, dict]:
    """Losses and answers of a model: {"nll": {way: [n, J]}, task: {way: results}}.

    held_out: see held_out_nll. Losses are kept in OUT.json, answers in a file for each task.
    """
    model, tokenizer = load(folder, held_out[0].device, DTYPES[options.dtype])
    if isinstance(model, Mistral):
        model = QuietStar(model, ThoughtConfig(thought_length=0))
    path = out.with_suffix(".json")
    about = evaluation.about(options)
    shape = about | {"shape": [*held_out[0].shape, len(held_out[2])]}
    if not path.exists() or read_json(path).get("about") != shape:
        nll = held_out_nll(model, arm, *held_out)
        write_json(path, {"about": shape, "nll": {way: x.tolist() for way, x in nll.items()}})
    found = {"nll": read_json(path)["nll"]}
    answering = {"pause": pausing(model), "thoughts": model}.get(arm, model.model)
    for task in [task for task in evaluation.TASKS if getattr(options, task)]:
        file = out.with_name(f"{out.name}-{task}.jsonl")
        header = about | {"data": getattr(options, task)}
        results = evaluation.answer_task(answering, tokenizer, task, header, file)
        ways = evaluation.ways_to_answer(answering)  # "without thoughts", "with thoughts"
        found[task] = {way.split()[0]: [result[way] for result in results] for way in ways}
    return found


# ------------------------------------------------------------------------------------- the report


def difference(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """How much lower the nll first is than second, both [seeds, n, J] or [1, n, J].

    Returns for every sequence the sum over its tokens, a mean over the seeds, in units that make
    the mean over sequences the mean over all tokens [n]; and the mean gain of every seed.
    """
    gain = second - first  # paired: the same token, and the same seed
    tokens = (~np.isnan(gain[0])).sum(axis=1)  # [n]
    values = np.nansum(gain, axis=2).mean(0) / tokens.mean()
    return values, np.nanmean(gain, axis=(1, 2)).tolist()


def show_difference(first, second, nll: dict) -> str:
    """A row: the gain of first over second, its interval, its seeds, and what could be seen."""
    values, seeds = difference(nll[first], nll[second])
    low, high = evaluation.bootstrap_interval(values)
    variance = values.var(ddof=1) / len(values)
    if len(seeds) > 1:
        variance += np.var(seeds, ddof=1) / len(seeds)
    seen = POWER * math.sqrt(variance)
    each = " ".join(f"{gain:+.4f}" for gain in seeds)
    cells = [f"{LABELS[first]} against {LABELS[second]}", f"{values.mean():+.4f}"]
    return f"| {' | '.join([*cells, f'{low:+.4f} .. {high:+.4f}', each, f'{seen:.4f}'])} |"


def show_losses(nll: dict) -> str:
    """Mean nll of every model and way, and those of the seeds."""
    lines = ["| | nats a token | seeds |", "|---|---|---|"]
    for key, label in LABELS.items():
        each = " ".join(f"{loss:.4f}" for loss in np.nanmean(nll[key], axis=(1, 2)))
        lines.append(f"| {label} | {np.nanmean(nll[key]):.4f} | {each} |")
    return "\n".join(lines)


def show_gain(first, second, nll: dict) -> str:
    """The gain of first over second by the loss before training; nll are means over the seeds."""
    known = ~np.isnan(nll["before", "without"][0])  # [n, J]
    before, one, other = (
        torch.from_numpy(nll[key].mean(0)[known]) for key in (("before", "without"), first, second)
    )
    return textwrap.indent(evaluation.show_text(other, one, by=before), "    ")


def show_task(task: str, answers: dict) -> str:
    """Scores of all models and ways in %, with intervals by drawing the questions anew.

    answers {(arm, way): a list of results for every seed}. Below, the gain of thoughts, paired.
    """

    def values(key, score: str) -> np.ndarray:
        """Percent of every question [n], the mean over the seeds."""
        return 100 * np.array([[r[score] for r in results] for results in answers[key]]).mean(0)

    def cell(percent: np.ndarray) -> str:
        low, high = evaluation.bootstrap_interval(percent)
        return f"{percent.mean():.2f} [{low:.2f}, {high:.2f}]"

    scores = [s for s in evaluation.SCORES if s in answers["before", "without"][0][0]]
    lines = [f"| {task} | {' | '.join(evaluation.SCORES[score] for score in scores)} |"]
    lines.append("|---" * (len(scores) + 1) + "|")
    for key in answers:
        cells = [cell(values(key, score)) for score in scores]
        lines.append(f"| {LABELS[key]} | {' | '.join(cells)} |")
    for second in (("thoughts", "without"), PLAIN):
        cells = [cell(values(THINKS, score) - values(second, score)) for score in scores]
        lines.append(f"| {LABELS[THINKS]} - {LABELS[second]} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def show_thoughts(model: QuietStar, tokenizer: Tokenizer, ids: Tensor) -> str:
    """What is thought in the middle of each of the sequences ids [n, T], a line each.

    The last words of the text, the true next token, the thought, w, and log p of the true token
    without and with it.
    """
    j, cache, lines = ids.shape[1] // 2, KVCache(model.model.config), []
    model.model.run(model.model.embed_tokens(ids[:, : j - 1]), cache)
    prediction = model.think_last(ids[:, j - 1], cache)
    for row, tokens in enumerate(ids.tolist()):
        text, _ = describe_thought(prediction, row, tokens[j], tokenizer)
        before, true = tokenizer.spell(tokens[max(j - 8, 0) : j]), tokenizer.spell([tokens[j]])
        lines.append(f"    {before!r} -> {true!r}  {text}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------- the command line


def prepare(options: argparse.Namespace, out: Path) -> tuple[dict, Tokens]:
    """Options of train.py for all runs, and the held-out tokens.

    Both sides of the text are written. What cannot work fails here, with a ValueError.
    """
    model.check_at_least(options, sequences=2, limit=1, seeds=1)
    for file in filter(None, (options.gsm8k, options.csqa)):
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file}")
    training = training_options(options.training)
    training |= {"checkpoint": options.checkpoint, "data": [out / "train.jsonl"]}
    settings, _ = train.make_settings(training)
    for seed in range(options.seeds):
        for arm in ARMS:
            same_settings(out / f"seed{seed}" / arm / "settings.json", training | {"seed": seed})
    known, held_out = split_text(options.data)
    tokens = tokenize(held_out, load_tokenizer(options.checkpoint))
    if len(tokens.ids) < 2 * settings.context:
        raise ValueError(
            f"the text held out has {len(tokens.ids)} tokens; two sequences of {settings.context} "
            "(context) are the least to compare on: give more --data"
        )
    out.mkdir(parents=True, exist_ok=True)
    for path, documents in ((out / "train.jsonl", known), (out / "held_out.jsonl", held_out)):
        text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        if not path.exists():
            write_text(path, text)
        elif read_utf8(path) != text:
            raise ValueError(f"{path} is of other --data than {options.data}; give another --out")
    return training, tokens


def report(found: dict[str, list[dict]], thoughts: str) -> str:
    """All of it as Markdown, from what measure found: {arm: a result for every seed}."""
    nll = {(arm, way): np.array([x["nll"][way] for x in found[arm]], float) for arm, way in LABELS}
    parts = [
        f"Held-out text: {int((~np.isnan(nll['before', 'without'])).sum())} tokens of "
        f"{nll['before', 'without'].shape[1]} sequences; loss in nats a token.",
        show_losses(nll),
        "Gains in nats a token, with 95 % intervals (the sequences drawn anew, the seeds as they "
        "are), the gain of each seed, and how large a gain had to be to be seen in four of five "
        "such runs (2.8 standard errors, of sequences and of seeds).",
        "| | gain | interval | seeds | could be seen |\n|---|---|---|---|---|\n"
        + "\n".join(show_difference(*pair, nll) for pair in DIFFERENCES),
    ]
    for second in (("thoughts", "without"), PLAIN):
        parts.append(f"By the loss before training: {LABELS[THINKS]} against {LABELS[second]}.")
        parts.append(show_gain(THINKS, second, nll))
    for task in [task for task in evaluation.TASKS if task in found["before"][0]]:
        parts.append("In %, means over the seeds, with 95 % intervals (the questions drawn anew).")
        answers = {key: [x[task].get(key[1]) for x in found[key[0]]] for key in LABELS}
        parts.append(show_task(task, {key: got for key, got in answers.items() if all(got)}))
    parts.append("Thoughts in the middle of held-out sequences, seed 0, as they came:")
    return "\n\n".join([*parts, thoughts]) + "\n"


def run(options: argparse.Namespace) -> None:
    """Split, train, measure, compare."""
    out, device = Path(options.out), pick_device(options.device)
    training, tokens = prepare(options, out)
    settings, _ = train.make_settings(training)
    T, count = settings.context, min(options.sequences, len(tokens.ids) // settings.context)
    ids, mask = tokens.batch(0, count, T, 0, device)  # [n, T], drawn from all
    positions = torch.randperm(T - 1, generator=torch.Generator().manual_seed(0))
    positions = positions[: settings.positions].sort().values  # as many as in training
    held_out = ids, mask, positions.to(device)

    def measured(arm: str, folder: Path, name: str) -> dict:
        print(f"measuring {name}")
        more = {"model": str(folder), "data": None, "dtype": settings.dtype}
        about = argparse.Namespace(**vars(options) | more)
        return measure(arm, folder, out / name, about, held_out)

    found = {"before": [measured("before", Path(options.checkpoint), "before")]}
    for seed in range(options.seeds):
        for arm, experiment in ARMS.items():
            run = out / f"seed{seed}" / arm
            print(f"run {run} on {device}")
            chosen = train.make_settings(training | {"seed": seed})
            train.train_thoughts(*chosen, run, device, experiment.loss)
            result = measured(arm, run / "quiet_star", f"seed{seed}/{arm}")
            found.setdefault(arm, []).append(result)
    model, tokenizer = load(out / "seed0/thoughts/quiet_star", device, DTYPES[settings.dtype])
    text = report(found, show_thoughts(model, tokenizer, ids[:THOUGHTS]))
    write_text(out / "report.md", text)
    print(text, end="")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FOLDER", help="a pretrained model")
    add("--data", required=True, nargs="+", metavar="FILE", help="text to train on and hold out")
    add("--out", required=True, metavar="FOLDER", help="folder of the comparison")
    add("--seeds", type=int, default=3, help="seeds 0, 1, ... (3)")
    add("--gsm8k", metavar="FILE", help="GSM8K's test questions, to be answered before and after")
    add("--csqa", metavar="FILE", help="CommonsenseQA's questions, likewise")
    add("--limit", type=int, metavar="N", help="of these, the first N only; none: all")
    add("--sequences", type=int, default=200, help="of held-out text to read (200)")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    add("training", nargs="*", metavar="-- ...", help="options of train.py")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
