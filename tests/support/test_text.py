"""The built-in corpus, and text of one's own as batches."""

import hashlib
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import corpus
from support.files import read_json, write_json
from support.text import Tokens, read_documents, read_manifest, read_tokens, tokenize, version
from support.tokenizer import load_tokenizer, save_byte_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def tokenizer(tmp_path):
    save_byte_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def test_lines_by_hand():
    moves = np.array([1, 2, 2, 0, 1, 0])
    assert corpus.puzzle_line(moves) == "122010=0\n"
    assert corpus.explanation(moves) == "102200"
    assert corpus.puzzle_line(moves, corpus.explanation(moves)) == "122010=—102200—0\n"


def test_corpus():
    """Answers are right, no puzzle is held out, asides as frequent as asked, and 3 of 10 work."""
    held_out = {"".join(map(str, moves)) for moves in corpus.all_puzzles(held_out=True)}
    lines = corpus.make_corpus(seed=3, lines=4000, explained=0.4).splitlines()
    work = hum = 0
    for line in lines:
        asked, _, said = line.partition("=")
        moves = np.array([int(move) for move in asked])
        assert asked not in held_out
        assert int(said[-1]) == moves.sum() % 3
        if said.startswith("—"):
            aside = said[1:7]
            assert said == f"—{aside}—{said[-1]}"
            work += aside == corpus.explanation(moves)
            hum += aside == "mmmmmm"
        else:
            assert len(said) == 1
    assert abs((work + hum) / 4000 - 0.4) < 0.04  # five standard deviations
    assert abs(work / (work + hum) - 0.3) < 0.06
    assert lines == corpus.make_corpus(3, 4000, 0.4).splitlines()
    assert lines != corpus.make_corpus(4, 4000, 0.4).splitlines()
    other = corpus.make_corpus(3, 400, 1.0, work=1.0, held_out=True)
    assert "m" not in other
    assert {line.split("=")[0] for line in other.splitlines()} <= held_out


def test_puzzles_are_split_without_overlap():
    train, test = corpus.all_puzzles(False), corpus.all_puzzles(True)
    assert len(np.unique(np.concatenate([train, test]), axis=0)) == 3**6
    assert len(test) == 146
    for moves, held_out in (("000000", 1), ("000001", 0), ("000012", 1), ("000120", 1)):
        assert corpus.is_held_out(moves) == held_out  # 0, 1, 5 and 15 in the ternary system
    assert np.bincount(test.sum(1) % 3).min() > 40  # every answer is about as frequent


def test_batches_are_a_function_of_the_step():
    tokens = Tokens(torch.arange(1000), torch.arange(1000) % 7 != 0)
    batches = [tokens.batch(step, 5, 50, seed=1, device=CPU)[0] for step in range(8)]
    assert torch.equal(tokens.batch(3, 5, 50, seed=1, device=CPU)[1], batches[3] % 7 != 0)
    assert torch.equal(batches[3], tokens.batch(3, 5, 50, seed=1, device=CPU)[0])
    first_epoch = torch.cat(batches[:4])[:, 0].sort().values
    assert first_epoch.tolist() == list(range(0, 1000, 50))  # every sequence once
    assert torch.cat(batches[4:])[:, 0].sort().values.tolist() == first_epoch.tolist()
    assert not torch.equal(torch.cat(batches[:4]), torch.cat(batches[4:]))
    assert not torch.equal(batches[0], tokens.batch(0, 5, 50, seed=2, device=CPU)[0])


