"""Does it think, or does it only compute more? Experiments on the embedded corpus, on the CPU.

    python experiments.py --out runs/controls                   all of them, five seeds
    python experiments.py --out runs/controls --only full pause --seeds 2
    python experiments.py --out runs/controls --tables          of what is finished, nothing is run

An experiment is `python train.py` with a few other options. A seed is another corpus, base model
and training; all experiments of a seed start from one base model. OUT/seed0/full/ is a run's folder
and OUT/seed0/full.json its result: settings, scores of the puzzles, last metrics, seconds. What has
a result is not run again, and what was stopped continues from its last checkpoint. The tables are
printed and written to OUT/tables.md.
"""

import argparse
import io
import json
import os
import signal
import statistics
import time
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

import data
import eval as evaluation
import train
from model import read_json, write_json, write_text
from sample import execute, make_parser
from thoughts import QuietStar, ThoughtConfig
from tokenizer import load_tokenizer, save_byte_tokenizer

HELD_OUT_LINES = 300  # of the text on which the gain by difficulty is measured


# ------------------------------------------------------------------------------- what is compared


def tokens_of(options: dict) -> int:
    """Tokens that a run of Quiet-STaR handles: what it costs."""
    settings, thoughts = train.make_settings(options)
    work = train.work_of(settings, thoughts)
    return settings.steps * work.batch * work.tokens(thoughts)


def at_equal_cost(options: dict) -> dict:
    """The options, with as many steps as cost what the default run costs."""
    return options | {"steps": round(tokens_of({}) / tokens_of(options | {"steps": 1}))}


LENGTHS = (0, 1, 2, 4, 8, 12)  # beside the 6 tokens that the work needs
QUARTER = {"positions": 16}  # of the 62 that have two tokens ahead

EXPERIMENTS: dict[str, dict] = {  # the options in which a run differs from `python train.py`
    "base": {},  # the base model, before Quiet-STaR
    "full": {},
    "none": {"thoughts": "none"},
    "pause": {"thoughts": "pause"},
    "random": {"thoughts": "random"},
    "policy0": {"policy_weight": 0.0},
    **{f"K{length}": {"thought_length": length} for length in LENGTHS},
    "A1": {"n_true": 1},
    "A4": {"n_true": 4},
    "N1": {"n_thoughts": 1},
    "N4": {"n_thoughts": 4},
    "init-random": {"init": "random"},
    "scale100": {"embedding_scale": 100.0},
    "keep-negative": {"drop_negative": False},
    "quarter": QUARTER,
    "quarter-equal-cost": at_equal_cost(QUARTER),
}

TABLES = {  # a title, and the experiments under the names that their rows have
    "Does it think, or only compute more? Paper: pause tokens, as much computation, help little.": {
        "base model": "base",
        "trained on without thoughts": "none",
        "pause tokens in training": "pause",
        "random thoughts in training": "random",
        "no REINFORCE (policy weight 0)": "policy0",
        "full Quiet-STaR": "full",
    },
    "Length of a thought. Paper: longer thoughts help.": {
        f"K = {length}": "full" if length == data.ASIDE else f"K{length}"
        for length in sorted({*LENGTHS, data.ASIDE})
    },
    "True tokens that a thought is scored on. Paper: 2 bring most of the gain.": {
        "A = 1": "A1",
        "A = 2": "full",
        "A = 4": "A4",
    },
    "Thoughts per position. Paper: 2 bring most of the gain.": {
        "N = 1 (baseline: the base model)": "N1",
        "N = 2": "full",
        "N = 4": "N4",
    },
    "Choices. Paper: em dash, scale 100 (at lr 1e-6), negative rewards dropped, all positions.": {
        "as in `python train.py`": "full",
        "start and end begin at random": "init-random",
        "embedding scale 100": "scale100",
        "negative rewards kept": "keep-negative",
        f"{QUARTER['positions']} positions, as many steps": "quarter",
        f"{QUARTER['positions']} positions, "
        f"{EXPERIMENTS['quarter-equal-cost']['steps']} steps": "quarter-equal-cost",
    },
}

