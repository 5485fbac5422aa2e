"""What Quiet-STaR costs, as ratios within one run.

    python -m tools.bench                  steps on the 'small' model, a few lengths of text
    python -m tools.bench --context 2048 --positions 64
    python -m tools.bench tricks           each trick of fast/ alone, at T = 256
    python -m tools.bench generation       a token with a thought against K + 1 steps without
    python -m tools.bench operations --preset mistral-7b    operations that a step launches
    python -m tools.bench bfloat16 --model FOLDER --data FILE    rounding against float32

A step handles M = T + N J (K + A + 1) tokens. The floor of its time is M times what the same model
spends per token in a plain language-model step, forward and backward, head and loss included; the
floor of its memory M / T times what a plain step saves for its backward pass. Times are medians of
steps that alternate, so that a busy machine slows all alike; memory is the peak over the loaded
model, in a process of its own. "plain" is what train.py does, "fast" what its --fast does.
"""

import argparse
import copy
import os
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fast
from fast.linear import add_gradients_at_once
from model import Mistral, MistralConfig
from sample import generate_steps
from support import memory
from support.checkpoints import load
from support.terminal import execute, make_parser
from support.text import read_tokens
from thoughts import QuietStar, ThoughtConfig, quiet_star_loss, reward
from tools import plan

SMALL = MistralConfig(4096, 288, 768, 6, 6, 2)  # 7.7 M parameters
MEGABYTE = 1e6


def attention_alone(model: QuietStar) -> None:
    """The fast attention of thoughts, and nothing else of fast/."""
    model.thought_cache = fast.FastThoughtCache


def logp_alone(model: QuietStar) -> None:
    """log p without keeping logits, and nothing else of fast/."""
    model.token_logits, model.token_logp = fast.token_logits, fast.token_logp


def gradients_alone(model: QuietStar) -> None:
    """Gradients of weights that are added to .grad at once, and nothing else of fast/."""
    add_gradients_at_once(model.model.layers)


PATHS: dict[str, Callable[[QuietStar], object]] = {
    "plain": lambda model: None,
    "attention": attention_alone,
    "logp": logp_alone,
    "gradients": gradients_alone,
    "fast": fast.apply,
    "fast, checkpointing": partial(fast.apply, checkpointing=True),
}


@dataclass(frozen=True)
class Case:
    """One row of the table: a text of T tokens, thoughts at all positions with A targets."""

    T: int
    K: int = 9
    A: int = 4
    N: int = 2
    positions: int | None = None  # J, spread evenly; none: all that have A targets

    @property
    def tokens(self) -> int:
        """M, the tokens that a step handles."""
        J = self.positions or self.T - self.A
        return plan.Work(1, self.T, J).tokens(ThoughtConfig(self.N, self.K, self.A))


CASES = (Case(64), Case(256), Case(512), Case(512, K=13, A=8))


def make(case: Case, path: str = "plain") -> tuple[QuietStar, Tensor]:
    """The small model with random weights, and a random text [1, T]."""
    torch.manual_seed(0)
    model = QuietStar(Mistral(SMALL), ThoughtConfig(case.N, case.K, case.A, init_id=0))
    PATHS[path](model)
    return model, torch.randint(SMALL.vocab_size, (1, case.T))


