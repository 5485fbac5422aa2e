"""GSM8K and CommonsenseQA answered at once: questions, scores, and files of results."""

import json
import os
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused
from tiny import think_slowly, tiny_quiet_star

import eval as evaluation
import sample
from model import save_mistral
from support.questions import Question, number_in, read_questions
from support.results import bootstrap_interval
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from thoughts import save_quiet_star

FIXTURES = Path(__file__).parent / "fixtures"
WORDS = ["bank", "library", "store", "mall", "new york"]
NESTED = {
    "answerKey": "B",
    "question": {
        "stem": "What has doors?",
        "choices": [
            {"label": label, "text": word} for label, word in zip("ABCDE", WORDS, strict=True)
        ],
    },
}
FLAT = {
    "question": "What has doors?",
    "choices": {"label": list("ABCDE"), "text": WORDS},
    "answerKey": "B",
}
SUM = {"question": "1 + 1?", "answer": "One more than 1.\n#### 2"}


@pytest.fixture
def tokenizer(tmp_path):
    save_byte_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def joining_tokenizer(tmp_path):
    """The byte tokenizer with one more token, "12"."""
    save_byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"]["12"] = 258
    document["model"]["merges"].append(["1", "2"])
    path.write_text(json.dumps(document))
    return load_tokenizer(tmp_path)


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ------------------------------------------------------------------------------------- questions


def test_both_layouts_of_csqa_are_the_same_question(tmp_path):
    text = "What has doors?\n(A) bank\n(B) library\n(C) store\n(D) mall\n(E) new york"
    path = write_lines(tmp_path / "x.jsonl", NESTED, FLAT)
    assert read_questions(path, "csqa") == [Question(n, text, "B") for n in (0, 1)]


def test_gsm8k_questions(tmp_path):
    """Blank lines are none, and U+2028 within a string does not end a line."""
    path = write_lines(tmp_path / "x.jsonl", SUM)
    sharp = {"question": "a\u2028b", "answer": "#### 1 no\n#### 2,125 "}
    path.write_text(path.read_text() + "\n" + json.dumps(sharp, ensure_ascii=False), "utf-8")
    expected = [Question(0, "1 + 1?", "2"), Question(1, "a\u2028b", "2,125")]
    assert read_questions(path, "gsm8k") == expected
    assert read_questions(path, "gsm8k", limit=1) == expected[:1]


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("gsm8k", "[1]", "line 2 is not a JSON object"),
        ("gsm8k", '{"question"', "line 2 is not a JSON object"),
        ("gsm8k", json.dumps({"question": "1 + 1?"}), "line 2 is no question.*'answer'"),
        ("gsm8k", json.dumps(SUM | {"answer": "2"}), "line 2 .* not #### and a number"),
        ("gsm8k", json.dumps(SUM | {"answer": "2 #### two"}), "line 2 .* not #### and a number"),
        ("gsm8k", json.dumps(SUM | {"answer": 2}), "line 2 is no question"),
        ("csqa", json.dumps(SUM), "line 2 is no question"),
        ("csqa", json.dumps(FLAT | {"choices": list("ABCDE")}), "line 2 is no question"),
        ("csqa", json.dumps(FLAT | {"question": None}), "line 2 is no question"),
        ("csqa", json.dumps(FLAT | {"answerKey": "F"}), "line 2 .* must be the letters"),
        ("csqa", json.dumps(FLAT | {"answerKey": ""}), "line 2 .* must be the letters"),
        ("csqa", json.dumps(FLAT | {"choices": {"label": ["A"], "text": ["x"]}}), "the letters"),
        ("csqa", "\udcff", "as UTF-8 text"),
    ],
)
def test_malformed_lines(tmp_path, task, line, message):
    path = write_lines(tmp_path / "x.jsonl", SUM if task == "gsm8k" else FLAT)
    with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line)
    with pytest.raises(ValueError, match=f"x.jsonl.*{message}"):
        read_questions(path, task)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 18", "18"),
        (" 18.", "18"),
        ("18.0", "18"),
        (" $1,450,000 a year", "1450000"),
        ("-$5", "-5"),
        ("$-5.50!", "-5.5"),
        (".5 of 3", "0.5"),
        ("1,2 and 3", "1"),
        ("2,125,", "2125"),
        ("5 - 3 = 2", "5"),
        ("007", "7"),
        ("no number", None),
        ("", None),
    ],
)
def test_number_in(text, number):
    assert number_in(text) == (None if number is None else Decimal(number))


