"""The built-in corpus: puzzles for which thoughts are useful.

A clock has three hours: 0, 1 and 2. A line says how far its hand moves, move after move, and after
"=" where the hand ends: at the sum of all moves modulo 3. This is hard to predict at once. Some
lines explain the answer in an aside between em dashes: the hour after the first move, the second
and so on. From them a model learns to work in an aside. But seven of ten asides only hum:

    122010=0
    122010=—102200—0
    122010=—mmmmmm—0

So a model that writes its likeliest aside hums, and learns nothing from it. Quiet-STaR has to find
out that working helps.
"""

from collections.abc import Iterable

import numpy as np

HOURS = 3
MOVES = 6
ANSWERS = "012"  # the possible ends of a line
ASIDE = MOVES  # characters of an aside: the thought that works has as many tokens
HUM = "m" * ASIDE
VOCAB = 258  # tokens: the bytes, and two for the em dash (tokenizer.save_byte_tokenizer)
WORK = 0.3  # share of the asides that work; the others hum


def is_held_out(moves: Iterable) -> bool:
    """Whether a puzzle is for evaluation only: one in five of the 3 ** 6, spread evenly."""
    return int("".join(map(str, moves)), HOURS) % 5 == 0


def all_puzzles(held_out: bool) -> np.ndarray:
    """Every puzzle for training, or for evaluation -> [puzzles, MOVES] of 0 .. 2."""
    every = np.stack(np.meshgrid(*[np.arange(HOURS)] * MOVES, indexing="ij"), -1).reshape(-1, MOVES)
    return every[[is_held_out(moves) == held_out for moves in every]]


def puzzle_line(moves: np.ndarray, aside: str | None = None) -> str:
    """One line of the corpus with its line end: 122010=0, or with an aside."""
    written = "" if aside is None else f"—{aside}—"
    return "".join(map(str, moves)) + f"={written}{moves.sum() % HOURS}\n"


def explanation(moves: np.ndarray) -> str:
    """The hour after every move: 122010 -> 102200."""
    return "".join(map(str, np.cumsum(moves) % HOURS))


def make_corpus(seed: int, lines: int, explained: float, work=WORK, held_out=False) -> str:
    """Lines of the training or held-out puzzles.

    explained: share of the lines with an aside. work: share of the asides that work.
    """
    rng, puzzles, text = np.random.default_rng(seed), all_puzzles(held_out), []
    for moves in puzzles[rng.integers(len(puzzles), size=lines)]:
        aside = None
        if rng.random() < explained:
            aside = explanation(moves) if rng.random() < work else HUM
        text.append(puzzle_line(moves, aside))
    return "".join(text)