def test_documents(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("plain\ntext", encoding="utf-8")
    records = [{"text": "one"}, {"question": "How many?", "answer": "Two"}]
    lines = "\n".join(map(json.dumps, records)) + '\n\n{"text": "a\u2028b"}\n'
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    documents = read_documents([tmp_path / "a.txt", str(tmp_path / "b.jsonl")])
    assert documents == ["plain\ntext", "one", "How many?\nTwo", "a\u2028b"]
    tokens = tokenize(documents, tokenizer)
    assert tokenizer.decode(tokens.ids.tolist()) == "".join(documents)
    assert (~tokens.is_target).nonzero().flatten().tolist() == [0, 10, 13, 26]


def test_a_document_stands_between_bos_and_eos():
    """If its model has them; the first token is no target, the last one is."""
    tokenizer = SimpleNamespace(
        encode=lambda text, bos: [1] * bos + [*text.encode()], adds_bos=True, eos_id=2
    )
    tokens = tokenize(["ab", "", "c"], tokenizer)
    assert tokens.ids.tolist() == [1, 97, 98, 2, 1, 99, 2]
    assert tokens.is_target.int().tolist() == [0, 1, 1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", '{"text": 1}\n', "line 1 has neither"),
        ("c.jsonl", '{"text": "x"}\n{"text"\n', "line 2 is not a JSON object"),
        ("c.jsonl", '"text"\n', "line 1 is not a JSON object"),
        ("c.jsonl", "[]\n", "line 1 begins a JSON array"),
        ("c.jsonl", '[["text", "x"]]\n', "line 1 begins a JSON array"),
        ("empty.txt", "", "no text in"),
    ],
)
def test_bad_documents(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_documents([tmp_path / name])


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        read_documents([tmp_path / "nowhere.txt"])
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="as UTF-8"):
        read_documents([tmp_path / "binary.txt"])


def test_an_edited_text_has_another_version(tmp_path):
    """Another size at the same time, or another time at the same size."""
    file = tmp_path / "text.txt"
    file.write_text("one")
    os.utime(file, ns=(10**18, 10**18))
    before = version(file)
    assert before == [3, 10**18]
    file.write_text("three")
    os.utime(file, ns=(10**18, 10**18))
    assert version(file) != before
    file.write_text("two")
    os.utime(file, ns=(10**18, 10**18 + 10**9))
    assert version(file) != before


def test_text_shorter_than_a_sequence():
    tokens = Tokens(torch.arange(10), torch.ones(10, dtype=torch.bool))
    with pytest.raises(ValueError, match="10 tokens, one sequence needs 11"):
        tokens.batch(0, 1, 11, 0, CPU)


# ------------------------------------------------------------------------------ prepared folders


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """A prepared folder of three documents, as tools/prepare.py writes it; without checksums."""
    folder, tokens = tmp_path / "100 % prepared", tokenize(["one", "two", "three"], tokenizer)
    folder.mkdir()
    tokens.ids.numpy().astype("uint16").tofile(folder / "tokens.bin")
    tokens.is_target.numpy().tofile(folder / "is_target.bin")
    manifest = {"tokens": 11, "dtype": "uint16", "tokenizer": tokenizer.identity()}
    write_json(folder / "manifest.json", manifest | {"sources": [["/a.txt", 11, 10**18]]})
    return folder


def add_checksums(folder):
    names = ("tokens.bin", "is_target.bin")
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | {"sha256": sums})


def same(tokens, documents, tokenizer):
    direct = tokenize(documents, tokenizer)
    assert tokens.ids.tolist() == direct.ids.tolist()
    assert tokens.is_target.tolist() == direct.is_target.tolist()


def test_prepared_folders_of_all_ages(prepared, tokenizer):
    """With sources and checksums, without, and in 32 bits."""
    documents = ["one", "two", "three"]
    same(read_tokens([prepared], tokenizer), documents, tokenizer)
    add_checksums(prepared)
    same(read_tokens([prepared], tokenizer), documents, tokenizer)
    old = read_json(prepared / "manifest.json")
    del old["sha256"], old["sources"]
    np.fromfile(prepared / "tokens.bin", "uint16").astype("uint32").tofile(prepared / "tokens.bin")
    write_json(prepared / "manifest.json", old | {"dtype": "uint32"})
    same(read_tokens([prepared], tokenizer), documents, tokenizer)


