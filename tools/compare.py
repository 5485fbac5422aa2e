"""Compare Quiet-STaR with equal training without thoughts, on a pretrained model.

    python -m tools.compare --checkpoint SmolLM2 --data maths.txt train.jsonl --out runs/smollm2 \\
        --gsm8k test.jsonl --csqa dev.jsonl -- --steps 200 --positions 64

The last tenth of every text is held out. On the rest, every seed trains three models on the same
batches: thoughts (Quiet-STaR), pause (pause tokens as thoughts: the same computation) and none (the
language-model loss: the same text). Options after -- are those of train.py, for all three. Their
runs are OUT/seed0/thoughts and so on. OUT/report.md compares the three and the model before
training: loss on held-out text, differences with intervals and the smallest detectable ones, gain
by difficulty, scores of eval.py's tasks, twenty thoughts. Started again, it continues.
"""

import argparse
import copy
import json
import math
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import eval as evaluation
import train
from model import KVCache, Mistral, check_range
from sample import describe_thought
from support.checkpoints import load
from support.device import DTYPES, pick_device
from support.files import read_utf8, write_text
from support.questions import TASKS, read_questions
from support.results import about, bootstrap_interval
from support.settings import add_settings
from support.terminal import execute, make_parser, show_status
from support.text import Tokens, read_documents, tokenize
from support.tokenizer import Tokenizer, load_tokenizer
from thoughts import QuietStar, ThoughtConfig
from tools.experiments import EXPERIMENTS, markdown, once, same_settings, train_run

HELD_OUT = 10  # one part in ten
THOUGHTS = 20  # to show, one in each of the first held-out sequences
READ = 8  # held-out sequences in a batch
ARMS = {"none": "none", "pause": "pause", "thoughts": "full"}  # folder: one of EXPERIMENTS
LABELS = {  # (arm, thoughts at evaluation): label
    ("before", "without"): "before",
    ("none", "without"): "trained without thoughts",
    ("pause", "without"): "pause tokens, not used",
    ("pause", "with"): "pause tokens",
    ("thoughts", "without"): "Quiet-STaR, no thoughts",
    ("thoughts", "with"): "Quiet-STaR, greedy thoughts",
    ("thoughts", "shuffled"): "Quiet-STaR, thoughts of other sequences",
}
BEFORE, PLAIN, _, PAUSE, SILENT, THINKS, SHUFFLED = LABELS
DIFFERENCES = [  # the first against the second
    (THINKS, SILENT), (THINKS, SHUFFLED), (THINKS, PAUSE), (THINKS, PLAIN), (SILENT, PLAIN),
    (PAUSE, PLAIN), (PLAIN, BEFORE),
]  # fmt: skip
POWER = 1.96 + 0.84  # standard errors of a gain that a 95 % interval shows in 80 % of such runs


def split_text(files: list[str]) -> tuple[list[str], list[str]]:
    """The documents to train on and the held-out ones: the last tenth of every file.

    A file with a single document is split by lines. Raises ValueError if nothing can be held out.
    """
    known, held_out = [], []
    for file in files:
        documents = read_documents([file])
        single = len(documents) == 1
        parts = documents[0].splitlines(keepends=True) if single else documents
        cut = len(parts) - len(parts) // HELD_OUT
        for side, part in ((known, parts[:cut]), (held_out, parts[cut:])):
            side += ["".join(part)] if single else part
    if not any(held_out):
        raise ValueError(f"--data: no file has {HELD_OUT} lines; nothing can be held out")
    return known, held_out


def training_options(arguments: list[str], fixed: Iterable[str] = ()) -> dict:
    """Options of train.py for make_settings. Raises ValueError for one that the tool sets.

    The tool sets checkpoint, data, seed, and the options in `fixed`.
    """
    parser = make_parser(None)
    parser.add_argument("--preset", choices=train.PRESETS, default=argparse.SUPPRESS)
    add_settings(parser, train.Settings, {})
    add_settings(parser, ThoughtConfig, {})
    given = vars(parser.parse_args(arguments))
    for name in {"checkpoint", "data", "seed", *fixed} & {*given}:
        option = name.replace("_", "-")
        raise ValueError(f"--{option} after -- is set by this tool; leave it out")
    return train.PRESETS.get(given.pop("preset", None), {}) | given


