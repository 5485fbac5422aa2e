"""What a step of Quiet-STaR costs, as ratios within one run.

    python bench.py                         a few lengths of text on the 'small' model, one thread
    python bench.py --context 256 --thought-length 9 --n-true 4

A step handles M = T + N J (K + A + 1) tokens. The floor of its time is M times what the same model
spends per token in a plain language-model step, forward and backward, head and loss included; the
floor of its memory M / T times what a plain step saves for its backward pass. Times are medians of
steps that alternate, so that a busy machine slows both alike; memory is the peak over the loaded
model, in a process of its own.
"""

import argparse
import os
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Mistral, MistralConfig
from sample import execute
from thoughts import QuietStar, ThoughtConfig, quiet_star_loss

SMALL = MistralConfig(4096, 288, 768, 6, 6, 2)  # 7.7 M parameters
MEGABYTE = 1e6


@dataclass(frozen=True)
class Case:
    """One row of the table: a text of T tokens, thoughts at all positions with A targets."""

    T: int
    K: int = 9
    A: int = 4
    N: int = 2
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """M, the tokens that a step handles."""
        return self.T + self.N * (self.T - self.A) * (self.K + self.A + 1)


CASES = (Case(64), Case(256), Case(512), Case(512, K=13, A=8))


def make(case: Case) -> tuple[QuietStar, Tensor]:
    """The small model with random weights, and a random text [1, T]."""
    torch.manual_seed(0)
    config = ThoughtConfig(case.N, case.K, case.A, init_id=0)
    model = QuietStar(Mistral(SMALL), config, case.checkpointing)
    return model, torch.randint(SMALL.vocab_size, (1, case.T))


def plain_step(model: QuietStar, ids: Tensor) -> None:
    """A language-model step of the base model: forward and backward."""
    logits = model.model(ids)[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    model.zero_grad()


def quiet_step(model: QuietStar, ids: Tensor) -> None:
    """A Quiet-STaR step: forward and backward."""
    quiet_star_loss(model(ids), model.config)[0].backward()
    model.zero_grad()


def seconds(step: Callable[[QuietStar, Tensor], None], model: QuietStar, ids: Tensor) -> float:
    """Wall time of one step."""
    begin = time.perf_counter()
    step(model, ids)
    return time.perf_counter() - begin


def time_ratio(case: Case, repeats: int) -> tuple[float, float]:
    """Median seconds of a plain and of a Quiet-STaR step."""
    model, ids = make(case)
    plain, quiet = [], []
    for _ in range(repeats + 1):  # the first is warm-up
        plain.append(statistics.median(seconds(plain_step, model, ids) for _ in range(5)))
        quiet.append(seconds(quiet_step, model, ids))
    return statistics.median(plain[1:]), statistics.median(quiet[1:])


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
        logits = model.model(ids)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss.requires_grad  # keeps the graph, and with it every storage, alive until here
    return sum(storages.values())


def peak_bytes(case: Case) -> int:
    """Peak resident memory of a Quiet-STaR step over that of the loaded model."""
    torch.set_num_threads(1)
    model, ids = make(case)
    quiet_step(model, ids[:, : case.A + 4])  # what loads on first use
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak; Linux only
    before = resident("VmRSS")
    quiet_step(model, ids)
    return resident("VmHWM") - before


def peak_in_its_own_process(case: Case) -> int:
    """peak_bytes in a fresh process, whose malloc gives back what is freed: a need, not a habit."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_bytes, case).result()


def resident(field: str) -> int:
    """This process' resident bytes: VmRSS now, VmHWM at their peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    torch.set_num_threads(options.threads)
    cases = CASES
    if options.context:
        sizes = (options.context, options.thought_length, options.n_true)
        cases = (Case(*sizes, checkpointing=options.checkpointing),)
    print("   T   K  A      M   plain s   floor s    ours s   ratio   peak MB  floor MB   ratio")
    for case in cases:
        plain, quiet = time_ratio(case, options.repeats)
        floor = plain * case.tokens / case.T
        peak = peak_in_its_own_process(case)
        least = saved_bytes(case) * case.tokens / case.T
        print(
            f"{case.T:4d}  {case.K:2d} {case.A:2d} {case.tokens:6d}  {plain:8.4f}  {floor:8.3f}  "
            f"{quiet:8.3f}  {quiet / floor:6.3f}  {peak / MEGABYTE:8.0f}  {least / MEGABYTE:8.0f}  "
            f"{peak / least:6.3f}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and memory of a step against their floors.")
    add = parser.add_argument
    add("--context", type=int, help="tokens of text (T); none: the four cases of the README")
    add("--thought-length", type=int, default=9, help="K (9)")
    add("--n-true", type=int, default=4, help="A (4)")
    add("--checkpointing", action="store_true", help="compute activations twice, keep fewer")
    add("--repeats", type=int, default=3, help="steps to take the median of (3)")
    add("--threads", type=int, default=1, help="CPU threads (1)")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
