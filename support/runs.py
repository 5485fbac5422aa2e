"""A run: its folder, its log and its checkpoints, and how it is stopped and resumed.

    settings.json        all settings, which --resume reads
    metrics.jsonl        a line for every step
    base/, quiet_star/   a checkpoint of each stage, with the state of the training
    lock                 held while a process trains

A checkpoint is written beside the previous one and replaces it when it is complete. A crash at any
moment leaves one complete checkpoint.
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
from support.checkpoints import read_thought_config
from support.files import read_json, write_file, write_json
from support.settings import settings_from
from support.terminal import StoppedError, show_status
from support.tokenizer import save_byte_tokenizer
from thoughts import QuietStar, ThoughtConfig, save_quiet_star

STATE = "training_state.pt"
STOP = threading.Event()  # set when a run is to save and stop after the current step
FIRST = not int(os.environ.get("RANK", 0))  # of several processes (torchrun), the one that writes
UNSTARTED: set[Path] = set()  # folders without a finished step, which make_folder replaces


def open_run(preset: dict, given: dict, make_settings: Callable, Settings: type):
    """Settings, thought config and folder of a new run, or of the run to be resumed.

    given: the options of the command line, which override the preset. Raises ValueError for options
    that do not go together, and for a folder that is not free or cannot be resumed.
    """
    out, resume = given.pop("out"), given.pop("resume")
    if resume:
        if out is None:
            raise ValueError("--resume needs --out, the folder of the run to continue")
        if other := [*(preset | given).keys() - {"steps"}]:
            raise ValueError(f"--resume keeps all settings but --steps; leave out {other}")
        return *read_settings(Path(out), given, Settings), Path(out)
    numbered = (Path("runs") / str(number) for number in range(1, 10**9))
    run = Path(out) if out else next(run for run in numbered if not run.exists())
    if run.exists() and any(run.iterdir()):
        if not is_unstarted(run):
            raise ValueError(f"{run} is not empty; give another --out, or --resume to continue it")
        with hold(run):
            UNSTARTED.add(run)
    return *make_settings(preset | given), run


def read_settings(run: Path, given: dict, Settings: type):
    """Settings and thought config of a run to be resumed, with the steps that are given.

    Raises ValueError if settings.json is damaged or contradicts the checkpoint, or if the text has
    changed.
    """
    path = run / "settings.json"
    saved = read_json(path)
    try:
        saved["settings"] |= {"data": tuple(saved["settings"].get("data", ()))} | given
        settings = settings_from(Settings, saved["settings"], path)
        thoughts = settings_from(ThoughtConfig, saved["thoughts"], path)
        for file, was in saved.get("texts", {}).items():
            if text.version(file) != was:
                raise ValueError(f"{file} has changed since {run} began; begin another run with it")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {error!r}") from None
    check_ahead(settings, thoughts)
    trained = read_thought_config(run / "quiet_star") or thoughts
    for name, value in asdict(thoughts).items():
        if getattr(trained, name) != value and not name.endswith("_id"):
            other = f"{getattr(trained, name)} in {run / 'quiet_star'}"
            raise ValueError(f"{path}: {name} is {value}, but {other}; restore the right value")
    if given:
        write_json(path, saved)
    return settings, thoughts


def check_ahead(settings, thoughts: ThoughtConfig) -> None:
    """Raise ValueError if fewer positions have n_true tokens ahead than are to think."""
    ahead = settings.context - thoughts.n_true
    if ahead < max(settings.positions or 1, 1):
        raise ValueError(
            f"positions is {settings.positions or 'all'}; of {settings.context} tokens (context) "
            f"{max(ahead, 0)} have {thoughts.n_true} (n_true) ahead"
        )


def is_unstarted(run: Path) -> bool:
    """Whether a folder is that of a run without a finished step, with nothing else in it."""
    sizes = {path.name: path.stat().st_size for path in run.iterdir()}
    own = {"settings.json", "metrics.jsonl", "lock", "tekken.json"}
    own |= {name for name in sizes if name.startswith("tokenizer")}
    return "settings.json" in sizes and sizes.keys() <= own and not sizes.get("metrics.jsonl")


def absolute(options: dict) -> dict:
    """Options with absolute paths of the files that exist: a run can be resumed from anywhere."""

    def full(file: str) -> str:
        return os.path.realpath(file) if os.path.exists(file) else str(file)

    paths = {name: full(options[name]) for name in ("checkpoint", "eval_data") if options.get(name)}
    data = {"data": tuple(map(full, options["data"]))} if "data" in options else {}
    return options | paths | data


def make_folder(settings, thoughts: ThoughtConfig, run: Path) -> None:
    """Make the run's folder, with the tokenizer and settings.json, unless it is there."""
    if not FIRST or ((run / "settings.json").exists() and run not in UNSTARTED):
        return
    new = run.with_name(f"{run.name}.{os.getpid()}.tmp")
    new.mkdir(parents=True)
    try:
        if settings.checkpoint is None:
            save_byte_tokenizer(new)
        else:
            copy_tokenizer(Path(settings.checkpoint), new)
        files = [*settings.data, *filter(None, [settings.eval_data])]
        texts = {file: text.version(file) for file in files}  # --resume compares them
        saved = {"settings": asdict(settings), "thoughts": asdict(thoughts), "texts": texts}
        write_json(new / "settings.json", saved)
        if run in UNSTARTED and is_unstarted(run):
            with hold(run):
                shutil.rmtree(run)
        os.replace(new, run)  # fails if another run has made the folder meanwhile
        UNSTARTED.discard(run)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def hold(run: Path) -> AbstractContextManager:
    """Lock a run's folder until the file is closed. Raises ValueError if another run holds it."""
    if not FIRST:
        return nullcontext()
    file = (run / "lock").open("a")
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{run} is in use by another run; give another --out") from None
    return file


def stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM stop a run after the current step, and a second Ctrl-C at once."""

    def stop_soon(signal_number: int, frame) -> None:
        STOP.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_soon)


class Record:
    """Logs, evaluates, saves and stops after every step of train.train; see there.

    start is the number of steps of the checkpoint in the folder.
    """

    def __init__(self, model, optimizer, generator, settings, folder: Path, look, look_every: int):
        self.model, self.optimizer, self.generator = model, optimizer, generator
        self.settings, self.folder, self.look, self.look_every = settings, folder, look, look_every
        self.start = restore(optimizer, generator, folder, settings.steps)
        self.began = self.clock = time.perf_counter()

    def after(self, step: int, metrics: dict[str, float]) -> bool:
        """Record a step, counted from 1. Returns whether the training is finished.

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
        self.clock = now if not line else time.perf_counter()  # tokens/s leaves out the evaluation
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
    """Append a line to metrics.jsonl and update the status line. left: seconds to the end."""
    if not FIRST:
        return
    with (folder.parent / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": folder.name, "step": step, **metrics}) + "\n")
    nlls = "nll {init_nll:.3f} -> {talk_nll:.3f}  reward {reward:.4f}"
    losses = f"{nlls}  loss {{loss:.4f}}" if "init_nll" in metrics else "loss {loss:.4f}"
    line = f"{folder.name} {step}/{steps}  {losses.format(**metrics)}  "
    line += f"{metrics['tokens_per_second']:.0f} tokens/s  {left:.0f} s left"
    show_status(line, step, steps, sys.stdout)


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy the files that load_tokenizer reads, except for the model's config.json."""
    for file in (*Path(source).glob("tokenizer*"), *Path(source).glob("tekken.json")):
        shutil.copy(file, target)


def save(model: nn.Module, optimizer, generator, step: int, folder: Path, keep: int = 0) -> None:
    """Write a checkpoint, which replaces the last one when it is complete.

    keep: number of models of earlier steps that stay, in folder-STEP. Raises ValueError if a weight
    is not finite, and keeps the last checkpoint.
    """
    optimizer_state = optimizer.state_dict()
    state = {
        "step": step,  # batches are a function of it
        "optimizer": optimizer_state,
        "entries": sum(map(len, optimizer_state["state"].values())),
        "generator": generator.get_state(),
        "metrics_bytes": (folder.parent / "metrics.jsonl").stat().st_size,
    }
    sharded = [module for module in model.modules() if hasattr(module, "unshard")]  # of FSDP2
    for module in sharded:
        module.unshard()
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            where = f"step {step} of {folder.name}: {name} is not finite"
            raise ValueError(f"{where}; the last checkpoint is kept; try a smaller --lr")
    if FIRST:
        write_checkpoint(model, state, folder, keep)
    for module in sharded:
        module.reshard()


def write_checkpoint(model: nn.Module, state: dict, folder: Path, keep: int) -> None:
    """See save. The state is written last: a folder that has it is complete."""
    new = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    try:
        (save_quiet_star if isinstance(model, QuietStar) else save_mistral)(model, new)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(f"cannot write {new}: {error}") from error
    for file in new.glob("*.safetensors"):  # safetensors lets only the owner read them
        file.chmod((new / "config.json").stat().st_mode)
    copy_tokenizer(folder.parent, new)
    write_file(new / STATE, lambda file: torch.save(state, file))
    recover(folder)
    if keep:  # hard links to the same files
        earlier, ignore = folder.with_name(f"{folder.name}-{state['step']}"), [STATE]
        shutil.rmtree(earlier, ignore_errors=True)
        shutil.copytree(folder, earlier, copy_function=os.link, ignore=lambda *_: ignore)
        kept = sorted(folder.parent.glob(f"{folder.name}-*"), key=lambda path: path.stat().st_mtime)
        for old in kept[: -keep - 1]:
            shutil.rmtree(old)


def recover(folder: Path) -> bool:
    """Move a complete new checkpoint to its place. Returns whether there is a checkpoint."""
    new = folder.with_name(folder.name + ".tmp")
    if (new / STATE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    return folder.exists()


def restore(optimizer, generator: torch.Generator, folder: Path, steps: int) -> int:
    """Load the state of optimiser and generator from a checkpoint. Returns its step, 0 without one.

    metrics.jsonl loses later steps, which will be run again, and a line that is cut off. Raises
    ValueError if the state is damaged or has more than `steps` steps.
    """
    metrics = folder.parent / "metrics.jsonl"
    if not recover(folder):
        if not recover(folder.parent / "base"):
            metrics.unlink(missing_ok=True)
        return 0
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        start, size = state["step"], state["metrics_bytes"]
        if {type(start), type(size)} != {int} or not 0 <= start < 1e9 or size < 0:
            raise ValueError(f"step {start} with {size} bytes of metrics is impossible")
        check_fit(state["optimizer"]["state"], state.get("entries"), optimizer)
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        metrics.touch()
        os.truncate(metrics, metrics.read_bytes()[:size].rfind(b"\n") + 1)
    except Exception as error:  # torch.load and load_state_dict raise errors of all types
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"cannot continue from {folder}: {reason}; delete this folder") from None
    if start > steps:
        raise ValueError(f"{folder} has {start} steps already; give at least that many --steps")
    return start


def check_fit(state: dict, entries: int | None, optimizer) -> None:
    """Raise ValueError if a saved state, of so many entries if known, does not fit an optimiser."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if entries not in (None, sum(map(len, state.values()))) or not state:
        raise ValueError("a part of the optimizer's state is missing")
    for index, values in state.items():
        shapes = {x.shape for x in values.values() if isinstance(x, torch.Tensor) and x.dim()}
        if index not in range(len(parameters)) or shapes != {parameters[index].shape}:
            raise ValueError(f"the optimizer has no parameter {index} of the saved shape")
