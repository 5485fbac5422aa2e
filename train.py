"""Train Quiet-STaR.

    python train.py                                        the built-in corpus: a minute or two
    python train.py --checkpoint FOLDER --data FILE ...    a pretrained model and your own text
    python train.py --checkpoint runs/1/quiet_star         go on from a model that thinks already
    python train.py --out FOLDER --resume                  continue a run that was stopped
    torchrun --nproc-per-node 8 train.py --fast ...        eight GPUs

Without --checkpoint there are two stages. A small base model is trained on puzzles most of which
explain their answer (support/corpus.py). Then Quiet-STaR trains it on puzzles most of which do not.
The run ends with a table of what the thoughts are worth. With --checkpoint, Quiet-STaR starts from
that model; with --data, the default settings are the paper's.

A run is a folder: settings.json, metrics.jsonl, and a checkpoint of each stage (base/, quiet_star/)
with weights, tokenizer and training state. --resume continues it with exactly the same losses.
"""

import argparse
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import support  # noqa: F401 - before torch: sets OMP_WAIT_POLICY, read when torch is imported

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eval as evaluation
from model import Mistral, MistralConfig, check_range, load_mistral
from support import corpus, runs
from support.checkpoints import load, read_config, read_thought_config
from support.device import DTYPES, pick_device
from support.memory import check_memory
from support.settings import add_settings
from support.terminal import execute, make_parser
from support.text import read_tokens, tokenize
from support.tokenizer import load_tokenizer
from thoughts import (
    Output,
    QuietStar,
    ThoughtConfig,
    count_targets,
    em_dash_id,
    quiet_star_loss,
)

SEVERAL = int(os.environ.get("WORLD_SIZE", 1)) > 1  # whether torchrun started several processes
if SEVERAL:
    from fast import parallel


@dataclass(frozen=True)
class Settings:
    """What a run does. The defaults are the paper's, for Mistral 7B."""

    checkpoint: str | None = None  # folder of a pretrained model; none: the built-in corpus
    data: tuple[str, ...] = ()  # text, .jsonl ("text", or "question" and "answer"), or one folder
    seed: int = 0  # of weights, batches and thoughts
    steps: int = 100  # optimiser steps of Quiet-STaR
    batch_size: int = 8  # sequences per optimiser step of Quiet-STaR
    micro_batch: int | None = None  # sequences per forward pass, to save memory; none: the batch
    context: int = 256  # tokens in a sequence (T)
    positions: int | None = None  # positions that think, drawn anew every step (J); none: all
    lr: float = 1e-6  # learning rate of AdamW
    mixing_lr: float | None = None  # learning rate of the mixing head; none: lr
    warmup: int = 20  # first steps, in which the learning rate rises to lr
    cooldown: float = 0.0  # share of the steps, at the end, in which the learning rate falls to 0
    weight_decay: float = 1e-3  # of AdamW
    clip: float = 1.0  # largest norm of the gradient
    save_every: int = 50  # steps between checkpoints
    keep: int = 0  # earlier models to keep, beside the last checkpoint
    eval_data: str | None = None  # held-out text, a file or a folder as for data; none: not used
    eval_every: int = 50  # steps between two evaluations on it
    eval_sequences: int = 16  # sequences of it at most; the same ones at every evaluation
    fast: bool = False  # fast/: the same results in less time and memory
    dtype: str = "float32"  # of weights and activations; bfloat16 needs fast
    masters: bool = True  # float32 copies of bfloat16 weights; without: stochastic rounding
    checkpointing: bool = False  # keep fewer activations, compute them twice; needs fast
    compile: bool = False  # torch.compile the layers; needs fast
    base_steps: int = 0  # built-in corpus: steps of the base model at most
    work: float = corpus.WORK  # built-in corpus: share of asides that work; the others hum

    def __post_init__(self):
        check_range(self, 1, math.inf, "steps", "batch_size", "micro_batch", "positions")
        check_range(self, 1, math.inf, "save_every", "eval_every", "eval_sequences")
        check_range(self, 2, math.inf, "context")
        check_range(self, 0, math.inf, "seed", "warmup", "base_steps", "keep")
        check_range(self, 0, 100, "lr", "mixing_lr", "weight_decay")
        check_range(self, 1e-9, 1e9, "clip")
        check_range(self, 0, 1, "cooldown", "work")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype}; it must be {' or '.join(DTYPES)}")
        if not self.fast and (self.checkpointing or self.compile or self.dtype == "bfloat16"):
            raise ValueError("--checkpointing, --compile and --dtype bfloat16 need --fast")
        if not self.masters and self.dtype != "bfloat16":
            raise ValueError("masters is off, which is for --dtype bfloat16; give --masters")


