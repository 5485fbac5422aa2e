"""Text to tokens to batches; and the embedded corpus, made here, on which thoughts visibly help.

The embedded corpus is about a clock with three hours, 0, 1 and 2. A line says how far its hand
moves, move after move, and after "=" where it ends:

    122010=0

Nobody can read the answer off the line: it is the sum of all moves modulo 3. Step by step it is
easy, and some lines explain themselves, as people do, in an aside between em dashes: where the
hand stands after the first move, the second, and so on.

    122010=—102200—0

A model learns from these how to work in an aside. In half of the asides, though, somebody only
hums, so that a thought sampled from the model is as often idle as it is work: which of the two
helps is left for Quiet-STaR to find out.

    122010=—mmmmmm—0
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HOURS = 3
MOVES = 6
ANSWERS = "012"  # what a line can end with
ASIDE = MOVES  # characters in an aside: the thought that works has as many tokens
LETTERS = "abcdefghijklmnopqrstuvwxyz"


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


def make_corpus(seed: int, lines: int, explained: float, held_out: bool = False) -> str:
    """Lines of the training or held-out puzzles; a share `explained` of them has an aside.

    Half of the asides are work.
    """
    rng = np.random.default_rng(seed)
    puzzles = all_puzzles(held_out)
    text = []
    for moves in puzzles[rng.integers(len(puzzles), size=lines)]:
        aside = None
        if rng.random() < explained:
            idle = LETTERS[rng.integers(len(LETTERS))] * ASIDE
            aside = explanation(moves) if rng.random() < 0.5 else idle
        text.append(puzzle_line(moves, aside))
    return "".join(text)


# ------------------------------------------------------------------------------ text of your own


def read_documents(files: Iterable[str | Path]) -> list[str]:
    """The documents in files: a text file is one, a .jsonl file has one in every line.

    A line of JSON has its text under "text", or a "question" and an "answer", joined by a new line
    (GSM8K's files). ValueError names a file or line that does not fit.
    """
    documents = []
    for path in map(Path, files):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path} as UTF-8 text: {error}") from None
        if path.suffix == ".jsonl":
            documents += [
                json_document(line, f"{path}, line {number}")
                for number, line in enumerate(text.split("\n"), 1)  # not at U+2028 in a string
                if line.strip()
            ]
        else:
            documents.append(text)
    if not any(documents):
        raise ValueError(f"no text in {', '.join(map(str, files)) or 'no files'}")
    return documents


def json_document(line: str, where: str) -> str:
    """The text of one line of a .jsonl file."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    record = record if isinstance(record, dict) else {}
    if isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record.get("question"), str) and isinstance(record.get("answer"), str):
        return record["question"] + "\n" + record["answer"]
    raise ValueError(f'{where} has neither "text" nor "question" and "answer" as strings')


@dataclass(frozen=True)
class Tokens:
    """Documents as one stream of tokens, cut into sequences of a batch."""

    ids: Tensor  # [tokens] int64
    is_target: Tensor  # [tokens] bool: False for the first of a document, which nothing foretells

    def batch(
        self, step: int, batch_size: int, T: int, seed: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """ids and target mask [B, T] of a step: a function of step and seed, so a run can resume.

        Sequences are the stream's successive T tokens. Every epoch, with the last sequences of the
        one before it if need be, goes through all of them in an order of its own.
        """
        sequences = len(self.ids) // T
        if not sequences:
            raise ValueError(f"the text has {len(self.ids)} tokens, one sequence needs {T}")
        rows = []
        for index in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(index, sequences)
            rows.append(self._order(epoch, sequences, seed)[place])
        spans = torch.tensor(rows)[:, None] * T + torch.arange(T)  # [B, T]
        return self.ids[spans].to(device), self.is_target[spans].to(device)

    @staticmethod
    @lru_cache(maxsize=2)
    def _order(epoch: int, sequences: int, seed: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(sequences)


def tokenize(documents: Iterable[str], tokenizer) -> Tokens:
    """Every document as its tokens, after bos if its model has texts begin so, and before eos."""
    ids: list[int] = []
    starts = []
    for document in filter(None, documents):
        starts.append(len(ids))
        ids += tokenizer.encode(document, bos=tokenizer.adds_bos)
        ids += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    is_target = torch.ones(len(ids), dtype=torch.bool)
    is_target[starts] = False
    return Tokens(torch.tensor(ids, dtype=torch.long), is_target)
