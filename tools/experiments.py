"""Does it think, or does it only compute more? Experiments on the built-in corpus, on the CPU.

    python -m tools.experiments --out runs/controls                   all of them, five seeds
    python -m tools.experiments --out runs/controls --only full pause --seeds 2
    python -m tools.experiments --out runs/controls --tables          of what is finished, no runs

An experiment is `python train.py` with a few other options, another loss (tools/objectives.py) or
another model to begin with: a line of TABLES. A seed is another corpus, base model and training;
all experiments of a seed start from the same base model. OUT/seed0/full/ is a run's folder and
OUT/seed0/full.json its result: settings, scores of the puzzles, last metrics, seconds.
What has a result is not run again, and what was stopped continues from its last checkpoint. The
tables are printed and written to OUT/tables.md.
"""

import argparse
import io
import json
import os
import signal
import statistics
import textwrap
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

import eval as evaluation
import train
from support import corpus
from support.files import read_json, write_json, write_text
from support.runs import make_folder
from support.terminal import execute, make_parser
from support.text import tokenize
from support.tokenizer import load_tokenizer
from thoughts import QuietStar, quiet_star_loss
from tools import objectives
from tools.plan import work_of

HELD_OUT_LINES = 300  # of the text on which the gain by difficulty is measured

# ------------------------------------------------------------------------------- what is compared


class Experiment(NamedTuple):
    """What differs from `python train.py`."""

    options: dict = {}  # noqa: RUF012  (never changed)
    loss: Callable = train.thought_loss
    model: Callable = train.thinking_model
    begins: str | None = "base"  # whose model it continues; none: it is itself a base model

    def tokens(self) -> int:
        """Tokens that a run handles at most, those of its thoughts too: what it costs."""
        settings, thoughts = train.make_settings(self.options)
        work = work_of(settings, thoughts)
        if self.begins is None:
            return settings.base_steps * train.BASE_SETTINGS["batch_size"] * work.T
        work = replace(work, J=0) if self.loss is objectives.plain_loss else work
        return settings.steps * work.batch * work.tokens(thoughts)


def scarce(percent: int, loss: Callable = train.thought_loss, **options) -> Experiment:
    """Of the asides that the base model learned from, only so many in a hundred work."""
    return Experiment({"work": percent / 100, **options}, loss, begins=f"base-{percent}")


def objective(function: Callable, model: Callable = train.thinking_model, **options) -> Experiment:
    """Trained by another objective."""
    return Experiment(options, objectives.trained_by(function), model)


BASE, FULL = ("base", Experiment(begins=None)), ("full", Experiment())
PAUSE = "pause", Experiment(loss=objectives.pause_loss)
ALL_ADVANTAGES = "all-advantages", objective(objectives.all_advantages)
RLP = objective(objectives.rlp, objectives.begin_without_mixing, n_true=1)
HOT = objectives.trained_by(quiet_star_loss, temperature=2.0)
BASE_BASELINE = "base-baseline", objective(objectives.base_as_baseline)


def scarce_rows(percent: int) -> dict[str, tuple[str, Experiment]]:
    """A base model, and Quiet-STaR from it."""
    if percent == 100 * corpus.WORK:
        return {", base model": BASE, "": FULL}
    base = f"base-{percent}", scarce(percent)._replace(begins=None)
    return {", base model": base, "": (f"work-{percent}", scarce(percent))}


