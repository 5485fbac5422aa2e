"""Make tokens of text of any size, once, for train.py --data.

    python -m tools.prepare --data corpus/ "more/*.jsonl.zst" --checkpoint FOLDER --out prepared
    python train.py --checkpoint FOLDER --data prepared

Read are files, folders and globs of .jsonl and .json (a document in every line), .parquet (one in
every row) and plain text (any other file is one document); all but .parquet also as .gz or .zst.
The tokens are those that train.py makes of the same documents itself, but memory does not grow with
the text. What is odd in the text is counted and told, or refused with --strict.

    prepared/tokens.bin       all tokens, uint16 or uint32
    prepared/is_target.bin    a byte for each: 0 if it is the first of a document, else 1
    prepared/manifest.json    what they were made of and by which tokenizer; counts

Ours: a byte a token, where the starts of documents would do, is mapped from the disk as it is.
"""

import argparse
import codecs
import glob
import gzip
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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from support.files import json_object, read_json, write_json
from support.terminal import execute, make_parser, show_status
from support.text import MANIFEST, text_of, tokenize, version
from support.tokenizer import load_tokenizer

CHUNK = 2**20  # bytes read, and about as many characters for a worker, at once
FILES = ("tokens.bin", "is_target.bin", MANIFEST)
NEEDS = {".zst": "zstandard", ".parquet": "pyarrow"}  # optional packages

# Between a letter and a space or a new line a word of every tokenizer here ends, and no merge goes
# across: a long text is cut there, and its parts have the tokens of the whole. As the beginning of
# a text may be something else than its middle, what follows a cut is encoded behind a letter.
CUT = re.compile(r"(?s:.*[^\W\d_])(?=[ \n])")
LETTER = "a"

ODD = {  # what is counted in the files
    "no_json": "lines that are no JSON object (left out)",
    "no_text": "lines or rows without text (left out)",
    "no_utf8": "places that are no UTF-8 (read as U+FFFD)",
    "nul": "NUL characters (kept)",
    "bom": "byte order mark (left out)",
    "line_ends": "file with line ends other than \\n (read as \\n)",
}


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    begins: bool = True  # whether its document does
    ends: bool = True


# ------------------------------------------------------------------------------------- the sources


