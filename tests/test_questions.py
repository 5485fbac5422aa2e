"""GSM8K and CommonsenseQA: questions, scores, votes, and files of results."""

import json
import shutil
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import think_slowly, tiny_quiet_star

import eval as evaluation
import questions
from model import save_mistral
from questions import Chains, Question, Settings, number_in
from sample import Step
from thoughts import save_quiet_star
from tokenizer import load_tokenizer, save_byte_tokenizer

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


def as_lines(*records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# ------------------------------------------------------------------------------------- questions


def test_both_layouts_of_csqa_are_the_same_question():
    text = "What has doors?\n(A) bank\n(B) library\n(C) store\n(D) mall\n(E) new york"
    found, problems = questions.read_questions(as_lines(NESTED, FLAT), "x", "csqa")
    assert found == [Question(1, text, "B"), Question(2, text, "B")]
    assert not problems


def test_gsm8k_question_and_lines_that_are_none():
    """Blank lines count, and U+2028 within a string does not end a line."""
    sharp = {"question": "a\u2028b", "answer": "#### 1 no\n#### 2,125 "}
    other = json.dumps(sharp, ensure_ascii=False).encode()
    contents = as_lines(SUM) + b"\n" + b'{"question"\n' + other + b"\n"
    found, problems = questions.read_questions(contents, "x.jsonl", "gsm8k")
    assert found == [Question(1, "1 + 1?", "2"), Question(4, "a\u2028b", "2,125")]
    assert len(problems) == 1
    assert problems[0].startswith("x.jsonl, line 3: ")


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("gsm8k", "[1]", "JSON object"),
        ("gsm8k", json.dumps({"question": "1 + 1?"}), '"question" and "answer"'),
        ("gsm8k", json.dumps(SUM | {"answer": "2"}), "must end in ####"),
        ("gsm8k", json.dumps(SUM | {"answer": "2 #### two"}), "must end in ####"),
        ("csqa", json.dumps(SUM), "neither layout"),
        ("csqa", json.dumps(FLAT | {"choices": list("ABCDE")}), "neither layout"),
        ("csqa", json.dumps(FLAT | {"question": None}), "neither layout"),
        ("csqa", json.dumps(FLAT | {"answerKey": "F"}), "must be the letters"),
        ("csqa", json.dumps(FLAT | {"answerKey": ""}), "must be the letters"),
        ("csqa", json.dumps(FLAT | {"choices": {"label": ["A"], "text": ["x"]}}), "letters"),
        ("csqa", "\udcff", "codec can't decode"),
    ],
)
def test_malformed_lines(task, line, message):
    contents = line.encode("utf-8", "surrogateescape")
    found, problems = questions.read_questions(contents, "x", task)
    assert not found
    assert problems[0].startswith("x, line 1: ")
    assert message in problems[0]


# ------------------------------------------------------------------------------- numbers and votes


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


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ("3 5 5", "5"),
        ("3 5", "3"),  # equally common: the first
        ("5 3 3 5", "5"),
        ("1 5.0 5", "5"),  # the same number, however it is written
        ("- - 4", None),
        ("4 -", "4"),
    ],
)
def test_majority(votes, winner):
    numbers = [None if vote == "-" else Decimal(vote) for vote in votes.split()]
    assert questions.majority(numbers) == (None if winner is None else Decimal(winner))


def test_bootstrap_by_hand():
    """Two draws of 0 and 1: their mean is 0 or 1 in a quarter of the resamples each."""
    assert questions.bootstrap_interval(np.array([0.0, 1.0]), seed=0) == (0.0, 1.0)
    assert questions.bootstrap_interval(np.array([0.25] * 7), seed=0) == (0.25, 0.25)
    values = np.arange(10.0)
    assert questions.bootstrap_interval(values, 1) == questions.bootstrap_interval(values, 1)
    assert questions.bootstrap_interval(values, 1) != questions.bootstrap_interval(values, 2)


def test_bootstrap_covers():
    """The true mean lies within about 95 % of the intervals (94 % for 50 normal values)."""
    rng = np.random.default_rng(0)
    inside, widths = 0, []
    for seed in range(400):
        low, high = questions.bootstrap_interval(rng.normal(size=50), seed, resamples=400)
        inside += low < 0 < high
        widths.append(high - low)
    assert 0.90 < inside / 400 < 0.97
    assert abs(np.mean(widths) / (2 * 1.96 / 50**0.5) - 1) < 0.05