# ------------------------------------------------------------------------------------- intervals


def test_bootstrap_by_hand():
    """Two draws of 0 and 1: their mean is 0 or 1 in a quarter of the resamples each."""
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.0, 1.0)
    assert bootstrap_interval(np.array([0.25] * 7)) == (0.25, 0.25)
    values = np.arange(10.0) ** 1.5  # no two resamples have the same mean
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_bootstrap_has_enough_resamples():
    """Right answers to 40 % of 1,000 questions: 0.4 ± 0.0304; 20 resamples are off by far more."""
    low, high = bootstrap_interval(np.arange(1000) % 5 < 2)
    assert low == pytest.approx(0.4 - 0.0304, abs=0.003)
    assert high == pytest.approx(0.4 + 0.0304, abs=0.003)


def test_bootstrap_covers():
    """The true mean lies within about 95 % of the intervals (94 % for 50 normal values)."""
    rng = np.random.default_rng(0)
    inside, widths = 0, []
    for _ in range(400):
        low, high = bootstrap_interval(rng.normal(size=50))
        inside += low < 0 < high
        widths.append(high - low)
    assert 0.90 < inside / 400 < 0.97
    assert abs(np.mean(widths) / (2 * 1.96 / 50**0.5) - 1) < 0.05


# ------------------------------------------------------------------------------ answering at once


def test_admissible_tokens_of_mistral_are_the_authors():
    """The two lists in their eval_helpers.py."""
    tokenizer = load_tokenizer(FIXTURES / "tokenizer.model")
    numbers = evaluation.admissible_tokens(tokenizer, "gsm8k")
    theirs = [28740, 28750, 28770, 28781, 28782, 28784, 28787, 28783, 28774, 28734, 13]
    assert numbers == dict(zip("1234567890\n", theirs, strict=True))
    letters = evaluation.admissible_tokens(tokenizer, "csqa")
    assert letters == dict(zip("ABCDE\n", [330, 365, 334, 384, 413, 13], strict=True))


def test_admissible_tokens_of_bytes(tokenizer):
    """The letters in their order, which answers are looked up in."""
    for task, characters in (("gsm8k", "0123456789\n"), ("csqa", "ABCDE\n")):
        found = evaluation.admissible_tokens(tokenizer, task)
        assert list(found.items()) == [(character, ord(character)) for character in characters]


def test_numbers_that_are_not_written_digit_by_digit(joining_tokenizer):
    with pytest.raises(ValueError, match="no token of its own for '1'"):
        evaluation.admissible_tokens(joining_tokenizer, "gsm8k")
    assert len(evaluation.admissible_tokens(joining_tokenizer, "csqa")) == 6


def test_where_an_answer_begins(joining_tokenizer):
    mistral = load_tokenizer(FIXTURES / "tokenizer.model")
    ids, start = evaluation.encode_answer(mistral, "Q: x\nA:", " -10\n")
    assert ids[0] == mistral.bos_id
    assert ids[start:] == [387, 28740, 28734, 13]  # " -", "1", "0", "\n"
    ids, start = evaluation.encode_answer(joining_tokenizer, "A: 1", "2\n")
    assert ids[start:] == [258, ord("\n")]


def test_answer_probability_by_hand():
    """3/4 of the first token's admissible mass, 1/4 of the second's; their sum is no matter."""
    logits = torch.tensor([[2.0, 6.0], [0.1, 0.3]]).log()
    assert abs(evaluation.answer_probability(logits, [1, 0]) - 3 / 16) < 1e-6


