"""The questions of GSM8K and CommonsenseQA, from the JSON lines of the data sets."""

import re
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from support.files import read_json_lines

LETTERS = "ABCDE"
NUMBER = re.compile(r"-?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)")


class Question(NamedTuple):
    """A question and its answer."""

    number: int  # from 0
    text: str  # after "Q: ", with the choices
    answer: str  # a number as spelled in the file, or a letter


def number_in(text: str) -> Decimal | None:
    """The first number in a text, without dollar signs and the commas between thousands."""
    match = NUMBER.search(text.replace("$", ""))
    return Decimal(match[0].replace(",", "")) if match else None


def gsm8k_question(record: dict) -> tuple[str, str]:
    """Text and answer of a line of GSM8K, which ends in #### and the number."""
    _, mark, number = record["answer"].rpartition("####")
    if not mark or number_in(number) is None:
        raise ValueError(f"the answer ends in {record['answer'][-30:]!r}, not #### and a number")
    return record["question"], number.strip()


def csqa_question(record: dict) -> tuple[str, str]:
    """Text and answer of a line of CommonsenseQA, in the original layout or the later flat one."""
    question, answer = record["question"], record["answerKey"]
    if isinstance(question, dict):
        choices = {choice["label"]: choice["text"] for choice in question["choices"]}
        question = question["stem"]
    else:
        choices = dict(zip(record["choices"]["label"], record["choices"]["text"], strict=True))
    if [*choices] != [*LETTERS] or answer not in choices:
        raise ValueError(f"choices and answerKey ({answer!r}) must be the letters {LETTERS}")
    return "\n".join([question, *(f"({k}) {v}" for k, v in choices.items())]), answer


TASKS = {"gsm8k": gsm8k_question, "csqa": csqa_question}


def read_questions(path: str | Path, task: str, limit: int | None = None) -> list[Question]:
    """The first `limit` questions in a data set's JSON lines. ValueError names a bad line."""
    questions, records = [], read_json_lines(path)[:limit]
    if not records or (limit or 1) < 1:
        raise ValueError(f"{path} is without questions, or limit is {limit}: give at least one")
    for where, record in records:
        try:
            questions.append(Question(len(questions), *TASKS[task](record)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is no question of {task}: {error!r}") from None
    return questions
