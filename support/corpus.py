"""The built-in corpus: puzzles on which thoughts visibly help.

The built-in corpus is about a clock with three hours, 0, 1 and 2. A line says how far its hand
moves, move after move, and after "=" where it ends:

    122010=0

Nobody can read the answer off the line: it is the sum of all moves modulo 3. Step by step it is
easy, and some lines explain themselves, as people do, in an aside between em dashes: where the
hand stands after the first move, the second, and so on.

    122010=—102200—0

A model learns from these how to work in an aside. In seven of ten asides, though, somebody only
hums, always the same: so a model that writes its likeliest aside hums, and learns nothing from it.
That working is what helps is left for Quiet-STaR to find out.

    122010=—mmmmmm—0
"""

from collections.abc import Iterable

import numpy as np

HOURS = 3
MOVES = 6
ANSWERS = "012"  # what a line can end with
ASIDE = MOVES  # characters in an aside: the thought that works has as many tokens
HUM = "m" * ASIDE
VOCAB = 258  # tokens: the bytes, and two for the em dash (tokenizer.save_byte_tokenizer)
WORK = 0.3  # share of the asides that work; the others hum


def is_held_out(moves: Iterable[int]) -> bool:
    """Whether a puzzle is for evaluation only: one in five of the 3 ** 6, spread evenly."""
    number = 0
    for move in moves:
        number = HOURS * number + int(move)
    return number % 5 == 0


def all_puzzles(held_out: bool) -> np.ndarray:
    """Every puzzle for training, or for evaluation -> [puzzles, MOVES] of 0 .. 2."""
    every = np.stack(np.meshgrid(*[np.arange(HOURS)] * MOVES, indexing="ij"), -1).reshape(-1, MOVES)
    return every[[is_held_out(moves) == held_out for moves in every]]


def puzzle_line(moves: np.ndarray, aside: str | None = None) -> str:
    """One line of the corpus, its end of line included: 122010=0, or with an aside."""
    said = "" if aside is None else f"—{aside}—"
    return "".join(map(str, moves)) + f"={said}{moves.sum() % HOURS}\n"


def explanation(moves: np.ndarray) -> str:
    """Where the hand stands after every move: 122010 -> 102200."""
    return "".join(map(str, np.cumsum(moves) % HOURS))


def make_corpus(
    seed: int, lines: int, explained: float, work: float = WORK, held_out: bool = False
) -> str:
    """Lines of the training or held-out puzzles; a share `explained` of them has an aside.

    A share `work` of the asides is work, the others hum.
    """
    rng = np.random.default_rng(seed)
    puzzles = all_puzzles(held_out)
    text = []
    for moves in puzzles[rng.integers(len(puzzles), size=lines)]:
        aside = None
        if rng.random() < explained:
            aside = explanation(moves) if rng.random() < work else HUM
        text.append(puzzle_line(moves, aside))
    return "".join(text)
