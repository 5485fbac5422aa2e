"""Train Quiet-STaR.

    python train.py                                        the built-in corpus: a minute or two
    python train.py --checkpoint FOLDER --data FILE ...    a pretrained model, text of your own
    python train.py --checkpoint runs/1/quiet_star         a model that thinks already, trained on
    python train.py --out FOLDER --resume                  continue a run that was stopped
    torchrun --nproc-per-node 8 train.py ...               the same on eight GPUs

Without --checkpoint a small base model is trained first, on puzzles that mostly explain themselves,
then Quiet-STaR on puzzles that mostly do not (data.py), and the run ends with a table of what the
thoughts are worth. With it, Quiet-STaR begins with that model; with --data the paper's settings.

A run is a folder: settings.json, metrics.jsonl, and a checkpoint per stage (base/, quiet_star/)
that holds weights, tokenizer and all that --resume needs to continue with exactly the same losses.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

# Threads that wait must sleep, not spin: beside another program spinning costs many times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import eval as evaluation
from data import (
    WORK,
    add_settings,
    check_at_least,
    read_json,
    settings_from,
    write_json,
)
from model import Mistral, MistralConfig, load_mistral, read_config
from runs import STOP, hold, log, make_folder, recover, restore, save, stop_soon
from sample import DTYPES, execute, load, make_parser, pick_device, show_status
from thoughts import (
    QuietStar,
    ThoughtConfig,
    count_targets,
    load_quiet_star,
    quiet_star_loss,
    read_thought_config,
)
from tokenizer import load_tokenizer

SEVERAL = int(os.environ.get("WORLD_SIZE", 1)) > 1  # whether torchrun started several processes
parallel = None
try:
    from fast import apply as apply_fast  # the same results for less: see fast/README.md

    if SEVERAL:
        from fast import parallel
except ImportError:
    apply_fast = None


@dataclass(frozen=True)
class Settings:
    """What a run does. The defaults are the paper's, for Mistral 7B."""

    checkpoint: str | None = None  # folder of a pretrained model; none: the built-in corpus
    data: tuple[str, ...] = ()  # text, .jsonl ("text", or "question" and "answer"), or one folder
    seed: int = 0  # of weights, batches and thoughts
    steps: int = 100  # optimiser steps of Quiet-STaR
    batch_size: int = 8  # sequences per optimiser step of Quiet-STaR
    micro_batch: int | None = None  # sequences at once, to save memory; none: the whole batch
    context: int = 256  # tokens in a sequence (T)
    positions: int | None = None  # positions that think, drawn anew every step (J); none: all
    lr: float = 1e-6  # learning rate of AdamW
    mixing_lr: float | None = None  # that of the mixing head; none: the same
    warmup: int = 20  # first steps, in which the learning rate rises to lr
    cooldown: float = 0.0  # share of the steps, the last ones, in which it falls to 0
    weight_decay: float = 1e-3  # of AdamW
    clip: float = 1.0  # largest norm of the gradient
    save_every: int = 50  # steps between checkpoints
    keep: int = 0  # models of earlier checkpoints to keep beside the last one
    eval_data: str | None = None  # held-out text, a file or a folder like data; none: no such loss
    eval_every: int = 50  # steps between two looks at its loss
    eval_sequences: int = 16  # at most, of context tokens each: the same ones at every look
    plain: bool = False  # leave out fast/: slower, with the same results
    dtype: str = "float32"  # of weights and activations: float32 or bfloat16 (fast/)
    masters: bool = True  # keep float32 copies of bfloat16 weights; else round at random (fast/)
    checkpointing: bool = False  # keep fewer activations, compute them twice (fast/)
    compile: bool = False  # compile the layers: slow to start, then faster (fast/)
    base_steps: int = 0  # built-in corpus: steps of the base model at most, till it hums and works
    work: float = WORK  # built-in corpus: share of the asides that work; the others hum

    def __post_init__(self):
        check_at_least(self, steps=1, batch_size=1, micro_batch=1, positions=1, context=2, seed=0)
        check_at_least(self, warmup=0, save_every=1, lr=0, mixing_lr=0, weight_decay=0, clip=1e-9)
        check_at_least(self, cooldown=0, base_steps=0, work=0, keep=0)
        check_at_least(self, eval_every=1, eval_sequences=1)
        for name in ("cooldown", "work"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype}; it must be {' or '.join(DTYPES)}")