def slow_probabilities(model, ids, i, candidates, thinking):
    """p of each candidate for token i of a text, renormalised over them, one text at a time."""
    p = []
    for candidate in candidates:
        text = torch.tensor([*ids[:i], candidate])
        if thinking:
            nll = think_slowly(model, text, i - 1, None)["nll"][0]
        else:
            nll = -torch.log_softmax(model.model(text[None])[0, -2], -1)[candidate]
        p.append(torch.exp(-nll).item())
    return [x / sum(p) for x in p]


@pytest.mark.parametrize("thinking", [False, True])
def test_gsm8k_answer_equals_the_slow_way(tokenizer, thinking):
    """Minus, comma and the space in front are skipped; "1", "2" and the end of line are not."""
    model = tiny_quiet_star(V=258, n_thoughts=2)
    admissible = evaluation.admissible_tokens(tokenizer, "gsm8k")
    way = "with thoughts" if thinking else "without thoughts"
    answering = evaluation.ways_to_answer(model)[way]
    result = evaluation.answer_at_once(answering, Question(0, "x?", "-1,2"), tokenizer, admissible)
    ids = [*b"Q: x?\nA: -1,2\n"]
    expected = 1.0
    for i in (10, 12, 13):
        p = slow_probabilities(model, ids, i, [*b"0123456789\n"], thinking)
        expected *= p[b"0123456789\n".index(ids[i])]
    assert abs(result["answer_probability"] / expected - 1) < 1e-4


@pytest.mark.parametrize("thinking", [False, True])
def test_csqa_answer_equals_the_slow_way(tokenizer, thinking):
    """The likeliest letter, whatever the true one is."""
    model = tiny_quiet_star(seed=2, V=258)
    answering = model if thinking else model.model
    admissible = evaluation.admissible_tokens(tokenizer, "csqa")
    among, right = [], []
    for letter in "ABCDE":
        question = Question(0, "x?", letter)
        result = evaluation.answer_at_once(answering, question, tokenizer, admissible)
        ids = [*f"Q: x?\nA: {letter}\n".encode()]
        first = slow_probabilities(model, ids, 9, [*b"ABCDE\n"], thinking)
        last = slow_probabilities(model, ids, 10, [*b"ABCDE\n"], thinking)
        expected = first["ABCDE".index(letter)] * last[5]
        assert abs(result["answer_probability"] / expected - 1) < 1e-4
        assert result["answer"] == "ABCDE"[int(np.argmax(first[:5]))]
        right.append(result["letter_accuracy"])
        among.append(result["answer"] == letter)
    assert right == among
    assert sum(right) == 1


def test_the_end_of_line_is_no_letter(tokenizer, monkeypatch):
    """Of the six admissible tokens the line break is the most likely, and C the next."""
    monkeypatch.setattr(evaluation, "answer_logits", lambda *_: logits)
    admissible = evaluation.admissible_tokens(tokenizer, "csqa")
    logits = torch.zeros(3, 258)  # " ", the letter, the line break
    logits[:, ord("C")], logits[:, ord("\n")] = 1, 2
    result = evaluation.answer_at_once(None, Question(0, "x?", "B"), tokenizer, admissible)
    assert (result["answer"], result["letter_accuracy"]) == ("C", 0)


@pytest.mark.parametrize("thinking", [False, True])
def test_answers_of_a_bfloat16_model_have_float32_logits(thinking):
    model = tiny_quiet_star(V=258).to(torch.bfloat16)
    answering = model if thinking else model.model
    assert evaluation.answer_logits(answering, [*b"A: 12"], 3).dtype == torch.float32


def script(monkeypatch, *texts):
    """Let generation write these texts, byte by byte; "%" stands for the first id that is no token.

    Returns what generation was asked for.
    """
    asked = []

    def steps(model, ids, max_new_tokens, **sampling):
        asked.append((ids.tolist(), max_new_tokens, sampling))
        for column in zip(*(text.ljust(max_new_tokens, "~") for text in texts), strict=True):
            yield torch.tensor([258 if x == "%" else ord(x) for x in column]), None

    monkeypatch.setattr(sample, "generate_steps", steps)
    return asked