def pausing(model: QuietStar) -> QuietStar:
    """The same model, with K start tokens instead of greedy thoughts in think_last."""
    paused, K = copy.copy(model), model.config.thought_length  # shares all weights
    paused.think_last = lambda last, cache: model.think_last(
        last, cache, last.new_full((len(last), K), model.start_id)
    )
    return paused


@torch.no_grad()
def held_out_nll(
    model: QuietStar, arm: str, ids: Tensor, mask: Tensor, positions: Tensor
) -> dict[str, list]:
    """nll in nats [n, J] of the tokens after positions [J], NaN for no targets: {way: nll}.

    ids, target mask [n, T]. The ways are those of LABELS for the arm: without a thought, with a
    greedy one (or pause tokens), with the shuffled ones of another sequence. Raises ValueError if a
    loss is not finite.
    """
    thinker, ways = evaluation.thinking_once(model), [way for name, way in LABELS if name == arm]
    if ways == ["without"]:
        thinker.config = replace(thinker.config, thought_length=0)
    parts: dict[str, list[Tensor]] = {way: [] for way in ways}
    generator, K = torch.Generator().manual_seed(0), thinker.config.thought_length
    count = max(len(ids) // READ, 1)  # so that no batch has a single sequence
    batches = zip(ids.tensor_split(count), mask.tensor_split(count), strict=True)
    for done, (part, targets) in enumerate(batches, 1):
        think = partial(thinker, part, positions=positions, target_mask=targets, temperature=0)
        shape = (len(part), 1, len(positions), K)
        output = think(part.new_full(shape, model.start_id) if arm == "pause" else None)
        nll = {"without": output.base_nll[:, positions], "with": output.talk_nll[0, :, 0]}
        if "shuffled" in ways:
            order = torch.randperm(len(positions), generator=generator).to(part.device)
            others = output.thought_ids.roll(1, 0)[:, :, order]  # of the sequence before
            nll["shuffled"] = think(others).talk_nll[0, :, 0]
        for way in ways:
            if not nll[way].isfinite().all():
                raise ValueError("the losses are not finite: the weights are broken")
            parts[way].append(nll[way].float().masked_fill(~output.valid[0], math.nan).cpu())
        show_status(f"held-out text: {done} of {count} batches", done, count, sys.stderr)
    return {way: torch.cat(part).tolist() for way, part in parts.items()}


def measure(
    arm: str, folder: Path, out: Path, options: argparse.Namespace, held_out: tuple[Tensor, ...]
) -> dict[str, dict]:
    """Losses and answers of a model: {"nll": {way: [n, J]}, task: {way: results}}.

    held_out: ids, mask and positions for held_out_nll. The results are kept in files OUT*.
    """
    model, tokenizer = load(folder, held_out[0].device, DTYPES[options.dtype])
    if isinstance(model, Mistral):
        model = QuietStar(model, ThoughtConfig(thought_length=0))
    header = about(argparse.Namespace(**vars(options) | {"model": str(folder), "data": None}))
    shape = header | {"shape": [*held_out[0].shape, len(held_out[2])]}
    path = out.with_suffix(".json")
    found = once(path, shape, lambda: {"nll": held_out_nll(model, arm, *held_out)})
    answering = {"pause": pausing(model), "thoughts": model}.get(arm, model.model)
    for task in [task for task in TASKS if getattr(options, task)]:
        file, data = out.with_name(f"{out.name}-{task}.jsonl"), {"data": getattr(options, task)}
        results = evaluation.answer_task(answering, tokenizer, task, header | data, file)
        ways = evaluation.ways_to_answer(answering)  # "without thoughts", "with thoughts"
        found[task] = {way.split()[0]: [result[way] for result in results] for way in ways}
    return found


def difference(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """The gain of the nll first over second, both [seeds, n, J] or [1, n, J], in nats per token.

    Returns the gain of every sequence [n], averaged over seeds and scaled so that its mean over
    sequences is the mean over tokens, and the mean gain of every seed.
    """
    gain = second - first  # paired: the same token and seed
    tokens = (~np.isnan(gain[0])).sum(axis=1)  # [n]
    values = np.nansum(gain, axis=2).mean(0) / tokens.mean()
    return values, np.nanmean(gain, axis=(1, 2)).tolist()


def difference_row(label: str, first: np.ndarray, second: np.ndarray) -> list[str]:
    """label, the gain of first over second (see difference), its interval, seeds, detectable."""
    values, seeds = difference(first, second)
    low, high = bootstrap_interval(values)
    variance = values.var(ddof=1) / len(values)
    if len(seeds) > 1:
        variance += np.var(seeds, ddof=1) / len(seeds)
    each, detectable = " ".join(f"{gain:+.4f}" for gain in seeds), POWER * math.sqrt(variance)
    return [label, f"{values.mean():+.4f}", f"{low:+.4f} .. {high:+.4f}", each, f"{detectable:.4f}"]


def show_task(task: str, answers: dict) -> str:
    """Scores in % and the gains of thoughts, from {(arm, way): [results of every seed]}."""

    def values(key, score: str) -> np.ndarray:  # percent of every question [n], mean over seeds
        return 100 * np.array([[r[score] for r in results] for results in answers[key]]).mean(0)

    def cell(percent: np.ndarray) -> str:
        low, high = bootstrap_interval(percent)
        return f"{percent.mean():.2f} [{low:.2f}, {high:.2f}]"

    scores = [s for s in evaluation.SCORES if s in answers[BEFORE][0][0]]
    rows = [[LABELS[key], *(cell(values(key, score)) for score in scores)] for key in answers]
    for second in (SILENT, PLAIN):
        cells = [cell(values(THINKS, score) - values(second, score)) for score in scores]
        rows.append([f"{LABELS[THINKS]} - {LABELS[second]}", *cells])
    return markdown([task, *(evaluation.SCORES[score] for score in scores)], rows)


@torch.no_grad()
def show_thoughts(model: QuietStar, tokenizer: Tokenizer, ids: Tensor) -> str:
    """Lines with the text up to the middle of each sequence of ids [n, T], and its thought."""
    j, cache, lines = ids.shape[1] // 2, KVCache(model.model.config), []
    model.model.run(model.model.embed_tokens(ids[:, : j - 1]), cache)
    prediction = model.think_last(ids[:, j - 1], cache)
    for row, tokens in enumerate(ids.tolist()):
        text, _ = describe_thought(prediction, row, tokens[j], tokenizer)
        before, true = tokenizer.spell(tokens[max(j - 8, 0) : j]), tokenizer.spell([tokens[j]])
        lines.append(f"    {before!r} -> {true!r}  {text}")
    return "\n".join(lines)


def report(found: dict[str, list[dict]], thoughts: str) -> str:
    """The report as Markdown, from the results of measure: {arm: [result of every seed]}."""
    nll = {(arm, way): np.array([x["nll"][way] for x in found[arm]], float) for arm, way in LABELS}
    targets = ~np.isnan(nll[BEFORE][0])  # [n, J]
    means = {key: np.nanmean(x, axis=(1, 2)) for key, x in nll.items()}  # [seeds]
    each = {key: " ".join(f"{loss:.4f}" for loss in means[key]) for key in means}
    losses = [[LABELS[key], f"{means[key].mean():.4f}", each[key]] for key in means]
    gains = [
        difference_row(f"{LABELS[first]} against {LABELS[second]}", nll[first], nll[second])
        for first, second in DIFFERENCES
    ]
    parts = [
        f"Held-out text: {targets.sum()} tokens of {len(targets)} sequences; nats per token.",
        markdown(["", "loss", "seeds"], losses),
        "Gains in nats per token: 95 % intervals (bootstrap over the sequences, seeds fixed), the "
        "gain of each seed, and the detectable gain, which 80 % of such comparisons would show "
        "(2.8 standard errors, of sequences and of seeds).",
        markdown(["", "gain", "interval", "seeds", "detectable"], gains),
    ]
    for second in (SILENT, PLAIN):
        keys = second, THINKS, BEFORE
        other, one, before = (torch.from_numpy(nll[key].mean(0)[targets]) for key in keys)
        parts.append(f"By the loss before training: {LABELS[THINKS]} against {LABELS[second]}.")
        parts.append(textwrap.indent(evaluation.show_text(other, one, by=before), "    "))
    for task in [task for task in TASKS if task in found["before"][0]]:
        parts.append("In %, mean over seeds, 95 % intervals (bootstrap over the questions).")
        answers = {key: [x[task].get(key[1]) for x in found[key[0]]] for key in LABELS}
        parts.append(show_task(task, {key: got for key, got in answers.items() if all(got)}))
    parts.append("Greedy thoughts in the middle of the first held-out sequences, seed 0:")
    return "\n\n".join([*parts, thoughts]) + "\n"


def prepare(options: argparse.Namespace, out: Path) -> tuple[dict, Tokens]:
    """Options of train.py for all runs, and the held-out tokens. What cannot work fails here."""
    check_range(options, 1, math.inf, "limit", "seeds")
    check_range(options, 2, math.inf, "sequences")
    for task in TASKS:
        if file := getattr(options, task):
            read_questions(file, task, options.limit)
    training = training_options(options.training)
    training |= {"checkpoint": options.checkpoint, "data": [out / "train.jsonl"]}
    settings, _ = train.make_settings(training)
    for seed, arm in product(range(options.seeds), ARMS):
        same_settings(out / f"seed{seed}" / arm / "settings.json", training | {"seed": seed})
    known, held_out = split_text(options.data)
    tokens = tokenize(held_out, load_tokenizer(options.checkpoint))
    if len(tokens.ids) < 2 * settings.context:
        raise ValueError(
            f"the held-out text has {len(tokens.ids)} tokens; it must have at least two sequences "
            f"of {settings.context} (context): give more --data"
        )
    out.mkdir(parents=True, exist_ok=True)
    for path, documents in ((out / "train.jsonl", known), (out / "held_out.jsonl", held_out)):
        text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        if not path.exists():
            write_text(path, text)
        elif read_utf8(path) != text:
            raise ValueError(f"{path} is of other --data than {options.data}; give another --out")
    return training, tokens


def run(options: argparse.Namespace) -> None:
    """Split the text, train, measure, and write the report."""
    out, device = Path(options.out), pick_device(options.device)
    training, tokens = prepare(options, out)
    settings, _ = train.make_settings(training)
    options.dtype = settings.dtype
    T, count = settings.context, min(options.sequences, len(tokens.ids) // settings.context)
    ids, mask = tokens.batch(0, count, T, 0, device)  # [n, T], drawn from all
    positions = torch.randperm(T - 1, generator=torch.Generator().manual_seed(0))
    positions = positions[: settings.positions].sort().values  # as many as in training
    held_out = ids, mask, positions.to(device)
    before = measure("before", Path(options.checkpoint), out / "before", options, held_out)
    found: dict[str, list[dict]] = {"before": [before]} | {arm: [] for arm in ARMS}
    for seed, arm in product(range(options.seeds), ARMS):
        folder, loss = out / f"seed{seed}" / arm, EXPERIMENTS[ARMS[arm]].loss
        train_run(training | {"seed": seed}, folder, device, loss)
        found[arm].append(measure(arm, folder / "quiet_star", folder, options, held_out))
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
    add("--seeds", type=int, default=3, help="number of seeds: 0, 1, ... (3)")
    add("--gsm8k", metavar="FILE", help="questions of GSM8K, to answer with every model")
    add("--csqa", metavar="FILE", help="questions of CommonsenseQA, to answer with every model")
    add("--limit", type=int, metavar="N", help="first questions of these to answer; none: all")
    add("--sequences", type=int, default=200, help="held-out sequences to read at most (200)")
    add("--device", help="cpu, cuda, mps; none: the best one available")
    add("training", nargs="*", metavar="-- ...", help="options of train.py")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