# ------------------------------------------------------------------------------ answering at once


def test_admissible_tokens_of_mistral_are_the_authors():
    """The two lists in their eval_helpers.py."""
    tokenizer = load_tokenizer(FIXTURES / "tokenizer.model")
    numbers = questions.admissible_tokens(tokenizer, "gsm8k")
    theirs = [28740, 28750, 28770, 28781, 28782, 28784, 28787, 28783, 28774, 28734, 13]
    assert numbers == dict(zip("1234567890\n", theirs, strict=True))
    letters = questions.admissible_tokens(tokenizer, "csqa")
    assert letters == dict(zip("ABCDE\n", [330, 365, 334, 384, 413, 13], strict=True))


def test_admissible_tokens_of_bytes(tokenizer):
    for task, characters in (("gsm8k", "0123456789\n"), ("csqa", "ABCDE\n")):
        found = questions.admissible_tokens(tokenizer, task)
        assert found == {character: ord(character) for character in characters}


def test_numbers_that_are_not_written_digit_by_digit(joining_tokenizer):
    with pytest.raises(ValueError, match="no token of its own for '1'"):
        questions.admissible_tokens(joining_tokenizer, "gsm8k")
    assert len(questions.admissible_tokens(joining_tokenizer, "csqa")) == 6


def test_where_an_answer_begins(joining_tokenizer):
    mistral = load_tokenizer(FIXTURES / "tokenizer.model")
    ids, start = questions.encode_answer(mistral, "Q: x\nA:", " -10\n")
    assert ids[0] == mistral.bos_id
    assert ids[start:] == [387, 28740, 28734, 13]  # " -", "1", "0", "\n"
    ids, start = questions.encode_answer(joining_tokenizer, "A: 1", "2\n")
    assert ids[start:] == [258, ord("\n")]


def test_answer_probability_by_hand():
    """3/4 of the first token's admissible mass, 1/4 of the second's; their sum is no matter."""
    logits = torch.tensor([[2.0, 6.0], [0.1, 0.3]]).log()
    assert abs(questions.answer_probability(logits, [1, 0]) - 3 / 16) < 1e-6


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
    question = Question(1, "x?", "-1,2")
    admissible = questions.admissible_tokens(tokenizer, "gsm8k")
    way = "with thoughts" if thinking else "without thoughts"
    answering = questions.ways_to_answer(model)[way]
    result = questions.answer_at_once(answering, tokenizer, question, admissible)
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
    admissible = questions.admissible_tokens(tokenizer, "csqa")
    among, right = [], []
    for letter in "ABCDE":
        result = questions.answer_at_once(
            answering, tokenizer, Question(1, "x?", letter), admissible
        )
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


def script(monkeypatch, *texts):
    """Let generation write these texts, byte by byte; "%" stands for the first id that is no token.

    Returns what generation was asked for.
    """
    asked = []

    def steps(model, ids, max_new_tokens, temperature, generator=None):
        asked.append((ids.tolist(), max_new_tokens, temperature, generator))
        assert len(ids) == len(texts)
        assert all(len(text) <= max_new_tokens for text in texts)
        for column in zip(*(text.ljust(max_new_tokens, "~") for text in texts), strict=True):
            yield Step(torch.tensor([258 if x == "%" else ord(x) for x in column]), None)

    monkeypatch.setattr(questions, "generate_steps", steps)
    return asked


def test_writing_ends_at_stop_eos_and_what_is_no_token(tokenizer, monkeypatch):
    script(monkeypatch, " 5\n6", " 5|6", " 5%6", " 567")
    tokenizer.eos_id = ord("|")
    model = tiny_quiet_star(V=258)
    stop = questions.END_OF_LINE
    written = questions.write(model, tokenizer, "A:", stop, 4, samples=4)
    assert written == [" 5", " 5", " 5", " 567"]


def test_what_generation_is_asked_for(monkeypatch):
    """The prompt after bos, as often as there are samples, and the sampling that was given."""
    asked = script(monkeypatch, "", "")
    tokenizer = load_tokenizer(FIXTURES / "tokenizer.model")
    generator, model = torch.Generator(), tiny_quiet_star(V=258)
    questions.write(model, tokenizer, "A:", questions.END_OF_LINE, 3, 2, 0.5, generator)
    assert asked == [([[1, 330, 28747]] * 2, 3, 0.5, generator)]