PRESETS = {  # what differs from the defaults: for one GPU of 80 GB, and for 135 M to 2 B parameters
    "mistral-7b": {
        "fast": True, "dtype": "bfloat16", "masters": False, "checkpointing": True,
        "micro_batch": 1,
    },
    "small": {
        "micro_batch": 1, "positions": 32, "lr": 3e-5, "mixing_lr": 3e-4, "cooldown": 0.5,
        "embedding_scale": 1.0, "reinforce_temperature": 1.0, "policy_weight": 10.0,
    },
}  # fmt: skip

# What differs on the built-in corpus: embeddings and rates of a model that is 128 wide.
BUILT_IN = {
    "steps": 150, "cooldown": 1.0, "context": 64, "positions": 16, "lr": 2e-4, "mixing_lr": 3e-3,
    "base_steps": 1500,
}  # fmt: skip
BUILT_IN_THOUGHTS = {
    "thought_length": corpus.ASIDE, "n_true": 2, "embedding_scale": 1.0,
    "reinforce_temperature": 1.0, "policy_weight": 10.0,
}  # fmt: skip

BASE = MistralConfig(corpus.VOCAB, 128, 352, 2, 4, 4)  # 0.5 M parameters: bytes and the em dash
BASE_SETTINGS = {
    "batch_size": 16, "lr": 1e-3, "warmup": 50, "cooldown": 0.0, "micro_batch": None,
    "positions": None, "fast": False, "dtype": "float32", "masters": True, "checkpointing": False,
    "compile": False,
}  # fmt: skip
BASE_EXPLAINED, EXPLAINED = 0.8, 0.1  # share of lines with an aside, before and in Quiet-STaR
CORPUS_LINES = 40_000


# ------------------------------------------------------------------------------------- the losses


def language_loss(model: Mistral, ids: Tensor, targets: Tensor, positions, counts, generator):
    """The language-model loss: the mean nll of a batch's targets in nats, and its metrics."""
    logits = model(ids)[:, :-1].float().flatten(0, 1)  # [B * (T-1), V]
    nll = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    loss = (nll * targets[:, 1:].flatten()).sum() / max(counts[0], 1)
    return loss, {"loss": loss.detach()}


def thought_loss(model: QuietStar, ids: Tensor, targets: Tensor, positions, counts, generator):
    """The Quiet-STaR loss: Algorithm 1 on a batch, and its metrics."""
    output = model(ids, positions=positions, target_mask=targets, generator=generator)
    loss, metrics = quiet_star_loss(output, model.config, counts)
    return loss, metrics | {"distinct": distinct_thoughts(output, counts)}


def distinct_thoughts(output: Output, counts: tuple[int, int]) -> Tensor:
    """The share of thoughts that are distinct within their sequence, at valid positions."""
    valid = output.valid.all(0)  # [B, J]
    found = 0
    for thoughts, where in zip(output.thought_ids, valid, strict=True):  # [N, J, K], [J]
        if where.any() and thoughts.shape[-1]:
            found += len(thoughts[:, where].flatten(0, 1).unique(dim=0))
    return torch.tensor(found / max(output.thought_ids.shape[1] * counts[1], 1))


# ------------------------------------------------------------------------------------- the loop


def batch_gradient(model, loss_of, ids, targets, settings: Settings, n_true: int, generator):
    """Add the gradient of a batch ids, targets [B, T] to the parameters -> Counter of metrics.

    However a batch is split into micro-batches, gradient, metrics and thoughts are the same: the
    loss of every part is divided by the counts of the whole batch.
    """
    positions = torch.arange(ids.shape[1] - n_true)  # [J] all that have n_true targets
    if settings.positions:  # a random subset gives an unbiased estimate of the same loss
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


def set_learning_rates(optimizer, step: int, settings: Settings) -> None:
    """Linear warm-up, constant, linear cool-down over the last steps. step counts from 0."""
    rising = (step + 1) / max(settings.warmup, 1)
    falling = (settings.steps - step) / max(settings.cooldown * settings.steps, 1)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * min(1.0, rising, falling)


