"""One page of what a GPU does: run this first where there is one.

    python -m tools.gpu --out gpu.md

The page has the CUDA tests, the operations that a step of Mistral 7B launches beside its time and
mfu, tokens per second of generation with and without thoughts, and the default run. Weights are
random, of the real shape, made on the device; no download is needed. An 80 GB GPU is needed.
"""

import argparse
import gc
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import fast
import train
from fast.adamw import BFloat16AdamW
from model import Mistral
from sample import generate_steps
from support import memory
from support.device import pick_device
from support.files import write_text
from support.terminal import execute, make_parser
from thoughts import QuietStar, ThoughtConfig
from tools import bench, plan

PRESET = train.Settings(**train.PRESETS["mistral-7b"])
FEW = 32  # positions, where the plain path has to fit
STEPS = {  # row: settings of a step
    "--preset mistral-7b": PRESET,
    "--preset mistral-7b --compile": replace(PRESET, compile=True),
    f"--preset mistral-7b --positions {FEW}": replace(PRESET, positions=FEW),
    f"the same, plain path, --positions {FEW}": replace(PRESET, positions=FEW, checkpointing=False),
}


def make_model(device: torch.device, config: ThoughtConfig) -> QuietStar:
    """Mistral 7B's shape in bfloat16 with random weights."""
    with device:
        base = Mistral(plan.SHAPES["mistral-7b"]).bfloat16()
    return QuietStar(base, config)


def time_steps(device, settings: train.Settings, plain: bool, count: int) -> tuple[float, int]:
    """Seconds of an optimiser step, the best of `count`, and the peak memory in bytes."""
    config = ThoughtConfig(init_id=0)
    model, work = make_model(device, config), plan.work_of(settings, config)
    AdamW = partial(BFloat16AdamW, masters=settings.masters)
    if not plain:
        AdamW = fast.apply(model, settings.checkpointing, settings.compile, settings.masters)
    optimizer = train.make_optimizer(model, settings, AdamW)
    generator, best = torch.Generator().manual_seed(0), float("inf")
    V = model.model.config.vocab_size
    for _ in range(count + 1):  # the first one warms up
        ids = torch.randint(V, (work.batch, work.T), generator=generator).to(device)
        targets = torch.ones_like(ids, dtype=torch.bool)
        plan.synchronize(device)
        begin = time.perf_counter()
        optimizer.zero_grad()
        train.batch_gradient(
            model, train.thought_loss, ids, targets, settings, config.n_true, generator
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        plan.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return best, used


def step_rows(device: torch.device, count: int) -> list[str]:
    """A table of steps: time, tokens per second, mfu, memory measured and planned."""
    shape, config = plan.SHAPES["mistral-7b"], ThoughtConfig(init_id=0)
    peak = plan.peak_flops(device, torch.bfloat16)
    rows = [
        f"mfu: share of the {peak / 1e12:.1f} TFLOP/s of a large matrix product here.",
        "",
        "| step | seconds | text tokens/s | mfu | peak memory | planned |",
        "|---|---|---|---|---|---|",
    ]
    for name, settings in STEPS.items():
        plain, work = "plain" in name, plan.work_of(settings, config)
        try:
            seconds, used = time_steps(device, settings, plain, count)
        except torch.OutOfMemoryError:
            rows.append(f"| {name} | out of memory | | | | |")
        else:
            flops = work.batch * memory.step_flops(shape, config, work.T, work.J)
            path = None if plain else train.fast_path(settings)
            total = memory.memory_plan(shape, config, settings, path)["total"]
            cells = f"{seconds:.2f} | {work.batch * work.T / seconds:.0f}"
            cells += f" | {flops / seconds / peak:.1%} | {used / 1e9:.1f} GB | {total / 1e9:.1f} GB"
            rows.append(f"| {name} | {cells} |")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        print(rows[-1], flush=True)
    return rows


def generation_rows(device: torch.device, count: int) -> list[str]:
    """Tokens per second of generation, without thoughts and with one before every token."""
    model = make_model(device, ThoughtConfig(init_id=0))
    ids = torch.randint(model.model.config.vocab_size, (1, 256)).to(device)
    rows = ["| generation, prompt of 256 tokens | tokens/s |", "|---|---|"]
    for name, writer in (("without thoughts", model.model), ("thoughts of 9 tokens", model)):
        steps = generate_steps(writer, ids, count + 1, temperature=0)
        next(steps)  # reads the prompt
        plan.synchronize(device)
        begin = time.perf_counter()
        for _ in steps:
            pass
        plan.synchronize(device)
        rows.append(f"| {name} | {count / (time.perf_counter() - begin):.2f} |")
    return rows


def command(*arguments: str) -> str:
    """The last lines that a command prints, as a block of Markdown."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()[-16:]
    seconds = f"exit code {done.returncode}, {time.perf_counter() - begin:.0f} s"
    return "\n".join(["```", f"python {' '.join(arguments)}    ({seconds})", *lines, "```"])


def run(options: argparse.Namespace) -> None:
    """Write the page; a section that is done is printed at once."""
    device, root = pick_device(options.device), Path(__file__).parents[1]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    counts = bench.count_operations(plan.SHAPES["mistral-7b"], ThoughtConfig(), PRESET.context)
    operations = [f"| {path} | {count:.0f} |" for path, count in counts.items()]
    tests = [str(root / "tests" / x) for x in ("test_cuda.py", "test_parallel_thoughts.py")]
    sections: dict[str, object] = {
        f"# {name}, torch {torch.__version__}, Python {sys.version.split()[0]}": lambda: [],
        "## CUDA tests": lambda: [command("-m", "pytest", "-q", *tests)],
        "## Operations of a step, one sequence": lambda: ["| path | operations |", "|---|---|",
                                                          *operations],
        "## Steps": lambda: step_rows(device, options.steps),
        "## Generation": lambda: generation_rows(device, 8 * options.steps),
        "## The default run": lambda: [
            command(str(root / "train.py"), "--out", str(Path(options.out).with_suffix(".run")),
                    "--device", device.type)
        ],
    }  # fmt: skip
    page = ""
    for title, section in sections.items():
        page += "\n".join([title, "", *section(), "", ""])
        write_text(Path(options.out), page)
        print(f"{title}: done", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", default="gpu.md", metavar="FILE", help="the page (gpu.md)")
    add("--steps", type=int, default=4, help="steps of each kind, the best of which counts (4)")
    add("--device", help="cpu, cuda; none: the best one available")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
