"""Tokenize text of any size once, for train.py --data.

    python -m tools.prepare --data corpus/ "more/*.jsonl.zst" --checkpoint FOLDER --out prepared
    python train.py --checkpoint FOLDER --data prepared

A .jsonl or .json file has a document in every line and a .parquet file one in every row. Any other
file is one document. All but .parquet may be compressed as .gz or .zst. The tokens are those that
train.py makes of these documents, but memory does not grow with the text. Flaws of the text are
counted and reported; --strict refuses them.

    prepared/tokens.bin       all tokens, uint16 or uint32
    prepared/is_target.bin    one byte per token: 0 for the first token of a document, else 1
    prepared/manifest.json    sources, tokenizer, options, counts, checksums
"""

import argparse
import codecs
import glob
import gzip
import hashlib
import io
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import islice, zip_longest
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from support.files import json_object, write_json
from support.terminal import execute, make_parser, show_status
from support.text import MANIFEST, read_manifest, text_of, tokenize, version
from support.tokenizer import load_tokenizer

CHUNK = 2**16  # characters of a long document that are read at once
TASK = 16  # documents or parts of documents that a worker encodes at once
ARRAYS = ("tokens.bin", "is_target.bin")
NEEDS = {".zst": "zstandard", ".parquet": "pyarrow"}  # optional packages

# Every tokenizer here ends a word between a letter and a space or newline, and never merges across.
# Long texts are cut there, and the tokens of the parts are those of the whole. As the start of a
# text may be encoded differently, a part after a cut is encoded with LETTER before it.
CUT = re.compile(r"(?s:.*[^\W\d_])(?=[ \n])")
LETTER = "a"

FLAWS = {
    "no_json": "lines without a JSON object (skipped)",
    "no_text": "records without text (skipped)",
    "no_utf8": "invalid UTF-8 sequences (read as U+FFFD)",
    "nul": "NUL characters (kept)",
    "bom": "byte order mark (skipped)",
    "line_ends": "file with line ends other than \\n (read as \\n)",
}


class Piece(NamedTuple):
    """A document or a part of a long document."""

    text: str
    begins: bool = True  # whether the document begins here
    ends: bool = True