def plain_loss(model: QuietStar, ids: Tensor) -> Tensor:
    """The language-model loss of the base model."""
    return F.cross_entropy(model.model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def plain_step(model: QuietStar, ids: Tensor) -> None:
    """A language-model step: forward and backward."""
    plain_loss(model, ids).backward()
    model.zero_grad()


def quiet_step(model: QuietStar, ids: Tensor, positions: int | None = None) -> None:
    """A Quiet-STaR step: forward and backward."""
    where = torch.arange(ids.shape[1] - model.config.n_true)
    if positions:
        where = where[:: len(where) // positions][:positions]
    quiet_star_loss(model(ids, positions=where), model.config)[0].backward()
    model.zero_grad()


def seconds(step: Callable[[QuietStar, Tensor], None], model: QuietStar, ids: Tensor) -> float:
    """Wall time of one step."""
    begin = time.perf_counter()
    step(model, ids)
    return time.perf_counter() - begin


def time_steps(case: Case, paths: list[str], repeats: int) -> tuple[float, list[float]]:
    """Median seconds of a plain language-model step, and of a Quiet-STaR step on each path."""
    models = [make(case, path)[0] for path in paths]
    ids = make(case)[1]
    plain, quiet = [], []
    for _ in range(repeats + 1):  # the first is warm-up
        plain.append(statistics.median(seconds(plain_step, models[0], ids) for _ in range(5)))
        thinking = partial(quiet_step, positions=case.positions)
        quiet.append([seconds(thinking, model, ids) for model in models])
    medians = [statistics.median(times) for times in zip(*quiet[1:], strict=True)]
    return statistics.median(plain[1:]), medians


def saved_bytes(case: Case) -> int:
    """Bytes of the activations that a plain step keeps for its backward pass."""
    model, ids = make(case)
    weights = {p.data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = plain_loss(model, ids)
    assert loss.requires_grad  # keeps the graph, and with it every storage, alive until here
    return sum(storages.values())


def peak_bytes(case: Case, path: str) -> int:
    """Peak resident memory of a Quiet-STaR step over that of the loaded model."""
    torch.set_num_threads(1)
    model, ids = make(case, path)
    quiet_step(model, ids[:, : case.A + 4])  # what loads on first use
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak; Linux only
    before = resident("VmRSS")
    quiet_step(model, ids, case.positions)
    return resident("VmHWM") - before


def in_its_own_process(measure: Callable, *arguments):
    """measure(*arguments) in a fresh process, where nothing is left from other measurements.

    Its malloc gives back what is freed, so that memory is a need, not a habit.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def resident(field: str) -> int:
    """This process' resident bytes: VmRSS now, VmHWM at their peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def show_row(case: Case, paths: list[str], repeats: int) -> None:
    """Time and memory of a case over their floors, on each path."""
    plain, times = time_steps(case, paths, repeats)
    floor, least = plain * case.tokens / case.T, saved_bytes(case) * case.tokens / case.T
    head = f"{case.T:4d}  {case.K:2d} {case.A:2d} {case.tokens:6d}  {plain:8.4f}  {floor:7.3f} s"
    for path, quiet in zip(paths, times, strict=True):
        peak = in_its_own_process(peak_bytes, case, path)
        print(
            f"{head}  {path:20}{quiet:7.3f} s  {quiet / floor:6.3f}  {peak / MEGABYTE:6.0f} MB  "
            f"{peak / least:6.3f}",
            flush=True,
        )


HEAD = "   T   K  A      M   LM step    floor    path                time      ratio   peak   ratio"


def bench_steps(options: argparse.Namespace) -> None:
    """Training steps against their floors, on the fast path and on the plain one."""
    given = {"K": options.thought_length, "A": options.n_true, "positions": options.positions}
    given = {name: value for name, value in given.items() if value is not None}
    print(HEAD)
    for case in (Case(options.context),) if options.context else CASES:
        paths = ["fast, checkpointing"] if options.checkpointing else ["fast", "plain"]
        show_row(replace(case, **given), paths, options.repeats)


def bench_tricks(options: argparse.Namespace) -> None:
    """What each trick of fast/ brings alone."""
    print(HEAD)
    show_row(Case(options.context or 256), list(PATHS), options.repeats)


def bench_generation(options: argparse.Namespace) -> None:
    """A token of a thinking model against K + 1 cached steps of the same model without thoughts."""
    K, new = options.thought_length, 16
    K = Case.K if K is None else K
    model, _ = make(Case(16, K=K))
    print("prompt   plain step s   floor s    ours s   ratio")
    for length in (64, 1024):
        ids = torch.randint(SMALL.vocab_size, (1, length))
        plain, ours = [], []
        for _ in range(options.repeats + 1):  # the first is warm-up
            for times, generator, tokens in (
                (plain, model.model, new * (K + 1)),
                (ours, model, new),
            ):
                steps = generate_steps(generator, ids, tokens + 1, temperature=0)
                next(steps)  # reads the prompt
                begin = time.perf_counter()
                for _ in steps:
                    pass
                times.append((time.perf_counter() - begin) / tokens)
        step, token = statistics.median(plain[1:]), statistics.median(ours[1:])
        floor = (K + 1) * step
        print(f"{length:6d}   {step:12.5f}  {floor:8.4f}  {token:8.4f}  {token / floor:6.3f}")


def count_operations(shape: MistralConfig, thoughts: ThoughtConfig, T: int) -> dict[str, float]:
    """Operations of a step with one sequence on the path of a GPU, forward and backward.

    Views are left out. RMSNorm and the attention of the text count as one operation, as on CUDA.
    """
    step, J = (shape, thoughts, 1, T), T - thoughts.n_true
    counts = {"language-model step": memory.step_operations(*step, 0, torch.bfloat16, None)}
    for name in [name for name in PATHS if name != "attention"]:  # that is for a CPU only
        counts[name] = memory.step_operations(*step, J, torch.bfloat16, PATHS[name])
    return counts


def bench_operations(options: argparse.Namespace) -> None:
    """Operations that a step launches. A GPU waits if they are shorter than a launch takes."""
    shape = plan.SHAPES[options.preset] if options.preset else SMALL
    given = {"thought_length": options.thought_length, "n_true": options.n_true}
    thoughts = ThoughtConfig(**{name: value for name, value in given.items() if value is not None})
    print(f"{'path':24}operations   at 10 us a launch")
    for path, count in count_operations(shape, thoughts, options.context or 256).items():
        print(f"{path:24}{count:10.0f}   {1e-5 * count:12.2f} s")


def bench_bfloat16(options: argparse.Namespace) -> None:
    """How far results in bfloat16 are from float32, with the same rounded weights and thoughts.

    The bfloat16 model runs on the fast path, as in training; the float32 model on the plain one.
    """
    if not (options.model and options.data):
        raise ValueError("bfloat16 needs --model, a thinking model, and --data, a text")
    exact, tokenizer = load(options.model, torch.device("cpu"), torch.float32)
    if not isinstance(exact, QuietStar):
        raise ValueError(f"{options.model} is a plain model; bfloat16 needs one that thinks")
    narrow = copy.deepcopy(exact).bfloat16()
    narrow.mixing_head.float()
    exact.load_state_dict(narrow.state_dict())  # the same rounded weights
    fast.apply(narrow)
    text = read_tokens([options.data], tokenizer)
    ids, targets = text.batch(0, 4, options.context or 256, 0, torch.device("cpu"))
    positions = torch.arange(ids.shape[1] - exact.config.n_true)[::4]
    thoughts, found = exact(ids, positions=positions, target_mask=targets).thought_ids, []
    for model in (exact, narrow):
        output = model(ids, thoughts, positions, targets)
        quiet_star_loss(output, model.config)[0].backward()
        r = reward(output.talk_nll, output.base_nll, positions, output.valid)
        found.append({
            "log p of a thought": output.thought_logp.sum(-1),
            "nll without a thought": output.base_nll,
            "nll with a thought": output.talk_nll,
            "w": output.weight,
            "reward r": r,
            "gradient": torch.cat([p.grad.float().flatten() for p in model.parameters()]),
        })  # fmt: skip
    print(f"{'':24}       mean  deviation  rms error mean error  correlation")
    for name, x in found[0].items():
        x, y = x.detach().flatten(), found[1][name].detach().flatten()
        error, both = y - x, torch.stack([x, y])
        numbers = (x.mean(), x.std(), error.pow(2).mean().sqrt(), error.mean())
        print(f"{name:24}" + "".join(f"{n:11.2e}" for n in numbers), end="")
        print(f"{torch.corrcoef(both)[0, 1]:13.4f}")


BENCHES = {
    "operations": bench_operations,
    "steps": bench_steps,
    "tricks": bench_tricks,
    "generation": bench_generation,
    "bfloat16": bench_bfloat16,
}


def run(options: argparse.Namespace) -> None:
    """Run the chosen benchmark."""
    if options.threads:
        torch.set_num_threads(options.threads)
    of = {"preset": "operations", "model": "bfloat16", "data": "bfloat16"}
    of |= {"positions": "steps", "checkpointing": "steps"}
    for name in [name for name in of if getattr(options, name) and of[name] != options.what]:
        raise ValueError(f"--{name} is for {of[name]}, not for {options.what}")
    BENCHES[options.what](options)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("what", nargs="?", choices=BENCHES, default="steps", help="what to measure (steps)")
    add("--context", type=int, help="tokens of text (T); none: 256, and for steps four cases")
    add("--thought-length", type=int, help="steps, generation, operations: K (9; last case: 13)")
    add("--n-true", type=int, help="steps, operations: A (4; the last case: 8)")
    add("--positions", type=int, help="steps: positions that think (J); none: all")
    add("--checkpointing", action="store_true", help="steps: keep fewer activations")
    add("--repeats", type=int, default=3, help="measurements to take the median of (3)")
    add("--preset", choices=plan.SHAPES, help="operations: of a large model's shape")
    add("--model", metavar="FOLDER", help="bfloat16: a thinking model")
    add("--data", metavar="FILE", help="bfloat16: a text")
    add("--threads", type=int, default=1, help="CPU threads, 0 for all (1)")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