def train(
    model, loss_of, optimizer, tokens, settings: Settings, n_true: int, folder: Path,
    look=None, look_every: int = 10, gradient=batch_gradient,
) -> None:  # fmt: skip
    """Train a model on text.Tokens. Checkpoints go to `folder`, where training continues.

    If `folder` has a checkpoint, the caller has loaded the model from it.
    loss_of(model, ids, targets, positions, counts, generator) -> loss, metrics: thought_loss, or
    another objective (tools/objectives.py). look(model) -> a line to print, whether training ends
    here, and metrics; it is called every look_every steps. gradient: batch_gradient, or that of
    several processes.
    """
    device, B, T = next(model.parameters()).device, settings.batch_size, settings.context
    generator = torch.Generator().manual_seed(settings.seed)
    record = runs.Record(model, optimizer, generator, settings, folder, look, look_every)
    for step in range(record.start, settings.steps):
        ids, targets = tokens.batch(step, B, T, settings.seed, device)  # [B, T]
        optimizer.zero_grad()
        metrics = gradient(model, loss_of, ids, targets, settings, n_true, generator)
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), settings.clip).item()
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            raise ValueError(
                f"step {step + 1} of {folder.name}: loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}; the last checkpoint is kept; try a smaller --lr"
            )
        set_learning_rates(optimizer, step, settings)
        optimizer.step()
        if record.after(step + 1, metrics):  # log, look, save, stop
            return


# ------------------------------------------------------------------------------------- the stages