def test_writing_ends_at_stop_eos_and_what_is_no_token(tokenizer, monkeypatch):
    script(monkeypatch, " 5\n6", " 5|6", " 5%6", " 567")
    tokenizer.eos_id = ord("|")
    model, rows, how = tiny_quiet_star(V=258), [], {"samples": 4, "stop": re.compile("\n")}
    how["watch"] = lambda row, token, prediction: rows.append(row)
    written = sample.write(model, tokenizer, "A:", 4, **how)
    assert written == [" 5", " 5", " 5", " 567"]
    assert [rows.count(row) for row in range(4)] == [3, 2, 2, 4]  # and nothing after the end


def test_what_generation_is_asked_for(monkeypatch):
    """The prompt after bos, as often as there are samples, and the sampling that was given."""
    asked = script(monkeypatch, "", "")
    tokenizer = load_tokenizer(FIXTURES / "tokenizer.model")
    how = {"temperature": 0.5, "generator": torch.Generator()}
    sample.write(tiny_quiet_star(V=258), tokenizer, "A:", 3, samples=2, **how)
    assert asked == [([[1, 330, 28747]] * 2, 3, how)]


@pytest.mark.parametrize(("written", "right"), [(" $2.00", 1), (" 3 - 1 = 2", 0), ("", 0)])
def test_greedy_accuracy(tokenizer, monkeypatch, written, right):
    """What is written greedily, up to the end of the line, is compared as a number."""
    asked = script(monkeypatch, written + "\n2")
    admissible = evaluation.admissible_tokens(tokenizer, "gsm8k")
    model = tiny_quiet_star(V=258).model
    result = evaluation.answer_at_once(model, Question(0, "1 + 1?", "2"), tokenizer, admissible)
    assert (result["greedy_accuracy"], result["answer"]) == (right, written)
    assert asked == [([[*b"Q: 1 + 1?\nA:"]], 12, {"temperature": 0})]


# ------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinking")
    save_quiet_star(tiny_quiet_star(V=258, thought_length=2, n_thoughts=1), folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(params=["csqa", "gsm8k"])
def five(request, tmp_path, monkeypatch):
    """Five questions of a data set; few tokens are written."""

    def two_tokens(model, tokenizer, prompt, max_new_tokens, **how):
        return sample.write(model, tokenizer, prompt, 2, **how)

    monkeypatch.setattr(evaluation, "write", two_tokens)
    sums = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(5)]
    doors = [FLAT | {"question": f"Is it {n}?"} for n in range(5)]
    path = tmp_path / f"{request.param}.jsonl"
    return write_lines(path, *(sums if request.param == "gsm8k" else doors))


def run(folder, data_file, out, *more):
    options = ["--task", data_file.stem, "--data", str(data_file), "--out", str(out)]
    evaluation.main(["--model", str(folder), *options, "--device", "cpu", *more])


