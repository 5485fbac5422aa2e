"""What a step of training costs before it is run: memory and arithmetic, counted from shapes.

    python -m tools.plan                                       the built-in corpus' small model
    python -m tools.plan --preset mistral-7b --positions 128   the shape of Mistral 7B
    python -m tools.plan --checkpoint FOLDER --micro-batch 2   the shape of a checkpoint

Options are those of train.py. The plan is of its fast path; without --fast more is kept.
Letters as in model.py and thoughts.py; rows = N * J thoughts of a sequence.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model import MistralConfig
from support.checkpoints import read_config
from support.device import DTYPES, free_memory, pick_device
from support.settings import add_settings
from support.terminal import execute, make_parser
from thoughts import ThoughtConfig
from train import BASE, BUILT_IN, BUILT_IN_THOUGHTS, PRESETS, Settings, make_settings

GIGABYTE = 1e9
SHAPES = {"mistral-7b": MistralConfig(32000, 4096, 14336, 32, 32, 8, sliding_window=4096)}


@dataclass(frozen=True)
class Work:
    """A step: sequences of T tokens of which J think, `at_once` of them in a forward pass."""

    batch: int  # B, sequences in a step
    at_once: int  # sequences in a micro-batch
    T: int
    J: int

    def tokens(self, thoughts: ThoughtConfig) -> int:
        """M = T + N J (K + A + 1): the tokens of a sequence and of all its thoughts' steps."""
        steps = thoughts.thought_length + thoughts.n_true + 1
        return self.T + thoughts.n_thoughts * self.J * steps


def work_of(settings: Settings, thoughts: ThoughtConfig) -> Work:
    """The shape of a step of Quiet-STaR."""
    B, T = settings.batch_size, settings.context
    return Work(B, settings.micro_batch or B, T, settings.positions or T - thoughts.n_true)


def parameters(model: MistralConfig) -> tuple[int, int, int]:
    """Parameters of all layers, of the head, and all of Quiet-STaR together."""
    D, V = model.hidden_size, model.vocab_size
    q, kv = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    layer = 2 * D * q + 2 * D * kv + 3 * D * model.intermediate_size + 2 * D
    layer += {"qwen2": q + 2 * kv, "qwen3": 2 * model.head_dim}.get(model.model_type, 0)
    layers, head = model.num_hidden_layers * layer, V * D
    mixing = 3 * D * D + 3 * D
    embeddings = 1 if model.tie_word_embeddings else 2
    return layers, head, layers + embeddings * head + D + mixing + 2 * D


def step_flops(model: MistralConfig, thoughts: ThoughtConfig, work: Work) -> float:
    """Floating-point operations of one optimiser step, forward and backward.

    Two per multiply-add, and twice the forward pass for the backward pass; what checkpointing
    computes again does not count (the convention of model FLOP utilisation).
    """
    N, K, A, T = thoughts.n_thoughts, thoughts.thought_length, thoughts.n_true, work.T
    rows, steps = N * work.J, K + A + 1
    layers, head, _ = parameters(model)
    through_layers = layers * (T + rows * steps)
    through_head = head * (T - 1 + rows * (K + A))
    mixing = 3 * model.hidden_size**2 * rows * A
    # a query sees half the text, and half of its thought
    keys = T * T / 2 + rows * steps * (T + steps + 1) / 2
    width = model.num_hidden_layers * model.num_attention_heads * model.head_dim
    return 6.0 * work.batch * (through_layers + through_head + mixing + 2 * width * keys)


