"""Do thoughts pay on natural text? GSM8K's solutions with the working taken out.

    python -m tools.unsaid --checkpoint SmolLM2 --data train.jsonl --test test.jsonl \\
        --out runs/unsaid -- --fast --dtype bfloat16

A solution says "She sells 9*2 = <<9*2=18>>18 eggs". Without its working it says "She sells 18
eggs", and what it leaves unsaid is an aside of K tokens, filled up with hums: "She sells —9*2 um um
um um um—18 eggs". A checkpoint learns from text in which half of the results have an aside
("taught"). From there it is trained in four ways on text in which a tenth have one: with
Quiet-STaR, without REINFORCE, with pause tokens, without thoughts. OUT/report.md compares them on
the solutions of --test. Options after -- are those of train.py, for the four ways. Started again,
it continues.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import eval as evaluation
import train
from model import check_range
from support import files
from support.checkpoints import load
from support.device import DTYPES, pick_device
from support.terminal import execute, make_parser, show_status
from support.text import MANIFEST, text_of
from support.tokenizer import load_tokenizer
from thoughts import QuietStar, ThoughtConfig, mix, token_logits, token_logp, valid_targets
from tools.compare import difference_row, training_options
from tools.experiments import EXPERIMENTS, markdown, once, train_language, train_run

K = 8  # tokens of an aside, and of a thought
HUM = " um"
TEACH = {  # options of train.py, to learn to work in asides
    "steps": 130, "batch_size": 4, "context": 192, "positions": 8, "lr": 2e-4, "cooldown": 0.4,
}  # fmt: skip
STUDY = {  # of the four ways
    "steps": 30, "batch_size": 2, "micro_batch": 1, "context": 384, "positions": 12, "lr": 3e-5,
    "mixing_lr": 1e-4, "warmup": 5, "cooldown": 0.5, "n_thoughts": 2, "thought_length": K,
    "n_true": 2, "embedding_scale": 1.0, "reinforce_temperature": 1.0, "policy_weight": 10.0,
}  # fmt: skip
HEAR = {  # differences from them while only the mixing head learns
    "steps": 40, "positions": 16, "lr": 0.0, "mixing_lr": 2e-4, "cooldown": 0.3,
    "policy_weight": 0.0,
}  # fmt: skip
ARMS = ("full", "policy0", "none", "pause")  # the four ways, of EXPERIMENTS
TEACHING, SILENT = 0.5, 0.1  # shares of the results that have an aside
SHOWN = 20  # thoughts in the report
RESULT = re.compile(r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
NUMBER = rf"(?:{RESULT.pattern}|\.[0-9]+)"
TERM = rf"\(*(?:[$€£]\s?)?{NUMBER}%?\)*"
ANNOTATION = re.compile(r"<<([^<>]*)=[^<>=]*>>")
# "9 * 2 = $" at the end of a text: what is cut, and the sign of a currency, which stays
WORKING = re.compile(rf"{TERM}(?:\s*[-+*/x×÷]\s*{TERM})+\s*=\s*([$€£]?)\s*$")


class Solution(NamedTuple):
    """A question and its solution without working, cut before each result that lost its working."""

    texts: list[str]  # all but the first begin with a result
    workings: list[str]  # one for each result: the expression in its annotation
    results: list[str]


def take_out(record: dict, where: str) -> Solution:
    """The solution of a record of GSM8K, without working and without the line of the answer.

    An annotation is removed alone, and its result is not counted, if no expression stands before
    it. Raises ValueError for another record.
    """
    text = text_of(record, where).partition("\n####")[0]
    solution, start = Solution([""], [], []), 0
    for annotation in ANNOTATION.finditer(text):
        before = text[start : annotation.start()]
        start = annotation.end()
        said, result = WORKING.search(before), RESULT.match(text, start)
        solution.texts[-1] += before[: said.start()] + said[1] if said and result else before
        if said and result:
            solution.texts.append("")
            solution.workings.append(annotation[1].replace(" ", ""))
            solution.results.append(result[0])
    solution.texts[-1] += text[start:] + "\n"
    return solution


class Encoded(NamedTuple):
    """The tokens of a solution."""

    ids: list[int]
    results: list[range]  # the tokens of each result
    workings: list[list[int] | None]  # an aside of K tokens for each result; None: it is longer


def encode(solution: Solution, tokenizer, spoken: Callable[[], bool] = lambda: False) -> Encoded:
    """Tokens of a solution, with an aside before the results for which spoken() is true.

    Texts, dashes and asides are encoded one by one, so that an aside changes no other token.
    """
    ids, results, workings = tokenizer.encode(solution.texts[0], bos=tokenizer.adds_bos), [], []
    hum, dash = tokenizer.token_id(HUM), tokenizer.token_id("—")
    for text, working, result in zip(*(solution.texts[1:], *solution[1:]), strict=True):
        aside = tokenizer.encode(working)
        aside = aside + [hum] * (K - len(aside)) if len(aside) <= K else None
        if aside and spoken():
            ids += [dash, *aside, dash]
        results.append(range(len(ids), len(ids) + len(tokenizer.encode(result))))
        workings.append(aside)
        ids += tokenizer.encode(text)
    return Encoded(ids, results, workings)


def write_tokens(
    solutions: list[Solution], tokenizer, share: float, seed: int, folder: Path
) -> None:
    """Write a folder of tokens for train.py, in which a share of the results has an aside.

    Raises ValueError if it exists with other tokens.
    """
    rng, ids, is_target = np.random.default_rng(seed), [], []
    for solution in solutions:
        document = encode(solution, tokenizer, lambda: rng.random() < share).ids
        document += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids += document
        is_target += [False] + [True] * (len(document) - 1)
    if (folder / MANIFEST).exists():
        if np.array(ids, np.uint32).tobytes() != (folder / "tokens.bin").read_bytes():
            raise ValueError(f"{folder} is of other --data or --checkpoint; give another --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    np.array(ids, np.uint32).tofile(folder / "tokens.bin")
    np.array(is_target).tofile(folder / "is_target.bin")
    about = {"tokens": len(ids), "dtype": "uint32", "tokenizer": tokenizer.identity()}
    files.write_json(folder / MANIFEST, about)


# ---------------------------------------------------------------------------------- the training


def likely_asides(model: QuietStar, ids: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    """As many positions as `positions` [J] of one text ids [1, T], sorted: every fourth of these,
    and those after which the model is most likely to write the dash of an aside.

    Thoughts at other positions are rarely drawn, so the loss is a biased estimate.
    """
    here = torch.arange(ids.shape[1] - model.config.n_true)
    with torch.no_grad():
        logp = model.model(ids)[0, : len(here)].float().log_softmax(-1)  # [T - A, V]
    wanted = logp[:, model.config.init_id]
    wanted[positions[::4].to(ids.device)] = math.inf
    valid = valid_targets(targets, here.to(ids.device), model.config.n_true).all(0)[0]
    return wanted.masked_fill(~valid, -math.inf).topk(len(positions)).indices.sort().values


def where_asides_are(loss: Callable, batch_size: int) -> Callable:
    """The loss of train.train at likely_asides. A micro-batch is one sequence."""

    def loss_of(model: QuietStar, ids, targets, positions, counts, generator):
        chosen = likely_asides(model, ids, targets, positions)
        counts = counts[0], batch_size * len(chosen)
        return loss(model, ids, targets, chosen, counts, generator)

    return loss_of


def hearing(loss: Callable) -> Callable:
    """The loss if only the mixing head learns."""

    def loss_of(model: QuietStar, *batch):
        model.requires_grad_(False)
        model.mixing_head.requires_grad_(True)
        return loss(model, *batch)

    return loss_of


# ------------------------------------------------------------------------------- the measurement


class HeldOut(NamedTuple):
    """Sequences of held-out solutions without asides, and J positions of each that think."""

    ids: Tensor  # [n, T]
    positions: Tensor  # [n, J] before every token of a result, and before some other tokens
    result: np.ndarray  # [n, J] number of the result that the next token is of; -1: of none
    workings: Tensor  # [n, J, K] the aside of the result that begins here, else -1


def hold_out(solutions: list[Solution], tokenizer, count: int, T: int) -> HeldOut:
    """`count` sequences of T tokens; J is T // 10.

    Raises ValueError if there are less tokens, or if a number is merged with the text before it.
    """
    rng, stream, of, aside_at = np.random.default_rng(0), [], {}, {}
    for solution in solutions:
        ids, results, workings = encode(solution, tokenizer)
        if ids != tokenizer.encode("".join(solution.texts), bos=tokenizer.adds_bos):
            raise ValueError("the tokenizer merges numbers with other text; use another checkpoint")
        for where, aside in zip(results, workings, strict=True):
            of |= dict.fromkeys((len(stream) + i for i in where), len(of))
            aside_at[len(stream) + where[0]] = aside
        stream += ids + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    if len(stream) < count * T:
        raise ValueError(f"--test has {len(stream)} tokens, but {count} sequences need {count * T}")
    positions = []
    for start in range(0, count * T, T):
        after = range(start + 1, start + T)  # the tokens to predict
        here = [i for i in after if i in of][: T // 10]
        others = rng.permutation([i for i in after if i not in of]).tolist()
        positions.append(sorted(here + others[: T // 10 - len(here)]))
    return HeldOut(
        torch.tensor(stream[: count * T]).view(count, T),
        torch.tensor(positions) - 1 - T * torch.arange(count)[:, None],
        np.array([[of.get(i, -1) for i in row] for row in positions]),
        torch.tensor([[aside_at.get(i) or [-1] * K for i in row] for row in positions]),
    )


Plan = dict[str, tuple[str, float | None]]  # name: thoughts, and w (None: the model's own)


@torch.no_grad()
def predict_all(model: QuietStar, text: HeldOut, plan: Plan) -> dict[str, dict[str, list]]:
    """nll in nats, hits (the true token is the likeliest) and w [n, J] after thoughts [n, J, K].

    Thoughts are greedy, sampled, pause (start tokens), true (the working, where a result begins),
    or shuffled (the greedy ones of other results, or of other tokens, in the same sequence). The
    last two need greedy before them.
    """
    device, head = model.start_embedding.device, model.model.lm_head.weight
    thinker = evaluation.thinking_once(model)
    found = {name: {"nll": [], "hit": [], "weight": [], "thoughts": []} for name in plan}
    for row, (ids, J, workings) in enumerate(
        zip(text.ids, text.positions, text.workings, strict=True)
    ):
        ids, J, workings = ids.to(device), J.to(device), workings.to(device)
        generator, forced, states = torch.Generator().manual_seed(row), {}, {}
        forced["pause"] = workings.new_full((len(J), thinker.config.thought_length), model.start_id)
        for way in dict.fromkeys(way for way, _ in plan.values()):
            seen, given = [], forced.get(way)
            thinker.mixing_weight = lambda *h, seen=seen: seen.append(h) or model.mixing_weight(*h)
            given, heat = None if given is None else given[None, None], float(way == "sampled")
            output = thinker(ids[None], given, J, temperature=heat, generator=generator)
            [(h_init, h_thought)] = seen  # [1, 1, J, 1, D] each
            thoughts, weight = output.thought_ids[0, 0], output.weight[0, 0, 0]  # [J, K], [J]
            states[way] = h_init[0, 0, :, 0], h_thought[0, 0, :, 0], weight, thoughts
            if way == "greedy":
                begins, order = workings[:, 0] >= 0, torch.arange(len(J), device=device)
                for group in (order[begins], order[~begins]):
                    order[group] = group.roll(len(group) // 2)
                forced["true"] = workings.where(workings >= 0, thoughts)
                forced["shuffled"] = thoughts[order]
        for name, (way, w) in plan.items():
            h_init, h_thought, weight, thoughts = states[way]
            weight = weight if w is None else torch.full_like(weight, w)
            logits, true = token_logits(mix(h_init, h_thought, weight), head), ids[J + 1]
            found[name]["nll"].append((-token_logp(logits, true)).tolist())
            found[name]["hit"].append((logits.argmax(-1) == true).tolist())
            found[name]["weight"].append(weight.tolist())
            found[name]["thoughts"].append(thoughts.tolist())
        done, total = row + 1, len(text.ids)
        show_status(f"held-out text: {done} of {total} sequences", done, total, sys.stderr)
    return found


# ------------------------------------------------------------------------------------ the report

LABELS = {
    ("none", "without"): "trained without thoughts",
    ("pause", "without"): "pause tokens, not used",
    ("pause", "pause"): "pause tokens",
    ("policy0", "without"): "no REINFORCE, no thoughts",
    ("policy0", "greedy"): "no REINFORCE, greedy thoughts",
    ("policy0", "shuffled"): "no REINFORCE, thoughts of other positions",
    ("full", "without"): "Quiet-STaR, no thoughts",
    ("full", "greedy"): "Quiet-STaR, greedy thoughts",
    ("full", "shuffled"): "Quiet-STaR, thoughts of other positions",
}
LOOK: Plan = {"at once": ("greedy", 1.0)} | {
    f"{way} aside, w = {w}": (way, w)
    for way in ("greedy", "sampled", "true")
    for w in (0.9, 0.7, 0.5, 0.0)
}  # fmt: skip
COLUMNS = {
    "first": "first token of a result",
    "result": "tokens of results",
    "other": "other tokens",
    "all": "all tokens",
    "right": "results right, %",
}


def values(found: dict, text: HeldOut) -> dict[str, np.ndarray]:
    """nll of groups of tokens, and 100 or 0 for a result of which all tokens are hits.

    found: of predict_all, for one name. Returns [n, J] for each group; NaN for other tokens.
    """
    nll, hit, rows = np.array(found["nll"]), np.array(found["hit"]), text.result
    first = [[r >= 0 and r not in row[:j] for j, r in enumerate(row)] for row in rows.tolist()]
    right = [[h[row == r].all() for r in row] for row, h in zip(rows, hit, strict=True)]
    return {
        "first": np.where(first, nll, np.nan),
        "result": np.where(rows >= 0, nll, np.nan),
        "other": np.where(rows < 0, nll, np.nan),
        "right": np.where(first, 100.0 * np.array(right), np.nan),
    }


def score_row(label: str, found: list[dict], text: HeldOut) -> list[str]:
    """Means over seeds and tokens, and w at the first tokens of results and at other tokens."""
    seeds = [values(x, text) for x in found]
    mean = {name: np.nanmean([seed[name] for seed in seeds]) for name in seeds[0]}
    share = (text.result >= 0).sum() / text.ids[:, 1:].numel()  # of result tokens in the text
    mean["all"] = share * mean["result"] + (1 - share) * mean["other"]
    w = np.array([x["weight"] for x in found])
    heard = [w[:, ~np.isnan(seeds[0][group])].mean() for group in ("first", "other")]
    cells = [f"{mean[name]:.1f}" if name == "right" else f"{mean[name]:.3f}" for name in COLUMNS]
    return [label, *cells, *(f"{x:.2f}" for x in heard)]


def show_thoughts(found: dict, text: HeldOut, tokenizer) -> str:
    """Lines with the text before a result, the result, the greedy thought, w, and log p."""
    lines, shown = [], set()
    for row, i in np.argwhere(text.result >= 0).tolist():
        number, j, ids = text.result[row, i], int(text.positions[row, i]), text.ids[row].tolist()
        if number in shown or len(shown) == SHOWN:
            continue
        shown.add(number)
        length = int((text.result[row] == number).sum())
        before, result = ids[max(j - 11, 0) : j + 1], ids[j + 1 : j + 1 + length]
        thought, w = (found["greedy"][name][row][i] for name in ("thoughts", "weight"))
        old, new = (-found[way]["nll"][row][i] for way in ("without", "greedy"))
        before, result, thought = (repr(tokenizer.spell(x)) for x in (before, result, thought))
        numbers = f"w {w:.2f}  log p {old:.2f} -> {new:.2f} ({new - old:+.2f})"
        lines.append(f"    {before} -> {result}  thought {thought}  {numbers}")
    return "\n".join(lines)


def report(look: dict, arms: dict[str, list[dict]], text: HeldOut, tokenizer) -> str:
    """The report as Markdown. look: of the taught model, arms: of every seed, from predict_all."""
    head = ["", *COLUMNS.values(), "w, results", "w, others"]
    found = {key: [x[key[1]] for x in arms[key[0]]] for key in LABELS if arms.get(key[0])}
    parts = [
        f"{(text.result >= 0).sum()} tokens of held-out results and {(text.result < 0).sum()} "
        f"other tokens of {len(text.ids)} sequences; nats per token.",
        "Before Quiet-STaR, with asides as thoughts and a fixed w:",
        markdown(head, [score_row(name, [look[name]], text) for name in LOOK]),
        "After training (means over seeds):",
        markdown(head, [score_row(LABELS[key], x, text) for key, x in found.items()]),
    ]
    full, groups = (
        ("full", "greedy"),
        {key: [values(y, text) for y in x] for key, x in found.items()},
    )
    for group, sign in (("result", 1), ("other", 1), ("right", -1)):
        of = {key: sign * np.array([x[group] for x in groups[key]]) for key in groups}
        rows = [
            difference_row(f"against {LABELS[key]}", of[full], of[key])
            for key in of
            if key != full and len(of[key]) in (1, len(of[full]))
        ]
        parts += [
            f"{COLUMNS[group]}: gains of {LABELS[full]}, with 95 % intervals (bootstrap over the "
            "sequences), the gain of each seed, and the detectable gain (2.8 standard errors):",
            markdown(["", "gain", "interval", "seeds", "detectable"], rows),
        ]
    parts += [
        "Thoughts at the first results, seed 0:",
        show_thoughts(arms["full"][0], text, tokenizer),
    ]
    return "\n\n".join(parts) + "\n"


# -------------------------------------------------------------------------------- the experiment


def measure(folder: Path, path: Path, plan: Plan, text: HeldOut, device, dtype: str) -> dict:
    """predict_all of the model in a folder, kept in a JSON file.

    A plain model thinks in asides: start and end are the em dash.
    """
    written = (folder / "model.safetensors").stat().st_mtime
    about = {
        "written": written,
        "plan": {x: [*y] for x, y in plan.items()},
        "n": [*text.result.shape],
    }

    def predict() -> dict:
        model, tokenizer = load(folder, device, DTYPES[dtype])
        if not isinstance(model, QuietStar):
            dash = tokenizer.token_id("—")
            config = ThoughtConfig(1, K, 1, init_id=dash, embedding_scale=1.0)
            model = QuietStar(model, config)
        return predict_all(model, text, plan)

    return once(path, about, predict)


def run(options: argparse.Namespace) -> None:
    """Teach, look, train in the four ways with every seed, measure, and write the report."""
    check_range(options, 1, math.inf, "seeds")
    check_range(options, 2, math.inf, "sequences")
    out, device = Path(options.out), pick_device(options.device)
    more = training_options(options.training, ["micro_batch", "thought_length"])
    tokenizer = load_tokenizer(options.checkpoint)
    kept = {name: more[name] for name in ("fast", "dtype", "masters") if name in more}
    study = STUDY | more | {"data": [out / "text"], "checkpoint": options.checkpoint}
    settings, _ = train.make_settings(study)
    solutions, unseen = (
        [take_out(record, where) for where, record in files.read_json_lines(file)]
        for file in (options.data, options.test)
    )
    text = hold_out(unseen, tokenizer, options.sequences, settings.context)
    for seed, (name, share) in enumerate({"teach": TEACHING, "text": SILENT}.items()):
        write_tokens(solutions, tokenizer, share, seed, out / name)
    teach = TEACH | kept | {"data": [out / "teach"], "checkpoint": options.checkpoint}
    taught = train_language(teach, out / "taught", device)
    arms: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for seed, arm in product(range(options.seeds), options.only):
        folder, begins, loss = out / f"seed{seed}" / arm, taught, EXPERIMENTS[arm].loss
        if arm != "none":
            loss = where_asides_are(loss, settings.batch_size)
            thoughts = "pause" if arm == "pause" else "full"  # while the head learns to hear
            listens = where_asides_are(EXPERIMENTS[thoughts].loss, settings.batch_size)
            given, heard = study | HEAR | {"checkpoint": taught}, out / f"hear-{thoughts}"
            train_run(given, heard, device, hearing(listens))
            begins = heard / "quiet_star"
        given = study | EXPERIMENTS[arm].options | {"checkpoint": begins, "seed": seed}
        train_run(given, folder, device, loss)
        ways = [way for name, way in LABELS if name == arm]
        plan = {way: ("greedy", 1.0) if way == "without" else (way, None) for way in ways}
        path = folder.with_suffix(".json")
        arms[arm].append(measure(folder / "quiet_star", path, plan, text, device, settings.dtype))
    look = measure(taught, out / "look.json", LOOK, text, device, settings.dtype)
    written = report(look, arms, text, tokenizer)
    files.write_text(out / "report.md", written)
    print(written, end="")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FOLDER", help="a pretrained model")
    add("--data", required=True, metavar="FILE", help="train.jsonl of GSM8K")
    add("--test", required=True, metavar="FILE", help="test.jsonl of GSM8K, held out")
    add("--out", required=True, metavar="FOLDER", help="folder of the experiment")
    add("--only", nargs="+", choices=ARMS, default=ARMS, help=f"of {', '.join(ARMS)} (all)")
    add("--seeds", type=int, default=3, help="number of seeds: 0, 1, ... (3)")
    add("--sequences", type=int, default=60, help="held-out sequences to read (60)")
    add("--device", help="cpu, cuda, mps; none: the best one available")
    add("training", nargs="*", metavar="-- ...", help="options of train.py")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
