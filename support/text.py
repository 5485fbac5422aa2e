"""Text to tokens to batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.files import read_json, read_json_lines, read_utf8

MANIFEST = "manifest.json"  # of a folder of tokens that tools/prepare.py made


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