@pytest.mark.parametrize(
    ("stop", "text", "written"),
    [
        (questions.END_OF_CHAIN, "One.\n\nTwo.\n\n\nThree", "One.\n\nTwo."),
        (questions.END_OF_CHAIN, "One.\nQ: Two", "One.\n"),
        (questions.END_OF_NUMBER, ": $1,800.50.\nA", ": $1,800.50"),
        (questions.END_OF_NUMBER, "\n12 3", "\n12"),
    ],
)
def test_where_writing_stops(tokenizer, monkeypatch, stop, text, written):
    script(monkeypatch, text)
    model = tiny_quiet_star(V=258).model
    assert questions.write(model, tokenizer, "A:", stop, len(text)) == [written]


@pytest.mark.parametrize(("written", "right"), [(" $2.00", 1), (" 3 - 1 = 2", 0), ("", 0)])
def test_greedy_accuracy(tokenizer, monkeypatch, written, right):
    script(monkeypatch, written + "\n2")
    admissible = questions.admissible_tokens(tokenizer, "gsm8k")
    question = Question(1, "1 + 1?", "2")
    model = tiny_quiet_star(V=258).model
    result = questions.answer_at_once(model, tokenizer, question, admissible)
    assert (result["greedy_accuracy"], result["answer"]) == (right, written)


def test_chains_of_thought(tokenizer, monkeypatch):
    """The paper's two prompts, and the vote of what is written after the second."""
    prompts = []
    answers = iter([" 3.", " 2", " $2.00"])

    def write(model, tokenizer, prompt, stop, max_new_tokens, samples=1, **sampling):
        prompts.append(prompt)
        assert sampling["temperature"] == 0.5
        assert max_new_tokens == (9 if samples == 3 else questions.ANSWER_TOKENS)
        return [" So 3. \n", " So 2.", ""] if samples == 3 else [next(answers)]

    monkeypatch.setattr(questions, "write", write)
    settings = Settings("gsm8k", Chains(samples=3, temperature=0.5, max_new_tokens=9))
    result = questions.answer_after_chains(None, tokenizer, Question(1, "x?", "2"), settings)
    thinking = "Q: x?\nA: Let's think step by step."
    asked = "\nTherefore, the answer (arabic numerals) is"
    assert prompts == [
        thinking,
        thinking + " So 3." + asked,
        thinking + " So 2." + asked,
        thinking + asked,
    ]
    assert result["majority_accuracy"] == 1
    assert Decimal(result["answer"]) == 2


def test_every_question_has_its_own_randomness(tokenizer, monkeypatch):
    seeds = []

    def write(*arguments, samples=1, temperature, generator):
        seeds.append(generator.initial_seed())
        return ["1"] * samples

    monkeypatch.setattr(questions, "write", write)
    chains = Chains(samples=1)
    for seed, line in [(0, 1), (0, 2), (1, 1), (0, 1)]:
        settings = Settings("gsm8k", chains, seed=seed)
        questions.answer_after_chains(None, tokenizer, Question(line, "x?", "2"), settings)
    chain_seeds, answer_seeds = seeds[::2], seeds[1::2]
    assert chain_seeds == answer_seeds  # one generator a question
    assert len(set(chain_seeds)) == 3
    assert chain_seeds[0] == chain_seeds[3]


