"""Prepared text: the same tokens as text read directly, whatever its form; flaws are reported."""

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused
from processes import quick_context

from support.files import read_json, write_json
from support.text import read_documents, read_tokens, tokenize
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from tools import prepare

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parents[1] / "fixtures"
MISTRAL = str(FIXTURES / "tokenizer.model")
TOKENIZERS = [
    MISTRAL,
    *map(str, sorted(FIXTURES.glob("tokenizer_json_*"))),
    str(FIXTURES / "tekken_cut"),
]
PROSE = "Two and  two\n\nis four, it's said.\n\t(Or 5?) — naïve 漢字。\n Yes"


class InPlace:
    """A pool that runs tasks in this process, for tests of anything else."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        value = function(*arguments)
        return type("Done", (), {"result": lambda self: value})()


@pytest.fixture
def in_place(monkeypatch):
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", InPlace)
    monkeypatch.setattr(prepare, "load_tokenizer", prepare.load_once)


def run(folder, *data, options=(), tokenizer=MISTRAL):
    out = str(folder / "out")
    prepare.main(["--data", *map(str, data), "--checkpoint", tokenizer, "--out", out, *options])
    return folder / "out"


def check_tokens(folder, documents, tokenizer=MISTRAL):
    """Assert that a prepared folder has the tokens and batches of documents. Its manifest."""
    tokenizer = prepare.load_once(tokenizer)
    direct, prepared = tokenize(documents, tokenizer), read_tokens([folder], tokenizer)
    assert torch.equal(direct.ids, torch.from_numpy(prepared.ids.astype(np.int64)))
    assert torch.equal(direct.is_target, torch.from_numpy(np.array(prepared.is_target)))
    assert not prepared.ids.flags.writeable
    for step in (0, 7):
        for one, other in zip(
            direct.batch(step, 2, 2, 3, CPU), prepared.batch(step, 2, 2, 3, CPU), strict=True
        ):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    return read_json(folder / "manifest.json")


def write_files(folder):
    """A text, and JSON lines with both kinds of fields."""
    (folder / "a.txt").write_text(PROSE, encoding="utf-8")
    records = [{"text": "one\u2028two"}, {"question": "How many?", "answer": "Two"}, {"text": ""}]
    (folder / "b.JSONL").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return [folder / "a.txt", folder / "b.JSONL"]


def test_prepared_text_has_the_batches_of_text_read_directly(tmp_path, monkeypatch):
    """Real processes; the first batch of pieces is the longest, so that others overtake it."""
    files = write_files(tmp_path)
    lines = [json.dumps({"text": f"{n} {PROSE}" * (200 if n == 0 else 1)}) for n in range(60)]
    (tmp_path / "c.json").write_text("\n".join(lines))
    monkeypatch.setattr(prepare, "CHUNK", 200)
    monkeypatch.setattr(prepare, "get_context", {"spawn": quick_context()}.__getitem__)
    files.append(tmp_path / "c.json")
    out = run(tmp_path, *files, options=["--workers", "2"])
    manifest = check_tokens(out, read_documents(files))
    assert (manifest["documents"], manifest["dtype"]) == (63, "uint16")
    assert not manifest["flaws"]
    assert manifest["sha256"] == {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest()
        for name in ("tokens.bin", "is_target.bin")
    }
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.txt", "b.JSONL", "c.json", "out"]


@pytest.mark.parametrize("size", [2, 3, 7, 40])
@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=[Path(x).name for x in TOKENIZERS])
def test_a_long_text_is_cut_without_a_trace(tmp_path, monkeypatch, in_place, size, tokenizer):
    """Into many pieces, read a few bytes at a time, in the middle of characters too."""
    monkeypatch.setattr(prepare, "CHUNK", size)
    text = tmp_path / "long.txt"
    text.write_text(PROSE * 3, encoding="utf-8")
    pieces = [piece for piece, _ in prepare.Reader().read([text])]
    assert "".join(piece.text for piece in pieces) == PROSE * 3
    assert len(pieces) > (1 if size == 40 else 3)
    check_tokens(run(tmp_path, text, tokenizer=tokenizer), [PROSE * 3], tokenizer)


def test_a_large_vocabulary_needs_wider_numbers(tmp_path, in_place, monkeypatch):
    monkeypatch.setattr(prepare.load_once(MISTRAL), "vocab_size", 2**16 + 1)
    manifest = check_tokens(
        run(tmp_path, *write_files(tmp_path)), [PROSE, "one\u2028two", "How many?\nTwo"]
    )
    assert manifest["dtype"] == "uint32"


def test_folders_globs_and_gzip(tmp_path, in_place, monkeypatch):
    """In the order of the sources, a folder's files sorted by name, hidden ones skipped."""
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "inner" / ".draft").write_text("hidden")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"bee"))
    (folder / "inner" / "a.jsonl.GZ").write_bytes(gzip.compress(b'{"text": "ay"}\n'))
    for name in "yx":
        (tmp_path / f"{name}.md").write_text(name)
    out = run(tmp_path, tmp_path / "*.md", folder, tmp_path / "y.md")
    manifest = check_tokens(out, ["x", "y", "bee", "ay", "y"])
    names = [Path(source[0]).name for source in manifest["sources"]]
    assert names == ["x.md", "y.md", "b.txt.gz", "a.jsonl.GZ", "y.md"]
    assert manifest["documents"] == 5
    monkeypatch.chdir(folder)
    assert [*map(str, prepare.find_files(["."], tmp_path / "out"))] == [
        "b.txt.gz",
        "inner/a.jsonl.GZ",
    ]


