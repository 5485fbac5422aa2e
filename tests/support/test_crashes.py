"""What a run survives: kill -9 at any moment, Ctrl-C, a full disk, a second run beside it."""

import json
import os
import random
import resource
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from processes import quick_context
from test_train import SMALL, losses, run, same_weights, small  # noqa: F401  (a fixture)

import train
from support import runs, terminal
from thoughts import load_quiet_star


def child(arguments):
    """Fork a process that runs train.py, small as in test_train.py. Returns its id."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            train.main(arguments)
        except SystemExit as stopped:
            os._exit(stopped.code or 0)
        os._exit(0)
    return pid


def kill_again_and_again(arguments, out):
    """Run, and resume after every kill: the number of kills, and how the last run ended.

    In a process of its own. Nothing of torch has run in it before it forks, so that is safe.
    """
    train.CORPUS_LINES, train.BASE = 300, train.MistralConfig(258, 16, 32, 1, 2, 1)
    train.BASE_SETTINGS["batch_size"] = 4
    train.evaluation.puzzle_table = lambda model, tokenizer: {}
    train.evaluation.look_at_puzzles = lambda model, tokenizer: ("seen", False, {})
    torch.set_num_threads(1)
    chance, kills = random.Random(0), 0
    while True:
        resume = os.path.exists(os.path.join(out, "settings.json"))
        pid = child(["--out", out, "--resume"] if resume else ["--out", out, *arguments])
        if kills < 5:
            time.sleep(chance.random() * 0.12)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            return kills, os.waitstatus_to_exitcode(status)
        kills += 1


def test_killed_many_times_a_run_ends_as_if_nothing_had_been(tmp_path):
    """kill -9 at random moments, in the base stage and in Quiet-STaR, while files are written."""
    more = "--save-every 1 --base-steps 6 --steps 6"
    options = [*SMALL.split(), "--device", "cpu", *more.split()]
    run(tmp_path / "whole", more)
    with ProcessPoolExecutor(1, quick_context()) as pool:
        done = pool.submit(kill_again_and_again, options, str(tmp_path / "killed"))
        kills, code = done.result(timeout=100)
    assert code == 0
    assert kills >= 3
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0].count("\n") == lines[1].count("\n") == 12
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    same_weights(tmp_path / "whole" / "quiet_star", tmp_path / "killed" / "quiet_star")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_its_step_and_says_how_to_go_on(tmp_path, monkeypatch, capsys, number):
    """The signal comes in step 3 of 4, and no checkpoint is due before the end."""
    run(tmp_path / "whole")
    log = runs.log

    def log_and_signal(folder, step, *rest):
        log(folder, step, *rest)
        if (folder.name, step) == ("quiet_star", 3):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(runs, "log", log_and_signal)
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / "out", "--save-every 9")
    finally:
        runs.STOP.clear()
        for one, handler in before.items():
            signal.signal(one, handler)
    assert stopped.value.code == 130
    assert f"--out {tmp_path / 'out'} --resume" in capsys.readouterr().err
    state = torch.load(tmp_path / "out" / "quiet_star" / runs.STATE, weights_only=True)
    assert state["step"] == 3
    monkeypatch.setattr(runs, "log", log)
    train.main(["--out", str(tmp_path / "out"), "--resume", "--device", "cpu"])
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_a_second_ctrl_c_ends_a_run_at_once():
    before = signal.getsignal(signal.SIGINT)
    try:
        runs.stop_on_signals()
        signal.raise_signal(signal.SIGINT)
        assert runs.STOP.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        runs.STOP.clear()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("file", ["weights", "state"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys, file):
    """Writing the second checkpoint of Quiet-STaR fails: one line, nothing half written.

    A file may not be larger than 99 bytes then, which the libraries hear as they hear a full disk.
    """
    run(tmp_path / "whole")
    owner, name = (torch, "save") if file == "state" else (runs, "save_quiet_star")
    save, count = getattr(owner, name), iter(range(10))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*arguments):
        if next(count) == (3 if file == "state" else 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (99, most))
        save(*arguments)

    monkeypatch.setattr(owner, name, full)
    try:
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    where = tmp_path / "out" / "quiet_star.tmp" / ("training_state.pt" if file == "state" else "")
    assert f"cannot write {where}: " in error and "File too large" in error
    assert error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*.tmp") if path.is_file()]
    state = torch.load(tmp_path / "out" / "quiet_star" / runs.STATE, weights_only=True)
    assert state["step"] == 2
    monkeypatch.setattr(owner, name, save)
    train.main(["--out", str(tmp_path / "out"), "--resume", "--device", "cpu"])
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "value"), [("embed_tokens.weight", float("nan")), ("head.4.weight", float("inf"))]
)
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys, name, value):
    """The last update of a run makes one of them so, and no loss is computed after it."""
    look = torch.optim.AdamW.step

    def step(optimizer, *arguments):
        look(optimizer, *arguments)
        last = list(optimizer.state.values())[-1]["step"] == 4
        if last and len(optimizer.param_groups) == 2:  # of Quiet-STaR, not of the base model
            group = optimizer.param_groups["head" in name]["params"]
            group[-1 if "head" in name else 2].data.view(-1)[5] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "step 4 of quiet_star: " in error and f"{name} is not finite" in error
    assert "the last checkpoint is kept; try a smaller --lr" in error
    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    state = torch.load(tmp_path / "quiet_star" / runs.STATE, weights_only=True)
    assert state["step"] == 2
    train.main(["--out", str(tmp_path), "--resume", "--device", "cpu"])
    assert [step for stage, step in losses(tmp_path) if stage == "quiet_star"] == [1, 2, 3, 4]


@pytest.mark.parametrize("stage", ["base", "quiet_star"])
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, capsys, stage):
    run(tmp_path)
    if stage == "base":
        shutil.rmtree(tmp_path / "quiet_star")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with runs.hold(tmp_path), pytest.raises(SystemExit) as stopped:
        train.main(["--out", str(tmp_path), "--resume", "--device", "cpu"])
    assert stopped.value.code == 2
    assert f"{tmp_path} is in use by another run" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    train.main(["--out", str(tmp_path), "--resume", "--device", "cpu"])  # it is free again


def test_what_a_lost_line_leaves_in_the_metrics(tmp_path):
    """Lines that are lost are not made up when a run goes on."""
    run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    train.main(["--out", str(tmp_path), "--resume", "--steps", "6", "--device", "cpu"])
    assert path.read_text().startswith("".join(lines[:-2]))
    assert [step for stage, step in losses(tmp_path) if stage == "quiet_star"] == [1, 2, 5, 6]


def test_of_two_runs_that_begin_together_one_gets_the_folder(tmp_path):
    """make_folder of the second finds the folder of the first in its place."""
    settings, thoughts = train.make_settings({})
    with pytest.raises(OSError, match="not empty"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "file").touch()
        runs.make_folder(settings, thoughts, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_finished_run_is_given_more_steps(tmp_path, capsys):
    run(tmp_path / "out")
    run(tmp_path / "whole", "--steps 6 --cooldown 0")
    # what a schedule that ends at 4 did cannot be taken back: compare without a cooldown
    run(tmp_path / "more", "--cooldown 0")
    train.main(["--out", str(tmp_path / "more"), "--resume", "--steps", "6", "--device", "cpu"])
    assert losses(tmp_path / "more") == losses(tmp_path / "whole")
    saved = json.loads((tmp_path / "more" / "settings.json").read_text())
    assert saved["settings"]["steps"] == 6
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "out"), "--resume", "--steps", "2"])
    assert "has 4 steps already; give at least that many --steps" in capsys.readouterr().err


def test_models_of_earlier_steps_are_kept_if_asked(tmp_path):
    """The last two of 3, 6, 9 beside 12; and again where a run takes these steps again."""
    run(tmp_path, "--steps 12 --save-every 3 --keep 2")
    kept = {"quiet_star", "quiet_star-6", "quiet_star-9", "quiet_star-12"}
    assert {path.name for path in tmp_path.glob("quiet_star*")} == kept
    same_weights(tmp_path / "quiet_star", tmp_path / "quiet_star-12")
    other = load_quiet_star(tmp_path / "quiet_star-6").model.lm_head.weight
    assert not torch.equal(other, load_quiet_star(tmp_path / "quiet_star").model.lm_head.weight)
    assert not (tmp_path / "quiet_star-6" / runs.STATE).exists()
    one, same = (tmp_path / name / "model.safetensors" for name in ("quiet_star", "quiet_star-12"))
    assert one.samefile(same)  # it takes no space
    shutil.rmtree(tmp_path / "quiet_star")
    train.main(["--out", str(tmp_path), "--resume", "--device", "cpu"])
    assert {path.name for path in tmp_path.glob("quiet_star*")} == kept


# ------------------------------------------------------------------------------------------ files


def test_checkpoints_are_for_all(tmp_path):
    """safetensors lets only the owner read its files."""
    (tmp_path / "plain").touch()
    run(tmp_path / "run", "--steps 1")
    modes = {path.stat().st_mode for path in tmp_path.glob("run/quiet_star/*.*")}
    assert modes == {(tmp_path / "plain").stat().st_mode}


class Terminal:
    """Standard output that says it is a terminal, or is none."""

    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_status_lines_fit_the_terminal(monkeypatch):
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: os.terminal_size((40, 20)))
    screen = Terminal(True)
    for step in (1, 2):
        terminal.show_status(f"step {step} " + "x" * 100, step, 9, screen)
    lines = screen.text.split("\r")[1:]
    assert [len(line) for line in lines] == [39, 39]
    assert "\n" not in screen.text


def test_a_log_has_a_line_every_tenth(monkeypatch):
    """And those that are to stay; on a terminal only these end their line."""
    monkeypatch.setattr(terminal, "shown", [1000.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: 1001.0)
    for tty, expected in ((False, "10 20 25 30 40 50 60 70 80 90 99"), (True, "25 99")):
        file = Terminal(tty)
        for step in range(1, 100):
            terminal.show_status(str(step), step, 99 if tty else 100, file, keep=step in (25, 99))
        lines = file.text.split("\n")[:-1]
        assert [line.split("\r")[-1].strip() for line in lines] == expected.split()
    for total, expected in ((3, "1 2 3"), (10, "1 2 3 4 5 6 7 8 9 10")):
        file = Terminal(False)
        for step in range(1, total + 1):
            terminal.show_status(str(step), step, total, file)
        assert file.text.split() == expected.split()


def test_the_line_of_a_step(tmp_path, monkeypatch, capsys):
    """Step 10 of 100 is a tenth, step 11 is not."""
    monkeypatch.setattr(terminal, "shown", [1000.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: 1001.0)
    metrics = {"loss": 1.5, "tokens_per_second": 70.0}
    more = {"init_nll": 2.0, "talk_nll": 1.0, "reward": 0.25}
    runs.log(tmp_path / "quiet_star", 10, 100, metrics | more, 9.0)
    line = (
        "quiet_star 10/100  nll 2.000 -> 1.000  reward 0.2500  loss 1.5000  70 tokens/s  9 s left"
    )
    assert capsys.readouterr().out == line + "\n"
    runs.log(tmp_path / "base", 11, 100, metrics, 9.0)
    assert capsys.readouterr().out == ""
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"stage": "quiet_star", "step": 10, **metrics, **more},
        {"stage": "base", "step": 11, **metrics},
    ]


def test_a_log_has_a_line_a_minute_at_least(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(terminal, "shown", [1000.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    file = Terminal(False)
    for step in range(1, 100):  # a tenth is 100 steps of 30 seconds
        now[0] += 30
        terminal.show_status(f"step {step}", step, 1000, file)
    assert 30 <= file.text.count("\n") <= 50
