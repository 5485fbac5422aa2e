"""Text to tokens to batches; and the built-in corpus, made here, on which thoughts visibly help.

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

import argparse
import inspect
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import numpy as np
import torch
from torch import Tensor

HOURS = 3
MOVES = 6
ANSWERS = "012"  # what a line can end with
ASIDE = MOVES  # characters in an aside: the thought that works has as many tokens
HUM = "m" * ASIDE
VOCAB = 258  # tokens: the bytes, and two for the em dash (tokenizer.save_byte_tokenizer)
WORK = 0.3  # share of the asides that work; the others hum

MANIFEST = "manifest.json"  # of a folder of tokens that tools/prepare.py made


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


# ------------------------------------------------------------------------------ text of your own


def read_documents(files: Iterable[str | Path]) -> list[str]:
    """The documents in files: a text file is one, a .jsonl or .json file has one in every line.

    ValueError names a file or line that does not fit.
    """
    documents = []
    try:
        for path in map(Path, files):
            if (path / MANIFEST).is_file():
                raise ValueError(f"{path} is prepared text, which is given alone")
            if path.suffix.lower() in (".gz", ".zst", ".parquet"):
                raise ValueError(f"{path} is no plain text")
            if path.suffix.lower() in (".jsonl", ".json"):
                documents += [text_of(record, where) for where, record in read_json_lines(path)]
            else:
                documents.append(read_utf8(path))
    except ValueError as error:
        more = "folders, *, .gz, .zst, .parquet and damaged text; nothing reads standard input"
        raise ValueError(f"{error} (python -m tools.prepare reads {more})") from None
    if not any(documents):
        raise ValueError(f"no text in {', '.join(map(str, files)) or 'no files'}")
    return documents


def text_of(record: dict, where: str, field: str | None = None) -> str:
    """A record's string under `field`; none: under "text", or "question" and "answer", joined.

    (The last two are GSM8K's.) ValueError says where there is no such string.
    """
    for names in [[field]] if field else [["text"], ["question", "answer"]]:
        parts = [record.get(name) for name in names]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
    wanted = f'no "{field}"' if field else 'neither "text" nor "question" and "answer"'
    raise ValueError(f"{where} has {wanted} as a string")


def read_json_lines(path: str | Path) -> list[tuple[str, dict]]:
    """The objects in a file of JSON lines, each with "file, line number" for messages about it."""
    records = []
    for number, line in enumerate(read_utf8(Path(path)).split("\n"), 1):  # not at U+2028
        if line.strip():
            where = f"{path}, line {number}"
            records.append((where, json_object(line, where)))
    return records


def json_object(text: str, where: str | Path) -> dict:
    """The object that a JSON text is; ValueError says where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object: {text[:40]!r}")
    return value


def read_utf8(path: Path) -> str:
    """The text of a file without its byte order mark; ValueError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"cannot read {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as UTF-8 text: {error}") from None


@dataclass(frozen=True)
class Tokens:
    """Documents as one stream of tokens, cut into sequences of a batch."""

    ids: Tensor | np.memmap  # [tokens] whole numbers, in memory or on the disk
    is_target: Tensor | np.memmap  # [tokens] bool: not a document's first, which nothing foretells

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
        spans = []
        for index in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(index, sequences)
            start = self._order(epoch, sequences, seed)[place] * T
            spans.append(slice(start, start + T))
        ids = np.stack([self.ids[span] for span in spans]).astype(np.int64)  # [B, T]
        is_target = np.stack([self.is_target[span] for span in spans])
        return torch.from_numpy(ids).to(device), torch.from_numpy(is_target).to(device)

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
    is_target[[start for start in starts if start < len(ids)]] = False  # a text may have no tokens
    return Tokens(torch.tensor(ids, dtype=torch.long), is_target)


def read_tokens(files: Sequence[str | Path], tokenizer) -> Tokens:
    """The tokens of text files, or of a folder from tools/prepare.py, which stay on the disk.

    ValueError for what cannot be read, or was prepared with another tokenizer.
    """
    folder = Path(files[0])
    if len(files) > 1 or not (folder / MANIFEST).is_file():
        return tokenize(read_documents(files), tokenizer)
    manifest = read_json(folder / MANIFEST)
    if manifest.get("tokenizer") != tokenizer.identity():
        raise ValueError(f"{folder} was not prepared with this checkpoint's tokenizer: do it again")
    try:
        kinds = {"tokens": manifest["dtype"], "is_target": "bool"}
        shape = (manifest["tokens"],)
        return Tokens(*(np.memmap(folder / f"{x}.bin", kinds[x], "r", shape=shape) for x in kinds))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{folder} is damaged ({error}): prepare it again") from None


def version(file: str | Path) -> list[int]:
    """By what an edited text is known: size and time of the file, or of a folder's manifest."""
    path = Path(file)
    status = (path / MANIFEST if path.is_dir() else path).stat()
    return [status.st_size, status.st_mtime_ns]


# ------------------------------------------------------------------------------ files and settings


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, then rename it: never half of a file.

    A link is followed. ValueError for what is no file (a folder, a device); OSError if it fails.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file and is not replaced; give another name")
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # of any new file here; safetensors' are for the owner only
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except Exception as error:  # of whichever library wrote
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if it is missing, broken or no object."""
    return json_object(read_utf8(path), path)


def check_at_least(settings: object, **least: float) -> None:
    """ValueError for the first setting that is below its least value; None is always allowed."""
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= smallest:  # NaN neither
            raise ValueError(f"{name} is {value}; it must be at least {smallest}")


def short(value: object) -> str:
    """The repr of a value for a message, on one line and not long whatever it is."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 100
    shown.maxdict = 8
    return shown.repr(value)


def fits(value: object, kind) -> bool:
    """Whether a value from a file is of a field's type; no bool is a number, nor is NaN."""
    if isinstance(kind, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if get_args(kind):  # list[int], tuple[str, ...]
        return type(value) in (list, tuple) and all(fits(item, get_args(kind)[0]) for item in value)
    if type(value) in (int, float):
        wide = abs(value) < (1e300 if type(value) is float else 2**63)  # NaN is not
        return wide and kind in (type(value), float)
    return type(value) is kind


def settings_from(kind: type, values: dict, path: Path):
    """A settings dataclass from the values in a file; ValueError names the file, and the value."""
    if not isinstance(values, dict):
        raise ValueError(f"{path}: settings are {short(values)}; they must be an object")
    for field in fields(kind):
        if field.name in values and not fits(values[field.name], field.type):
            wanted = getattr(field.type, "__name__", field.type)
            raise ValueError(
                f"{path}: {field.name} is {short(values[field.name])}; it must be {wanted}"
            )
    try:
        return kind(**values)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from None


def comments(settings: type) -> dict[str, str]:
    """The comment behind each field of a dataclass: it is the option's help text."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(settings), re.MULTILINE))


def add_settings(parser: argparse.ArgumentParser, settings: type, built_in: dict) -> None:
    """One option per field of a dataclass; absent from the result unless it was given."""
    group = parser.add_argument_group(settings.__name__, settings.__doc__)
    help_texts = comments(settings)
    for field in fields(settings):
        if field.name.endswith("_id"):  # looked up in the tokenizer, or outside the vocabulary
            continue
        optional = isinstance(field.type, UnionType)
        kind = get_args(field.type)[0] if optional else get_origin(field.type) or field.type
        values = [str(field.default)] if field.default not in (None, ()) else []
        if field.name in built_in:
            values.append(f"built-in corpus: {built_in[field.name]}")
        options: dict = {"default": argparse.SUPPRESS, "help": help_texts[field.name]}
        options["help"] += f" ({'; '.join(values)})" if values else ""
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= {"nargs": "+", "metavar": "FILE"}
        else:
            options |= {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
        group.add_argument("--" + field.name.replace("_", "-"), **options)