def find_files(sources: list[str], out: Path) -> list[Path]:
    """The files that are meant, in the order of the sources; those of a folder or glob by name.

    Hidden files of a folder are left out. ValueError for a source without files, for a folder that
    `out` lies in, and for a package that is missing.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if source == "-":
            raise ValueError("- is standard input, which is not read: write it to a file first")
        if path.is_dir():
            if out.resolve().is_relative_to(path.resolve()):
                raise ValueError(f"--out {out} lies in {path}, which is read; put it elsewhere")
            found = [x for x in path.rglob("*") if "/." not in x.as_posix()[len(str(path)) :]]
        else:
            found = [path] if path.exists() else map(Path, glob.glob(source, recursive=True))
        found = sorted(file for file in found if file.is_file())
        if not found:
            raise ValueError(f"{source}: there is no such file, or no file in it")
        files += found
    for suffix in {file.suffix.lower() for file in files} & {*NEEDS}:
        if find_spec(NEEDS[suffix]) is None:
            raise ValueError(f"{suffix} files need a package: pip install {NEEDS[suffix]}")
    return files


class Reader:
    """Files to pieces of text; counts what is odd in them, or refuses it."""

    def __init__(self, field: str | None = None, strict: bool = False):
        self.field, self.strict = field, strict
        self.odd: Counter = Counter()  # {kind: count} in all files read
        self.here: dict[str, list] = {}  # {kind: [count, where it was met first]} in this one

    def read(self, files: list[Path]) -> Iterator[tuple[Piece, int]]:
        """The pieces of all files, and how many bytes of the files were read by then.

        ValueError for a damaged file, and with `strict` for what is odd.
        """
        codecs.register_error("count", self.replace)
        done = 0
        for self.path in files:
            self.here, size = {}, self.path.stat().st_size
            try:
                with self.path.open("rb") as raw:
                    for piece in filter(lambda piece: piece.text, self.pieces(raw)):
                        self.count("nul", number=piece.text.count("\0"))
                        yield piece, done + min(raw.tell(), size)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"cannot read {self.path}: {error}") from None
            done += size
            self.odd += {kind: number for kind, (number, _) in self.here.items()}
            if told := [f"{n} {ODD[kind]}{where}" for kind, (n, where) in self.here.items()]:
                print(f"{self.path}: {', '.join(told)}", file=sys.stderr)

    def count(self, kind: str, line: int | None = None, number: int = 1) -> None:
        """Count what is odd."""
        if number and self.strict:
            place = f"{self.path}, line {line}" if line else self.path
            raise ValueError(f"{place}: {number} {ODD[kind]}; that is refused by --strict")
        if number:
            first = self.here.setdefault(kind, [0, f", first in line {line}" if line else ""])
            first[0] += number

    def replace(self, error: UnicodeError) -> tuple[str, int]:
        """Handler of decoding errors."""
        self.count("no_utf8")
        return "\ufffd", error.end

    def pieces(self, raw: BinaryIO) -> Iterator[Piece]:
        """The pieces of a file; its name says how it is packed and what it is."""
        suffix, inner = self.path.suffix.lower(), Path(self.path.stem).suffix.lower()
        if suffix == ".parquet":
            yield from self.documents(enumerate(rows(raw, self.field), 1))
            return
        stream: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw
        chunks = unpack_zst(raw) if suffix == ".zst" else iter(partial(stream.read, CHUNK), b"")
        texts = self.decode(chunks)
        if (inner if suffix in (".gz", ".zst") else suffix) in (".jsonl", ".json"):
            yield from self.documents(self.objects(texts))
        else:
            yield from cut(texts)

    def decode(self, chunks: Iterator[bytes]) -> Iterator[str]:
        """The text in bytes, in chunks, without its byte order mark and with \\n everywhere."""
        utf8 = codecs.getincrementaldecoder("utf-8")("count")
        decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        texts = (decoder.decode(chunk) for chunk in chunks)
        first = next(filter(None, texts), "")
        self.count("bom", number=first.startswith("\ufeff"))
        yield first.removeprefix("\ufeff")
        yield from filter(None, texts)
        yield from filter(None, [decoder.decode(b"", final=True)])
        self.count("line_ends", number=decoder.newlines not in (None, "\n"))

    def objects(self, texts: Iterator[str]) -> Iterator[tuple[int, dict]]:
        """The objects in JSON lines, and the numbers of their lines."""
        for number, line in enumerate(lines(texts), 1):  # not at U+2028
            if line.strip():
                try:
                    yield number, json_object(line, "")
                except ValueError:
                    self.count("no_json", number)

    def documents(self, records: Iterator[tuple[int, dict]]) -> Iterator[Piece]:
        """The texts of records that have one."""
        for number, record in records:
            try:
                text = text_of(record, "", self.field)
            except ValueError:
                self.count("no_text", number)
                continue
            yield Piece(text)


def unpack_zst(raw: BinaryIO) -> Iterator[bytes]:
    """The bytes in a .zst file. (zstandard's own reader takes one that is cut off for whole.)"""
    import zstandard

    frame, unpacker = None, zstandard.ZstdDecompressor(max_window_size=2**31)  # zstd --long=31 too
    try:
        while packed := raw.read(CHUNK // 16):
            while packed:
                frame = frame or unpacker.decompressobj()
                yield frame.decompress(packed)
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None
    if frame:
        raise EOFError("the file is cut off")


def rows(raw: BinaryIO, field: str | None) -> Iterator[dict]:
    """The rows of a .parquet file, of the columns that text can be in; ValueError without any."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(raw)
        names = [field] if field else ["text", "question", "answer"]
        columns = [name for name in table.schema_arrow.names if name in names]
        if not columns:
            raise OSError(f"its columns are {', '.join(table.schema_arrow.names)}; give --field")
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def lines(texts: Iterator[str]) -> Iterator[str]:
    """The lines of a text that comes in chunks."""
    held: list[str] = []
    for text in texts:
        *whole, rest = text.split("\n")
        for line in whole:
            yield "".join([*held, line])
            held = []
        held.append(rest)
    yield "".join(held)


def cut(texts: Iterator[str]) -> Iterator[Piece]:
    """A long document, which comes in chunks, as pieces that are encoded as in the whole."""
    held, text, begins = "", next(texts), True
    for following in texts:
        if match := CUT.match(text):
            yield Piece(held + match[0], begins, ends=False)
            held, text, begins = "", text[match.end() :], False
        held, text = held + text, following
    yield Piece(held + text, begins)


# ------------------------------------------------------------------------------------- the tokens

load_once = lru_cache(load_tokenizer)  # by every worker


def start_worker() -> None:
    """One thread a worker; the parent alone hears Ctrl-C, and no worker outlives it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch = threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True)
    watch.start()


def encode(tokenizer_file: str, pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """ids and target mask [tokens] of pieces, as data.tokenize has them of whole documents."""
    tokenizer, parts = load_once(tokenizer_file), []
    front = len(tokenizer.encode(LETTER, bos=tokenizer.adds_bos))
    for text, begins, ends in pieces:
        tokens = tokenize([text if begins else LETTER + text], tokenizer)
        part = slice(0 if begins else front, None if ends or tokenizer.eos_id is None else -1)
        parts.append((tokens.ids[part], tokens.is_target[part]))
    ids, is_target = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return ids.astype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32), is_target


def batches(pieces: Iterator[tuple[Piece, int]]) -> Iterator[tuple[list[Piece], int]]:
    """Pieces in lists of about CHUNK characters, and how many bytes were read by then."""
    batch, length, done = [], 0, 0
    for piece, done in pieces:
        batch.append(piece)
        length += len(piece.text)
        if length >= CHUNK:
            yield batch, done
            batch, length = [], 0
    if batch:
        yield batch, done


def in_order(pool, tokenizer_file: str, work: Iterator, ahead: int) -> Iterator[tuple]:
    """What `encode` makes of batches, in their order, and the bytes read; `ahead` at once."""
    waiting: deque = deque()
    for batch, done in work:
        waiting.append((pool.submit(encode, tokenizer_file, batch), done))
        if len(waiting) > ahead:
            future, done = waiting.popleft()
            yield *future.result(), done
    for future, done in waiting:
        yield *future.result(), done


def write_tokens(
    files: list[Path], reader: Reader, tokenizer_file: str, folder: Path, workers: int
) -> dict:
    """Write tokens.bin and is_target.bin of the files into a folder; what the manifest says of it.

    ValueError where no text is left.
    """
    total, began, shown = sum(file.stat().st_size for file in files), time.perf_counter(), -1
    documents = tokens = 0
    work, kind = batches(reader.read(files)), None
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool,
        (folder / FILES[0]).open("wb") as ids_file,
        (folder / FILES[1]).open("wb") as target_file,
    ):
        for ids, is_target, done in in_order(pool, tokenizer_file, work, 2 * workers):
            ids.tofile(ids_file)
            is_target.tofile(target_file)
            documents, tokens = documents + int((~is_target).sum()), tokens + len(ids)
            kind, seconds = ids.dtype.name, time.perf_counter() - began
            part = 1000 * done // max(total, 1)
            if part > shown:
                left = seconds * (total - done) / max(done, 1)
                line = f"{part / 10:.1f} %  {tokens} tokens, {tokens / seconds:.0f}/s"
                line += f"  {left:.0f} s left"
                show_status(line, part, 1000, sys.stderr, keep=part // 100 > shown // 100)
                shown = part
    if not tokens:
        raise ValueError(f"no text in {len(files)} files; left out: {dict(reader.odd)}")
    return {"dtype": kind, "documents": documents, "tokens": tokens, "odd": dict(reader.odd)}


# ------------------------------------------------------------------------------ the command line


def difference(found: dict, wanted: dict) -> str | None:
    """What a manifest was made of that is not wanted now; None if there is nothing."""
    for name, value in wanted.items():
        if name == "sources" and found.get(name) != value:
            old, new = ({tuple(x) for x in sources} for sources in (found.get(name, []), value))
            if old == new:
                return "their order has changed"
            file = min(old ^ new)[0]
            both = all(file in {source[0] for source in sources} for sources in (old, new))
            return f"{file} {'has changed' if both else 'is in one of the two only'}"
        if found.get(name) != value:
            return f"{name} was {found.get(name)}, now {value}"
    return None


def run(options: argparse.Namespace) -> None:
    """Make the folder, unless it is up to date."""
    out, source = Path(options.out), options.tokenizer or options.checkpoint
    if (source is None) or (options.tokenizer and options.checkpoint):
        raise ValueError("give either --checkpoint or --tokenizer")
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; it must be at least 1")
    files = find_files(options.data, out)
    wanted = {
        "sources": [[str(file.resolve()), *version(file)] for file in files],
        "tokenizer": load_tokenizer(source).identity(),
        "field": options.field,
        "strict": options.strict,
    }
    new = out.with_name(out.name + ".tmp")
    for folder in (out, new):
        if folder.exists() and not {x.name for x in folder.iterdir()} <= {*FILES}:
            raise ValueError(f"{folder} is something else than prepared text; give another --out")
    if (out / MANIFEST).exists() and not options.rebuild:
        if changed := difference(read_json(out / MANIFEST), wanted):
            raise ValueError(f"{out} is of other text: {changed}; --rebuild makes it anew")
        print(f"{out} is up to date")
        return
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    reader = Reader(options.field, options.strict)
    try:
        made = write_tokens(files, reader, source, new, options.workers)
        write_json(new / MANIFEST, wanted | made)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(new, out)
    except BrokenProcessPool:
        raise ValueError("a worker was killed (no memory left?); try fewer --workers") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{out} has {made['documents']} documents, {made['tokens']} tokens ({made['dtype']})")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, nargs="+", metavar="FILE", help="files, folders, globs")
    add("--checkpoint", metavar="FOLDER", help="the model to be trained, with its tokenizer")
    add("--tokenizer", metavar="FILE", help="or a tokenizer alone")
    add("--out", required=True, metavar="FOLDER", help="folder to make")
    add("--field", metavar="NAME", help='of the text; none: "text", or "question" and "answer"')
    add("--strict", action="store_true", help="refuse what is odd instead of counting it")
    add("--rebuild", action="store_true", help="make the folder anew")
    add("--workers", type=int, default=os.cpu_count(), help="processes at once (one a core)")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
