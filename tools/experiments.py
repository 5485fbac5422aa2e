"""Experiments on the built-in corpus, on the CPU: controls, ablations, other objectives.

    python -m tools.experiments --out runs/controls                   all experiments, five seeds
    python -m tools.experiments --out runs/controls --only full pause --seeds 2
    python -m tools.experiments --out runs/controls --seeds 0         print finished results only

An experiment is `python train.py` with other options, another loss (tools/objectives.py) or another
initial model. A seed sets the corpus, the base model (the same for all experiments) and the
training. OUT/seed0/full/ is the folder of a run and OUT/seed0/full.json its result. Finished
experiments are not run again, and a stopped one continues from its last checkpoint. The tables are
printed and written to OUT/tables.md.
"""

import argparse
import io
import json
import math
import os
import statistics
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

import eval as evaluation
import train
from model import check_range, save_mistral
from support import corpus
from support.files import read_json, write_json, write_text
from support.runs import copy_tokenizer, make_folder
from support.terminal import execute, make_parser
from support.text import tokenize
from support.tokenizer import load_tokenizer
from thoughts import quiet_star_loss
from tools import objectives, two
from tools.plan import work_of
from tools.prepare import check_workers, start_worker

HELD_OUT_LINES = 300  # of the text on which the gain by difficulty is measured


class Experiment(NamedTuple):
    """The differences from `python train.py`, and a label for tables."""

    label: str
    options: dict = {}  # noqa: RUF012  (never changed)
    loss: Callable = train.thought_loss
    model: Callable = train.thinking_model
    begins: str | None = "base"  # the experiment whose model it continues; None: a base model
    puzzles: Callable = nullcontext  # a context in which it runs: tools/two.py has other puzzles

    def tokens(self) -> int:
        """The cost: tokens processed in training with thoughts, at most."""
        settings, thoughts = train.make_settings(self.options)
        work = work_of(settings, thoughts)
        work = replace(work, J=0) if self.loss is objectives.plain_loss else work
        return settings.steps * work.batch * work.tokens(thoughts)


def objective(label: str, function: Callable, model=train.thinking_model, **options) -> Experiment:
    """An experiment with another objective."""
    return Experiment(label, options, objectives.trained_by(function), model)


def scarce(percent: int, label: str = "", loss=train.thought_loss, **options) -> Experiment:
    """An experiment in which only this percentage of the asides works, in both stages."""
    options = {"work": percent / 100, **options}
    return Experiment(f"{percent} %{label}", options, loss, begins=f"base-{percent}")


def two_digits(A: int) -> Experiment:
    """An experiment with puzzles whose answer has two tokens."""
    options = {"n_true": A}
    return Experiment(f"A = {A}, two digits", options, begins="two-base", puzzles=two.puzzles)