LARGE = {"dtype": "bfloat16", "masters": False, "checkpointing": True, "micro_batch": 1}
PRESETS = {"mistral-7b": LARGE}  # what differs from the defaults on one GPU of 80 GB

# What differs on the built-in corpus: embeddings and rates of a model that is 128 wide.
BUILT_IN = {
    "steps": 150, "cooldown": 0.5, "context": 64, "positions": 16, "lr": 2e-4, "mixing_lr": 3e-3,
    "base_steps": 1500,
}  # fmt: skip
BUILT_IN_THOUGHTS = {
    "thought_length": data.ASIDE, "n_true": 2, "embedding_scale": 1.0,
    "reinforce_temperature": 1.0, "policy_weight": 10.0,
}  # fmt: skip

BASE = MistralConfig(data.VOCAB, 128, 352, 2, 4, 4)  # 0.5 M parameters over bytes and the em dash
BASE_SETTINGS = {
    "batch_size": 16, "lr": 1e-3, "warmup": 50, "cooldown": 0.0, "micro_batch": None,
    "positions": None, "dtype": "float32", "checkpointing": False, "compile": False,
}  # fmt: skip
BASE_EXPLAINED, EXPLAINED = 0.8, 0.1  # share of lines with an aside, before and during Quiet-STaR
CORPUS_LINES = 40_000
EM_DASH = "—"  # what start and end begin as
GLANCE = {"base": 50, "quiet_star": 10}  # steps between two looks at what a model can do


# ------------------------------------------------------------------------------------- the losses


def language_loss(model: Mistral, ids: Tensor, targets: Tensor, positions, counts, generator):
    """The plain language-model loss: the mean nll of a batch's targets in nats, and its metrics."""
    logits = model(ids)[:, :-1].float().flatten(0, 1)  # [B * (T-1), V]
    nll = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    loss = (nll * targets[:, 1:].flatten()).sum() / max(counts[0], 1)
    return loss, {"loss": loss.detach()}


def thought_loss(model: QuietStar, ids: Tensor, targets: Tensor, positions, counts, generator):
    """The Quiet-STaR loss, and its metrics."""
    output = model(ids, positions=positions, target_mask=targets, generator=generator)
    return quiet_star_loss(output, model.config, counts)


# ------------------------------------------------------------------------------------- the loop


def batch_gradient(model, loss_of, ids, targets, settings: Settings, n_true: int, generator):
    """Add the gradient of a batch ids, targets [B, T] to the parameters -> Counter of metrics.

    However the batch is split into micro-batches, gradient, metrics and thoughts are the same:
    every part divides by the counts of the whole.
    """
    positions = torch.arange(ids.shape[1] - n_true)  # [J] those that have all targets
    if settings.positions:  # any subset gives an unbiased estimate of the same loss
        shuffled = torch.randperm(len(positions), generator=generator)
        positions = shuffled[: settings.positions].sort().values
    counts = count_targets(targets, positions, n_true)
    metrics: Counter = Counter()
    size = settings.micro_batch or len(ids)
    for part, part_targets in zip(ids.split(size), targets.split(size), strict=True):
        loss, values = loss_of(model, part, part_targets, positions, counts, generator)
        loss.backward()
        metrics.update({name: value.item() for name, value in values.items()})
    return metrics


