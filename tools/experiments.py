"""Does it think, or does it only compute more? Experiments on the built-in corpus, on the CPU.

    python -m tools.experiments --out runs/controls                   all of them, five seeds
    python -m tools.experiments --out runs/controls --only full pause --seeds 2
    python -m tools.experiments --out runs/controls --tables          of what is finished, no runs

An experiment is `python train.py` with a few other options, another loss or another model to begin
with: a line of TABLES, and a function where options do not reach. A seed is another corpus, base
model and training; all experiments of a seed start from one base model. OUT/seed0/full/ is a run's
folder and OUT/seed0/full.json its result: settings, scores of the puzzles, last metrics, seconds.
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
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

import data
import eval as evaluation
import train
from data import read_json, write_json, write_text
from sample import execute, make_parser
from thoughts import QuietStar, quiet_star_loss
from tokenizer import load_tokenizer
from tools.plan import work_of

HELD_OUT_LINES = 300  # of the text on which the gain by difficulty is measured

# ---------------------------------------------------------- where the options of train.py end


def plain_loss(model: QuietStar, *batch):
    """The control that only trains on: the language-model loss of the model inside."""
    return train.language_loss(model.model, *batch)


def pause_loss(model: QuietStar, *batch):
    """After thoughts of K start tokens: learned, and without content (Goyal et al. 2023)."""
    return forced_loss(lambda shape, generator: torch.full(shape, model.start_id), model, *batch)


def random_loss(model: QuietStar, *batch):
    """After thoughts of K tokens, each of the vocabulary as likely, drawn on the CPU."""
    return forced_loss(partial(torch.randint, model.model.config.vocab_size), model, *batch)


def forced_loss(make: Callable, model: QuietStar, ids, targets, positions, counts, generator):
    """The losses after thoughts make([B, N, J, K], generator=generator), and their metrics.

    The model did not choose them, so that nothing can be reinforced: the policy loss is 0.
    """
    shape = (len(ids), model.config.n_thoughts, len(positions), model.config.thought_length)
    output = model(ids, make(shape, generator=generator).to(ids.device), positions, targets)
    output = output._replace(thought_logp=torch.zeros_like(output.thought_logp))
    return quiet_star_loss(output, model.config, counts)


def begin_at_random(*run) -> QuietStar:
    """train.thinking_model, but a new one's start and end are random vectors, not the em dash."""
    model = train.thinking_model(*run)
    if model.config.init_id is None:  # it is this run's own, continued
        return model
    return QuietStar(model.model, replace(model.config, init_id=None))


# ------------------------------------------------------------------------------- what is compared


class Experiment(NamedTuple):
    """What differs from `python train.py`."""

    options: dict = {}  # noqa: RUF012  (never changed)
    loss: Callable = train.thought_loss
    model: Callable = train.thinking_model

    def tokens(self) -> int:
        """Tokens that a run handles, those of its thoughts too: what it costs."""
        settings, thoughts = train.make_settings(self.options)
        work = work_of(settings, thoughts)
        work = replace(work, J=0) if self.loss is plain_loss else work
        return settings.steps * work.batch * work.tokens(thoughts)


FULL = "full", Experiment()

