"""Puzzles with an answer of two tokens: their lines, their chance, their scores, their runs."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from test_experiments import small_runs
from tiny import think_slowly, tiny_quiet_star

import eval as evaluation
import train
from support import corpus
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from tools import experiments, two


def test_lines_by_hand():
    """The last hour is the number that the moves write in base 2, modulo 9."""
    moves = np.array([1, 2, 2, 0, 1, 0])  # 32 + 2 * 16 + 2 * 8 + 2 = 82 = 9 * 9 + 1
    assert two.explanation(moves) == "141251"
    assert two.puzzle_line(moves) == "122010=01\n"
    assert two.puzzle_line(moves, corpus.HUM) == "122010=—mmmmmm—01\n"
    for moves in corpus.all_puzzles(held_out=True):
        hour = sum(int(move) * 2 ** (5 - i) for i, move in enumerate(moves)) % 9
        line = two.puzzle_line(moves, two.explanation(moves))
        assert int(line[:-1].split("—")[2], 3) == hour == int(line.split("—")[1][-1])


@pytest.mark.parametrize("held_out", [False, True])
def test_an_answer_cannot_be_guessed_nor_a_digit_from_the_other(held_out):
    puzzles = corpus.all_puzzles(held_out)
    assert len(puzzles) == (146 if held_out else 583)
    share = np.zeros((3, 3))
    for moves in puzzles:
        share[*map(int, two.puzzle_line(moves).strip()[-2:])] += 1 / len(puzzles)
    assert share.max() < 0.125
    for joint in (share, share.T):
        assert (joint / joint.sum(0)).max() < 0.37


def test_every_move_matters_for_both_digits():
    every = {
        moves: two.puzzle_line(np.array(moves))[-3:-1] for moves in product(range(3), repeat=6)
    }
    for i, digit in product(range(6), range(2)):
        others = [moves for moves in every if moves[i] == 0]
        raised = [(*moves[:i], 1, *moves[i + 1 :]) for moves in others]
        changed = [every[a][digit] != every[b][digit] for a, b in zip(others, raised, strict=True)]
        assert np.mean(changed) > 0.3


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    """And a twentieth of the puzzles: 8 are held out."""
    all_puzzles = corpus.all_puzzles
    monkeypatch.setattr(corpus, "all_puzzles", lambda held_out: all_puzzles(held_out)[::20])
    save_byte_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def test_the_puzzles_replace_the_built_in_ones_for_a_while(tokenizer):
    built_in = corpus.puzzle_line, corpus.explanation, evaluation.puzzle_table
    with two.puzzles():
        text = corpus.make_corpus(0, 50, explained=0.5)
        prompts = [tokenizer.decode(row) for row in two.held_out_puzzles(tokenizer).ids.tolist()]
    assert (corpus.puzzle_line, corpus.explanation, evaluation.puzzle_table) == built_in
    for line in text.splitlines():
        moves = np.array([*map(int, line[:6])])
        aside = {"": None, "—": line[8:14]}[line[7:8].strip("012")]
        assert aside in (None, corpus.HUM, two.explanation(moves))
        assert two.puzzle_line(moves, aside) == line + "\n"
    for prompt, moves in zip(prompts, corpus.all_puzzles(held_out=True), strict=True):
        begin, *before, last = prompt.split("\n")
        assert (begin, last) == ("", two.puzzle_line(moves)[:7])
        for line in before:
            assert two.puzzle_line(np.array([*map(int, line[:6])])) == line + "\n"
            assert not corpus.is_held_out(line[:6])


@torch.no_grad()
def test_scores_equal_thinking_slowly(tokenizer):
    """log p of both digits: at once, after a thought before the first, and before each of them."""
    model = tiny_quiet_star(V=258, thought_length=2, n_true=2)
    with two.puzzles():
        table, puzzles = two.puzzle_table(model, tokenizer), two.held_out_puzzles(tokenizer)
    right = {name: [] for name in ("answers at once", "one greedy thought", "greedy thoughts")}
    logps = {name: [] for name in right}
    for ids, answer in zip(puzzles.ids, puzzles.answers.tolist(), strict=True):
        T, found = len(ids), {name: [] for name in right}
        for digits in puzzles.candidates:
            row = torch.cat([ids, digits])
            logp = torch.log_softmax(model.model(row[None])[0], -1)
            found["answers at once"].append(logp[T - 1, row[T]] + logp[T, row[T + 1]])
            first, second = (think_slowly(model, row, j, None)["nll"] for j in (T - 1, T))
            found["one greedy thought"].append(-first[0] - first[1])
            found["greedy thoughts"].append(-first[0] - second[0])
        for name, values in found.items():
            right[name].append(values.index(max(values)) == answer)
            logps[name].append(float(values[answer]))
    for name in right:
        assert table[name].logp == pytest.approx(np.mean(logps[name]), abs=1e-5)
        assert table[name].right == pytest.approx(np.mean(right[name]))


@pytest.mark.parametrize(("hum", "begun", "enough"), [(1, 1, True), (1, 0, False), (0, 1, False)])
def test_a_base_model_is_ready_if_it_works_when_begun_right_and_else_hums(
    tokenizer, monkeypatch, hum, begun, enough
):
    score = two.Score(float(begun), -1.0)
    said = torch.full((8, 6), ord("m" if hum else "n"))
    monkeypatch.setattr(two, "puzzle_table", lambda *_: {"writes one, begun right": score})
    monkeypatch.setattr(evaluation, "write_aside", lambda *_, begun: (said, None))
    line, found, metrics = two.look(None, tokenizer)
    assert (found, metrics) == (enough, {})
    assert line.startswith(f"{hum:.2f} of the asides hum; begun right, {begun:.2f}")


def test_experiments_train_on_them(tmp_path, monkeypatch):
    with small_runs(), monkeypatch.context() as patch:
        seen, tokenize = [], train.tokenize
        patch.setattr(
            train, "tokenize", lambda texts, *x: seen.append(texts) or tokenize(texts, *x)
        )
        experiments.main(["--out", str(tmp_path), "--seeds", "1", "--only", "two-A3"])
    assert len(seen) == 2
    assert all(two.puzzle_line(np.array([*map(int, x[0][:6])]))[:7] == x[0][:7] for x in seen)
    lines = [line for [text] in seen for line in text.splitlines() if "—" not in line]
    assert all(line[7:] in two.ANSWERS for line in lines)
    base, result = (
        json.loads((tmp_path / "seed0" / f"{name}.json").read_text())
        for name in ("two-base", "two-A3")
    )
    assert result["thoughts"]["n_true"] == 3
    assert {*result["table"]} - {*base["table"]} == {"greedy thoughts", "one greedy thought"}
    head, *_ = (tmp_path / "tables.md").read_text().split("\n\n", 2)[2].splitlines()
    columns = ["seeds", "cost", "at once", "greedy", "greedy, once", "aside", "begun"]
    assert [cell.strip() for cell in head.split("|")[2:-2]] == columns