RLP = objectives.rlp, objectives.begin_without_mixing
HOT = objectives.trained_by(quiet_star_loss, temperature=2.0)
SCARCE = (50, 20, 15, 10)  # percentages of asides that work; by default it is 30
EXPERIMENTS = {
    "base": Experiment("base model", begins=None),
    "full": Experiment("full Quiet-STaR (N = 2, K = 6, A = 2)"),
    "none": Experiment("trained further without thoughts", loss=objectives.plain_loss),
    "pause": Experiment("pause tokens in training", loss=objectives.pause_loss),
    "random": Experiment("random thoughts in training", loss=objectives.random_loss),
    "policy0": Experiment("no REINFORCE (policy weight 0)", {"policy_weight": 0.0}),
    "all-advantages": objective("all advantages: negatives kept", objectives.all_advantages),
    "base-baseline": objective("base as baseline", objectives.base_as_baseline),
    "log-mean": objective("log mean", objectives.log_mean),
    "probability": objective("probability as reward", objectives.probability_reward),
    "rpt": Experiment("next token likeliest as reward (RPT)", loss=objectives.rpt_loss),
    "kl": Experiment(
        "KL to the initial model, 0.1", {}, objectives.kl_loss, objectives.begin_with_reference
    ),
    "straight-through": Experiment(
        "straight-through Gumbel", {"policy_weight": 0.0}, model=objectives.begin_straight_through
    ),
    "w0": Experiment("Quiet-STaR, w = 0", model=objectives.begin_without_mixing),
    "no-base": Experiment("no L_base (base weight 0)", {"base_weight": 0.0}),
    "rlp-language": objective(  # policy_weight: that of the others times RLP's N / (N - 1)
        "RLP, all losses kept", objectives.all_advantages, RLP[1], n_true=1, policy_weight=20.0
    ),
    "rlp-base": objective("RLP, L_base kept", objectives.rlp_base, RLP[1], n_true=1),
    "rlp": objective("RLP", *RLP, n_true=1),
    "rlp-slow": objective("RLP, a tenth of the learning rate", *RLP, n_true=1, lr=2e-5),
    **{f"K{K}": Experiment(f"K = {K}", {"thought_length": K}) for K in (0, 1, 2, 4, 8, 12)},
    "K12-A4": Experiment("K = 12, A = 4", {"thought_length": 12, "n_true": 4}),
    "K12-8": Experiment("then K = 8, A = 2", {"thought_length": 8}, begins="K12-A4"),
    "K12-8-6": Experiment("then K = 6, A = 1", {"n_true": 1}, begins="K12-8"),
    "K12-8-6-4": Experiment(
        "then K = 4, A = 1", {"thought_length": 4, "n_true": 1}, begins="K12-8-6"
    ),
    "A1": Experiment("A = 1", {"n_true": 1}),
    "A4": Experiment("A = 4", {"n_true": 4}),
    "N1": Experiment("N = 1 (base as baseline)", {"n_thoughts": 1}),
    "N4": Experiment("N = 4", {"n_thoughts": 4}),
    "N4-base": objective("N = 4, base as baseline", objectives.base_as_baseline, n_thoughts=4),
    "init-random": Experiment("random initial start and end", model=objectives.begin_at_random),
    "squashed": Experiment("w = 1 - sigmoid(MLP - 3)", model=objectives.begin_squashed),
    "scale100": Experiment("embedding scale 100", {"embedding_scale": 100.0}),
    "few-positions": Experiment("4 positions", {"positions": 4}),
    "all-positions": Experiment("all 62 positions", {"positions": 62}),
    **{f"base-{x}": scarce(x, ", base model")._replace(begins=None) for x in SCARCE},
    **{f"work-{x}": scarce(x) for x in SCARCE},
    "work-10-steps": scarce(10, ", three times the steps", steps=450),
    "work-10-N4": scarce(10, ", N = 4", n_thoughts=4),
    "work-10-N8": scarce(10, ", N = 8", n_thoughts=8),
    "work-10-J62": scarce(10, ", all 62 positions", positions=62),
    "work-10-hot": scarce(10, ", sampling temperature 2", HOT),
    "work-10-policy": scarce(10, ", policy weight 100", policy_weight=100.0),
    "work-10-all": scarce(10, ", negative rewards kept", drop_negative=False),
    "two-base": Experiment("base model, two digits", begins=None, puzzles=two.puzzles),
    **{f"two-A{A}": two_digits(A) for A in (1, 2, 3)},
}

TABLES = {  # title: names of the rows
    "Controls. Paper: pause tokens, with the same computation, help little.":
        "base none pause random policy0 full",
    "Other objectives (tools/objectives.py).":
        "full all-advantages base-baseline log-mean probability rpt kl straight-through rlp "
        "rlp-slow pause",
    "RLP, one change at a time.":
        "full all-advantages A1 w0 no-base rlp-language rlp-base rlp rlp-slow",
    "Thought length K. Paper: longer thoughts help.": "K0 K1 K2 K4 full K8 K12",
    "Curriculum of decreasing K and A; a row continues the row above (as Fast Quiet-STaR).":
        "K12-A4 K12-8 K12-8-6 K12-8-6-4",
    "True tokens A that score a thought. Paper: A = 2 brings most of the gain.": "A1 full A4",
    "True tokens A if the answer has two tokens, both to be right (tools/two.py; chance: 11).":
        "two-base two-A1 two-A2 two-A3",
    "Thoughts per position N, and the baseline. Paper: N = 2 brings most of the gain.":
        "N1 base-baseline N4-base full N4",
    "Choices. Paper: em dash, scale 100 (at lr 1e-6), negatives dropped, all positions (here 16).":
        "full init-random scale100 squashed all-advantages few-positions all-positions",
    "Percentage of the asides that work, in both stages; by default 30.":
        "base-50 work-50 base full base-20 work-20 base-15 work-15 base-10 work-10",
    "What helps if only 10 % of the asides work?":
        "work-10 work-10-steps work-10-N4 work-10-N8 work-10-J62 work-10-hot work-10-policy "
        "work-10-all",
}  # fmt: skip

