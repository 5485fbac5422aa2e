"""Damaged files of a run: --resume takes them rightly or refuses them in one line."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from test_train import losses, run, small  # noqa: F401  (a fixture)
from tiny import tiny_mistral

import train
from support import runs
from support.files import read_json, write_json

VALUES = [None, -1, 0, 1e300, 10**30, "x", "", [], {}, [1], True, float("nan"), "9" * 99, 1.5]


def mutated_json(value, chance):
    """One entry somewhere in it is removed or becomes something else."""
    value = copy.deepcopy(value)
    node = value
    while True:
        key = chance.choice([*node] if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], (dict, list)) and node[key] and chance.random() < 0.8:
            node = node[key]
        elif chance.random() < 0.2:
            del node[key]
            return value
        else:
            node[key] = chance.choice(VALUES)
            return value


def mutated_bytes(content, chance):
    """A few bytes are changed, removed, put in, or all after some point is lost."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            content[at : at + 1] = chance.randbytes(1)
        elif kind == 1:
            del content[at : at + chance.randint(1, 40)]
        elif kind == 2:
            content[at:at] = chance.randbytes(chance.randint(1, 8))
        else:
            del content[at:]
    return bytes(content)


@pytest.mark.parametrize("name", ["settings.json", "quiet_star/training_state.pt", "metrics.jsonl"])
def test_damaged_files_are_taken_rightly_or_refused(tmp_path, capsys, name):
    run(tmp_path / "whole", "--base-steps 2 --steps 2 --save-every 1")
    content, chance = (tmp_path / "whole" / name).read_bytes(), random.Random(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(10):
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", damaged)
        if name == "settings.json" and chance.random() < 0.7:
            text = json.dumps(mutated_json(json.loads(content), chance))
            (damaged / name).write_text(text)
        else:
            (damaged / name).write_bytes(mutated_bytes(content, chance))
        try:
            train.main(["--out", str(damaged), "--resume", "--device", "cpu"])
        except SystemExit as stopped:
            assert stopped.code == 2
            error = capsys.readouterr().err
            assert str(damaged) in error or "steps" in error or "must" in error, error
            assert error.count("\n") == 1, error
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------ one damage at a time


FINISHED = []


@pytest.fixture
def finished(tmp_path_factory):
    """A run of two steps in each stage, the same one for all tests."""
    if not FINISHED:
        FINISHED.append(tmp_path_factory.mktemp("finished") / "run")
        run(FINISHED[0], "--base-steps 2 --steps 2 --save-every 1")
    return FINISHED[0]


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def resume(folder, *options):
    train.main(["--out", str(folder), "--resume", "--device", "cpu", *options])


def refused(capsys, folder, message):
    """One line on standard error; exit code 2; no file is changed."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    before = {path: path.read_bytes() for path in files}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        resume(folder)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in files}
    return error


def moments(state, index=3):
    return state["optimizer"]["state"][index]


CHANGES = {  # of training_state.pt: what is said of it
    "a part of the optimizer's state is missing": [
        lambda state: state["optimizer"]["state"].pop(3),
        lambda state: moments(state).pop("exp_avg"),
        lambda state: moments(state).pop("step"),
        lambda state: state["optimizer"]["state"].clear(),
        lambda state: [state.pop("entries"), state["optimizer"]["state"].clear()],
    ],
    "of the saved shape": [
        lambda state: moments(state).update(exp_avg=torch.zeros(2, 2)),
        lambda state: moments(state).update(exp_avg_sq=torch.zeros(17)),
        lambda state: state["optimizer"]["state"].update({99: state["optimizer"]["state"].pop(3)}),
        lambda state: state["optimizer"]["state"].update({-1: state["optimizer"]["state"].pop(3)}),
        lambda state: state["optimizer"]["state"].update({"3": state["optimizer"]["state"].pop(3)}),
    ],
    "is impossible": [
        lambda state: state.update(step=2.5),
        lambda state: state.update(step=True),
        lambda state: state.update(step="2"),
        lambda state: state.update(step=-1),
        lambda state: state.update(step=10**9 + 1),
        lambda state: state.update(metrics_bytes=-5),
        lambda state: state.update(metrics_bytes=2.5),
        lambda state: state.update(metrics_bytes=None),
    ],
    "": [
        lambda state: state.update(optimizer=None),
        lambda state: state["optimizer"].pop("param_groups"),
        lambda state: state["optimizer"].update(param_groups=[]),
        lambda state: state.update(generator=torch.zeros(3)),
        lambda state: state.update(more=Path("code that a pickle could run")),
        lambda state: state.clear(),
    ],
}


@pytest.mark.parametrize(
    ("message", "change"), [(text, change) for text in CHANGES for change in CHANGES[text]]
)
def test_a_state_that_does_not_fit(damaged, capsys, message, change):
    path = damaged / "quiet_star" / runs.STATE
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    error = refused(capsys, damaged, message)
    assert f"cannot continue from {path.parent}: " in error and "; delete this folder" in error


def test_a_state_of_before_entries_were_counted(damaged, finished):
    path = damaged / "quiet_star" / runs.STATE
    state = torch.load(path, weights_only=True)
    del state["entries"]
    torch.save(state, path)
    resume(damaged, "--steps", "3")
    assert [*losses(damaged)] == [*losses(finished), ("quiet_star", 3)]


def test_a_parameter_without_a_gradient_has_no_state(tmp_path):
    """Some objectives train a part of the model; their runs are resumed too."""
    model = tiny_mistral()
    optimizer = torch.optim.AdamW(model.parameters())
    model.norm.weight.grad = torch.zeros(16)
    optimizer.step()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    generator = torch.Generator()
    runs.save(model, optimizer, generator, 1, tmp_path / "base")
    assert runs.restore(torch.optim.AdamW(model.parameters()), generator, tmp_path / "base", 1) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("thoughts"), "is damaged or incomplete: KeyError('thoughts')"),
        (lambda saved: saved.pop("settings"), "is damaged or incomplete: KeyError('settings')"),
        (lambda saved: saved.update(thoughts=[]), "is damaged or incomplete"),
        (lambda saved: saved.update(texts=5), "is damaged or incomplete"),
        (lambda saved: saved["thoughts"].update(n_thoughts=5), "n_thoughts is 5, but 2 in"),
        (lambda saved: saved["thoughts"].update(thought_length=3), "thought_length is 3, but 2 in"),
        (lambda saved: saved["thoughts"].update(n_true=3), "n_true is 3, but 2 in"),
        (lambda saved: saved["thoughts"].update(base_weight=0.25), "base_weight is 0.25, but 0.5"),
        (lambda saved: saved["thoughts"].pop("embedding_scale"), "embedding_scale is 100.0, but 1"),
        (lambda saved: saved["thoughts"].update(n_true=16), "of 16 tokens (context) 0 have 16"),
        (lambda saved: saved["thoughts"].update(n_true=9999), "(context) 0 have 9999"),
        (lambda saved: saved["settings"].update(context=7), "positions is 6; of 7 tokens"),
        (lambda saved: saved["settings"].update(positions=2**40), "positions is 1099511627776;"),
        (lambda saved: saved["settings"].update({"a\nb" * 9999: 1}), "is not a field of Settings"),
    ],
)
def test_settings_that_contradict_the_run(damaged, capsys, change, message):
    saved = read_json(damaged / "settings.json")
    change(saved)
    write_json(damaged / "settings.json", saved)
    refused(capsys, damaged, message)


def test_a_config_that_contradicts_the_settings(damaged, capsys):
    path = damaged / "quiet_star" / "quiet_star.json"
    write_json(path, read_json(path) | {"n_thoughts": 7})
    refused(capsys, damaged, f"n_thoughts is 2, but 7 in {damaged / 'quiet_star'}")


@pytest.mark.parametrize("bytes_left", [-1, -20, -300])
def test_a_line_of_metrics_that_is_cut_off_is_removed(damaged, bytes_left):
    """The next step gets a line of its own; whole lines stay."""
    path = damaged / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(path.read_bytes()[:bytes_left])
    left = path.read_bytes()
    kept = left[: left.rindex(b"\n") + 1]
    resume(damaged, "--steps", "3")
    lines = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:-1]) == kept == b"".join(whole[: len(lines) - 1])
    assert json.loads(lines[-1])["step"] == 3


def test_metrics_of_later_steps_are_removed(damaged, finished):
    """They are those of steps that will be run again."""
    with (damaged / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "quiet_star", "step": 3}\n{"stage"')
    resume(damaged)
    assert losses(damaged) == losses(finished)


def test_metrics_of_an_old_run_are_removed(tmp_path):
    """Without a checkpoint there is no step that they could be of; with one of base they stay."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    generator, metrics = torch.Generator(), tmp_path / "metrics.jsonl"
    for stage in ("base", "quiet_star"):
        metrics.write_text('{"stage": "base", "step": 1}\n')
        assert runs.restore(optimizer, generator, tmp_path / stage, 4) == 0
        assert not metrics.exists()
    (tmp_path / "base").mkdir()
    metrics.write_text('{"stage": "base", "step": 1}\n')
    assert runs.restore(optimizer, generator, tmp_path / "quiet_star", 4) == 0
    assert metrics.exists()


# ------------------------------------------------------------------ folders without a finished step


class KilledError(Exception):
    pass


@pytest.fixture
def unstarted(tmp_path, monkeypatch):
    """The folder of a run that was killed in its first step."""

    def killed(*arguments):
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(runs, "Record", killed)
        run(tmp_path / "run", "--seed 1")
    return tmp_path / "run"


def test_a_folder_without_a_finished_step_is_begun_again(unstarted, finished):
    """With other settings; nothing of the old ones is left."""
    (unstarted / "metrics.jsonl").touch()
    run(unstarted, "--base-steps 2 --steps 2 --save-every 1")
    assert losses(unstarted) == losses(finished)
    assert read_json(unstarted / "settings.json") == read_json(finished / "settings.json")
    assert {path.name for path in unstarted.parent.iterdir()} == {"run"}
    assert not runs.UNSTARTED


def test_a_folder_without_a_finished_step_can_be_resumed(unstarted):
    resume(unstarted)
    assert read_json(unstarted / "settings.json")["settings"]["seed"] == 1
    assert len(losses(unstarted)) == 8


def test_a_folder_without_a_finished_step_stays_if_the_new_run_fails(unstarted, capsys):
    before = (unstarted / "settings.json").read_bytes()
    for options in ("--seed -1", "--checkpoint nowhere --data nowhere"):
        with pytest.raises(SystemExit):
            run(unstarted, options)
        assert (unstarted / "settings.json").read_bytes() == before
    runs.UNSTARTED.clear()


@pytest.mark.parametrize(
    "make",
    [
        lambda run: (run / "notes.txt").touch(),
        lambda run: (run / "base").mkdir(),
        lambda run: (run / "quiet_star.tmp").mkdir(),
        lambda run: (run / "metrics.jsonl").write_text("{}\n"),
        lambda run: (run / "settings.json").unlink(),
    ],
)
def test_any_other_folder_is_not_begun_again(unstarted, capsys, make):
    make(unstarted)
    before = sorted(unstarted.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run(unstarted)
    assert stopped.value.code == 2
    assert f"{unstarted} is not empty" in capsys.readouterr().err
    assert sorted(unstarted.rglob("*")) == before


def test_a_run_in_its_first_step_is_not_replaced(unstarted, capsys):
    with runs.hold(unstarted), pytest.raises(SystemExit) as stopped:
        run(unstarted)
    assert stopped.value.code == 2
    assert "is in use by another run" in capsys.readouterr().err
    assert not runs.UNSTARTED


def test_a_run_has_all_files_of_its_tokenizer(tmp_path):
    """Each of them decides on tokens; config.json is the model's own."""
    names = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model.v3", "tekken.json"]
    for name in [*names, "config.json", "README.md"]:
        (tmp_path / name).write_text(name)
    (tmp_path / "run").mkdir()
    runs.copy_tokenizer(tmp_path, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*names}