def test_zstandard(tmp_path, in_place, capsys):
    """Two frames, as compressed in pieces; a truncated file is noticed."""
    zstandard = pytest.importorskip("zstandard")
    lines = [json.dumps({"text": f"{n} {PROSE}"}).encode() + b"\n" for n in range(30)]
    packed = zstandard.compress(b"".join(lines[:9])) + zstandard.compress(b"".join(lines[9:]))
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(packed)
    check_tokens(run(tmp_path, file), [f"{n} {PROSE}" for n in range(30)])
    for broken, message in ((packed[:-9], "the file is truncated"), (b"nonsense", "cannot read")):
        file.write_bytes(broken)
        assert message in refused(capsys, run, tmp_path, file, options=["--rebuild"])


def test_parquet(tmp_path, in_place, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), file)
    manifest = check_tokens(run(tmp_path, file), ["one", "two"])
    assert manifest["flaws"] == {"no_text": 1}
    assert "its columns are text, id; choose with --field" in refused(
        capsys, run, tmp_path, file, options=["--field", "text", "body", "--rebuild"]
    )
    file.write_bytes(b"nonsense")
    assert f"cannot read {file}" in refused(capsys, run, tmp_path, file, options=["--rebuild"])


@pytest.mark.parametrize(("suffix", "package"), [("zst", "zstandard"), ("parquet", "pyarrow")])
def test_a_missing_package_is_told_before_anything_is_read(
    tmp_path, capsys, monkeypatch, suffix, package
):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    (tmp_path / f"a.{suffix}").write_bytes(b"")
    assert f"pip install {package}" in refused(capsys, run, tmp_path, tmp_path / f"a.{suffix}")