def find_files(sources: list[str], out: Path) -> list[Path]:
    """The files of the sources, in order; those of a folder (without hidden ones) or glob by name.

    Raises ValueError for a source without files, `out` in a source, or a missing optional package.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            if out.resolve().is_relative_to(path.resolve()):
                raise ValueError(f"--out {out} is inside {path}, a source; give another folder")
            inside = (file.relative_to(path) for file in path.rglob("*"))
            found = [path / x for x in inside if not any(part[0] == "." for part in x.parts)]
        else:
            found = [path] if path.exists() else map(Path, glob.glob(source, recursive=True))
        found = sorted(file for file in found if file.is_file())
        if not found:
            raise ValueError(f"{source}: there is no such file, or no file in it")
        files += found
    for suffix, package in NEEDS.items():
        if suffix in {file.suffix.lower() for file in files} and not find_spec(package):
            raise ValueError(f"{suffix} files need a package: pip install {package}")
    return files


class Reader:
    """Reads files as pieces of text, and counts the FLAWS or refuses them."""

    def __init__(self, fields: list[str] | None = None, strict: bool = False):
        self.fields, self.strict = fields, strict
        self.flaws: Counter = Counter()  # {kind: count} in all files

    def read(self, files: list[Path]) -> Iterator[tuple[Piece, int]]:
        """Pieces, and bytes read so far. ValueError for a damaged file, or a flaw if strict."""
        codecs.register_error("count", lambda error: (self.count("no_utf8") or "\ufffd", error.end))
        done = 0
        for self.path in files:
            self.here, self.first, size = Counter(), {}, self.path.stat().st_size
            try:
                with self.path.open("rb") as raw:
                    for piece in filter(lambda piece: piece.text, self.pieces(raw)):
                        self.count("nul", number=piece.text.count("\0"))
                        yield piece, done + min(raw.tell(), size)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"cannot read {self.path}: {error}") from None
            done += size
            self.flaws += self.here
            if found := [f"{n} {FLAWS[x]}{self.first.get(x, '')}" for x, n in self.here.items()]:
                print(f"{self.path}: {', '.join(found)}", file=sys.stderr)

    def count(self, kind: str, line: int | None = None, number: int = 1) -> None:
        """Count flaws of a kind. Raises ValueError if strict."""
        if number and self.strict:
            place = f"{self.path}, line {line}" if line else self.path
            raise ValueError(f"{place}: {number} {FLAWS[kind]}; --strict refuses this")
        self.here += Counter({kind: int(number)})
        self.first.setdefault(kind, f", first in line {line}" if line else "")

    def pieces(self, raw: BinaryIO) -> Iterator[Piece]:
        """The pieces of a file. Its name decides how it is read."""
        suffix, inner = self.path.suffix.lower(), Path(self.path.stem).suffix.lower()
        if suffix == ".parquet":
            yield from self.documents(rows(raw, self.fields))
            return
        stream = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw
        stream = io.BufferedReader(Unpacked(raw), CHUNK) if suffix == ".zst" else stream
        start, mark = stream.peek(CHUNK), codecs.BOM_UTF8
        self.count("bom", number=start.startswith(mark))
        text = io.TextIOWrapper(stream, "utf-8-sig", "count")
        if (inner if suffix in (".gz", ".zst") else suffix) not in (".jsonl", ".json"):
            yield from cut(iter(partial(text.read, CHUNK), ""))
        elif start.removeprefix(mark).lstrip().startswith(b"["):
            raise OSError("it is a JSON array; write one object per line (jq -c '.[]')")
        else:
            yield from self.documents(text)
        self.count("line_ends", number=text.newlines not in (None, "\n"))

    def documents(self, records: Iterable[str | dict]) -> Iterator[Piece]:
        """The texts of JSON lines or rows. Records without text are skipped and counted."""
        for number, record in enumerate(records, 1):
            flaw = "no_json"
            try:
                record = json_object(record, "") if isinstance(record, str) else record
                flaw = "no_text"
                parts = [text_of(record, "", field) for field in self.fields or [None]]
            except ValueError:
                if not str(record).isspace():
                    self.count(flaw, number)
            else:
                yield Piece("\n".join(parts))


class Unpacked(io.RawIOBase):
    """A .zst file, decompressed. (The reader of zstandard does not notice a truncated file.)"""

    def __init__(self, raw: BinaryIO):
        self.chunks, self.held = self.unpack(raw), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.held = self.held or next(filter(None, self.chunks), b"")
        count = min(len(buffer), len(self.held))
        buffer[:count], self.held = self.held[:count], self.held[count:]
        return count

    @staticmethod
    def unpack(raw: BinaryIO) -> Iterator[bytes]:
        import zstandard

        frame, unpacker = None, zstandard.ZstdDecompressor(max_window_size=2**31)  # --long=31 too
        try:
            while packed := raw.read(CHUNK // 16):
                while packed:
                    frame = frame or unpacker.decompressobj()
                    yield frame.decompress(packed)
                    packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        if frame:
            raise EOFError("the file is truncated")


def rows(raw: BinaryIO, fields: list[str] | None) -> Iterator[dict]:
    """The rows of a .parquet file, with only the columns that are needed."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(raw)
        names = table.schema_arrow.names
        columns = [x for x in fields or ("text", "question", "answer") if x in names]
        if not columns or len(columns) < len(fields or ()):
            raise OSError(f"its columns are {', '.join(names)}; choose with --field")
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def cut(texts: Iterator[str]) -> Iterator[Piece]:
    """The pieces of a long document that comes in chunks. See CUT."""
    held, text, begins = "", next(texts, ""), True
    for following in texts:
        if match := CUT.match(text):
            yield Piece(held + match[0], begins, ends=False)
            held, text, begins = "", text[match.end() :], False
        held, text = held + text, following
    yield Piece(held + text, begins)


load_once = lru_cache(load_tokenizer)  # in every worker


def check_workers(workers: int) -> None:
    """Raise ValueError unless the number of workers is at least 1 and at most 8 per CPU core."""
    most = 8 * (os.cpu_count() or 1)
    if not 1 <= workers <= most:
        raise ValueError(f"--workers is {workers}; it must be between 1 and {most}, 8 per core")


