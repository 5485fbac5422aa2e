"""A file of results that grows line by line, and is continued after a crash."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.files import json_object, write_text
from support.terminal import show_status


def about(options: argparse.Namespace) -> dict:
    """A header for results: the model and when it was written, the data, the dtype."""
    written = max(file.stat().st_mtime for file in Path(options.model).glob("*.safetensors"))
    names = ("model", "data", "limit", "dtype")
    return {name: getattr(options, name) for name in names} | {"written": written}


def results_file(options: argparse.Namespace, task: str) -> Path:
    """Where the answers to a task go without --out: a name of the run's folder and the model's."""
    name = "-".join([*Path(options.model).resolve().parts[-2:], task])
    return Path(options.out or f"runs/{name}.jsonl")


def answer_all(
    ways: dict[str, Any], questions: list, answer: Callable, path: Path, header: dict
) -> list[dict]:
    """Answer questions with several models, and write a JSON line for each question to a file.

    ways: {name: model}. answer(model, question) -> dict. The results of a question are its number,
    the expected answer, and the dict of each model. A file that exists is continued. Raises
    ValueError if its header differs from `header`.
    """
    head = json.dumps(header) + "\n"
    text = path.read_text(encoding="utf-8") if path.exists() else head
    if not text.startswith(head):
        raise ValueError(f"{path} has other results than of {header}; give another --out")
    text = text[: text.rindex("\n") + 1]  # without what a killed run may have half written
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    results, total = [], len(questions)
    for number, line in enumerate(text.splitlines()[1:]):
        results.append(json_object(line, f"{path}, line {number + 2}"))
        if results[-1].keys() != {"question", "expected", *ways}:
            raise ValueError(f"{path}, line {number + 2} is no result; delete the file")
    began, before = time.perf_counter(), len(results)
    with path.open("a", encoding="utf-8") as file:
        for question in questions[before:]:
            answers = {way: answer(answering, question) for way, answering in ways.items()}
            results.append({"question": question.number, "expected": question.answer, **answers})
            file.write(json.dumps(results[-1]) + "\n")
            file.flush()
            done = len(results)
            left = (time.perf_counter() - began) / (done - before) * (total - done)
            show_status(f"{done} of {total} questions  {left:.0f} s left", done, total, sys.stderr)
    return results
