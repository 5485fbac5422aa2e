"""Text to tokens to batches."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.files import read_json, read_json_lines, read_utf8, short
from support.settings import fits

MANIFEST = "manifest.json"  # marks a folder of tokens that tools/prepare.py has written


def read_documents(files: Iterable[str | Path]) -> list[str]:
    """The documents in files: one per line of a .jsonl or .json file, one per other file.

    Raises ValueError that names the file or the line that cannot be read.
    """
    documents = []
    for path in map(Path, files):
        if (path / MANIFEST).is_file():
            raise ValueError(f"{path} is a prepared folder; give it as the only --data")
        if path.is_dir() or path.suffix.lower() in (".gz", ".zst", ".parquet"):
            more = "python -m tools.prepare reads folders, .gz, .zst, .parquet and damaged text"
            raise ValueError(f"cannot read {path}, which is not plain text; {more}")
        if path.suffix.lower() in (".jsonl", ".json"):
            documents += [text_of(record, where) for where, record in read_json_lines(path)]
        else:
            documents.append(read_utf8(path))
    if not any(documents):
        raise ValueError(f"no text in {', '.join(map(str, files)) or 'no files'}")
    return documents


def text_of(record: dict, where: str, field: str | None = None) -> str:
    """The string under `field` in a record. None: under "text", or "question" and "answer", joined.

    ("question" and "answer" are GSM8K's.) Raises ValueError if there is no such string.
    """
    for names in [[field]] if field else [["text"], ["question", "answer"]]:
        parts = [record.get(name) for name in names]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
    wanted = f'no "{field}"' if field else 'neither "text" nor "question" and "answer"'
    raise ValueError(f"{where} has {wanted} as a string")


@dataclass(frozen=True)
class Tokens:
    """Documents as one stream of tokens, from which batches are cut."""

    ids: Tensor | np.memmap  # [tokens] integers, in memory or on the disk
    is_target: Tensor | np.memmap  # [tokens] bool; False for the first token of a document

    def batch(self, step: int, batch_size: int, T: int, seed: int, device) -> tuple[Tensor, Tensor]:
        """ids [B, T] int64 and target mask [B, T] bool of a step, which a resumed run sees again.

        Sequences are successive T tokens of the stream. Each epoch has all of them in a new random
        order; a batch may span two epochs. Raises ValueError if there are less than T tokens.
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
    """Encode documents: bos, if texts begin with it; the text's tokens; eos, if there is one."""
    ids: list[int] = []
    starts = []
    for document in filter(None, documents):
        starts.append(len(ids))
        ids += tokenizer.encode(document, bos=tokenizer.adds_bos)
        ids += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    is_target = torch.ones(len(ids), dtype=torch.bool)
    is_target[[start for start in starts if start < len(ids)]] = False  # a text may have no tokens
    return Tokens(torch.tensor(ids, dtype=torch.long), is_target)


def damaged(folder: Path, reason: str) -> ValueError:
    """The error of a prepared folder that cannot be right."""
    return ValueError(f"{folder} is damaged ({reason}): prepare it again")


def read_manifest(folder: Path) -> dict:
    """The manifest of a prepared folder. Raises ValueError if a value in it has a wrong type."""
    manifest = {"sources": [], "sha256": {}} | read_json(folder / MANIFEST)
    tokens, dtype, sources, sums = map(manifest.get, ("tokens", "dtype", "sources", "sha256"))
    right = {
        "tokens": fits(tokens, int) and tokens > 0,
        "dtype": dtype in ("uint16", "uint32"),
        "sources": fits(sources, list[list])
        and all([*map(type, source)] == [str, int, int] for source in sources),
        "sha256": fits(sums, dict) and fits([*sums.values()], list[str]),
    }
    if wrong := [name for name in right if not right[name]]:
        raise damaged(folder, f"{wrong[0]} is {short(manifest.get(wrong[0]))}")
    return manifest


def read_tokens(files: Sequence[str | Path], tokenizer) -> Tokens:
    """The tokens of text files, or of a folder from tools/prepare.py, which stay on the disk.

    Raises ValueError if a file cannot be read, or if the folder is damaged or was prepared with
    another tokenizer.
    """
    folder = Path(files[0])
    if len(files) > 1 or not (folder / MANIFEST).is_file():
        return tokenize(read_documents(files), tokenizer)
    manifest, arrays = read_manifest(folder), []
    if manifest.get("tokenizer") != tokenizer.identity():
        raise ValueError(f"{folder} was not prepared with this checkpoint's tokenizer: do it again")
    for name, dtype in (("tokens.bin", manifest["dtype"]), ("is_target.bin", "bool")):
        file, size = folder / name, manifest["tokens"] * np.dtype(dtype).itemsize
        if not file.is_file() or file.stat().st_size != size:
            raise damaged(folder, f"{name} does not have {size} bytes")
        arrays.append(np.memmap(file, dtype, "r"))
        checksum = manifest["sha256"].get(name)
        if checksum and hashlib.sha256(arrays[-1]).hexdigest() != checksum:
            raise damaged(folder, f"{name} does not have the checksum in {MANIFEST}")
    ids, is_target = arrays
    if ids.max() >= tokenizer.vocab_size:
        raise damaged(folder, f"id {ids.max()} in a vocabulary of {tokenizer.vocab_size}")
    if is_target[0] or is_target.view(np.uint8).max() != 1:  # the first token begins a document
        raise damaged(folder, "is_target.bin is not a mask of targets")
    return Tokens(ids, is_target)


def version(file: str | Path) -> list[int]:
    """Size and time of a file, or of a folder's manifest. They change if the text is edited."""
    path = Path(file)
    status = (path / MANIFEST if path.is_dir() else path).stat()
    return [status.st_size, status.st_mtime_ns]