def start_worker() -> None:
    """Set up a worker: one thread; it leaves Ctrl-C to the parent, and ends if the parent ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch = threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True)
    watch.start()


def encode(tokenizer_file: str, task: list[tuple[Piece, int]]) -> tuple[np.ndarray, np.ndarray]:
    """ids and target mask [tokens] of pieces, equal to those of the whole documents."""
    tokenizer, parts = load_once(tokenizer_file), []
    front = len(tokenizer.encode(LETTER, bos=tokenizer.adds_bos))
    for (text, begins, ends), _ in task:
        tokens = tokenize([text if begins else LETTER + text], tokenizer)
        part = slice(0 if begins else front, None if ends or tokenizer.eos_id is None else -1)
        parts.append((tokens.ids[part], tokens.is_target[part]))
    ids, is_target = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return ids.astype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32), is_target


def write_tokens(
    files: list[Path], reader: Reader, tokenizer_file: str, folder: Path, workers: int
) -> dict:
    """Write the ARRAYS, and return the rest of the manifest. Raises ValueError for no text."""
    total, began = sum(file.stat().st_size for file in files), time.perf_counter()
    documents, tokens, paths = 0, 0, [folder / name for name in ARRAYS]
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool,
        paths[0].open("wb") as ids_file,
        paths[1].open("wb") as target_file,
    ):
        pieces = reader.read(files)
        tasks = iter(lambda: [*islice(pieces, TASK)], [])
        work = ((pool.submit(encode, tokenizer_file, task), task[-1][1]) for task in tasks)
        waiting = deque(islice(work, 4 * workers))
        while waiting:
            future, done = waiting.popleft()
            waiting.extend(islice(work, 1))
            ids, is_target = future.result()
            ids.tofile(ids_file)
            is_target.tofile(target_file)
            documents, tokens = documents + int((~is_target).sum()), tokens + len(ids)
            left = (time.perf_counter() - began) * (total - done) / max(done, 1)
            line = f"{100 * done / max(total, 1):.1f} %  {tokens} tokens  {left:.0f} s left"
            show_status(line, done, total, sys.stderr)
    if not tokens:
        raise ValueError(f"no text in {len(files)} files; skipped: {dict(reader.flaws)}")
    counts = {"documents": documents, "tokens": tokens, "flaws": dict(reader.flaws)}
    return {"dtype": ids.dtype.name, **counts, "sha256": checksums(folder)}


def checksums(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of the ARRAYS in a folder."""
    found = {}
    for name in ARRAYS:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def difference(found: dict, wanted: dict) -> str | None:
    """The first entry of a manifest that is not as wanted, in words, or None."""
    for name, value in wanted.items():
        was = found.get(name)
        if name == "sources" and was != value:
            was, value = next(x for x in zip_longest(was or [], value) if x[0] != x[1])
        if was != value:
            return f"{name} had {was}, now {value}"
    return None


def run(options: argparse.Namespace) -> None:
    """Make the folder, unless it is up to date."""
    check_workers(options.workers)
    out, source = Path(options.out), options.checkpoint
    new, files = out.with_name(out.name + ".tmp"), find_files(options.data, out)
    wanted = {
        "sources": [[str(file.resolve()), *version(file)] for file in files],
        "tokenizer": load_tokenizer(source).identity(),
        "field": options.field,
        "strict": options.strict,
    }
    for folder in (out, new):
        if folder.exists() and not {x.name for x in folder.iterdir()} <= {*ARRAYS, MANIFEST}:
            raise ValueError(f"{folder} holds other files than prepared text; give another --out")
    if (out / MANIFEST).exists() and not options.rebuild:
        found = read_manifest(out)
        if changed := difference(found, wanted) or difference(found, {"sha256": checksums(out)}):
            raise ValueError(f"{out} holds other text: {changed}; --rebuild replaces it")
        print(f"{out} is up to date")
        return
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        reader = Reader(options.field, options.strict)
        made = write_tokens(files, reader, source, new, options.workers)
        write_json(new / MANIFEST, wanted | made)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(new, out)
    except BrokenProcessPool:
        raise ValueError("a worker was killed (out of memory?); try fewer --workers") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{out} has {made['documents']} documents, {made['tokens']} tokens ({made['dtype']})")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, nargs="+", metavar="FILE", help="files, folders, globs")
    add("--checkpoint", required=True, metavar="FOLDER", help="model to train, or tokenizer file")
    add("--out", required=True, metavar="FOLDER", help="folder to make")
    text = 'fields of a record, joined by newlines; none: "text", or "question" and "answer"'
    add("--field", nargs="+", metavar="NAME", help=text)
    add("--strict", action="store_true", help="refuse flaws of the text instead of counting them")
    add("--rebuild", action="store_true", help="replace the folder")
    add("--workers", type=int, default=os.cpu_count(), help="processes (one per core)")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
