"""A run: its folder, its checkpoints, its log, and how it stops and is resumed.

    settings.json        all settings, which --resume reads
    metrics.jsonl        a line for every step
    base/, quiet_star/   a checkpoint of each stage, with the state of the training
    lock                 held while a process trains

A checkpoint is written beside the previous one, and replaces it when it is complete. After a crash
at any moment, one complete checkpoint is there.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from model import save_mistral
from support import text
from support.files import read_json, write_file, write_json
from support.settings import settings_from
from support.terminal import StoppedError, show_status
from support.tokenizer import save_byte_tokenizer
from thoughts import QuietStar, ThoughtConfig, save_quiet_star

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

STATE = "training_state.pt"
STOP = threading.Event()  # set when a run is to end its step, save and stop
FIRST = not int(os.environ.get("RANK", 0))  # of several processes (torchrun), the one that writes


# ------------------------------------------------------------------------------------- the folder


def open_run(preset: dict, given: dict, make_settings: Callable, Settings: type):
    """Settings, thought config and folder of a new run, or of the run to be resumed.

    given: options of the command line. Those of the preset have lower priority. Raises ValueError
    for options that do not go together, and for a folder that is not free or cannot be resumed.
    """
    out, resume = given.pop("out"), given.pop("resume")
    if not resume:
        free = (Path("runs") / str(number) for number in range(1, 10**9))
        run = Path(out) if out else next(run for run in free if not run.exists())
        if run.exists() and any(run.iterdir()):
            raise ValueError(f"{run} is not empty; give another --out, or --resume to continue it")
        return *make_settings(preset | given), run
    if out is None:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    if other := [*(preset | given).keys() - {"steps"}]:
        raise ValueError(
            f"--resume keeps the run's settings, except for --steps; leave out {other}"
        )
    run, path = Path(out), Path(out) / "settings.json"
    saved = {"settings": {}, "thoughts": {}} | read_json(path)
    try:
        saved["settings"] |= {"data": tuple(saved["settings"].get("data", ()))} | given
        texts = dict(saved.get("texts", {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    for file, was in texts.items():
        if text.version(file) != was:
            raise ValueError(f"{file} has changed since {run} began; begin another run with it")
    thoughts = settings_from(ThoughtConfig, saved["thoughts"], path)
    settings = settings_from(Settings, saved["settings"], path)
    if given:
        write_json(path, saved)
    return settings, thoughts, run


def absolute(options: dict) -> dict:
    """Options with absolute paths of their files, so that a run can be resumed from anywhere."""
    paths = {
        name: str(Path(options[name]).resolve())
        for name in ("checkpoint", "eval_data")
        if options.get(name)
    }
    if "data" in options:
        paths["data"] = tuple(str(Path(file).resolve()) for file in options["data"])
    return options | paths


def make_folder(settings, thoughts: ThoughtConfig, run: Path) -> None:
    """The run's folder, with the tokenizer and what --resume needs to know in it."""
    if (run / "settings.json").exists() or not FIRST:
        return
    new = run.with_name(f"{run.name}.{os.getpid()}.tmp")
    new.mkdir(parents=True)
    try:
        if settings.checkpoint is None:
            save_byte_tokenizer(new)
        else:
            copy_tokenizer(Path(settings.checkpoint), new)
        files = [*settings.data, *filter(None, [settings.eval_data])]
        texts = {file: text.version(file) for file in files}  # by which --resume sees a change
        saved = {"settings": asdict(settings), "thoughts": asdict(thoughts), "texts": texts}
        write_json(new / "settings.json", saved)
        os.replace(new, run)  # all at once; fails where another run was quicker
    finally:
        shutil.rmtree(new, ignore_errors=True)


def hold(run: Path) -> AbstractContextManager:
    """A lock on a run's folder while the file is open; ValueError if another run has it."""
    if not FIRST:
        return nullcontext()
    file = (run / "lock").open("a")
    if fcntl:  # there is none on Windows
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{run} is in use by another run; give another --out") from None
    return file


def stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end a run after the current step; a second Ctrl-C ends it at once."""

    def stop_soon(signal_number: int, frame) -> None:
        STOP.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_soon)


# ------------------------------------------------------------------------------- after every step


class Record:
    """What follows every step of train.train: log, look, save, stop. See there.

    start is the number of steps that the checkpoint in the folder has.
    """

    def __init__(self, model, optimizer, generator, settings, folder: Path, look, look_every: int):
        self.model, self.optimizer, self.generator = model, optimizer, generator
        self.settings, self.folder, self.look, self.look_every = settings, folder, look, look_every
        self.start = restore(optimizer, generator, folder, settings.steps)
        self.began = self.clock = time.perf_counter()

    def after(self, step: int, metrics: dict[str, float]) -> bool:
        """Record a step, counted from 1. Returns whether the training is done.

        Raises StoppedError, after saving, if the run was asked to stop.
        """
        settings, now = self.settings, time.perf_counter()
        tokens = settings.batch_size * settings.context
        metrics["tokens_per_second"] = tokens / (now - self.clock)
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        left = (now - self.began) / (step - self.start) * (settings.steps - step)
        line, enough, seen = "", False, {}
        if self.look and step % self.look_every == 0:
            line, enough, seen = self.look(self.model)
        log(self.folder, step, settings.steps, metrics | seen, left)
        if line:
            show_status(f"    step {step}: {line}", step, settings.steps, sys.stdout, keep=True)
        self.clock = now if not line else time.perf_counter()  # a look is no training
        done = enough or step == settings.steps
        stopped = STOP.is_set() and not done
        if done or stopped or step % settings.save_every == 0:
            reached = settings.steps if done else step
            save(self.model, self.optimizer, self.generator, reached, self.folder, settings.keep)
        if stopped:
            run = self.folder.parent
            raise StoppedError(f"saved; python train.py --out {run} --resume continues the run")
        return done


def log(folder: Path, step: int, steps: int, metrics: dict[str, float], left: float) -> None:
    """Append a line to metrics.jsonl and renew the status line; `left` in seconds."""
    if not FIRST:
        return
    with (folder.parent / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": folder.name, "step": step, **metrics}) + "\n")
    nlls = "nll {init_nll:.3f} -> {talk_nll:.3f}  reward {reward:.4f}"
    thoughts = nlls.format(**metrics) if "init_nll" in metrics else ""
    line = (
        f"{folder.name} {step}/{steps}  loss {metrics['loss']:.4f}  {thoughts}  "
        f"{metrics['tokens_per_second']:.0f} tokens/s  {left:.0f} s left"
    )
    show_status(line, step, steps, sys.stdout)


# ------------------------------------------------------------------------------------- checkpoints


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files that load_tokenizer reads, except for the model's config.json."""
    for file in (*source.glob("tokenizer*"), *source.glob("tekken.json")):
        shutil.copy(file, target)


def save(model: nn.Module, optimizer, generator, step: int, folder: Path, keep: int = 0) -> None:
    """Write a checkpoint beside the old one, then put it in its place.

    Batches are a function of the step, so the step is the data position. The state is written last:
    a folder that has it is complete. keep: models of earlier steps that stay, in folder-STEP.
    """
    state = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "metrics_bytes": (folder.parent / "metrics.jsonl").stat().st_size,
    }
    sharded = [module for module in model.modules() if hasattr(module, "unshard")]  # of FSDP2
    for module in sharded:
        module.unshard()
    if FIRST:
        write_checkpoint(model, state, folder, keep)
    for module in sharded:
        module.reshard()


def write_checkpoint(model: nn.Module, state: dict, folder: Path, keep: int) -> None:
    """See save."""
    new = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    try:
        (save_quiet_star if isinstance(model, QuietStar) else save_mistral)(model, new)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(f"cannot write {new}: {error}") from error
    for file in new.glob("*.safetensors"):  # safetensors lets only the owner read them
        file.chmod((new / "config.json").stat().st_mode)
    copy_tokenizer(folder.parent, new)
    write_file(new / STATE, lambda path: torch.save(state, path))
    recover(folder)
    if keep:  # hard links to the same files
        earlier, ignored = folder.with_name(f"{folder.name}-{state['step']}"), STATE
        shutil.rmtree(earlier, ignore_errors=True)
        shutil.copytree(
            folder, earlier, copy_function=os.link, ignore=shutil.ignore_patterns(ignored)
        )
        kept = sorted(folder.parent.glob(f"{folder.name}-*"), key=lambda path: path.stat().st_mtime)
        for old in kept[: -keep - 1]:
            shutil.rmtree(old)


def recover(folder: Path) -> bool:
    """Put a complete new checkpoint in its place, after a crash too; whether there is one now."""
    new = folder.with_name(folder.name + ".tmp")
    if (new / STATE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    return folder.exists()


def restore(optimizer, generator: torch.Generator, folder: Path, steps: int) -> int:
    """Give optimiser and generator the state of a checkpoint; return its step, 0 without one.

    Metrics of later steps, which will be run again, are cut off. ValueError if the state is damaged
    or beyond `steps`.
    """
    if not recover(folder):
        if not recover(folder.parent / "base"):
            (folder.parent / "metrics.jsonl").unlink(missing_ok=True)
        return 0
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        if not 0 <= state["step"] < 1e9 or not state["optimizer"]["state"]:
            raise ValueError("its state is empty or of an impossible step")
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        with (folder.parent / "metrics.jsonl").open("ab") as file:
            file.truncate(min(state["metrics_bytes"], file.tell()))
        start = state["step"]
    except Exception as error:  # of whatever torch.load and load_state_dict stumble on
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"cannot continue from {folder}: {reason}; delete it") from None
    if start > steps:
        raise ValueError(f"{folder} has {start} steps already; give at least that many --steps")
    return start