def train(model, loss_of, optimizer, tokens, settings, n_true: int, folder: Path, glance=None):
    """Train a model by a loss on data.Tokens; its checkpoints go to `folder`.

    If there is one already, the caller has loaded the model from it, and training continues there.

    loss_of(model, ids, targets, positions, counts, generator) -> loss, metrics: thought_loss, or
    whatever else is to be learned (tools/experiments.py has more). glance(model) -> a line to watch
    every few steps, whether the model is trained enough (this ends then, before all steps), and
    metrics of held-out text.
    """
    device, B, T = next(model.parameters()).device, settings.batch_size, settings.context
    generator = torch.Generator().manual_seed(settings.seed)
    gradient, write, store = batch_gradient, log, save
    if parallel:  # the same, of this process' share of a batch and part of the weights
        gradient, write, store = parallel.join(model, optimizer, batch_gradient, log, save)
    start = restore(optimizer, generator, folder, settings.steps)
    every = settings.eval_every if settings.eval_data else GLANCE[folder.name]
    clock = began = time.perf_counter()
    for step in range(start, settings.steps):
        rising = (step + 1) / max(settings.warmup, 1)
        falling = (settings.steps - step) / max(settings.cooldown * settings.steps, 1)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min(1.0, rising, falling)
        ids, targets = tokens.batch(step, B, T, settings.seed, device)  # [B, T]
        optimizer.zero_grad()
        metrics = gradient(model, loss_of, ids, targets, settings, n_true, generator)
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), settings.clip).item()
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            raise ValueError(
                f"step {step + 1} of {folder.name}: loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}; the last checkpoint is kept; try a smaller --lr"
            )
        optimizer.step()
        now = time.perf_counter()
        metrics["tokens_per_second"], clock = B * T / (now - clock), now
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        left = (now - began) / (step + 1 - start) * (settings.steps - step - 1)
        look = glance and (step + 1) % every == 0
        line, enough, seen = glance(model) if look else ("", False, {})
        write(folder, step + 1, settings.steps, metrics | seen, left)
        if look:
            show_status(
                f"    step {step + 1}: {line}", step + 1, settings.steps, sys.stdout, keep=True
            )
            clock = time.perf_counter()  # looking is no training
        done = enough or step + 1 == settings.steps
        stopped = STOP.is_set() and not done
        if done or stopped or (step + 1) % settings.save_every == 0:
            reached = settings.steps if done else step + 1
            store(model, optimizer, generator, reached, folder, settings.keep)
        if stopped:
            raise KeyboardInterrupt(
                f" and saved; python train.py --out {folder.parent} --resume goes on"
            )
        if done:
            return


# ------------------------------------------------------------------------------------- the runs


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, the mixing head with a learning rate of its own; and the one door to fast/."""
    AdamW = torch.optim.AdamW
    if isinstance(model, QuietStar) and apply_fast and not settings.plain:
        AdamW = apply_fast(model, settings.checkpointing, settings.compile, settings.masters)
    elif settings.checkpointing or settings.compile or settings.dtype == "bfloat16":
        raise ValueError(
            "--checkpointing, --compile and --dtype bfloat16 need fast/, and no --plain"
        )
    head = [p for name, p in model.named_parameters() if name.startswith("mixing_head.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("mixing_head.")]
    rates = [(rest, settings.lr), (head, settings.mixing_lr or settings.lr)]
    groups = [{"params": params, "peak_lr": lr} for params, lr in rates if params]
    return AdamW(groups, weight_decay=settings.weight_decay)


def train_base(settings: Settings, thoughts: ThoughtConfig, run: Path, device) -> Mistral:
    """The built-in corpus' base model: a plain language model of lines that explain themselves."""
    make_folder(settings, thoughts, run)
    torch.manual_seed(settings.seed)
    folder = run / "base"
    model = (load_mistral(folder) if recover(folder) else Mistral(BASE)).to(device)
    if not recover(run / "quiet_star"):
        first = replace(settings, steps=settings.base_steps, **BASE_SETTINGS)
        text = data.make_corpus(settings.seed, CORPUS_LINES, BASE_EXPLAINED, settings.work)
        tokenizer, optimizer = load_tokenizer(run), make_optimizer(model, first)
        tokens = data.tokenize([text], tokenizer)
        glance = partial(evaluation.glance, tokenizer=tokenizer)
        with hold(run):
            train(model, language_loss, optimizer, tokens, first, 1, folder, glance)
    return model


