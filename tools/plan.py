"""The memory and the operations of a training step, counted before it is run.

    python -m tools.plan                                       the built-in corpus' small model
    python -m tools.plan --preset mistral-7b --positions 128   the shape of Mistral 7B
    python -m tools.plan --checkpoint FOLDER --micro-batch 2   the shape of a checkpoint

Options are those of train.py. The step is run on PyTorch's meta device, without numbers, on the
path that a GPU takes (support/memory.py). On a CPU, --fast needs a little less.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model import MistralConfig
from support.checkpoints import read_config
from support.device import free_memory, pick_device
from support.memory import GIGABYTE, advice, memory_plan, step_flops, thinking
from support.settings import add_settings
from support.terminal import execute, make_parser
from thoughts import ThoughtConfig
from train import BASE, BUILT_IN, BUILT_IN_THOUGHTS, PRESETS, Settings, fast_path, make_settings

SHAPES = {"mistral-7b": MistralConfig(32000, 4096, 14336, 32, 32, 8, sliding_window=4096)}


@dataclass(frozen=True)
class Work:
    """A step: `batch` sequences of T tokens, of which J positions think."""

    batch: int  # B
    T: int
    J: int

    def tokens(self, thoughts: ThoughtConfig) -> int:
        """M = T + N J (K + A + 1): the tokens of a sequence and of all steps of its thoughts."""
        steps = thoughts.thought_length + thoughts.n_true + 1
        return self.T + thoughts.n_thoughts * self.J * steps


def work_of(settings: Settings, thoughts: ThoughtConfig) -> Work:
    """The size of a step of Quiet-STaR."""
    return Work(settings.batch_size, settings.context, thinking(settings, thoughts))


def show_plan(plan: dict[str, float], free: float | None) -> str:
    """A memory plan as a line, in GB."""
    parts = ", ".join(f"{name} {size / GIGABYTE:.2f}" for name, size in plan.items())
    has = "" if free is None else f"; the device has {free / GIGABYTE:.2f} free"
    return f"memory plan (GB): {parts}{has}"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The highest rate of a large matrix product on a device, in operations per second.

    The best of five is returned.
    """
    size = 8192 if device.type == "cuda" else 768
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(6):  # the first one warms up
        synchronize(device)
        begin = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work, which is queued, before the clock is read."""
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


def run(options: argparse.Namespace) -> None:
    """Print the plan of the given options."""
    given = dict(vars(options))
    free = free_memory(pick_device(given.pop("device")))
    shape, settings, thoughts = read_shape(given)
    plan = memory_plan(shape, thoughts, settings, fast_path(settings))
    print(show_plan(plan, free))
    if free is not None and plan["total"] > free:
        print(f"it does not fit: {advice(shape, thoughts, settings, fast_path, free)}")
    elif free is not None:
        print("it fits")
    work = work_of(settings, thoughts)
    flops = work.batch * step_flops(shape, thoughts, work.T, work.J)
    tokens = work.tokens(thoughts)
    print(
        f"a step: {work.batch} sequences of M = {tokens} tokens, thoughts included; {flops:.3g} "
        "floating-point operations"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add(
        "--preset", choices=PRESETS, default=argparse.SUPPRESS, help="settings and shape of a model"
    )
    add("--device", help="cpu, cuda, mps; none: the best one available")
    add_settings(parser, Settings, BUILT_IN)
    add_settings(parser, ThoughtConfig, BUILT_IN_THOUGHTS)
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