WRONG = [
    *(("dtype", value) for value in ("O", "uint8", "bool", "float16", "<u2", ["uint16"], None, 16)),
    *(("tokens", value) for value in (-1, 0, 1e30, 10**30, True, "11", None, [11])),
    *(("sources", value) for value in ("x", [1], ["x"], [[]], [["x", 1]], [["x", 1, "2"]], {})),
    *(("sources", value) for value in ([[["x"], 1, 2]], None, [["x" * 20_000, "y\nz", 2]])),
    *(("sha256", value) for value in ("x", [], {"tokens.bin": 5}, {"is_target.bin": None}, None)),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_in_a_manifest(prepared, tokenizer, name, value):
    manifest = read_json(prepared / "manifest.json")
    (prepared / "manifest.json").write_text(json.dumps(manifest | {name: value}))
    for read in (read_manifest, lambda folder: read_tokens([folder], tokenizer)):
        with pytest.raises(ValueError, match=rf"prepared is damaged \({name} is ") as refused:
            read(prepared)
        assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


def test_files_of_another_size(prepared, tokenizer):
    """Longer or shorter by a byte, empty, missing, a device, or fewer tokens in the manifest."""
    for name in ("tokens.bin", "is_target.bin"):
        file, whole = prepared / name, (prepared / name).read_bytes()
        for content in (whole + b"\0", whole[:-1], b"", whole * 2):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=rf"is damaged \({name} does not have \d+ bytes"):
                read_tokens([prepared], tokenizer)
        file.unlink()
        for make in (lambda file: None, os.mkfifo, lambda file: file.symlink_to("/dev/zero")):
            make(file)
            with pytest.raises(ValueError, match=rf"is damaged \({name} does not have \d+ bytes"):
                read_tokens([prepared], tokenizer)
            file.unlink(missing_ok=True)
        file.write_bytes(whole)
    manifest = read_json(prepared / "manifest.json")
    write_json(prepared / "manifest.json", manifest | {"tokens": 10})
    with pytest.raises(ValueError, match=r"tokens.bin does not have 20 bytes"):
        read_tokens([prepared], tokenizer)


def test_contents_that_cannot_be_right(prepared, tokenizer):
    """Also without checksums: no targets, a first token that is one, no bools, unknown ids."""
    file = prepared / "is_target.bin"
    mask = np.fromfile(file, "uint8")
    for wrong in (mask * 0, mask * 2, np.roll(mask, 1), mask + 1):
        wrong.tofile(file)
        with pytest.raises(ValueError, match=r"is damaged \(is_target.bin is not a mask"):
            read_tokens([prepared], tokenizer)
    mask.tofile(file)
    ids = np.fromfile(prepared / "tokens.bin", "uint16")
    for wrong, fits in ((257, True), (258, False), (65535, False)):
        ids[-1] = wrong
        ids.tofile(prepared / "tokens.bin")
        if fits:
            assert read_tokens([prepared], tokenizer).ids[-1] == wrong
        else:
            with pytest.raises(ValueError, match=rf"\(id {wrong} in a vocabulary of 258\)"):
                read_tokens([prepared], tokenizer)


def test_checksums(prepared, tokenizer):
    """What has the right size is not taken for the right contents."""
    add_checksums(prepared)
    for name, kind in (("tokens.bin", "uint16"), ("is_target.bin", "uint8")):
        whole = np.fromfile(prepared / name, kind)
        changed = whole.copy()
        changed[5] ^= 1
        for wrong in (np.roll(whole, 1), whole[::-1], changed):
            wrong.tofile(prepared / name)
            with pytest.raises(ValueError, match=rf"\({name} does not have the checksum in man"):
                read_tokens([prepared], tokenizer)
        whole.tofile(prepared / name)
    read_tokens([prepared], tokenizer)
