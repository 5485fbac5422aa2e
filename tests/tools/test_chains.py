"""Chains of thought and their votes, and where results are written."""

import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_quiet_star

import sample
from support.questions import Question
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from thoughts import save_quiet_star
from tools import chains


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
    assert chains.majority(numbers) == (None if winner is None else Decimal(winner))


@pytest.mark.parametrize(
    ("stop", "text", "written"),
    [
        (chains.END_OF_CHAIN, "One.\n\nTwo.\n\n\nThree", "One.\n\nTwo."),
        (chains.END_OF_CHAIN, "One.\nQ: Two", "One.\n"),
        (chains.END_OF_NUMBER, ": $1,800.50.\nA", ": $1,800.50"),
        (chains.END_OF_NUMBER, "\n12 3", "\n12"),
    ],
)
def test_where_writing_stops(tmp_path, monkeypatch, stop, text, written):
    def steps(model, ids, max_new_tokens):
        return ((torch.tensor([ord(character)]), None) for character in text)

    monkeypatch.setattr(sample, "generate_steps", steps)
    save_byte_tokenizer(tmp_path)
    model, tokenizer = tiny_quiet_star(V=258).model, load_tokenizer(tmp_path)
    assert sample.write(model, tokenizer, "A:", len(text), stop=stop) == [written]


def test_chains_of_thought(monkeypatch):
    """The paper's two prompts, and the vote of what is written after the second."""
    prompts = []
    answers = iter([" 3.", " 2", " $2.00"])

    def write(model, tokenizer, prompt, max_new_tokens, temperature, generator, stop, samples=1):
        prompts.append(prompt)
        assert temperature == 0.5
        assert max_new_tokens == (9 if samples == 3 else chains.ANSWER_TOKENS)
        assert stop == (chains.END_OF_CHAIN if samples == 3 else chains.END_OF_NUMBER)
        return [" So 3. \n", " So 2.", ""] if samples == 3 else [next(answers)]

    monkeypatch.setattr(chains, "write", write)
    settings = SimpleNamespace(samples=3, temperature=0.5, max_new_tokens=9, seed=0)
    result = chains.answer_after_chains(None, Question(0, "x?", "2"), None, settings)
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
    assert result["chains"][1] == " So 2." + asked + " 2"


def test_every_question_has_its_own_randomness(monkeypatch):
    seeds = []

    def write(*arguments, generator, samples=1, **how):
        seeds.append(generator.initial_seed())
        return ["1"] * samples

    monkeypatch.setattr(chains, "write", write)
    for seed, number in [(0, 1), (0, 2), (1, 1), (0, 1)]:
        settings = SimpleNamespace(samples=1, temperature=0.7, max_new_tokens=9, seed=seed)
        chains.answer_after_chains(None, Question(number, "x?", "2"), None, settings)
    chain_seeds, answer_seeds = seeds[::2], seeds[1::2]
    assert chain_seeds == answer_seeds  # one generator a question
    assert len(set(chain_seeds)) == 3
    assert chain_seeds[0] == chain_seeds[3]


# ------------------------------------------------------------------------------ the command line


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Those of a model and three questions; few tokens are written."""
    monkeypatch.setattr(chains, "ANSWER_TOKENS", 2)
    monkeypatch.chdir(tmp_path)  # results go to runs/
    save_quiet_star(tiny_quiet_star(V=258, thought_length=1, n_thoughts=1), tmp_path)
    save_byte_tokenizer(tmp_path)
    lines = [json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) for n in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    files = ["--model", str(tmp_path), "--data", str(tmp_path / "test.jsonl"), "--device", "cpu"]
    return [*files, "--samples", "2", "--max-new-tokens", "3"]


def test_a_killed_run_continues_to_the_same_results(options, tmp_path, capsys):
    chains.main(options)
    table = capsys.readouterr().out
    out = Path("runs") / f"{tmp_path.parent.name}-{tmp_path.name}-gsm8k-cot.jsonl"
    assert table.endswith(f"a line for each question is in {out}\n")
    assert "gsm8k, 3 questions" in table
    assert "with thoughts" in table
    assert chains.SCORES["majority_accuracy"] in table
    whole = out.read_bytes()
    header, *lines = map(json.loads, whole.splitlines())
    assert header["samples"] == len(lines[0]["with thoughts"]["chains"]) == 2
    assert header["seed"] == 0
    assert [line["expected"] for line in lines] == ["1", "2", "3"]
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"question"')
    chains.main(options)
    assert out.read_bytes() == whole
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("change", [["--seed", "1"], ["--temperature", "0"], ["--samples", "3"]])
def test_results_of_other_chains_are_refused(options, tmp_path, capsys, monkeypatch, change):
    monkeypatch.setattr(chains, "answer_after_chains", lambda *_, **__: {"majority_accuracy": 1})
    chains.main(options)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        chains.main([*options, *change])
    assert stopped.value.code == 2
    assert "has other results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--samples", "0"], "samples is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--limit", "0"], "limit is 0"),
        (["--limit", "-1"], "limit is -1"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_options(options, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        chains.main([*options, *change])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_help_says_where_results_go(capsys):
    with pytest.raises(SystemExit):
        chains.main(["--help"])
    assert "runs/RUN-MODEL-gsm8k-cot.jsonl" in capsys.readouterr().out