COLUMNS = {  # of the tables: a row of evaluation.puzzle_table, and which of its scores
    "at once": ("answers at once", "right"),
    "pause": ("pause tokens", "right"),
    "random": ("random thoughts", "right"),
    "shuffled": ("shuffled thoughts", "right"),
    "sampled": ("sampled thoughts", "right"),
    "greedy": ("greedy thoughts", "right"),
    "aside": ("writes its aside", "right"),
    "log p, sampled": ("sampled thoughts", "logp"),
    "log p, greedy": ("greedy thoughts", "logp"),
}


# ---------------------------------------------------------------------------------- one experiment


class Job(NamedTuple):
    """One experiment with one seed."""

    out: Path
    name: str
    seed: int

    def result(self) -> Path:
        """The file that says that it is finished."""
        return self.out / f"seed{self.seed}" / f"{self.name}.json"

    def made(self) -> tuple[train.Settings, ThoughtConfig]:
        """What it is trained with."""
        return train.make_settings({"seed": self.seed} | EXPERIMENTS[self.name])

    def settings(self) -> dict:
        """Its settings, as they stand in the result."""
        settings, thoughts = self.made()
        made = {"settings": asdict(settings), "thoughts": asdict(thoughts)}
        return json.loads(json.dumps(made))  # tuples become lists, as in the file

    def finished(self) -> bool:
        """Whether there is a result; ValueError if it has other settings than it should."""
        if not self.result().exists():
            return False
        found = read_json(self.result())
        given = {name: found.get(name) for name in ("settings", "thoughts")}
        if given != self.settings() or "table" not in found:
            raise ValueError(f"{self.result()} is of other settings; delete it, or change --out")
        return True

    def begin(self, run: Path) -> None:
        """Note the settings in a run's folder; ValueError if it was begun with others."""
        note = run / "job.json"
        if note.exists() and read_json(note) != self.settings():
            raise ValueError(f"{run} was begun with other settings; delete it, or change --out")
        run.mkdir(parents=True, exist_ok=True)
        write_json(note, self.settings())

    def tokens(self) -> int:
        """What it costs."""
        if self.name != "base":
            return tokens_of(EXPERIMENTS[self.name])
        settings, _ = train.make_settings({})
        return settings.base_steps * train.BASE_BATCH * settings.context


def perform(job: Job) -> Job:
    """Train, evaluate, write the result."""
    began, device = time.perf_counter(), torch.device("cpu")
    home = job.out / f"seed{job.seed}"
    run = home if job.name == "base" else home / job.name
    job.begin(run)
    settings, thoughts = job.made()
    if job.name == "base":
        save_byte_tokenizer(home)
        stage = train.base_stage(settings, run, device)
    else:  # from the base model of the seed, on the text of the embedded corpus all the same
        settings = replace(settings, checkpoint=str(home / "base"))
        stage = train.quiet_star_stage(settings, thoughts, run, device)
    tokenizer = load_tokenizer(home)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # status lines
        train.train_stage(stage, settings, run)
        table = evaluation.puzzle_table(stage.model, tokenizer)
        nll = held_out_nll(stage.model, tokenizer, settings.context)
    scores = {name: score._asdict() for name, score in table.items()}
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    seconds = time.perf_counter() - began  # since it was last started
    result = {"table": scores, "nll": nll, "metrics": last, "seconds": seconds}
    write_json(job.result(), job.settings() | result)
    return job


def held_out_nll(model, tokenizer, context: int) -> dict[str, list[float]]:
    """Every target's loss in nats without and with a greedy thought, in lines of held-out puzzles.

    Empty for a model that cannot think.
    """
    if not isinstance(model, QuietStar):
        return {}
    text = data.make_corpus(0, HELD_OUT_LINES, train.EXPLAINED, held_out=True)
    tokens = data.tokenize([text], tokenizer)
    base, talk = evaluation.text_nll(model, tokens.ids, tokens.is_target, context)
    return {"without": base.tolist(), "with": talk.tolist()}


# -------------------------------------------------------------------------------------- all of them