TABLES: dict[str, dict[str, tuple[str, Experiment]]] = {  # title: {row: (name, experiment)}
    "Does it think, or only compute more? Paper: pause tokens, as much computation, help little.": {
        "base model": BASE,
        "trained on without thoughts": ("none", Experiment(loss=objectives.plain_loss)),
        "pause tokens in training": PAUSE,
        "random thoughts in training": ("random", Experiment(loss=objectives.random_loss)),
        "no REINFORCE (policy weight 0)": ("policy0", Experiment({"policy_weight": 0.0})),
        "full Quiet-STaR": FULL,
    },
    "Objectives of the same family (tools/objectives.py).": {
        "Quiet-STaR": FULL,
        "all advantages": ALL_ADVANTAGES,
        "base as baseline": BASE_BASELINE,
        "log mean": ("log-mean", objective(objectives.log_mean)),
        "probability as reward": ("probability", objective(objectives.probability_reward)),
        "RLP": ("rlp", RLP),
        "RLP, a tenth of the learning rate": (
            "rlp-slow",
            RLP._replace(options=RLP.options | {"lr": 2e-5}),
        ),
        "pause tokens": PAUSE,
    },
    "Length of a thought. Paper: longer thoughts help.": {
        f"K = {K}": FULL if K == corpus.ASIDE else (f"K{K}", Experiment({"thought_length": K}))
        for K in (0, 1, 2, 4, corpus.ASIDE, 8, 12)
    },
    "A curriculum of falling K and A, each row from the one before (as Fast Quiet-STaR).": {
        "K = 12, A = 4": ("K12-A4", Experiment({"thought_length": 12, "n_true": 4})),
        "then K = 8, A = 2": ("K12-8", Experiment({"thought_length": 8}, begins="K12-A4")),
        "then K = 6, A = 1": ("K12-8-6", Experiment({"n_true": 1}, begins="K12-8")),
        "then K = 4, A = 1": (
            "K12-8-6-4",
            Experiment({"thought_length": 4, "n_true": 1}, begins="K12-8-6"),
        ),
    },
    "True tokens that a thought is scored on. Paper: 2 bring most of the gain.": {
        "A = 1": ("A1", Experiment({"n_true": 1})),
        "A = 2": FULL,
        "A = 4": ("A4", Experiment({"n_true": 4})),
    },
    "Thoughts per position, and what they are compared with. Paper: 2 bring most of the gain.": {
        "N = 1, base model": ("N1", Experiment({"n_thoughts": 1})),
        "N = 2, base model": BASE_BASELINE,
        "N = 4, base model": ("N4-base", objective(objectives.base_as_baseline, n_thoughts=4)),
        "N = 2, siblings": FULL,
        "N = 4, siblings": ("N4", Experiment({"n_thoughts": 4})),
    },
    "Choices. Paper: em dash, scale 100 (at lr 1e-6), negatives dropped, all positions; here 16.": {
        "as in `python train.py`": FULL,
        "start and end begin at random": (
            "init-random",
            Experiment(model=objectives.begin_at_random),
        ),
        "embedding scale 100": ("scale100", Experiment({"embedding_scale": 100.0})),
        "negative rewards kept": ALL_ADVANTAGES,
        "4 positions": ("few-positions", Experiment({"positions": 4})),
        "all 62 positions": ("all-positions", Experiment({"positions": 62})),
    },
    "How rare may the useful thought be? Share of the asides that work, from the start on.": {
        f"{percent} %{label}": row
        for percent in (50, 30, 20, 15, 10)
        for label, row in scarce_rows(percent).items()
    },
    "What helps to find a thought as rare as 10 %?": {
        "nothing else": ("work-10", scarce(10)),
        "three times the steps": ("work-10-steps", scarce(10, steps=450)),
        "N = 4": ("work-10-N4", scarce(10, n_thoughts=4)),
        "N = 8": ("work-10-N8", scarce(10, n_thoughts=8)),
        "62 positions": ("work-10-J62", scarce(10, positions=62)),
        "sampled at temperature 2": ("work-10-hot", scarce(10, HOT)),
        "policy weight 100": ("work-10-policy", scarce(10, policy_weight=100.0)),
        "negative rewards kept": ("work-10-all", scarce(10, drop_negative=False)),
    },
}
EXPERIMENTS = dict(row for rows in TABLES.values() for row in rows.values())

COLUMNS = {  # of the tables: a row of evaluation.puzzle_table, and which of its scores
    "at once": ("answers at once", "right"), "pause": ("pause tokens", "right"),
    "random": ("random thoughts", "right"), "shuffled": ("shuffled thoughts", "right"),
    "sampled": ("sampled thoughts", "right"), "greedy": ("greedy thoughts", "right"),
    "aside": ("writes an aside", "right"), "begun": ("writes one, begun right", "right"),
    "log p, sampled": ("sampled thoughts", "logp"), "log p, greedy": ("greedy thoughts", "logp"),
}  # fmt: skip


# ---------------------------------------------------------------------------------- one experiment


