"""The clock on a pretrained model: the puzzles in its tokens, and the four ways to train."""

import json
import shutil

import pytest
import torch
from commands import refused
from test_tokenizer import CHAR_OF, write_json
from tiny import tiny_mistral

import eval as evaluation
from model import save_mistral
from support import corpus
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from thoughts import load_quiet_star
from tools import clock


@pytest.fixture
def folder(tmp_path):
    """A tiny model over bytes, with tokens of their own for the em dash and the hum's word."""
    merges = {}
    for word in ("—", " um"):
        letters = [CHAR_OF[byte] for byte in word.encode()]
        for end in range(1, len(letters)):
            merges["".join(letters[:end]), letters[end]] = None
    folder = tmp_path / "model"
    folder.mkdir()
    V = len(write_json(folder, list(merges)))
    save_mistral(tiny_mistral(V=V), folder)
    return folder


def test_puzzles(folder):
    tokenizer = load_tokenizer(folder)
    puzzles = clock.held_out_puzzles(tokenizer, torch.device("cpu"))
    assert len(puzzles.ids) == len(corpus.all_puzzles(held_out=True))
    assert tokenizer.decode([puzzles.hum]) == " um"
    few = clock.held_out_puzzles(tokenizer, torch.device("cpu"), clock.WATCHED)
    assert len(few.ids) == len(few.answers) == len(few.work) == 25
    for row, answer, work in zip(*map(torch.Tensor.tolist, few[:3]), strict=True):
        asked = tokenizer.decode(row).split("\n")[-1]
        moves = torch.tensor([int(move) for move in asked[:-1]]).numpy()
        assert tokenizer.decode(work) == corpus.explanation(moves)
        assert answer == moves.sum() % corpus.HOURS


def test_a_base_model_is_ready_if_it_works_when_begun_right_and_else_hums(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    puzzles = clock.held_out_puzzles(tokenizer, torch.device("cpu"), clock.WATCHED)
    right = torch.nn.functional.one_hot(puzzles.candidates[puzzles.answers], 300) * 9.0
    for hums in (True, False):
        said = torch.full_like(puzzles.work, puzzles.hum + (not hums))
        for answers, able in ((right, True), (right * 0, False)):
            monkeypatch.setattr(evaluation, "write_aside", lambda *a, begun, x=(said, answers): x)
            model = type("Model", (), {"model": lambda ids: torch.zeros(len(ids), 1, 300)})
            for humming in (True, False):
                line, enough, metrics = clock.look(model, tokenizer, puzzles, humming)
                assert enough == (able and (hums or not humming))
                assert metrics == {}
            assert f"begun right {float(able or 1 / 3):.1f}"[:13] in line
            assert line.endswith(f"hums {float(hums):.2f}")


def arguments(folder, tmp_path, *more):
    options = ["--checkpoint", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    return [*options, *more, "--", "--steps", "2", "--batch-size", "2"]


def test_four_ways(folder, tmp_path, monkeypatch, capsys):
    """On every tenth puzzle."""
    all_puzzles = corpus.all_puzzles
    monkeypatch.setattr(corpus, "all_puzzles", lambda held_out: all_puzzles(held_out)[::10])
    monkeypatch.setattr(clock, "LINES", 100)
    monkeypatch.setattr(clock, "BASE", clock.BASE | {"steps": 1})
    clock.main(arguments(folder, tmp_path))
    out = tmp_path / "out"
    table = (out / "tables.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [*clock.LABELS.values()]
    assert len({line.count("|") for line in table}) == 1
    tokenizer, policy = load_tokenizer(folder), {}
    puzzles = clock.held_out_puzzles(tokenizer, torch.device("cpu"))
    for arm in clock.ARMS:
        settings = json.loads((out / arm / "settings.json").read_text())
        assert settings["settings"]["checkpoint"] == str(out / "hums" / "model")
        lines = (out / arm / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2
        assert ("reward" in lines[0]) == (arm != "none")
        policy[arm] = settings["thoughts"]["policy_weight"]
        model = load_quiet_star(out / arm / "quiet_star", torch.float32)
        scores = evaluation.puzzle_table(model, tokenizer, puzzles)
        assert json.loads((out / f"{arm}.json").read_text())["table"] == {
            row: score._asdict() for row, score in scores.items()
        }
    assert policy == {"full": 10, "policy0": 0, "pause": 10, "none": 10}
    for name in ("works", "hums"):
        assert "reward" not in (out / name / "metrics.jsonl").read_text()
    asides = {name: (out / f"{name}.txt").read_text().count("—") // 2 for name in clock.TEXTS}
    hums = {name: (out / f"{name}.txt").read_text().count(clock.HUM) for name in clock.TEXTS}
    assert asides["works"] > 80 > 20 > asides["silent"] > 0
    assert hums["works"] == 0
    assert asides["hums"] > hums["hums"] > asides["hums"] / 2

    (out / "hums" / "model" / "tokenizer.json").unlink()  # killed while it was written
    (out / "hums" / "model").rename(out / "hums" / "model.tmp")
    written = (out / "full.json").read_text()
    (out / "full.json").write_text(written.replace('"written": 1', '"written": 2'))  # of another
    clock.main(arguments(folder, tmp_path, "--only", "full"))
    assert (out / "full.json").read_text() == written

    monkeypatch.setattr(evaluation, "puzzle_table", None)  # finished: nothing is done again
    clock.main(arguments(folder, tmp_path, "--only", "full"))
    assert (out / "tables.md").read_text().splitlines() == table
    other_rate = [*arguments(folder, tmp_path, "--only", "none"), "--lr", "1"]
    for given in (arguments(folder, tmp_path, "--seed", "1"), other_rate):
        assert "has other settings" in refused(capsys, clock.main, given)
    shutil.copytree(folder, tmp_path / "other")
    error = refused(capsys, clock.main, arguments(tmp_path / "other", tmp_path))
    assert "works/settings.json has other settings" in error


def test_what_cannot_work_fails_before_training(folder, tmp_path, capsys):
    given = arguments(folder, tmp_path)
    other = arguments(tmp_path / "nowhere", tmp_path)
    for bad, message in (
        ([*given, "--steps", "0"], "steps is 0"),
        ([*given, "--seed", "1"], "--seed after -- is set by this tool"),
        (["--seed", "-1", *given], "seed is -1"),
        (other, "nowhere does not exist"),
    ):
        assert message in refused(capsys, clock.main, bad)
        assert not (tmp_path / "out").exists()


def test_the_hum_must_be_tokens(folder, tmp_path, capsys):
    save_byte_tokenizer(folder)
    save_mistral(tiny_mistral(V=258), folder)
    assert "which must be 6" in refused(capsys, clock.main, arguments(folder, tmp_path))