def start_worker() -> None:
    """One thread a worker; the parent alone hears Ctrl-C, and stops them."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def perform_all(jobs: list[Job], workers: int) -> None:
    """Perform what is not finished: base models first, since the others start from them."""
    left = [job for job in jobs if not job.finished()]
    began, done, total = time.perf_counter(), 0, sum(job.tokens() for job in left)
    count = len(jobs) - len(left)
    with get_context("spawn").Pool(workers, start_worker) as pool:
        for bases in (True, False):
            phase = [job for job in left if (job.name == "base") == bases]
            for job in pool.imap_unordered(perform, phase):
                count, done = count + 1, done + job.tokens()
                minutes = (time.perf_counter() - began) * (total / done - 1) / 60
                state = f"{count}/{len(jobs)}  {job.name}, seed {job.seed}"
                print(f"{state:40}  {minutes:.0f} min left", flush=True)


def mean_and_spread(numbers: Iterable[float], digits: int) -> str:
    """Mean ± standard deviation (of the sample; without it for a single number)."""
    numbers = list(numbers)
    text = f"{statistics.mean(numbers):.{digits}f}"
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return text + spread


def table_row(label: str, name: str, results: list[dict]) -> str:
    """A line of a Markdown table: mean and spread of every column over the seeds."""
    cost = "-" if name == "base" else f"{tokens_of(EXPERIMENTS[name]) / tokens_of({}):.2f}"
    cells = [label, str(len(results)), cost]
    for row, field in COLUMNS.values():
        if row not in results[0]["table"]:
            cells.append("-")
            continue
        numbers = [result["table"][row][field] for result in results]
        percent = [100 * number for number in numbers]
        is_share = field == "right"
        cells.append(mean_and_spread(percent if is_share else numbers, 1 if is_share else 3))
    return f"| {' | '.join(cells)} |"


def show_tables(results: dict[str, list[dict]]) -> str:
    """All tables as Markdown, of the results of every experiment that has any."""
    lines = [
        "Answers right in % (guessing gives 33), by what stands between the question and the "
        "answer, and log p of the right answer in nats: mean ± standard deviation over seeds. "
        "Cost: tokens handled in training, over those of the full run.",
    ]
    head = ["", "seeds", "cost", *COLUMNS]
    for title, rows in TABLES.items():
        there = {label: name for label, name in rows.items() if results.get(name)}
        if there:
            lines += ["", title, "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
            lines += [table_row(label, name, results[name]) for label, name in there.items()]
    if results.get("full"):
        without, with_thought = (
            torch.tensor([nll for result in results["full"] for nll in result["nll"][kind]])
            for kind in ("without", "with")
        )
        lines += [
            "",
            "The gain by difficulty, full Quiet-STaR with greedy thoughts on text of held-out "
            "puzzles, all seeds. Paper: gains concentrate on hard tokens.",
            "",
            *(f"    {line}" for line in evaluation.show_text(without, with_thought).split("\n")),
        ]
    return "\n".join(lines)


# -------------------------------------------------------------------------------- the command line


def run(options: argparse.Namespace) -> None:
    """Perform what is left of the chosen experiments, then the tables of all that is finished."""
    out = Path(options.out)
    if options.seeds < 1 or options.workers < 1:
        raise ValueError("--seeds and --workers must be at least 1")
    if not options.tables:
        names = ["base", *(name for name in options.only if name != "base")]
        perform_all(
            [Job(out, n, seed) for seed in range(options.seeds) for n in names], options.workers
        )
    seeds = sorted(int(folder.name[4:]) for folder in out.glob("seed[0-9]*"))
    results = {name: [] for name in EXPERIMENTS}
    for name in EXPERIMENTS:
        jobs = [Job(out, name, seed) for seed in seeds]
        results[name] = [read_json(job.result()) for job in jobs if job.finished()]
    if not any(results.values()):
        raise ValueError(f"no results in {out}; run without --tables first, or give another --out")
    text = show_tables(results)
    write_text(out / "tables.md", text + "\n")
    print(text)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="FOLDER", help="folder of the experiments")
    add("--seeds", type=int, default=5, help="seeds 0, 1, ... (5)")
    add(
        "--only",
        nargs="+",
        choices=EXPERIMENTS,
        default=list(EXPERIMENTS),
        metavar="NAME",
        help=f"of {', '.join(EXPERIMENTS)} (all)",
    )
    add("--workers", type=int, default=os.cpu_count(), help="processes at once (one a core)")
    add("--tables", action="store_true", help="only print the tables of finished results")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