@pytest.mark.parametrize(
    ("fields", "documents"), [(["body"], ["yes", "no"]), (["head", "body"], ["Is it?\nyes"])]
)
def test_chosen_fields_are_joined(tmp_path, in_place, fields, documents):
    records = [{"text": "x", "body": "yes", "head": "Is it?"}, {"text": "x", "body": "no"}, {}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    out = run(tmp_path, tmp_path / "a.jsonl", options=["--field", *fields])
    manifest = check_tokens(out, documents)
    assert manifest["flaws"] == {"no_text": 3 - len(documents)}


FLAWED = {  # file: its bytes, its documents, the report
    "bom.txt": (b"\xef\xbb\xbfone\n", ["one\n"], "bom.txt: 1 byte order mark"),
    "lines.txt": (b"one\r\ntwo\r", ["one\ntwo\n"], "lines.txt: 1 file with line ends"),
    "nul.txt": (b"one\0two\0", ["one\0two\0"], "nul.txt: 2 NUL"),
    "utf8.txt": (b"one \xff\xc3\xa4 \xe4\xbd", ["one \ufffdä \ufffd"], "utf8.txt: 2 invalid UTF-8"),
    "bad.jsonl": (
        b'{"text": "one"}\n{"text"\n[]\n\n',
        ["one"],
        "2 lines without a JSON object (skipped), first in line 2",
    ),
    "none.jsonl": (
        b'{"text": "one"}\n{"text": 1}\n',
        ["one"],
        "1 records without text (skipped), first in line 2",
    ),
}


@pytest.mark.parametrize("name", FLAWED)
def test_flaws_are_reported_and_refused_only_with_strict(tmp_path, in_place, capsys, name):
    content, documents, message = FLAWED[name]
    file = tmp_path / name
    file.write_bytes(content)
    check_tokens(run(tmp_path, file), documents)
    told = [line for line in capsys.readouterr().err.splitlines() if name in line]
    assert len(told) == 1
    assert message in told[0]
    error = refused(capsys, run, tmp_path, file, options=["--strict", "--rebuild"])
    assert name in error
    assert "--strict" in error
    assert (tmp_path / "out" / "manifest.json").exists()  # nothing is lost
    if name.endswith(("bom.txt", "lines.txt", "nul.txt")):  # read directly, it is the same
        assert read_documents([file]) == documents


def test_folder_is_used_again_and_refused_when_something_changed(tmp_path, in_place, capsys):
    files = write_files(tmp_path)
    out = run(tmp_path, *files)
    before = (out / "tokens.bin").stat().st_mtime_ns
    run(tmp_path, *files)
    assert f"{out} is up to date" in capsys.readouterr().out
    assert (out / "tokens.bin").stat().st_mtime_ns == before
    save_byte_tokenizer(tmp_path)
    other = str(tmp_path / "tokenizer.json")
    assert "tokenizer had [" in refused(capsys, run, tmp_path, *files, tokenizer=other)
    assert "field had None, now ['x']" in refused(
        capsys, run, tmp_path, *files, options=["--field", "x"]
    )
    assert f"sources had ['{files[0]}'" in refused(capsys, run, tmp_path, *reversed(files))
    assert f"sources had ['{files[1]}'" in refused(capsys, run, tmp_path, files[0])
    files[0].write_text("edited")
    error = refused(capsys, run, tmp_path, *files)
    assert f"sources had ['{files[0]}', {len(PROSE.encode())}, " in error
    assert f"now ['{files[0]}', 6, " in error
    assert "--rebuild replaces it" in error
    run(tmp_path, *files, options=["--rebuild"])
    check_tokens(out, read_documents(files))
    (out / "tokens.bin").write_bytes(b"damaged")
    assert "sha256 had {" in refused(capsys, run, tmp_path, *files)
    os.utime(files[1], ns=(1, 1))
    assert f"now ['{files[1]}', " in refused(capsys, run, tmp_path, *files)


def test_a_killed_run_leaves_no_corpus(tmp_path, in_place):
    """Its temporary folder is not read, and the next run starts from the beginning."""
    files = write_files(tmp_path)
    out = run(tmp_path, *files)
    left = tmp_path / "out.tmp"
    out.rename(left)
    (left / "manifest.json").unlink()
    with pytest.raises(ValueError, match="cannot read"):
        read_tokens([left], load_tokenizer(MISTRAL))
    check_tokens(run(tmp_path, *files), read_documents(files))
    assert not left.exists()


def test_damaged_folders(tmp_path, in_place):
    out, tokenizer = run(tmp_path, *write_files(tmp_path)), load_tokenizer(MISTRAL)
    for files in ([tmp_path / "a.txt", out], [out, tmp_path / "a.txt"]):  # not beside others
        with pytest.raises(ValueError, match=r"is (a )?prepared"):
            read_tokens(files, tokenizer)
    whole = (out / "tokens.bin").read_bytes()
    (out / "tokens.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="is damaged"):
        read_tokens([out], tokenizer)
    (out / "tokens.bin").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        read_tokens([out], tokenizer)
    write_json(out / "manifest.json", {"tokenizer": tokenizer.identity()})
    with pytest.raises(ValueError, match="is damaged"):
        read_tokens([out], tokenizer)


def test_another_tokenizer(tmp_path, in_place):
    """Another file, or the same one beside a config that ends texts otherwise."""
    save_byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    out = run(tmp_path, *write_files(tmp_path), tokenizer=str(tmp_path))
    read_tokens([out], tokenizer)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    for other in (load_tokenizer(tmp_path), load_tokenizer(MISTRAL)):
        with pytest.raises(ValueError, match="prepared with"):
            read_tokens([out], other)


def test_bad_input(tmp_path, capsys, in_place):
    [text, _] = write_files(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "array.json").write_bytes(b'\xef\xbb\xbf\n [{"text": "one"}]')
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"one two")[:-4])
    for source, message in (
        ("-", "there is no such file"),
        (tmp_path / "nowhere.txt", "there is no such file"),
        (tmp_path / "*.nothing", "there is no such file"),
        (tmp_path / "folder", "no file in it"),
        (tmp_path, f"out is inside {tmp_path}"),
        (tmp_path / "empty.txt", "no text in 1 files"),
        (tmp_path / "cut.gz", "cannot read"),
        (tmp_path / "array.json", "array.json: it is a JSON array; write one object per line"),
    ):
        assert message in refused(capsys, run, tmp_path, source)
        assert not list(tmp_path.glob("out*"))
    for workers in ("0", "-1", "2147483648"):
        error = refused(capsys, run, tmp_path, text, options=["--workers", workers])
        assert f"--workers is {workers}; it must be between 1 and " in error
    shutil.copytree(tmp_path / "folder", tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("precious")
    error = refused(capsys, run, tmp_path, text, options=["--rebuild"])
    assert "holds other files than prepared text" in error
    assert (tmp_path / "out" / "mine.txt").exists()