COLUMNS = {  # of the tables: a row of evaluation.puzzle_table, and one of its scores
    "at once": ("answers at once", "right"), "pause": ("pause tokens", "right"),
    "random": ("random thoughts", "right"), "shuffled": ("shuffled thoughts", "right"),
    "sampled": ("sampled thoughts", "right"), "greedy": ("greedy thoughts", "right"),
    "greedy, once": ("one greedy thought", "right"),
    "aside": ("writes an aside", "right"), "begun": ("writes one, begun right", "right"),
    "log p, sampled": ("sampled thoughts", "logp"), "log p, greedy": ("greedy thoughts", "logp"),
}  # fmt: skip


def same_settings(path: Path, options: dict, more: dict | None = None) -> bool:
    """Whether a JSON file of a run exists. Raises ValueError if it has other options, or `more`."""
    if not path.exists():
        return False
    settings, thoughts = map(asdict, train.make_settings(options))
    given, file = json.loads(json.dumps(settings | thoughts | (more or {}))), read_json(path)
    found = (more or {}) | file | file.get("settings", {}) | file.get("thoughts", {})
    if other := [f"{name} {found.get(name)}" for name in given if found.get(name) != given[name]]:
        raise ValueError(f"{path} has other settings ({', '.join(other)}); give another --out")
    return True


def once(path: Path, about: dict, measure: Callable[[], dict]) -> dict:
    """The result of measure(), read from a JSON file if it holds that of the same `about`."""
    if not path.exists() or read_json(path).get("about") != about:
        write_json(path, {"about": about} | measure())
    return read_json(path)


class Job(NamedTuple):
    """An experiment with a seed."""

    out: Path
    name: str
    seed: int

    def result(self) -> Path:
        """The result file, which is written last."""
        return self.out / f"seed{self.seed}" / f"{self.name}.json"

    def kind(self) -> tuple[dict, dict]:
        """Options of train.py, and the other properties, as same_settings takes them."""
        made = EXPERIMENTS[self.name]
        functions = {"loss": made.loss.__name__, "model": made.model.__name__}
        return {"seed": self.seed} | made.options, {"begins": made.begins} | functions

    def finished(self) -> bool:
        """Whether it has a result. Raises ValueError if that is of another experiment."""
        return same_settings(self.result(), *self.kind())

    def chain(self) -> list["Job"]:
        """The jobs whose models it continues, the base model first, and itself."""
        begins = EXPERIMENTS[self.name].begins
        return [*(self._replace(name=begins).chain() if begins else []), self]

    def model(self) -> Path:
        """The folder of its model."""
        return self.result().with_suffix("") / ("quiet_star" if self.chain()[1:] else "base")


def train_run(options: dict, run: Path, device: torch.device, loss: Callable, look=None):
    """Train with options of train.py in the folder of a run, or continue it. Returns the model.

    Raises ValueError if the run has other options.
    """
    same_settings(run / "settings.json", options)
    print(f"run {run} on {device}")
    return train.train_thoughts(*train.make_settings(options), run, device, loss, look=look)


def train_language(options: dict, run: Path, device: torch.device, look=None) -> Path:
    """The folder of a plain model, trained with options of train.py in the folder of a run."""
    same_settings(run / "settings.json", options)
    folder, new = run / "model", run / "model.tmp"
    if not folder.exists():
        model = train_run(options, run, device, objectives.plain_loss, look)
        save_mistral(model.model, new)
        copy_tokenizer(run, new)
        os.replace(new, folder)
    return folder


def perform(job: Job) -> Job:
    """Train, evaluate, and write the result."""
    began, run, device = time.perf_counter(), job.model().parent, torch.device("cpu")
    path, (options, more), nll = run / "settings.json", job.kind(), {}
    same_settings(path, options, more)
    settings, thoughts = train.make_settings(options)
    make_folder(settings, thoughts, run)
    write_json(path, read_json(path) | more)
    made, silent = EXPERIMENTS[job.name], io.StringIO()  # for status lines
    with made.puzzles(), redirect_stdout(silent), redirect_stderr(silent):
        if before := job.chain()[:-1]:
            settings = replace(settings, checkpoint=str(before[-1].model()))
            look = partial(evaluation.look_at_puzzles, tokenizer=load_tokenizer(run))
            given = settings, thoughts, run, device, made.loss, made.model, look
            model = train.train_thoughts(*given)
        else:
            model = train.train_base(settings, thoughts, run, device)
        tokenizer = load_tokenizer(run)
        table = evaluation.puzzle_table(model, tokenizer)
        if before:  # nll of every target in nats, without and with thoughts
            text = corpus.make_corpus(0, HELD_OUT_LINES, train.EXPLAINED, held_out=True)
            tokens = tokenize([text], tokenizer)
            nlls = evaluation.text_nll(model, tokens.ids, tokens.is_target, settings.context)
            nll = {kind: x.tolist() for kind, x in zip(("without", "with"), nlls, strict=True)}
    result = {
        "table": {name: score._asdict() for name, score in table.items()},
        "nll": nll,
        "metrics": json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]),
        "seconds": time.perf_counter() - began,  # since the last start
    }
    write_json(job.result(), read_json(path) | result)
    return job