def same_settings(path: Path, options: dict, more: dict | None = None) -> bool:
    """Whether a JSON file is there, of a run with these options; ValueError if it has others.

    more: what else it has to say, if it says anything about it.
    """
    if not path.exists():
        return False
    settings, thoughts = map(asdict, train.make_settings(options))
    given, file = json.loads(json.dumps(settings | thoughts | (more or {}))), read_json(path)
    found = (more or {}) | file | file.get("settings", {}) | file.get("thoughts", {})
    if other := [f"{name} {found.get(name)}" for name in given if found.get(name) != given[name]]:
        raise ValueError(f"{path} has other settings ({', '.join(other)}); give another --out")
    return True


class Job(NamedTuple):
    """One experiment with one seed."""

    out: Path
    name: str
    seed: int

    def result(self) -> Path:
        """The file that says that it is finished."""
        return self.out / f"seed{self.seed}" / f"{self.name}.json"

    def options(self) -> dict:
        """Those of train.py."""
        return {"seed": self.seed} | EXPERIMENTS[self.name].options

    def more(self) -> dict:
        """What an experiment is besides."""
        _, loss, model, begins = EXPERIMENTS[self.name]
        return {"begins": begins, "loss": loss.__name__, "model": model.__name__}

    def before(self) -> "Job | None":
        """The job whose model it continues."""
        begins = EXPERIMENTS[self.name].begins
        return self._replace(name=begins) if begins else None

    def model(self) -> Path:
        """The folder of its model."""
        return self.result().with_suffix("") / ("quiet_star" if self.before() else "base")


def perform(job: Job) -> Job:
    """Train, evaluate, write the result."""
    began, run, device = time.perf_counter(), job.model().parent, torch.device("cpu")
    same_settings(run / "settings.json", job.options(), job.more())
    settings, thoughts = train.make_settings(job.options())
    make_folder(settings, thoughts, run)
    write_json(run / "settings.json", read_json(run / "settings.json") | job.more())
    nll: dict[str, list[float]] = {}
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # status lines
        if before := job.before():  # on the text of the built-in corpus all the same
            settings = replace(settings, checkpoint=str(before.model()))
            _, loss, model_of, _ = EXPERIMENTS[job.name]
            model = train.train_thoughts(settings, thoughts, run, device, loss, model_of)
        else:
            model = train.train_base(settings, thoughts, run, device)
        tokenizer = load_tokenizer(run)
        table = evaluation.puzzle_table(model, tokenizer)
        if isinstance(model, QuietStar):  # the nll of every target without and with a thought
            text = corpus.make_corpus(0, HELD_OUT_LINES, train.EXPLAINED, held_out=True)
            tokens = tokenize([text], tokenizer)
            nlls = evaluation.text_nll(model, tokens.ids, tokens.is_target, settings.context)
            nll = {kind: x.tolist() for kind, x in zip(("without", "with"), nlls, strict=True)}
    last = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    result = {
        "table": {name: score._asdict() for name, score in table.items()},
        "nll": nll,
        "metrics": json.loads(last),
        "seconds": time.perf_counter() - began,  # since it was last started
    }
    write_json(job.result(), read_json(run / "settings.json") | result)
    return job


# -------------------------------------------------------------------------------------- all of them