TABLES: dict[str, dict[str, tuple[str, Experiment]]] = {  # title: {row: (name, experiment)}
    "Does it think, or only compute more? Paper: pause tokens, as much computation, help little.": {
        "base model": ("base", Experiment()),  # before Quiet-STaR: special in `perform`
        "trained on without thoughts": ("none", Experiment(loss=plain_loss)),
        "pause tokens in training": ("pause", Experiment(loss=pause_loss)),
        "random thoughts in training": ("random", Experiment(loss=random_loss)),
        "no REINFORCE (policy weight 0)": ("policy0", Experiment({"policy_weight": 0.0})),
        "full Quiet-STaR": FULL,
    },
    "Length of a thought. Paper: longer thoughts help.": {
        f"K = {K}": FULL if K == data.ASIDE else (f"K{K}", Experiment({"thought_length": K}))
        for K in (0, 1, 2, 4, data.ASIDE, 8, 12)
    },
    "True tokens that a thought is scored on. Paper: 2 bring most of the gain.": {
        "A = 1": ("A1", Experiment({"n_true": 1})),
        "A = 2": FULL,
        "A = 4": ("A4", Experiment({"n_true": 4})),
    },
    "Thoughts per position. Paper: 2 bring most of the gain.": {
        "N = 1 (baseline: the base model)": ("N1", Experiment({"n_thoughts": 1})),
        "N = 2": FULL,
        "N = 4": ("N4", Experiment({"n_thoughts": 4})),
    },
    "Choices. Paper: em dash, scale 100 (at lr 1e-6), negatives dropped, all positions; here 16.": {
        "as in `python train.py`": FULL,
        "start and end begin at random": ("init-random", Experiment(model=begin_at_random)),
        "embedding scale 100": ("scale100", Experiment({"embedding_scale": 100.0})),
        "negative rewards kept": ("keep-negative", Experiment({"drop_negative": False})),
        "4 positions": ("few-positions", Experiment({"positions": 4})),
        "all 62 positions": ("all-positions", Experiment({"positions": 62})),
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


def same_settings(path: Path, options: dict) -> bool:
    """Whether a JSON file is there, of a run with these options; ValueError if it has others."""
    if not path.exists():
        return False
    settings, thoughts = map(asdict, train.make_settings(options))
    given, file = json.loads(json.dumps(settings | thoughts)), read_json(path)
    found = file.get("settings", {}) | file.get("thoughts", {})
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


def perform(job: Job) -> Job:
    """Train, evaluate, write the result."""
    began, home, device = time.perf_counter(), job.result().parent, torch.device("cpu")
    run, nll = home if job.name == "base" else home / job.name, {}
    same_settings(run / "settings.json", job.options())
    settings, thoughts = train.make_settings(job.options())
    train.make_folder(settings, thoughts, run)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # status lines
        if job.name == "base":
            model = train.train_base(settings, thoughts, run, device)
        else:  # from the base model of the seed, on the text of the built-in corpus all the same
            settings = replace(settings, checkpoint=str(home / "base"))
            _, loss, model_of = EXPERIMENTS[job.name]
            model = train.train_thoughts(settings, thoughts, run, device, loss, model_of)
        tokenizer = load_tokenizer(run)
        table = evaluation.puzzle_table(model, tokenizer)
        if isinstance(model, QuietStar):  # the nll of every target without and with a thought
            text = data.make_corpus(0, HELD_OUT_LINES, train.EXPLAINED, held_out=True)
            tokens = data.tokenize([text], tokenizer)
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


def perform_all(jobs: list[Job], workers: int) -> None:
    """Perform what is not finished: base models first, since the others start from them."""
    left = [job for job in jobs if not same_settings(job.result(), job.options())]
    cost = {job: EXPERIMENTS[job.name].tokens() for job in left}  # a base costs what full does
    began, done, count = time.perf_counter(), 0, len(jobs) - len(left)
    with get_context("spawn").Pool(workers, start_worker) as pool:
        for bases in (True, False):
            phase = [job for job in left if (job.name == "base") == bases]
            for job in pool.imap_unordered(perform, phase):
                count, done = count + 1, done + cost[job]
                minutes = (time.perf_counter() - began) * (sum(cost.values()) / done - 1) / 60
                state = f"{count}/{len(jobs)}  {job.name}, seed {job.seed}"
                print(f"{state:40}  {minutes:.0f} min left", flush=True)


def mean_and_spread(numbers: list[float], digits: int) -> str:
    """Mean ± standard deviation (of the sample; without it for a single number)."""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def table_row(label: str, name: str, results: list[dict]) -> str:
    """A line of a Markdown table: mean and spread of every column over the seeds."""
    cost = EXPERIMENTS[name].tokens() / Experiment().tokens()
    cells = [label, str(len(results)), "-" if name == "base" else f"{cost:.2f}"]
    for row, field in COLUMNS.values():
        factor, digits = (100, 1) if field == "right" else (1, 3)  # percent, or nats
        tables = [result["table"] for result in results if row in result["table"]]
        numbers = [factor * table[row][field] for table in tables]
        cells.append(mean_and_spread(numbers, digits) if numbers else "-")
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
        names = ["base", *(name for name in options.only if name != "base")]
        jobs = [Job(out, name, seed) for seed in range(options.seeds) for name in names]
        perform_all(jobs, options.workers)
    seeds = sorted(int(folder.name[4:]) for folder in out.glob("seed[0-9]*"))
    results = {}
    for name in EXPERIMENTS:
        jobs = [Job(out, name, seed) for seed in seeds]
        there = [job for job in jobs if same_settings(job.result(), job.options())]
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