def perform_all(jobs: list[Job], workers: int) -> None:
    """Perform the unfinished jobs: first the base models, then what continues them, and so on."""
    left = [job for job in jobs if not job.finished()]
    began, done = time.perf_counter(), 0
    for depth in sorted({len(job.chain()) for job in left}):
        ready = [job for job in left if len(job.chain()) == depth]
        with get_context("spawn").Pool(min(workers, len(ready)), start_worker) as pool:
            for job in pool.imap_unordered(perform, ready):
                done += 1
                minutes = (time.perf_counter() - began) / 60 * (len(left) / done - 1)
                state = f"{done}/{len(left)}  {job.name}, seed {job.seed}"
                print(f"{state:40}  about {minutes:.0f} min left", flush=True)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, without columns in which every cell is "-"."""
    columns = [cells for cells in zip(head, *rows, strict=True) if {*cells[1:]} != {"-"}]
    lines = [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def score_cells(tables: list[dict]) -> list[str]:
    """Mean ± standard deviation for each of the COLUMNS, from puzzle_table of several runs."""
    cells = []
    for row, field in COLUMNS.values():
        factor, digits = (100, 1) if field == "right" else (1, 3)  # percent, or nats
        numbers = [factor * table[row][field] for table in tables if row in table]
        spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
        cells.append(f"{statistics.mean(numbers):.{digits}f}{spread}" if numbers else "-")
    return cells


def table_row(name: str, results: list[dict]) -> list[str]:
    """The cells of an experiment: label, seeds, cost and scores."""
    chain = [EXPERIMENTS[job.name].tokens() for job in Job(Path(), name, 0).chain()[1:]]
    cost = f"{sum(chain) / EXPERIMENTS['full'].tokens():.2f}" if chain else "-"
    scores = score_cells([result["table"] for result in results])
    return [EXPERIMENTS[name].label, str(len(results)), cost, *scores]


def show_tables(results: dict[str, list[dict]]) -> str:
    """All tables as Markdown, from the results of the finished experiments."""
    parts = [
        "Accuracy in % (chance: 33) by the thought between question and answer, and log p of the "
        "right answer in nats: mean ± standard deviation over seeds. Cost: tokens processed in "
        "training, relative to the full run."
    ]
    for title, rows in TABLES.items():
        found = [table_row(name, results[name]) for name in rows.split() if results.get(name)]
        if found:
            parts += [title, markdown(["", "seeds", "cost", *COLUMNS], found)]
    if full := results.get("full"):
        without, with_thought = (
            torch.tensor([nll for result in full for nll in result["nll"][kind]])
            for kind in ("without", "with")
        )
        gain = textwrap.indent(evaluation.show_text(without, with_thought), "    ")
        text = "Gain by difficulty, full Quiet-STaR, greedy thoughts, text of held-out puzzles."
        parts += [f"{text} Paper: gains concentrate on hard tokens.", gain]
    return "\n\n".join(parts) + "\n"


def run(options: argparse.Namespace) -> None:
    """Run the chosen experiments that are not finished, and print the tables of all that are."""
    out = Path(options.out)
    check_range(options, 0, math.inf, "seeds")
    check_workers(options.workers)
    chosen = [Job(out, name, seed) for seed in range(options.seeds) for name in options.only]
    perform_all([*dict.fromkeys(job for last in chosen for job in last.chain())], options.workers)
    seeds = sorted(int(folder.name[4:]) for folder in out.glob("seed[0-9]*"))
    jobs = {name: [Job(out, name, seed) for seed in seeds] for name in EXPERIMENTS}
    results = {x: [read_json(job.result()) for job in jobs[x] if job.finished()] for x in jobs}
    if not any(results.values()):
        raise ValueError(f"no results in {out}; give some --seeds to run, or another --out")
    text = show_tables(results)
    write_text(out / "tables.md", text)
    print(text, end="")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    names = f"experiments, of {', '.join(EXPERIMENTS)} (all)"
    add("--out", required=True, metavar="FOLDER", help="folder of the experiments")
    add("--seeds", type=int, default=5, help="number of seeds; 0 prints finished results only (5)")
    add("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, metavar="NAME", help=names)
    add("--workers", type=int, default=os.cpu_count(), help="processes (one per core)")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