def thinking_model(settings: Settings, thoughts: ThoughtConfig, run: Path, device) -> QuietStar:
    """The model of the run's checkpoint, or a new one whose meta tokens begin as the em dash.

    One that thinks already thinks on, with the settings of this run: other N, K or A if need be.
    """
    if recover(run / "quiet_star"):
        return load_quiet_star(run / "quiet_star", device=device)
    torch.manual_seed(settings.seed)
    source = settings.checkpoint or run / "base"
    base, tokenizer = load(source, device, DTYPES[settings.dtype])
    if isinstance(base, QuietStar):
        old, ids = base.config, ("start_id", "end_id", "init_id")
        base.config = replace(thoughts, **{name: getattr(old, name) for name in ids})
        for embedding in (base.start_embedding, base.end_embedding):  # the same in use
            embedding.data *= old.embedding_scale / thoughts.embedding_scale
        return base
    try:
        init_id = tokenizer.token_id(EM_DASH)
    except ValueError:  # not every vocabulary has it
        init_id = tokenizer.encode(EM_DASH)[0]
    return QuietStar(base, replace(thoughts, init_id=init_id))


def train_thoughts(
    settings: Settings, thoughts: ThoughtConfig, run: Path, device, loss_of=thought_loss,
    model_of=thinking_model, glance=None,
) -> QuietStar:  # fmt: skip
    """Train Quiet-STaR in a run's folder, or what another loss or model makes of it."""
    source = Path(settings.checkpoint or run / "base")
    read_config(source)  # what cannot be read fails before the folder is made
    tokenizer = load_tokenizer(source)
    if settings.data:
        print(f"reading {', '.join(settings.data)}", flush=True)
        tokens = data.read_tokens(settings.data, tokenizer)
    else:
        text = data.make_corpus(settings.seed + 1, CORPUS_LINES, EXPLAINED, settings.work)
        tokens = data.tokenize([text], tokenizer)
    tokens.batch(0, 1, settings.context, settings.seed, torch.device("cpu"))  # long enough?
    if settings.eval_data:
        held_out, T = data.read_tokens([settings.eval_data], tokenizer), settings.context
        count = max(1, min(settings.eval_sequences, len(held_out.ids) // T))
        ids, is_target = held_out.batch(0, count, T, 0, device)  # [count, T], drawn from all
        glance = partial(evaluation.glance_at_text, ids=ids, is_target=is_target)
    model = model_of(settings, thoughts, run, device)
    optimizer = make_optimizer(model, settings)
    make_folder(settings, thoughts, run)
    folder = run / "quiet_star"
    with hold(run):
        train(model, loss_of, optimizer, tokens, settings, thoughts.n_true, folder, glance)
    return model


def make_settings(given: dict) -> tuple[Settings, ThoughtConfig]:
    """Both kinds of settings from options; ValueError for what does not go together.

    What is not given has the paper's value, or without --data the built-in corpus'; but a model
    that thinks already goes on as it does.
    """
    names = {field.name for field in fields(Settings)}
    options = {name: value for name, value in given.items() if name in names}
    thought_options = {name: value for name, value in given.items() if name not in names}
    built_in, checkpoint = "data" not in options, options.get("checkpoint")
    if not built_in and checkpoint is None:
        raise ValueError("--data needs --checkpoint, the model to be trained on it")
    thinks = checkpoint and read_thought_config(checkpoint)
    if checkpoint:  # absolute: a run may be resumed from anywhere
        options["checkpoint"] = str(Path(checkpoint).resolve())
        if built_in and read_config(Path(checkpoint)).vocab_size != data.VOCAB:
            raise ValueError(f"{checkpoint} is no model of the built-in corpus: give it --data")
    if not built_in:
        options["data"] = tuple(str(Path(file).resolve()) for file in options["data"])
    if options.get("eval_data"):
        options["eval_data"] = str(Path(options["eval_data"]).resolve())
    settings = Settings(**(BUILT_IN if built_in else {}) | options)
    defaults = asdict(thinks) if thinks else BUILT_IN_THOUGHTS if built_in else {}
    thoughts = ThoughtConfig(**defaults | thought_options)
    ahead = settings.context - thoughts.n_true
    if ahead < max(settings.positions or 1, 1):
        raise ValueError(
            f"positions is {settings.positions or 'all'}; of {settings.context} tokens (context) "
            f"{max(ahead, 0)} have {thoughts.n_true} (n_true) ahead"
        )
    if checkpoint is None and settings.base_steps < 1:
        raise ValueError("base_steps is 0; without --checkpoint a base model has to be trained")
    heard = {"base_steps": checkpoint is None, "work": built_in}
    for name in [name for name in heard if name in options and not heard[name]]:
        raise ValueError(f"{name} is of the built-in corpus, which is not used here; leave it out")
    needs = {"eval_data": "data", "eval_every": "eval_data", "eval_sequences": "eval_data"}
    for name in [name for name in needs if name in options and needs[name] not in options]:
        raise ValueError(f"{name} means nothing without {needs[name]}")
    return settings, thoughts


def start_run(given: dict) -> tuple[Settings, ThoughtConfig, Path]:
    """Settings and folder of a new run, or of the one to resume, from command-line options."""
    out, resume = given.pop("out", None), given.pop("resume")
    given = PRESETS.get(given.pop("preset", None), {}) | given
    if not resume:
        free = (Path("runs") / str(number) for number in range(1, 10**9))
        run = Path(out) if out else next(run for run in free if not run.exists())
        if run.exists() and any(run.iterdir()):
            raise ValueError(f"{run} is not empty; give another --out, or --resume to continue it")
        return *make_settings(given), run
    if out is None:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    if {*given} - {"steps"}:
        raise ValueError(
            f"--resume continues with the run's own settings, but for --steps; leave out {[*given]}"
        )
    run, path = Path(out), Path(out) / "settings.json"
    saved = {"settings": {}, "thoughts": {}} | read_json(path)
    try:
        saved["settings"] |= {"data": tuple(saved["settings"].get("data", ()))} | given
        texts = dict(saved.get("texts", {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    for file, was in texts.items():
        if data.version(file) != was:
            raise ValueError(f"{file} has changed since {run} began; begin another run, on it")
    thoughts = settings_from(ThoughtConfig, saved["thoughts"], path)
    settings = settings_from(Settings, saved["settings"], path)
    if given:
        write_json(path, saved)
    return settings, thoughts, run


def run(options: argparse.Namespace) -> None:
    """Train what the options ask for; on the built-in corpus, end with the table."""
    given = dict(vars(options))
    device = given.pop("device")
    settings, thoughts, folder = start_run(given)
    if parallel:
        parallel.start(settings, device, first=partial(recover, folder / "quiet_star"))
    elif SEVERAL:
        raise ValueError("several processes (torchrun) need fast/")
    else:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop_soon)
    device = pick_device(device)
    path = "plain" if settings.plain or apply_fast is None else "fast"
    print(f"run {folder} on {device}, {torch.get_num_threads()} threads, {path} path")
    tables, glance = {}, None
    if settings.checkpoint is None:
        base = train_base(settings, thoughts, folder, device)
        tables["base model"] = evaluation.puzzle_table(base, load_tokenizer(folder))
    if not settings.data:
        tokenizer = load_tokenizer(settings.checkpoint or folder)
        glance = partial(evaluation.glance, tokenizer=tokenizer)
    model = train_thoughts(settings, thoughts, folder, device, glance=glance)
    if not settings.data:
        tables["Quiet-STaR"] = evaluation.puzzle_table(model, tokenizer)
        print(evaluation.show_puzzles(tables))
    print(f"the model is in {folder / 'quiet_star'}")


# ------------------------------------------------------------------------------ the command line


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", metavar="FOLDER", help="folder of the run; none: runs/1, runs/2, ...")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--preset", choices=PRESETS, default=argparse.SUPPRESS, help="settings for a large model")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    add_settings(parser, Settings, BUILT_IN)
    add_settings(parser, ThoughtConfig, BUILT_IN_THOUGHTS)
    execute(parser, parallel.together(run) if parallel else run, arguments)


if __name__ == "__main__":
    main()