def memory_plan(
    model: MistralConfig,
    thoughts: ThoughtConfig,
    work: Work,
    weight_bytes: int,
    optimizer_bytes: int,
    checkpointing: bool,
) -> dict[str, float]:
    """Bytes that training needs: weights, gradients, optimiser, activations, and their total.

    weight_bytes: of a parameter and of an activation, 2 or 4; optimizer_bytes: of the optimiser's
    state per parameter. Activations are those kept for the backward pass and the largest that
    come and go: three tensors of logits, and one layer's step while it is computed again.
    """
    D, H = model.hidden_size, model.num_attention_heads * model.head_dim
    kv, inner = model.num_key_value_heads * model.head_dim, model.intermediate_size
    N, K, A = thoughts.n_thoughts, thoughts.thought_length, thoughts.n_true
    L = model.num_hidden_layers
    rows, steps = N * work.J, K + A + 1
    wide = max(weight_bytes, 4) / weight_bytes  # norms and logits are in float32
    layer = 2 * (1 + 2 * wide) * D + 3 * H + 2 * kv + 4 * inner  # of a token in a layer
    kept = D + 2 * H + 2 * kv if checkpointing else layer
    text = work.T * (L * (kept + 2 * H) + 3 * D)
    thought = rows * steps * L * kept
    ends = rows * (steps * (2 + wide) * D + A * 8 * D)  # last norms, heads, mixing
    passing = 3 * wide * max(rows * A, work.T) * model.vocab_size + 2 * rows * (A + 1) * layer
    _, _, count = parameters(model)
    plan = {
        "weights": count * weight_bytes,
        "gradients": count * weight_bytes,
        "optimiser": count * optimizer_bytes,
        "activations": work.at_once * (text + thought + ends + passing) * weight_bytes,
    }
    return plan | {"total": sum(plan.values())}


def show_plan(plan: dict[str, float], available: float | None) -> str:
    """The plan as a line, in GB."""
    parts = ", ".join(f"{name} {size / GIGABYTE:.2f}" for name, size in plan.items())
    has = "" if available is None else f"; the device has {available / GIGABYTE:.2f} free"
    return f"memory plan (GB): {parts}{has}"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The most operations per second that a large matrix product reaches here, best of five."""
    size = 8192 if device.type == "cuda" else 768
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(6):  # the first warms up
        synchronize(device)
        begin = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for the device: its work is queued, and a clock read before it ends means nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------ the command line


def read_shape(given: dict) -> tuple[MistralConfig, Settings, ThoughtConfig]:
    """The model's shape and both kinds of settings, from options of train.py."""
    preset = given.pop("preset", None)
    shape = SHAPES.get(preset, BASE)
    if "checkpoint" in given:
        shape = read_config(Path(given["checkpoint"]))
    if shape is not BASE:  # nothing is read from either of them
        given = {"checkpoint": preset, "data": ()} | given
    return shape, *make_settings(PRESETS.get(preset, {}) | given)


def hints(settings: Settings) -> list[str]:
    """What takes less memory than the settings do."""
    unused = {
        "--micro-batch 1": (settings.micro_batch or settings.batch_size) > 1,
        "--checkpointing": not settings.checkpointing,
        "--dtype bfloat16 --no-masters": settings.masters or settings.dtype == "float32",
    }
    smaller = "a smaller --positions, --context, --n-thoughts or --thought-length, a smaller model"
    return [*filter(unused.get, unused), smaller]


def run(options: argparse.Namespace) -> None:
    """Print the plan of what the options ask for."""
    given = dict(vars(options))
    free = free_memory(pick_device(given.pop("device")))
    shape, settings, thoughts = read_shape(given)
    work, weight = work_of(settings, thoughts), DTYPES[settings.dtype].itemsize
    state = 8 if weight == 4 else 12 if settings.masters else 4  # bytes a parameter: fast/adamw.py
    plan = memory_plan(shape, thoughts, work, weight, state, settings.checkpointing)
    print(show_plan(plan, free))
    if free is not None:
        fits = plan["total"] <= free
        print("it fits" if fits else f"it does not fit: try {', '.join(hints(settings))}")
    flops = step_flops(shape, thoughts, work)
    print(
        f"a step: {work.batch} sequences of M = {work.tokens(thoughts)} tokens, "
        f"thoughts included; {flops:.3g} floating-point operations"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=SHAPES, default=argparse.SUPPRESS, help="settings and shape of a model")
    add("--device", help="cpu, cuda, mps; none: the best there is")
    add_settings(parser, Settings, BUILT_IN)
    add_settings(parser, ThoughtConfig, BUILT_IN_THOUGHTS)
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