def test_a_killed_run_continues_to_the_same_results(folder, five, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out.jsonl"
    run(folder, five, out)
    whole, table = out.read_bytes(), capsys.readouterr().out
    assert len(whole.splitlines()) == 1 + 5

    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"question": 2, "expec')
    asked = []
    answer_at_once = evaluation.answer_at_once

    def counting(model, question, **how):
        asked.append((question.number, len(out.read_bytes().splitlines())))
        return answer_at_once(model, question, **how)

    monkeypatch.setattr(evaluation, "answer_at_once", counting)
    run(folder, five, out)
    # in both ways, and what was answered before is on disk already
    assert asked == [(2, 3), (2, 3), (3, 4), (3, 4), (4, 5), (4, 5)]
    assert out.read_bytes() == whole
    assert capsys.readouterr().out == table


def test_results_and_table(folder, five, tmp_path, capsys):
    """A line per question after the header; the table has their means."""
    out = tmp_path / "out.jsonl"
    run(folder, five, out, "--limit", "4")
    table = capsys.readouterr().out
    assert f"{five.stem}, 4 questions" in table
    header, *lines = map(json.loads, out.read_text().splitlines())
    written = max(file.stat().st_mtime for file in folder.glob("*.safetensors"))
    about = {"model": str(folder), "data": str(five), "limit": 4, "dtype": None}
    assert header == about | {"written": written}
    assert [line["question"] for line in lines] == [0, 1, 2, 3]
    expected = ["B"] * 4 if five.stem == "csqa" else ["1", "2", "3", "4"]
    assert [line["expected"] for line in lines] == expected
    accuracy = "letter_accuracy" if five.stem == "csqa" else "greedy_accuracy"
    for way in ("without thoughts", "with thoughts"):
        assert way in table
        for score in ("answer_probability", accuracy):
            values = np.array([line[way][score] for line in lines])
            low, high = bootstrap_interval(values)
            assert low <= values.mean() <= high
            numbers = [f"{100 * value:.2f}" for value in (values.mean(), low, high)]
            assert "{} % [{}, {}]".format(*numbers) in table
            assert evaluation.SCORES[score] in table


def test_results_are_named_after_the_model_without_out(folder, five, tmp_path, monkeypatch):
    """After its folder, wherever it is read from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    options = ["--task", five.stem, "--data", str(five), "--device", "cpu"]
    evaluation.main(["--model", "link", *options])
    out = tmp_path / "runs" / f"{folder.parent.name}-{folder.name}-{five.stem}.jsonl"
    assert len(out.read_text().splitlines()) == 1 + 5


def test_results_of_weights_written_since_are_not_continued(folder, five, tmp_path, capsys):
    run(folder, five, tmp_path / "out.jsonl")
    later = (folder / "quiet_star.safetensors").stat().st_mtime + 100
    os.utime(folder / "quiet_star.safetensors", (later, later))
    with pytest.raises(SystemExit):
        run(folder, five, tmp_path / "out.jsonl")
    assert "; give another --out" in capsys.readouterr().err


def test_a_plain_model_answers_without_thoughts(tmp_path, capsys):
    save_mistral(tiny_quiet_star(V=258).model, tmp_path)
    save_byte_tokenizer(tmp_path)
    run(tmp_path, write_lines(tmp_path / "csqa.jsonl", FLAT, NESTED), tmp_path / "out.jsonl")
    table = capsys.readouterr().out
    assert "without thoughts" in table
    assert "with thoughts" not in table
    assert evaluation.SCORES["letter_accuracy"] in table


@pytest.mark.parametrize("content", [None, "", "[]\n"])
def test_a_file_of_something_else_is_refused(folder, five, tmp_path, capsys, content):
    """Results of other questions, nothing, and no results; the file is left as it is."""
    out = tmp_path / "out.jsonl"
    if content is None:
        run(folder, five, out)
        content = out.read_text()
    else:
        out.write_text(content)
    capsys.readouterr()
    assert "; give another --out" in refused(capsys, run, folder, five, out, "--limit", "4")
    assert out.read_text() == content


def test_malformed_lines_are_refused(folder, five, tmp_path, capsys):
    five.write_text("[1]\n" + five.read_text())
    assert f"{five.name}, line 1 " in refused(capsys, run, folder, five, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "limit is 0; it must be at least 1"),
        (["--limit", "-1"], "limit is -1; it must be at least 1"),
        (["--text", "x"], "--task needs --data, the file of its questions, and no --text"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "/dev/null"], "cannot read /dev/null"),
    ],
)
def test_bad_options(folder, five, tmp_path, capsys, options, message):
    assert message in refused(capsys, run, folder, five, tmp_path / "out.jsonl", *options)


def test_task_and_data_need_each_other(folder, capsys):
    for options, message in (
        (["--data", "x"], "--data means nothing without --task"),
        (["--task", "gsm8k"], "--task needs --data"),
    ):
        with pytest.raises(SystemExit):
            evaluation.main(["--model", str(folder), *options])
        assert message in capsys.readouterr().err
