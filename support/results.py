"""Results of questions: a file that grows line by line, and tables of scores."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from support.files import json_object, read_utf8, short, write_text
from support.settings import fits
from support.terminal import show_status


def about(options: argparse.Namespace) -> dict:
    """The header of a file of results: the model, the time of its weights, the data, the dtype."""
    written = max(file.stat().st_mtime for file in Path(options.model).glob("*.safetensors"))
    names = ("model", "data", "limit", "dtype")
    return {name: getattr(options, name) for name in names} | {"written": written}


def results_file(options: argparse.Namespace, task: str) -> Path:
    """--out, or a file in runs/ that is named after the folder of the model and the task."""
    name = "-".join([*Path(os.path.realpath(options.model)).parts[-2:], task])
    return Path(options.out or f"runs/{name}.jsonl")


def answer_all(ways: dict, questions: list, answer: Callable, path: Path, header: dict) -> list:
    """Answer questions with several models, and write a JSON line for each question to a file.

    ways: {name: model}. answer(model, question) -> dict with scores in [0, 1], which are named
    *_accuracy or *_probability. A result has the question's number, the expected answer and the
    dict of each model. An existing file is continued. Raises ValueError if it has other results.
    """
    try:
        results, total = read_results(path, header, questions, ways), len(questions)
    except ValueError as error:
        raise ValueError(f"{error}; give another --out") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line) + "\n" for line in [header, *results]))
    began, before = time.perf_counter(), len(results)
    with path.open("a", encoding="utf-8") as file:
        for question in questions[before:]:
            answers = {way: answer(model, question) for way, model in ways.items()}
            results.append({"question": question.number, "expected": question.answer, **answers})
            file.write(json.dumps(results[-1]) + "\n")
            file.flush()
            done = len(results)
            left = (time.perf_counter() - began) / (done - before) * (total - done)
            show_status(f"{done} of {total} questions  {left:.0f} s left", done, total, sys.stderr)
    return results


def has_scores(answer: Any) -> bool:
    """Whether an answer is a dict with scores, which are numbers from 0 to 1."""
    given = answer if isinstance(answer, dict) else {}
    scores = [given[name] for name in given if name.endswith(("_accuracy", "_probability"))]
    return bool(scores) and all(fits(score, float) and 0 <= score <= 1 for score in scores)


def read_results(path: Path, header: dict, questions: list, ways: dict) -> list[dict]:
    """The results in a file, without a last line that is cut off; [] if there is no file.

    Raises ValueError if the file's header differs from `header` (the file's limit may be smaller),
    or if a line is not the result of its question.
    """
    if not path.exists():
        return []
    first, *lines = read_utf8(path).rpartition("\n")[0].split("\n")
    found, wanted = json_object(first, f"{path}, line 1"), json.loads(json.dumps(header))
    for name in sorted(found.keys() | wanted.keys()):
        was, now = found.get(name), wanted.get(name)
        grown = name == "limit" and fits(was, int) and (now is None or was < now)
        if was != now and not grown:
            raise ValueError(f"{path} has other results: {name} was {short(was)}, now {short(now)}")
    if len(lines) > len(questions):
        raise ValueError(f"{path} has {len(lines)} results of {len(questions)} questions")
    results = []
    for number, (line, question) in enumerate(zip(lines, questions, strict=False), 2):
        result = json_object(line, f"{path}, line {number}")
        asked = {"question": question.number, "expected": question.answer}
        if result | asked != result or result.keys() != {*asked, *ways}:
            raise ValueError(f"{path}, line {number} is not the result of {asked}")
        if not all(has_scores(result[way]) for way in ways):
            raise ValueError(f"{path}, line {number} has no scores, or not from 0 to 1")
        results.append(result)
    return results


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of values [n], from 2,000 resamples."""
    drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def show_scores(title: str, results: list[dict], scores: dict[str, str]) -> str:
    """Means over questions with 95 % intervals: a row per score, a column per way to answer."""
    ways = [way for way, value in results[0].items() if isinstance(value, dict)]
    lines = [f"{f'{title}, {len(results)} questions':66}" + "".join(f"{way:>27}" for way in ways)]
    for score in [score for score in scores if score in results[0][ways[0]]]:
        line = f"{scores[score]:66}"
        for way in ways:
            percent = 100 * np.array([result[way][score] for result in results])
            low, high = bootstrap_interval(percent)
            line += f"{f'{percent.mean():.2f} % [{low:.2f}, {high:.2f}]':>27}"
        lines.append(line)
    return "\n".join([*lines, "In brackets: 95 % intervals (bootstrap over the questions)."])
