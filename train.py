"""Train Quiet-STaR.

    python train.py                                        the embedded corpus: minutes on a laptop
    python train.py --checkpoint FOLDER --data FILE ...    a pretrained model, text of your own

Without --checkpoint a small base model is trained first, on puzzles that mostly explain themselves,
then Quiet-STaR on puzzles that mostly do not (data.py), and the run ends with a table of what the
thoughts are worth. With it, Quiet-STaR continues from the checkpoint with the paper's settings.

A run is a folder: settings.json, metrics.jsonl, and a checkpoint per stage (base/, quiet_star/)
that holds weights, tokenizer and all that --resume needs to continue with exactly the same losses.
"""

import argparse
import inspect
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

# Threads that wait must sleep, not spin: beside another program spinning costs many times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import eval as evaluation
from cost import Work, free_memory, memory_plan, peak_flops, show_plan, step_flops
from model import (
    Mistral,
    MistralConfig,
    at_least_float32,
    load_mistral,
    read_config,
    read_json,
    save_mistral,
    write_json,
    write_text,
)
from optim import BFloat16AdamW
from sample import DTYPES, check_belongs, execute, make_parser, pick_device, show_status
from thoughts import (
    QuietStar,
    ThoughtConfig,
    check_settings,
    count_targets,
    load_quiet_star,
    quiet_star_loss,
    save_quiet_star,
    thinks,
)
from tokenizer import load_tokenizer, save_byte_tokenizer

THOUGHTS = ("sampled", "pause", "random", "none")
INITS = ("dash", "random")


