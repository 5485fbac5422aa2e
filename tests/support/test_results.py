"""A file of results: what continues it, and what is refused because it is of something else."""

import json
from typing import NamedTuple

import pytest

from support.results import answer_all


class Asked(NamedTuple):
    number: int
    answer: str


QUESTIONS = [Asked(number, f"#{number}") for number in range(5)]
HEADER = {"model": "m", "data": "d", "limit": None, "dtype": None, "written": 1.5, "seed": 0}
WAYS = {"without": 0.25, "with": 1}


def answer(score, question):
    return {"some_accuracy": score, "answer": f"{question.number}"}


def run(path, header=HEADER, questions=QUESTIONS, answer=answer):
    return answer_all(WAYS, questions, answer, path, header)


@pytest.fixture
def whole(tmp_path):
    """A complete file."""
    run(tmp_path / "whole.jsonl")
    return tmp_path / "whole.jsonl"


def changed(line, *keys, value=None):
    """A line of JSON with one of its values changed or, without a value, removed."""
    result = json.loads(line)
    inside = result
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    if value is None:
        del inside[keys[-1]]
    return json.dumps(result)


def refused(path, lines, message, **more):
    """These lines are refused and left as they are."""
    content = "".join(line + "\n" for line in lines)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{message}.*; give another --out"):
        run(path, **more)
    assert path.read_text() == content


def test_a_file_that_is_cut_off_anywhere_is_continued(tmp_path, whole):
    content, path = whole.read_bytes(), tmp_path / "cut.jsonl"
    header = content.index(b"\n") + 1
    for end in range(header, len(content), 7):
        path.write_bytes(content[:end])
        assert run(path) == run(whole)
        assert path.read_bytes() == content


def test_a_line_that_is_not_the_result_of_its_question(whole):
    header, *lines = whole.read_text().splitlines()
    swapped = [lines[0], lines[2], lines[1], *lines[3:]]
    refused(whole, [header, *swapped], "line 3 is not the result of .*'question': 1")
    refused(whole, [header, *lines[1:]], "line 2 is not the result of")
    for line in (
        changed(lines[4], "question", value=3),
        changed(lines[4], "expected", value="#3"),
        changed(lines[4], "expected"),
        changed(lines[4], "with"),
        changed(lines[4], "without thoughts", value={"some_accuracy": 1}),
    ):
        refused(whole, [header, *lines[:4], line], "line 6 is not the result of")
    refused(whole, [header, *lines[:4], lines[4][:-1]], "line 6 is not a JSON object")
    refused(whole, [header, *lines, lines[4]], "has 6 results of 5 questions")


@pytest.mark.parametrize("score", [2, -1e-9, 1.0000001, float("nan"), "1", True, [1], None])
def test_scores_are_numbers_from_0_to_1(whole, score):
    """None: there is none."""
    header, *lines = whole.read_text().splitlines()
    for line in (
        changed(lines[2], "with", "some_accuracy", value=score),
        changed(lines[2], "with", "some_probability", value=[score]),
        changed(lines[2], "with", value=[score]),
    ):
        refused(whole, [header, *lines[:2], line, *lines[3:]], "line 4 has no scores")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "n"}, "model was 'm', now 'n'"),
        ({"dtype": "bfloat16"}, "dtype was None, now 'bfloat16'"),
        ({"written": 2}, "written was 1.5, now 2"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"limit": 4}, "limit was None, now 4"),
        ({"more": "x" * 20_000}, "more was None, now 'xxx.{10,100}'"),
    ],
)
def test_a_header_that_differs_names_the_field(whole, change, message):
    lines = whole.read_text().splitlines()
    refused(whole, lines, f"has other results: {message}", header=HEADER | change)


def test_a_limit_may_grow(tmp_path, whole):
    """The file is then that of a run with the larger limit, and no question is answered twice."""
    path, asked = tmp_path / "limited.jsonl", []

    def answer_and_note(score, question):
        asked.append(question.number)
        return answer(score, question)

    for limit in (2, 4, None):
        run(path, HEADER | {"limit": limit}, QUESTIONS[:limit], answer_and_note)
    assert path.read_bytes() == whole.read_bytes()
    assert asked == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    lines = path.read_text().splitlines()
    refused(path, lines, "limit was None, now 4", header=HEADER | {"limit": 4})


@pytest.mark.parametrize("content", ["", "\n", "[]\n", "text", '{"text": "a"}\n', "\xff\n"])
def test_a_file_of_something_else(tmp_path, content):
    path = tmp_path / "file"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="; give another --out"):
        run(path)
    assert path.read_text(encoding="latin-1") == content


def test_no_device_is_a_file_of_results(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("/dev/full", "/dev/zero", "/dev/null", "."):
        with pytest.raises(ValueError, match=r"it is not a regular file; give another --out"):
            run(tmp_path / path)
    with pytest.raises(ValueError, match="loop is not a regular file"):
        run(tmp_path / "loop")
