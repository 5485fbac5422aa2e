"""A run's folder: what lies in it, who writes there, and how a run that was stopped goes on.

    settings.json        all settings: what --resume reads
    metrics.jsonl        a line for every step
    base/, quiet_star/   a checkpoint of each stage, and what it takes to continue from it
    lock                 held while a process trains

A reader of the paper can pass this file over. A checkpoint is written beside the one before and
takes its place when it is complete, so that a crash at any moment leaves one that is.
"""

import json
import os
import shutil
import signal
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import data
from data import write_file, write_json
from model import save_mistral
from sample import show_status
from thoughts import QuietStar, ThoughtConfig, save_quiet_star
from tokenizer import save_byte_tokenizer

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

STATE = "training_state.pt"
STOP = threading.Event()  # set when a run is to end its step, save and stop
FIRST = not int(os.environ.get("RANK", 0))  # of several processes (torchrun) the first one writes


# ------------------------------------------------------------------------------------- the folder


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
        texts = {file: data.version(file) for file in files}  # by which --resume sees a change
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


def stop_soon(signal_number: int, frame) -> None:
    """Ctrl-C and SIGTERM: train ends its step and saves. A second Ctrl-C ends it at once."""
    STOP.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def log(folder: Path, step: int, steps: int, metrics: dict[str, float], left: float) -> None:
    """Append a line to metrics.jsonl and renew the status line; `left` in seconds."""
    with (folder.parent / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": folder.name, "step": step, **metrics}) + "\n")
    nlls = "nll {init_nll:.3f} -> {talk_nll:.3f}  reward {reward:+.4f}"
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

    The data position is the step: batches are a function of it. The state is written last, so a
    folder that has it is complete. keep: so many models of earlier steps stay, in folder-STEP.
    """
    new = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    (save_quiet_star if isinstance(model, QuietStar) else save_mistral)(model, new)
    copy_tokenizer(folder.parent, new)
    state = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "metrics_bytes": (folder.parent / "metrics.jsonl").stat().st_size,
    }
    write_file(new / STATE, lambda path: torch.save(state, path))
    recover(folder)
    if keep:  # links: the same files under two names
        earlier, state = folder.with_name(f"{folder.name}-{step}"), shutil.ignore_patterns(STATE)
        shutil.rmtree(earlier, ignore_errors=True)
        shutil.copytree(folder, earlier, copy_function=os.link, ignore=state)
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