@dataclass(frozen=True)
class Settings:
    """What a run does. The defaults are the paper's, for Mistral 7B."""

    checkpoint: str | None = None  # folder of a pretrained model; none: the embedded corpus
    data: tuple[str, ...] = ()  # text files, or .jsonl with "text" or "question" and "answer"
    seed: int = 0  # of weights, batches and thoughts
    steps: int = 100  # optimiser steps of Quiet-STaR
    batch_size: int = 8  # sequences per optimiser step of Quiet-STaR
    micro_batch: int | None = None  # sequences at once, to save memory; none: the whole batch
    context: int = 256  # tokens in a sequence (T)
    positions: int | None = None  # positions that think, drawn anew every step (J); none: all
    lr: float = 1e-6  # learning rate of AdamW in Quiet-STaR
    mixing_lr: float | None = None  # that of the mixing head; none: the same
    thoughts: str = "sampled"  # sampled; or a control: pause (start tokens), random (tokens), none
    init: str = "dash"  # what start and end begin as: dash (the em dash) or random
    warmup: int = 20  # steps in which the learning rate rises to lr, constant afterwards
    weight_decay: float = 1e-3  # of AdamW
    clip: float = 1.0  # largest norm of the gradient
    save_every: int = 50  # steps between checkpoints
    dtype: str = "float32"  # of weights and activations: float32 or bfloat16
    masters: bool | None = None  # float32 copies of bfloat16 weights (optim.py); none: if they fit
    checkpointing: bool = False  # keep fewer activations, compute them twice
    compile: bool = False  # compile the layers: slow to start, then faster
    base_steps: int = 0  # embedded corpus: optimiser steps of the base model, before Quiet-STaR

    def __post_init__(self):
        allowed = {
            "seed": (0 <= self.seed < 2**32, "between 0 and 2**32 - 1"),
            "steps": (self.steps >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "micro_batch": (self.micro_batch is None or self.micro_batch >= 1, "at least 1"),
            "context": (self.context >= 2, "at least 2"),
            "positions": (self.positions is None or self.positions >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "positive"),
            "mixing_lr": (self.mixing_lr is None or 0 < self.mixing_lr < math.inf, "positive"),
            "thoughts": (self.thoughts in THOUGHTS, ", ".join(THOUGHTS)),
            "init": (self.init in INITS, " or ".join(INITS)),
            "warmup": (self.warmup >= 0, "at least 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "clip": (self.clip > 0, "positive"),
            "save_every": (self.save_every >= 1, "at least 1"),
            "base_steps": (self.base_steps >= 0, "at least 0"),
            "dtype": (self.dtype in DTYPES, " or ".join(DTYPES)),
        }
        check_settings(self, allowed)


PRESETS = {  # what differs from the defaults to fit a 7 B model on one GPU of 80 GB
    "mistral-7b": {"dtype": "bfloat16", "checkpointing": True, "micro_batch": 1},
}

# What differs on the embedded corpus: embeddings and rates of a model that is 128 wide.
EMBEDDED = {"steps": 100, "context": 64, "lr": 2e-4, "mixing_lr": 1e-3, "base_steps": 500}
EMBEDDED_THOUGHTS = {
    "thought_length": data.ASIDE,
    "n_true": 2,
    "embedding_scale": 1.0,
    "reinforce_temperature": 1.0,
    "policy_weight": 5.0,
}

BASE = MistralConfig(258, 128, 352, 2, 4, 4)  # 0.5 M parameters over bytes and the em dash
BASE_BATCH, BASE_LR = 32, 3e-3
BASE_EXPLAINED, EXPLAINED = 0.8, 0.1  # share of lines with an aside, before and during Quiet-STaR
CORPUS_LINES = 40_000
EM_DASH = "—"  # what start and end begin as, unless at random
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


# ------------------------------------------------------------------------------------- one step


def split(ids: Tensor, mask: Tensor, size: int | None) -> list[tuple[Tensor, Tensor]]:
    """A batch [B, T] in micro-batches of at most `size` sequences."""
    size = size or len(ids)
    return list(zip(ids.split(size), mask.split(size), strict=True))


def language_step(model, ids, mask, settings, generator) -> dict[str, Tensor]:
    """Gradient of the plain language-model loss, the mean nll of a batch's targets in nats.

    Nothing is drawn from the generator: the arguments are those of quiet_star_step.
    """
    total: dict[str, Tensor] = {}
    for part, targets in split(ids, mask, settings.micro_batch):
        logits = at_least_float32(model(part)[:, :-1]).flatten(0, 1)
        nll = F.cross_entropy(logits, part[:, 1:].flatten(), reduction="none")
        loss = (nll * targets[:, 1:].flatten()).sum() / mask[:, 1:].sum()
        loss.backward()
        add(total, {"loss": loss.detach()})
    return total


def step_without_thoughts(model, ids, mask, settings, generator) -> dict[str, Tensor]:
    """The control that only trains on: language_step of the model inside a QuietStar."""
    return language_step(model.model, ids, mask, settings, generator)


def quiet_star_step(model, ids, mask, settings, generator) -> dict[str, Tensor]:
    """Gradient of the Quiet-STaR loss of a batch, and its metrics.

    However the batch is split they are the same: thoughts' randomness is drawn sequence by
    sequence, and every part divides by the counts of the whole batch.
    """
    A = model.config.n_true
    positions = torch.arange(ids.shape[1] - A)
    if settings.positions is not None:  # any subset gives an unbiased estimate of the same loss
        shuffled = torch.randperm(len(positions), generator=generator)
        positions = shuffled[: settings.positions].sort().values
    counts = count_targets(mask, positions.to(ids.device), A)
    total: dict[str, Tensor] = {}
    for part, targets in split(ids, mask, settings.micro_batch):
        forced = forced_thoughts(settings.thoughts, model, len(part), len(positions), generator)
        output = model(part, forced, positions, targets, generator=generator)
        if forced is not None:  # not what the model chose: there is nothing to reinforce
            output = output._replace(thought_logp=torch.zeros_like(output.thought_logp))
        loss, metrics = quiet_star_loss(output, model.config, counts)
        loss.backward()
        add(total, metrics)
    return total


def forced_thoughts(
    kind: str, model: QuietStar, B: int, J: int, generator: torch.Generator | None
) -> Tensor | None:
    """A control's thoughts [B, N, J, K] at J positions of B sequences; None: let the model sample.

    pause: the start token K times, learned and without content (Goyal et al. 2023). random: K
    tokens, each of the vocabulary as likely, drawn on the CPU sequence by sequence.
    """
    shape = (B, model.config.n_thoughts, J, model.config.thought_length)
    device = model.start_embedding.device
    if kind == "pause":
        return torch.full(shape, model.start_id, device=device)
    if kind == "random":
        return torch.randint(model.model.config.vocab_size, shape, generator=generator).to(device)
    return None


def add(total: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    """Add a micro-batch's metrics to those of the batch."""
    for name, value in part.items():
        total[name] = total.get(name, 0) + value


# ------------------------------------------------------------------------------------- the loop


@dataclass
class Stage:
    """Something to train: the base model, or Quiet-STaR on top of it."""

    name: str  # of its folder in the run
    model: nn.Module
    steps: int
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]  # step -> factor on every learning rate
    batch: Callable[[int], tuple[Tensor, Tensor]]  # step -> ids and target mask [B, T]
    step: Callable[..., dict[str, Tensor]]  # adds gradients, returns metrics
    save: Callable[[Path], None]  # writes the model into a folder
    tokenizer: Path  # folder whose tokenizer goes into every checkpoint
    flops: float  # operations of a step
    peak: float  # operations per second of a large matrix product on this device


def train_stage(stage: Stage, settings: Settings, run: Path) -> None:
    """Train a stage to its end, from its checkpoint in the run's folder if there is one."""
    generator = torch.Generator().manual_seed(settings.seed)
    rates = [group["lr"] for group in stage.optimizer.param_groups]
    start = restore(stage, generator, run / stage.name)
    trim_metrics(run / "metrics.jsonl", stage.name, start)
    clock = began = time.perf_counter()
    for step in range(start, stage.steps):
        for group, rate in zip(stage.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * stage.rate(step)
        ids, mask = stage.batch(step)
        stage.optimizer.zero_grad()
        totals = stage.step(stage.model, ids, mask, settings, generator)
        norm = nn.utils.clip_grad_norm_(stage.model.parameters(), settings.clip)
        metrics = {name: value.item() for name, value in (totals | {"grad_norm": norm}).items()}
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            raise ValueError(
                f"step {step} of {stage.name}: loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}; the last checkpoint is kept; try a smaller --lr"
            )
        stage.optimizer.step()
        now = time.perf_counter()
        metrics["tokens_per_second"] = ids.numel() / (now - clock)
        metrics["utilisation"] = stage.flops / (now - clock) / stage.peak
        metrics["lr"] = stage.optimizer.param_groups[0]["lr"]
        clock = now
        left = (now - began) / (step + 1 - start) * (stage.steps - step - 1)
        log(run / "metrics.jsonl", stage, step + 1, metrics, left)
        if (step + 1) % settings.save_every == 0 or step + 1 == stage.steps:
            save_checkpoint(stage, step + 1, generator, run / stage.name)


def log(path: Path, stage: Stage, step: int, metrics: dict[str, float], left: float) -> None:
    """Append a line to metrics.jsonl and renew the status line; `left` in seconds."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage.name, "step": step, **metrics}) + "\n")
    gain = f"  reward {metrics['reward']:+.4f}" if "reward" in metrics else ""
    line = (
        f"{stage.name} {step}/{stage.steps}  loss {metrics['loss']:.4f}{gain}  "
        f"{metrics['tokens_per_second']:.0f} tokens/s  "
        f"{100 * metrics['utilisation']:.0f} % of peak  {left:.0f} s left"
    )
    show_status(line, step, stage.steps, sys.stdout)


def trim_metrics(path: Path, stage: str, step: int) -> None:
    """Drop metrics that a resumed run will write again: those of this stage after `step`."""
    if not path.exists():
        return
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")  # a killed run may end within
    lines = [json.loads(line) for line in whole.splitlines()]
    kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_text(path, text)


def save_checkpoint(stage: Stage, step: int, generator: torch.Generator, folder: Path) -> None:
    """Write the stage's folder beside the old one, then put it in its place.

    The data position is the step: batches are a function of it.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    stage.save(new)
    for name in TOKENIZER_FILES:
        if (stage.tokenizer / name).exists():
            shutil.copy(stage.tokenizer / name, new / name)
    state = {
        "step": step,
        "optimizer": stage.optimizer.state_dict(),
        "generator": generator.get_state(),
    }
    torch.save(state, new / "training_state.pt")
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def restore(stage: Stage, generator: torch.Generator, folder: Path) -> int:
    """Give optimiser and generator the state of a checkpoint; return its step, 0 without one."""
    if not folder.exists():
        return 0
    path = folder / "training_state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        stage.optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        return state["step"]
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot continue from {path}: {reason}; delete {folder}") from None


# ------------------------------------------------------------------------------------- the runs


def constant_after(warmup: int) -> Callable[[int], float]:
    """Paper: appendix. The learning rate rises linearly for `warmup` steps, then stays."""
    return lambda step: min(1.0, (step + 1) / max(warmup, 1))


def cosine(steps: int) -> Callable[[int], float]:
    """Rises for 50 steps and falls to 0 at `steps` along a cosine."""
    return lambda step: min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2


def checkpoint_of(folder: Path) -> Path | None:
    """The folder if it holds a checkpoint; puts back one that was about to be replaced."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():
        os.replace(old, folder)
    return folder if folder.exists() else None


def base_stage(settings: Settings, run: Path, device: torch.device) -> Stage:
    """The embedded corpus' base model: a plain language model of lines that explain themselves."""
    torch.manual_seed(settings.seed)
    checkpoint = checkpoint_of(run / "base")
    model = (load_mistral(checkpoint) if checkpoint else Mistral(BASE)).to(device)
    text = data.make_corpus(settings.seed, CORPUS_LINES, BASE_EXPLAINED)
    tokens = data.tokenize([text], load_tokenizer(run))
    weights = [{"params": list(model.parameters()), "lr": BASE_LR}]
    return Stage(
        name="base",
        model=model,
        steps=settings.base_steps,
        optimizer=torch.optim.AdamW(weights, weight_decay=settings.weight_decay),
        rate=cosine(settings.base_steps),
        batch=lambda step: tokens.batch(step, BASE_BATCH, settings.context, settings.seed, device),
        step=language_step,
        save=lambda folder: save_mistral(model, folder),
        tokenizer=run,
        flops=step_flops(BASE, ThoughtConfig(), Work(BASE_BATCH, BASE_BATCH, settings.context, 0)),
        peak=peak_flops(device, torch.float32),
    )


def work_of(settings: Settings, thoughts: ThoughtConfig) -> Work:
    """The shape of a step of Quiet-STaR, or of its control without thoughts (J = 0)."""
    J = settings.positions or settings.context - thoughts.n_true
    J = 0 if settings.thoughts == "none" else J
    return Work(
        settings.batch_size, settings.micro_batch or settings.batch_size, settings.context, J
    )


def plan_memory(
    settings: Settings, thoughts: ThoughtConfig, device: torch.device
) -> tuple[Settings, str]:
    """Settings with `masters` decided, and the memory plan; ValueError if it does not fit."""
    config = read_config(Path(settings.checkpoint)) if settings.checkpoint else BASE
    free, work = free_memory(device), work_of(settings, thoughts)

    def plan(masters: bool) -> dict[str, float]:
        weight = DTYPES[settings.dtype].itemsize
        state = 8 if weight == 4 else 12 if masters else 4  # bytes a parameter in the optimiser
        return memory_plan(config, thoughts, work, weight, state, settings.checkpointing)

    masters = settings.masters
    if masters is None:
        masters = free is None or plan(True)["total"] <= free
    text = show_plan(plan(masters), free)
    if free is not None and plan(masters)["total"] > free:
        raise ValueError(
            f"{text}; try --micro-batch 1, --checkpointing, --dtype bfloat16, --no-masters, a "
            "smaller --positions, --context or --thought-length, or a smaller model"
        )
    return replace(settings, masters=masters), text


def make_optimizer(weights: list[dict], settings: Settings) -> torch.optim.Optimizer:
    """AdamW; for bfloat16 weights one that does not round small updates away."""
    if settings.dtype == "float32":
        return torch.optim.AdamW(weights, weight_decay=settings.weight_decay)
    return BFloat16AdamW(weights, bool(settings.masters), settings.weight_decay)


def quiet_star_stage(
    settings: Settings, thoughts: ThoughtConfig, run: Path, device: torch.device
) -> Stage:
    """Quiet-STaR or a control of it, on the embedded corpus or on text of the user's."""
    torch.manual_seed(settings.seed)
    source = Path(settings.checkpoint or run / "base")
    tokenizer = load_tokenizer(source)
    checkpoint = checkpoint_of(run / "quiet_star")
    if checkpoint:
        model = load_quiet_star(checkpoint, device=device)
    elif thinks(source):
        raise ValueError(f"{source} thinks already; --checkpoint takes a plain model")
    else:
        base = load_mistral(source, DTYPES[settings.dtype], device)
        check_belongs(tokenizer, base.config.vocab_size, source)
        init_id = tokenizer.token_id(EM_DASH) if settings.init == "dash" else None
        model = QuietStar(base, replace(thoughts, init_id=init_id))
    model.checkpointing = settings.checkpointing
    if settings.compile:
        for layer in model.model.layers:
            layer.project, layer.finish = torch.compile(layer.project), torch.compile(layer.finish)
    if settings.data:
        documents = data.read_documents(settings.data)
    else:
        documents = [data.make_corpus(settings.seed + 1, CORPUS_LINES, EXPLAINED)]
    tokens = data.tokenize(documents, tokenizer)

    head = list(model.mixing_head.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("mixing_head.")]
    weights = [
        {"params": rest, "lr": settings.lr},
        {"params": head, "lr": settings.mixing_lr or settings.lr},
    ]
    B, T = settings.batch_size, settings.context
    tokens.batch(0, B, T, settings.seed, device)  # a text that is too short fails here
    return Stage(
        name="quiet_star",
        model=model,
        steps=settings.steps,
        optimizer=make_optimizer(weights, settings),
        rate=constant_after(settings.warmup),
        batch=lambda step: tokens.batch(step, B, T, settings.seed, device),
        step=step_without_thoughts if settings.thoughts == "none" else quiet_star_step,
        save=lambda folder: save_quiet_star(model, folder),
        tokenizer=source,
        flops=step_flops(model.model.config, model.config, work_of(settings, model.config)),
        peak=peak_flops(device, DTYPES[settings.dtype]),
    )


def start_run(given: dict) -> tuple[Settings, ThoughtConfig, Path]:
    """Settings and folder of a new run, or of the one to resume, from command-line options."""
    out, resume = given.pop("out", None), given.pop("resume")
    preset = PRESETS[given.pop("preset")] if "preset" in given else {}
    if resume:
        return resume_run(out, given | preset)
    run = Path(out) if out else first_free_run(Path("runs"))
    if run.exists() and any(run.iterdir()):
        raise ValueError(f"{run} is not empty; give another --out, or --resume to continue it")
    return *make_settings(preset | given), run


def make_settings(given: dict) -> tuple[Settings, ThoughtConfig]:
    """Both kinds of settings from options; ValueError for what does not go together.

    What is not given has the paper's value, or without a checkpoint the embedded corpus'. Thoughts
    that are not sampled from the model have no policy loss.
    """
    names = {field.name for field in fields(Settings)}
    options = {name: value for name, value in given.items() if name in names}
    thought_options = {name: value for name, value in given.items() if name not in names}
    embedded = "checkpoint" not in options
    if embedded == ("data" in options):
        raise ValueError("--checkpoint and --data go together; give both, or none of them")
    if not embedded:  # absolute: a run may be resumed from anywhere
        options["checkpoint"] = str(Path(options["checkpoint"]).resolve())
        options["data"] = tuple(str(Path(file).resolve()) for file in options["data"])
    settings = Settings(**(EMBEDDED if embedded else {}) | options)
    if settings.thoughts != "sampled" and thought_options.setdefault("policy_weight", 0.0) != 0:
        raise ValueError(
            f"--thoughts {settings.thoughts} leaves nothing to reinforce: its policy weight is 0, "
            "leave --policy-weight out"
        )
    thoughts = ThoughtConfig(**(EMBEDDED_THOUGHTS if embedded else {}) | thought_options)
    if thoughts.n_true >= settings.context:
        raise ValueError(f"n_true ({thoughts.n_true}) must be below context ({settings.context})")
    if (settings.positions or 0) > settings.context - thoughts.n_true:
        raise ValueError(
            f"positions is {settings.positions}; of {settings.context} tokens "
            f"{settings.context - thoughts.n_true} have {thoughts.n_true} ahead"
        )
    if embedded != (settings.base_steps > 0):
        raise ValueError("--base-steps must be at least 1 on the embedded corpus, and 0 elsewhere")
    return settings, thoughts


def resume_run(out: str | None, given: dict) -> tuple[Settings, ThoughtConfig, Path]:
    """Settings and folder of a run to continue."""
    if out is None:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    if given:
        raise ValueError(
            f"--resume continues with the run's own settings; leave out {sorted(given)}"
        )
    saved = read_json(Path(out) / "settings.json")
    try:
        settings = saved["settings"] | {"data": tuple(saved["settings"]["data"])}
        return Settings(**settings), ThoughtConfig(**saved["thoughts"]), Path(out)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{out}/settings.json is damaged: {error}") from None


def write_settings(settings: Settings, thoughts: ThoughtConfig, run: Path) -> None:
    """Make the run's folder, with what --resume needs to know in it."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "settings.json", {"settings": asdict(settings), "thoughts": asdict(thoughts)})


def first_free_run(folder: Path) -> Path:
    """runs/1, runs/2, ...: a run never overwrites another."""
    number = 1
    while (folder / str(number)).exists():
        number += 1
    return folder / str(number)


def execute_run(options: argparse.Namespace) -> None:
    """Train what the options ask for; on the embedded corpus, end with the table."""
    given = dict(vars(options))
    device = pick_device(given.pop("device"))
    settings, thoughts, run = start_run(given)
    settings, plan = plan_memory(settings, thoughts, device)
    print(f"run {run} on {device}, {torch.get_num_threads()} threads; {plan}")
    if settings.checkpoint:
        stage = quiet_star_stage(settings, thoughts, run, device)  # reads all inputs first
        write_settings(settings, thoughts, run)
        train_stage(stage, settings, run)
    else:
        write_settings(settings, thoughts, run)
        save_byte_tokenizer(run)
        tokenizer = load_tokenizer(run)
        base = base_stage(settings, run, device)
        train_stage(base, settings, run)
        tables = {"base model": evaluation.puzzle_table(base.model, tokenizer)}
        stage = quiet_star_stage(settings, thoughts, run, device)
        train_stage(stage, settings, run)
        tables["Quiet-STaR"] = evaluation.puzzle_table(stage.model, tokenizer)
        print(evaluation.show_puzzles(tables))
    print(f"the model is in {run / 'quiet_star'}")


# ------------------------------------------------------------------------------ the command line


def comments(settings: type) -> dict[str, str]:
    """The comment behind each field of a dataclass: it is the option's help text."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(settings), re.MULTILINE))


def add_settings(parser: argparse.ArgumentParser, settings: type, embedded: dict) -> None:
    """One option per field of a dataclass; absent from the result unless it was given."""
    group = parser.add_argument_group(settings.__name__, settings.__doc__)
    help_texts = comments(settings)
    for field in fields(settings):
        if field.name.endswith("_id"):  # looked up in the tokenizer, or outside the vocabulary
            continue
        optional = isinstance(field.type, UnionType)
        kind = get_args(field.type)[0] if optional else get_origin(field.type) or field.type
        default = "" if field.default in (None, ()) else f"{field.default}"
        if field.name in embedded:
            default += f"; embedded corpus: {embedded[field.name]}"
        options: dict = {"default": argparse.SUPPRESS, "help": help_texts[field.name]}
        options["help"] += f" ({default.removeprefix('; ')})" if default else ""
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= {"nargs": "+", "metavar": "FILE"}
        else:
            options |= {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
        group.add_argument("--" + field.name.replace("_", "-"), **options)


def command_line() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", metavar="FOLDER", help="folder of the run; none: runs/1, runs/2, ...")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--preset", choices=PRESETS, default=argparse.SUPPRESS, help="settings for a large model")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    add_settings(parser, Settings, EMBEDDED)
    add_settings(parser, ThoughtConfig, EMBEDDED_THOUGHTS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    execute(command_line(), execute_run, arguments)


if __name__ == "__main__":
    main()
