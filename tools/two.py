"""Puzzles with an answer of two tokens: what the number A of true tokens ahead is worth.

    python -m tools.experiments --out runs/two --only two-A1 two-A2 two-A3

This clock has nine hours. Its hand starts at 0, and at every move the hour is doubled before the
move is added, modulo 9. The answer is the last hour in base 3. Moves, held-out puzzles and hums are
those of support/corpus.py; an aside that works has the hour after every move:

    122010=01
    122010=—141251—01
    122010=—mmmmmm—01

All six moves matter for both digits. The nine answers are about equally frequent, so guessing gives
11 %, and the first digit says nothing about the second.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import eval as evaluation
from eval import Puzzles, Score
from sample import Model
from support import corpus
from support.tokenizer import Tokenizer
from thoughts import QuietStar

ANSWERS = [first + second for first in "012" for second in "012"]  # the hours 0 .. 8 in base 3


def explanation(moves: np.ndarray) -> str:
    """The hour after every move: 122010 -> 141251."""
    return "".join(map(str, accumulate(moves, lambda hour, move: (2 * hour + move) % 9)))


def puzzle_line(moves: np.ndarray, aside: str | None = None) -> str:
    """One line with its line end: 122010=01, or with an aside."""
    written = "" if aside is None else f"—{aside}—"
    return "".join(map(str, moves)) + f"={written}{ANSWERS[int(explanation(moves)[-1])]}\n"


def held_out_puzzles(tokenizer: Tokenizer) -> Puzzles:
    """eval.held_out_puzzles of these puzzles, once each; candidates [9, 2] are the ANSWERS."""
    held_out = corpus.all_puzzles(held_out=True)
    before = corpus.make_corpus(0, 3 * len(held_out), explained=0.0).splitlines(keepends=True)
    rows, work = [], [explanation(moves) for moves in held_out]
    for i, moves in enumerate(held_out):
        rows.append("\n" + "".join(before[3 * i : 3 * i + 3]) + puzzle_line(moves)[:-3])
    ids, asides, candidates = (
        torch.tensor([tokenizer.encode(x) for x in texts]) for texts in (rows, work, ANSWERS)
    )
    answers = torch.tensor([int(hours[-1]) for hours in work])
    return Puzzles(ids, answers, asides, candidates, tokenizer.token_id(corpus.HUM[0]))


def score(nll: Tensor, puzzles: Puzzles) -> Score:
    """Score of both digits together, from the nll [n * 9] of every candidate after every puzzle."""
    logp = -nll.view(-1, len(ANSWERS))
    right = (logp.argmax(1) == puzzles.answers).float().mean().item()
    return Score(right, logp.gather(1, puzzles.answers[:, None]).mean().item())


@torch.no_grad()
def puzzle_table(model: Model, tokenizer: Tokenizer) -> dict[str, Score]:
    """eval.puzzle_table of these puzzles, with greedy thoughts before each digit or the first."""
    puzzles, table = held_out_puzzles(tokenizer), {}
    text_model = model.model if isinstance(model, QuietStar) else model
    dash = torch.full_like(puzzles.ids[:, :1], tokenizer.token_id("—"))
    before = {"answers at once": puzzles.ids}
    for name, begun in (("writes an aside", False), ("writes one, begun right", True)):
        aside = evaluation.write_aside(text_model, puzzles, tokenizer, begun)[0]
        before[name] = torch.cat([puzzles.ids, dash, aside, dash], dim=1)
    for name, ids in before.items():
        answers, T = puzzles.candidates.repeat(len(ids), 1), ids.shape[1]
        rows = torch.cat([ids.repeat_interleave(9, 0), answers], dim=1)  # [n * 9, T + 2]
        logits = text_model(rows)[:, T - 1 : T + 1]  # [n * 9, 2, V]
        nll = F.cross_entropy(logits.mT, answers, reduction="none")  # [n * 9, 2]
        table[name] = score(nll.sum(1), puzzles)
        if isinstance(model, QuietStar) and name == "answers at once":
            once, positions = evaluation.thinking_once(model), torch.tensor([T - 1, T])
            once.config = replace(once.config, n_true=2)
            nll = once(rows, positions=positions, temperature=0).talk_nll[:, :, 0]  # [A, n * 9, J]
            table["greedy thoughts"] = score(nll[0].sum(1), puzzles)
            table["one greedy thought"] = score(nll[:, :, 0].sum(0), puzzles)
    return table


@torch.no_grad()
def look(model: Model, tokenizer: Tokenizer) -> tuple[str, bool, dict]:
    """eval.look_at_puzzles of these puzzles, for the base model only: others take seconds."""
    if isinstance(model, QuietStar):
        return "", False, {}
    puzzles = held_out_puzzles(tokenizer)
    written = evaluation.write_aside(model, puzzles, tokenizer, begun=False)[0]
    hums = (written == puzzles.hum).all(1).float().mean().item()
    begun = puzzle_table(model, tokenizer)["writes one, begun right"].right
    line = f"{hums:.2f} of the asides hum; begun right, {begun:.2f} lead to the answer"
    return line, hums >= 0.99 and begun == 1, {}


@contextmanager
def puzzles() -> Iterator[None]:
    """Let train.py train and evaluate on these puzzles."""
    with (
        patch.multiple(corpus, explanation=explanation, puzzle_line=puzzle_line),
        patch.multiple(evaluation, puzzle_table=puzzle_table, look_at_puzzles=look),
    ):
        yield
