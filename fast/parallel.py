"""Several processes train on one batch, each with a part of every weight: PyTorch's FSDP2.

    torchrun --nproc-per-node 8 train.py --fast --checkpoint FOLDER --data FILE --out runs/mine

Every process runs train.py, which imports this file only if there are several. Batch, thoughts,
losses, metrics and checkpoints are those of one process:

    batch       each takes its share of the sequences of every micro-batch; the losses divide by the
                counts of the whole batch, so gradients and metrics add up
    thoughts    every process draws the random numbers of all sequences and uses those of its own
    weights     gathered once a step and kept until its gradient is there: a layer runs K + 2
                times in every pass, and gathering them each time would move the model as often
    files       the first process reads and writes what one process would, and only it prints
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from thoughts import QuietStar

RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def together(run: Callable) -> Callable:
    """A command that all processes run; as soon as it ends with an error in one, torchrun ends all.

    What is wrong is told once, by the first process if it knows; the others give it time. And a
    RuntimeError may only say that another process is gone, which has more to say.
    """

    def run_together(options) -> None:
        try:
            run(options)
        except Exception as error:
            time.sleep(5 * (RANK > 0) + 5 * isinstance(error, RuntimeError))
            raise
        dist.all_reduce(torch.zeros(1))  # nobody leaves before all are done
        dist.destroy_process_group()

    return run_together


def start(settings, device: str | None, first: Callable) -> None:
    """Take a GPU and wait for the other processes; from here on only the first one prints.

    first: what the first process does before the others go on. ValueError for what several
    processes cannot do.
    """
    if not settings.data:
        raise ValueError(f"{PROCESSES} processes need --data: one trains on the built-in corpus")
    if not settings.fast:
        raise ValueError(f"{PROCESSES} processes (torchrun) need --fast")
    if settings.eval_data:
        raise ValueError("eval_data is for one process; measure the model with eval.py --text")
    if settings.batch_size % PROCESSES:
        raise ValueError(
            f"batch_size is {settings.batch_size}; {PROCESSES} processes need a multiple of "
            f"{PROCESSES}"
        )
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {device} is for one process; leave it out, or give cuda or cpu")
    if device != "cpu" and torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"no GPU for process {local + 1}: {torch.cuda.device_count()} are here"
            )
        torch.cuda.set_device(local)
    dist.init_process_group(timeout=timedelta(hours=1))  # to write a checkpoint may take long
    if RANK == 0:
        first()
        print(f"{PROCESSES} processes")
    else:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    dist.all_reduce(torch.zeros(1))  # nobody goes on before all are here


def shard(model: QuietStar, optimizer: torch.optim.Optimizer) -> list[FSDPModule]:
    """Leave each process its part of every weight and of the optimiser's state.

    The optimiser has no state yet; state_dict and load_state_dict speak of whole tensors as ever.
    Returns what gathers weights (unshard) and lets go of them (reshard).
    """
    mesh = init_device_mesh(next(model.parameters()).device.type, (PROCESSES,))
    whole = list(model.parameters())
    for module in (*model.model.layers, model.mixing_head):  # the head may have another dtype
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)  # the rest: embeddings and head may be the same tensor
    # Nor after the backward pass of one run of a layer: others still need the weights in theirs.
    model.set_reshard_after_backward(False)
    part_of = dict(zip(whole, model.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [part_of[parameter] for parameter in group["params"]]
    optimizer.register_state_dict_post_hook(gather_state)
    optimizer.register_load_state_dict_pre_hook(split_state)
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gather_state(optimizer, state: dict) -> dict:
    """Whole tensors on the CPU of the first process instead of everybody's parts."""

    def whole(value):
        if not isinstance(value, DTensor):
            return value
        tensor = value.full_tensor()
        return None if RANK else tensor.cpu()

    states = {
        index: {name: whole(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return state | {"state": states}


def split_state(optimizer, state: dict) -> None:
    """This process' parts instead of whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        like = parameters[index]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == like.shape:
                value = value.to(like.device)
                values[name] = distribute_tensor(
                    value, like.device_mesh, like.placements, src_data_rank=None
                )


def share(loss_of: Callable) -> Callable:
    """The loss of this process' sequences of a micro-batch, times the number of processes.

    (FSDP takes the mean of the gradients. Ours are to be added.)
    """

    def loss_of_share(model, ids, targets, positions, counts, generator):
        def skip(sequences: int) -> None:  # what QuietStar.forward draws for them
            config = model.config
            shape = sequences, config.n_thoughts, len(positions), config.thought_length
            torch.rand(shape, generator=generator)

        size = len(ids) // PROCESSES
        own = slice(RANK * size, (RANK + 1) * size)
        skip(own.start)
        loss, metrics = loss_of(model, ids[own], targets[own], positions, counts, generator)
        skip(len(ids) - own.stop)
        return loss * PROCESSES, metrics

    return loss_of_share


def gradient_of(model: QuietStar, optimizer, batch_gradient: Callable) -> Callable:
    """batch_gradient of this model for several processes. Shards the model and the optimiser."""
    modules = shard(model, optimizer)

    def gradient(model, loss_of, ids, targets, settings, n_true, generator) -> Counter:
        """Of the whole batch. --micro-batch is the number of sequences at once in a process."""
        size = settings.micro_batch and settings.micro_batch * PROCESSES
        at_once = replace(settings, micro_batch=size)
        metrics = batch_gradient(model, share(loss_of), ids, targets, at_once, n_true, generator)
        for module in modules:
            module.reshard()
        total = torch.tensor(list(metrics.values()), dtype=torch.float64)
        dist.all_reduce(total)
        return Counter(dict(zip(metrics, total.tolist(), strict=True)))

    return gradient