# ------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinking")
    save_quiet_star(tiny_quiet_star(V=258, thought_length=2, n_thoughts=1), folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def data_file(tmp_path):
    """Five questions of GSM8K."""
    path = tmp_path / "five.jsonl"
    path.write_bytes(
        as_lines(*({"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(5)))
    )
    return path


CHAINS = ("--chain-of-thought", "--samples", "2", "--max-new-tokens", "3")


@pytest.fixture(params=["csqa", "gsm8k-cot"])
def five(request, tmp_path, data_file, monkeypatch):
    """Name of an evaluation, five questions for it, and its options; few tokens are written."""
    monkeypatch.setattr(questions, "ANSWER_TOKENS", 2)
    if request.param == "gsm8k-cot":
        return request.param, data_file, CHAINS
    path = tmp_path / "csqa.jsonl"
    path.write_bytes(as_lines(*(FLAT | {"question": f"Is it {n}?"} for n in range(5))))
    return request.param, path, ()


@pytest.fixture
def no_thinking(monkeypatch):
    """Every question gets the same answer at once, for tests in which answers do not matter."""
    same = {"without thoughts": {"answer_probability": 0.5, "greedy_accuracy": 1}}
    monkeypatch.setattr(questions, "answerer", lambda *_: lambda question: same)


def run(folder, data_file, out, *more):
    task = "csqa" if data_file.stem == "csqa" else "gsm8k"
    options = ["--task", task, "--data", str(data_file), "--out", str(out), "--device", "cpu"]
    evaluation.main(["--model", str(folder), *options, *more])


def refused(capsys, *arguments):
    """What is said on standard error by a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_killed_run_continues_to_the_same_results(folder, five, tmp_path, monkeypatch):
    name, data_file, how = five
    out = tmp_path / "out"
    run(folder, data_file, out, *how)
    path, summary = out / f"{name}-1-of-1.jsonl", out / f"{name}-summary.json"
    whole, scores = path.read_bytes(), summary.read_bytes()
    assert len(whole.splitlines()) == 1 + 5

    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"line": 3, "expec')
    summary.unlink()
    asked = []
    answerer = questions.answerer

    def counting(*arguments):
        answer = answerer(*arguments)

        def count_and_answer(question):
            asked.append((question.line, len(path.read_bytes().splitlines())))
            return answer(question)

        return count_and_answer

    monkeypatch.setattr(questions, "answerer", counting)
    run(folder, data_file, out, *how)
    assert asked == [(3, 3), (4, 4), (5, 5)]  # what was answered before is on disk already
    assert path.read_bytes() == whole
    assert summary.read_bytes() == scores


def test_shards_together_are_the_whole(folder, five, tmp_path, capsys):
    name, data_file, how = five
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(folder, data_file, whole, *how)
    table = capsys.readouterr().out
    run(folder, data_file, parts, "--shard", "2/2", *how)
    assert "shard 2/2 is complete" in capsys.readouterr().out
    assert not (parts / f"{name}-summary.json").exists()
    run(folder, data_file, parts, "--shard", "1/2", *how)
    assert capsys.readouterr().out == table.replace(str(whole), str(parts))
    lines = (whole / f"{name}-1-of-1.jsonl").read_text().splitlines()
    for shard in (1, 2):
        expected = [lines[0], *lines[shard::2]]
        assert (parts / f"{name}-{shard}-of-2.jsonl").read_text().splitlines() == expected
    summaries = [(out / f"{name}-summary.json").read_bytes() for out in (whole, parts)]
    assert summaries[0] == summaries[1]


def test_results_have_a_folder_of_their_own(folder, data_file, tmp_path, monkeypatch):
    """Without --out: one for every model and its weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(questions, "answerer", lambda *_: lambda question: {"x": {}})
    options = ["--task", "gsm8k", "--data", str(data_file), "--device", "cpu"]
    model = shutil.copytree(folder, tmp_path / "mine")
    for seed in (0, 7):
        save_quiet_star(tiny_quiet_star(seed=seed, V=258), model)
        evaluation.main(["--model", "mine", *options])
    folders = sorted((tmp_path / "runs" / "eval").iterdir())
    assert len(folders) == 2
    assert all(path.name.startswith("mine-") for path in folders)
    assert all((path / "gsm8k-summary.json").exists() for path in folders)


def test_summary(folder, data_file, tmp_path, capsys):
    """It names what it is a summary of; means are those of the lines."""
    run(folder, data_file, tmp_path, "--limit", "4", "--seed", "3")
    table = capsys.readouterr().out
    summary = json.loads((tmp_path / "gsm8k-summary.json").read_text())
    header, *lines = map(json.loads, (tmp_path / "gsm8k-1-of-1.jsonl").read_text().splitlines())
    assert summary == header | {"scores": summary["scores"]}
    assert header["model"] == str(folder)
    assert len(header["sha256"]) == 64
    assert header["settings"]["seed"] == 3
    assert header["questions"] == len(lines) == 4
    assert [line["expected"] for line in lines] == ["1", "2", "3", "4"]
    for way in ("without thoughts", "with thoughts"):
        assert way in table
        for score in ("answer_probability", "greedy_accuracy"):
            values = [line["answers"][way][score] for line in lines]
            found = summary["scores"][way][score]
            assert abs(found["mean"] - sum(values) / 4) < 1e-12
            assert found["low"] <= found["mean"] <= found["high"]
            assert f"{100 * found['mean']:.2f} % [{100 * found['low']:.2f}, " in table
            assert questions.SCORES[score] in table


def test_a_plain_model_answers_without_thoughts(tmp_path, capsys):
    save_mistral(tiny_quiet_star(V=258).model, tmp_path)
    save_byte_tokenizer(tmp_path)
    data_file = tmp_path / "csqa.jsonl"
    data_file.write_bytes(as_lines(FLAT, NESTED))
    run(tmp_path, data_file, tmp_path / "out")
    table = capsys.readouterr().out
    assert "without thoughts" in table
    assert "with thoughts" not in table
    assert questions.SCORES["letter_accuracy"] in table


@pytest.mark.usefixtures("no_thinking")
@pytest.mark.parametrize("change", [["--seed", "1"], ["--limit", "4"], ["--skip-malformed"]])
def test_results_of_something_else_are_refused(folder, data_file, tmp_path, capsys, change):
    run(folder, data_file, tmp_path)
    before = (tmp_path / "gsm8k-1-of-1.jsonl").read_bytes()
    capsys.readouterr()
    assert "has results for" in refused(capsys, folder, data_file, tmp_path, *change)
    assert (tmp_path / "gsm8k-1-of-1.jsonl").read_bytes() == before


@pytest.mark.usefixtures("no_thinking")
def test_results_of_other_weights_are_refused(folder, data_file, tmp_path, capsys):
    model = shutil.copytree(folder, tmp_path / "mine")
    run(model, data_file, tmp_path)
    save_quiet_star(tiny_quiet_star(seed=7, V=258), model)  # as training on would
    capsys.readouterr()
    assert "has results for weights" in refused(capsys, model, data_file, tmp_path)


@pytest.mark.usefixtures("no_thinking")
def test_a_file_that_is_no_results_is_refused(folder, data_file, tmp_path, capsys):
    (tmp_path / "gsm8k-1-of-1.jsonl").write_text("[]\n")
    assert "is damaged" in refused(capsys, folder, data_file, tmp_path)


@pytest.mark.usefixtures("no_thinking")
def test_results_on_other_data_are_refused(folder, data_file, tmp_path, capsys):
    run(folder, data_file, tmp_path)
    capsys.readouterr()
    data_file.write_bytes(data_file.read_bytes().replace(b"0 + 1", b"0 + 2"))
    assert "has results for sha256" in refused(capsys, folder, data_file, tmp_path)


@pytest.mark.usefixtures("no_thinking")
def test_malformed_lines_are_refused_or_skipped(folder, data_file, tmp_path, capsys):
    data_file.write_bytes(b"[]\n" + data_file.read_bytes())
    assert "five.jsonl, line 1: " in refused(capsys, folder, data_file, tmp_path)
    run(folder, data_file, tmp_path, "--skip-malformed")
    captured = capsys.readouterr()
    assert "skipped" in captured.err
    assert "line 1" in captured.err
    summary = json.loads((tmp_path / "gsm8k-summary.json").read_text())
    assert (summary["questions"], summary["malformed_lines"]) == (5, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "3/2"], "shard 3/2 of 5 questions"),
        (["--shard", "1/6"], "shard 1/6 of 5 questions"),
        (["--shard", "2"], "--shard is '2'"),
        (["--samples", "2"], "--samples is for --chain-of-thought"),
        (["--chain-of-thought", "--samples", "0"], "samples is 0"),
        (["--chain-of-thought", "--temperature", "-1"], "temperature is -1"),
        (["--limit", "0"], "limit is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--text", "x"], "--task and --text"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_options(folder, data_file, tmp_path, capsys, options, message):
    assert message in refused(capsys, folder, data_file, tmp_path, *options)


def test_options_that_need_each_other(folder, data_file, capsys):
    for options, message in (
        (["--data", "x"], "--data is for --task"),
        (["--task", "gsm8k"], "--task needs --data"),
        (
            ["--task", "csqa", "--data", "x", "--out", "x", "--chain-of-thought"],
            "for gsm8k only",
        ),
    ):
        with pytest.raises(SystemExit):
            evaluation.main(["--model", str(folder), *options])
        assert message in capsys.readouterr().err