def make_optimizer(model: nn.Module, settings: Settings, AdamW=torch.optim.AdamW):
    """AdamW with the rates of the settings; the mixing head has a learning rate of its own."""
    head = [p for name, p in model.named_parameters() if name.startswith("mixing_head.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("mixing_head.")]
    mixing_lr = settings.lr if settings.mixing_lr is None else settings.mixing_lr
    groups = [{"params": rest, "peak_lr": settings.lr}, {"params": head, "peak_lr": mixing_lr}]
    return AdamW([group for group in groups if group["params"]], weight_decay=settings.weight_decay)


def fast_path(settings: Settings):
    """The function that makes a model use fast/, or None without --fast."""
    if not settings.fast:
        return None
    import fast

    return partial(fast.apply, checkpointing=settings.checkpointing)


def train_base(settings: Settings, thoughts: ThoughtConfig, run: Path, device) -> Mistral:
    """Stage 1 on the built-in corpus: a language model of lines that explain themselves."""
    runs.make_folder(settings, thoughts, run)
    torch.manual_seed(settings.seed)
    folder = run / "base"
    model = (load_mistral(folder) if runs.recover(folder) else Mistral(BASE)).to(device)
    if not runs.recover(run / "quiet_star"):
        first = replace(settings, steps=settings.base_steps, **BASE_SETTINGS)
        text = corpus.make_corpus(settings.seed, CORPUS_LINES, BASE_EXPLAINED, settings.work)
        tokenizer, optimizer = load_tokenizer(run), make_optimizer(model, first)
        tokens = tokenize([text], tokenizer)
        look = partial(evaluation.look_at_puzzles, tokenizer=tokenizer)
        with runs.hold(run):
            train(model, language_loss, optimizer, tokens, first, 1, folder, look, look_every=50)
    return model


def thinking_model(settings: Settings, thoughts: ThoughtConfig, run: Path, device) -> QuietStar:
    """The model that Quiet-STaR starts from, or the run's own if it is resumed.

    start and end of a new model are initialised with the em dash. A model that thinks already keeps
    its weights, and takes the settings of this run: N, K and A may differ.
    """
    dtype = DTYPES[settings.dtype]
    if runs.recover(run / "quiet_star"):
        model, _ = load(run / "quiet_star", device, dtype)
        return model
    torch.manual_seed(settings.seed)
    model, tokenizer = load(settings.checkpoint or run / "base", device, dtype)
    if isinstance(model, QuietStar):
        old, ids = model.config, ("start_id", "end_id", "init_id")
        model.config = replace(thoughts, **{name: getattr(old, name) for name in ids})
        for embedding in (model.start_embedding, model.end_embedding):  # the same in use
            embedding.data *= old.embedding_scale / thoughts.embedding_scale
        return model
    init_id = em_dash_id(tokenizer)
    print(f"start and end begin as the embedding of {tokenizer.spell([init_id])!r}")
    return QuietStar(model, replace(thoughts, init_id=init_id))


def train_thoughts(
    settings: Settings, thoughts: ThoughtConfig, run: Path, device, loss_of=thought_loss,
    model_of=thinking_model, look=None,
) -> QuietStar:  # fmt: skip
    """Stage 2: train Quiet-STaR in a run's folder, or another loss or model if they are given."""
    source = Path(settings.checkpoint or run / "base")
    shape = read_config(source)  # an unreadable checkpoint fails before the folder is made
    tokenizer, look_every = load_tokenizer(source), 10
    if settings.data and not SEVERAL:
        check_memory(shape, thoughts, settings, fast_path, device)
    if settings.data:
        print(f"reading {', '.join(settings.data)}", flush=True)
        tokens = read_tokens(settings.data, tokenizer)
    else:
        text = corpus.make_corpus(settings.seed + 1, CORPUS_LINES, EXPLAINED, settings.work)
        tokens = tokenize([text], tokenizer)
    ids, targets = tokens.batch(0, settings.batch_size, settings.context, settings.seed, device)
    if settings.eval_data:
        held_out = read_tokens([settings.eval_data], tokenizer)
        look = evaluation.text_look(held_out, settings.eval_sequences, settings.context, device)
        look_every = settings.eval_every
    model, AdamW = model_of(settings, thoughts, run, device), torch.optim.AdamW
    if settings.fast:
        import fast

        options = settings.checkpointing, settings.compile, settings.masters
        AdamW = fast.enter(model, ids, targets, *options)
    optimizer = make_optimizer(model, settings, AdamW)
    gradient = batch_gradient
    if SEVERAL:
        gradient = parallel.gradient_of(model, optimizer, batch_gradient)
    runs.make_folder(settings, thoughts, run)
    with runs.hold(run):
        train(
            model, loss_of, optimizer, tokens, settings, thoughts.n_true, run / "quiet_star",
            look, look_every, gradient,
        )  # fmt: skip
    return model


# ------------------------------------------------------------------------------ the command line


def make_settings(given: dict) -> tuple[Settings, ThoughtConfig]:
    """Settings and thought config from options. Raises ValueError for what does not go together.

    What is not given has the paper's value, or without --data that of the built-in corpus; but a
    model that thinks already goes on with its own thought config.
    """
    names = {field.name for field in fields(Settings)}
    options = {name: value for name, value in given.items() if name in names}
    thought_options = {name: value for name, value in given.items() if name not in names}
    built_in, checkpoint = "data" not in options, options.get("checkpoint")
    if not built_in and checkpoint is None:
        raise ValueError("--data needs --checkpoint, the model to be trained on it")
    if checkpoint and built_in and read_config(checkpoint).vocab_size != corpus.VOCAB:
        raise ValueError(f"{checkpoint} is no model of the built-in corpus: give it --data")
    settings = Settings(**(BUILT_IN if built_in else {}) | runs.absolute(options))
    thinks = checkpoint and read_thought_config(checkpoint)
    defaults = asdict(thinks) if thinks else BUILT_IN_THOUGHTS if built_in else {}
    thoughts = ThoughtConfig(**defaults | thought_options)
    runs.check_ahead(settings, thoughts)
    if checkpoint is None and settings.base_steps < 1:
        raise ValueError("base_steps is 0; without --checkpoint a base model has to be trained")
    heard = {"base_steps": checkpoint is None, "work": built_in}
    for name in [name for name in heard if name in options and not heard[name]]:
        raise ValueError(f"{name} is of the built-in corpus, which is not used here; leave it out")
    needs = {"eval_data": "data", "eval_every": "eval_data", "eval_sequences": "eval_data"}
    for name in [name for name in needs if name in options and needs[name] not in options]:
        raise ValueError(f"{name} has no effect without {needs[name]}; leave it out")
    return settings, thoughts


def run(options: argparse.Namespace) -> None:
    """Train as the options say. On the built-in corpus, end with the table."""
    given = dict(vars(options))
    device, preset = given.pop("device"), PRESETS.get(given.pop("preset", None), {})
    settings, thoughts, folder = runs.open_run(preset, given, make_settings, Settings)
    if SEVERAL:
        parallel.start(settings, device, first=partial(runs.recover, folder / "quiet_star"))
    else:
        runs.stop_on_signals()
    device = pick_device(device)
    path = "fast path" if settings.fast else "plain path"
    print(f"run {folder} on {device}, {torch.get_num_threads()} threads, {path}")
    tables, look = {}, None
    if settings.checkpoint is None:
        base = train_base(settings, thoughts, folder, device)
        tables["base model"] = evaluation.puzzle_table(base, load_tokenizer(folder))
    if not settings.data:
        tokenizer = load_tokenizer(settings.checkpoint or folder)
        look = partial(evaluation.look_at_puzzles, tokenizer=tokenizer)
    model = train_thoughts(settings, thoughts, folder, device, look=look)
    if not settings.data:
        tables["Quiet-STaR"] = evaluation.puzzle_table(model, tokenizer)
        print(evaluation.show_puzzles(tables))
    print(f"the model is in {folder / 'quiet_star'}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", metavar="FOLDER", help="folder of the run; none: runs/1, runs/2, ...")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--preset", choices=PRESETS, default=argparse.SUPPRESS, help="settings for such a model")
    add("--device", help="cpu, cuda, mps; none: the best one available")
    add_settings(parser, Settings, BUILT_IN)
    add_settings(parser, ThoughtConfig, BUILT_IN_THOUGHTS)
    execute(parser, parallel.together(run) if SEVERAL else run, arguments)


if __name__ == "__main__":
    main()