def start_worker() -> None:
    """One thread a worker; the parent alone hears Ctrl-C, and stops them."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def with_those_before(jobs: list[Job]) -> list[Job]:
    """The jobs, each behind the one whose model it continues; none twice."""
    ordered: dict[Job, None] = {}
    for job in jobs:
        chain = [job]
        while before := chain[-1].before():
            chain.append(before)
        ordered |= dict.fromkeys(reversed(chain))
    return [*ordered]


def perform_all(jobs: list[Job], workers: int) -> None:
    """Perform what is not finished, in rounds: first what begins from nothing, then what can."""
    left = [job for job in jobs if not same_settings(job.result(), job.options(), job.more())]
    cost = {job: EXPERIMENTS[job.name].tokens() for job in left}
    began, done, count, total = time.perf_counter(), 0, len(jobs) - len(left), sum(cost.values())
    with get_context("spawn").Pool(workers, start_worker) as pool:
        while left:
            ready = [job for job in left if job.before() not in left]
            left = [job for job in left if job not in ready]
            for job in pool.imap_unordered(perform, sorted(ready, key=lambda job: -cost[job])):
                count, done = count + 1, done + cost[job]
                minutes = (time.perf_counter() - began) * (total / done - 1) / 60
                state = f"{count}/{len(jobs)}  {job.name}, seed {job.seed}"
                print(f"{state:40}  about {minutes:.0f} min left", flush=True)


def mean_and_spread(numbers: list[float], digits: int) -> str:
    """Mean ± standard deviation (of the sample; without it for a single number)."""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def score_cells(tables: list[dict]) -> list[str]:
    """Mean and spread of every column of COLUMNS over evaluation.puzzle_table of several runs."""
    cells = []
    for row, field in COLUMNS.values():
        factor, digits = (100, 1) if field == "right" else (1, 3)  # percent, or nats
        numbers = [factor * table[row][field] for table in tables if row in table]
        cells.append(mean_and_spread(numbers, digits) if numbers else "-")
    return cells


def table_row(label: str, name: str, results: list[dict]) -> str:
    """A line of a Markdown table: mean and spread of every column over the seeds."""
    chain = [job.name for job in with_those_before([Job(Path(), name, 0)]) if job.before()]
    cost = sum(EXPERIMENTS[name].tokens() for name in chain) / Experiment().tokens()
    cells = [label, str(len(results)), f"{cost:.2f}" if chain else "-"]
    cells += score_cells([result["table"] for result in results])
    return f"| {' | '.join(cells)} |"


def show_tables(results: dict[str, list[dict]]) -> str:
    """All tables as Markdown, of the results of every experiment that has any."""
    text = (
        "Answers right in % (guessing gives 33), by what stands between the question and the "
        "answer, and log p of the right answer in nats: mean ± standard deviation over seeds. "
        "Cost: tokens handled in training, over those of the full run.\n"
    )
    head = ["", "seeds", "cost", *COLUMNS]
    for title, rows in TABLES.items():
        there = [(label, name) for label, (name, _) in rows.items() if results.get(name)]
        if there:
            lines = [title, "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
            lines += [table_row(label, name, results[name]) for label, name in there]
            text += "\n".join(["", *lines, ""])
    if results.get("full"):
        without, with_thought = (
            torch.tensor([nll for result in results["full"] for nll in result["nll"][kind]])
            for kind in ("without", "with")
        )
        gain = evaluation.show_text(without, with_thought)
        text += (
            "\nThe gain by difficulty, full Quiet-STaR with greedy thoughts on text of held-out "
            f"puzzles, all seeds. Paper: gains concentrate on hard tokens.\n\n"
            f"{textwrap.indent(gain, '    ')}\n"
        )
    return text


# -------------------------------------------------------------------------------- the command line


def run(options: argparse.Namespace) -> None:
    """Perform what is left of the chosen experiments, then the tables of all that is finished."""
    out = Path(options.out)
    if options.seeds < 1 or options.workers < 1:
        raise ValueError("--seeds and --workers must be at least 1")
    if not options.tables:
        jobs = [Job(out, name, seed) for seed in range(options.seeds) for name in options.only]
        perform_all(with_those_before(jobs), options.workers)
    seeds = sorted(int(folder.name[4:]) for folder in out.glob("seed[0-9]*"))
    results = {}
    for name in EXPERIMENTS:
        jobs = [Job(out, name, seed) for seed in seeds]
        there = [job for job in jobs if same_settings(job.result(), job.options(), job.more())]
        results[name] = [read_json(job.result()) for job in there]
    if not any(results.values()):
        raise ValueError(f"no results in {out}; run without --tables first, or give another --out")
    text = show_tables(results)
    write_text(out / "tables.md", text)
    print(text, end="")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    names = f"of {', '.join(EXPERIMENTS)} (all)"
    add("--out", required=True, metavar="FOLDER", help="folder of the experiments")
    add("--seeds", type=int, default=5, help="seeds 0, 1, ... (5)")
    add("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, metavar="NAME", help=names)
    add("--workers", type=int, default=os.cpu_count(), help="processes at once (one a core)")
    add("--tables", action="store_true", help="only print the tables of finished results")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
