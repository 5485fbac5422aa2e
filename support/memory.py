"""The cost of a training step, counted before it is run.

The step is run on PyTorch's meta device, which computes shapes but no numbers, with three and with
four layers. Memory and operations are linear in the number of layers, so that both counts give
that of the whole model.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental import _config as meta_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import Mistral, MistralConfig
from support.device import DTYPES, free_memory
from thoughts import QuietStar, ThoughtConfig, quiet_star_loss

GIGABYTE = 1e9


class Watch(TorchDispatchMode):
    """Counts operations, and the bytes of all tensors that are alive, beside those of a module."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.operations = self.live = self.peak = 0
        self.sizes: dict[int, int] = {}  # of every storage, by its address
        tensors = [x for p in module.parameters() for x in (p, p.grad) if x is not None]
        self.kept = {x.untyped_storage()._cdata: x for x in tensors}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                address = storage._cdata
                if address not in self.sizes and address not in self.kept:
                    self.sizes[address] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.forget, address)
        self.peak = max(self.peak, self.live)
        arguments = operation._schema.arguments
        view = any(x.alias_info is not None and not x.alias_info.is_write for x in arguments)
        launches_nothing = "empty" in operation._schema.name or "view" in operation._schema.name
        self.operations += not (view or launches_nothing)  # _unsafe_view has no alias_info
        return result

    def forget(self, address: int) -> None:
        self.live -= self.sizes.pop(address)


def one_kernel_attention(q, k, v, mask=None, is_causal=False, enable_gqa=True):
    """F.scaled_dot_product_attention as a fused kernel, which the meta device does not choose."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, 0.0, is_causal, attn_mask=bias)[0]


def one_kernel_norm(x, shape, weight=None, eps=None):
    """F.rms_norm in one operation, as on CUDA. (Elsewhere PyTorch composes it of eight.)"""
    return F.layer_norm(x, shape, weight, None, eps)


def run_step(
    shape: MistralConfig, thoughts: ThoughtConfig, sequences: int, T: int, J: int,
    dtype: torch.dtype, apply: Callable | None, watch: Callable,
):  # fmt: skip
    """A forward and backward pass on the meta device, under the mode watch(model), returned.

    sequences of T tokens at once, of which J positions think; J = 0: a language-model step.
    apply(model) is called first, to use fast/ for example.
    """
    with torch.device("meta"):
        base = Mistral(shape).to(dtype)
        model = QuietStar(base, thoughts)
    if apply:
        apply(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as in all micro-batches but the first
    ids = torch.zeros(sequences, T, dtype=torch.long, device="meta")
    with (
        mock.patch.object(F, "scaled_dot_product_attention", one_kernel_attention),
        mock.patch.object(F, "rms_norm", one_kernel_norm),
        mock.patch.object(meta_config, "meta_nonzero_assume_all_nonzero", True),
        watch(model) as mode,
    ):
        if J:
            output, counts = model(ids, positions=torch.arange(J)), (sequences * T, sequences * J)
            loss, _ = quiet_star_loss(output, thoughts, counts)
            del output
        else:
            logits = base(ids)[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
    return mode


def of_all_layers(shape: MistralConfig, cost_of: Callable[[MistralConfig], float]) -> float:
    """A cost that is linear in the number of layers, from models of three and of four layers."""
    three, four = (cost_of(replace(shape, num_hidden_layers=layers)) for layers in (3, 4))
    return three + (shape.num_hidden_layers - 3) * (four - three)


def step_bytes(shape: MistralConfig, *step) -> float:
    """Peak of the tensors of a step, without weights and gradients. step: as for run_step.

    3 % are added, since allocators round up.
    """
    return 1.03 * of_all_layers(shape, lambda few: run_step(few, *step, Watch).peak)


def step_operations(shape: MistralConfig, *step) -> float:
    """Operations that a step launches, views left out. step: as for run_step."""
    return of_all_layers(shape, lambda few: run_step(few, *step, Watch).operations)


def step_flops(shape: MistralConfig, thoughts: ThoughtConfig, T: int, J: int) -> float:
    """Floating-point operations of a step with one sequence; a multiply-add counts as two.

    Operations that checkpointing repeats do not count, by the convention of mfu.
    """
    step = thoughts, 1, T, J, torch.bfloat16, None

    def flops(few: MistralConfig) -> float:
        mode = run_step(few, *step, lambda model: FlopCounterMode(display=False))
        return mode.get_total_flops()

    return of_all_layers(shape, flops)


def thinking(settings, thoughts: ThoughtConfig) -> int:
    """J, the number of positions of a sequence that think."""
    return settings.positions or settings.context - thoughts.n_true


def memory_plan(
    shape: MistralConfig, thoughts: ThoughtConfig, settings, apply: Callable | None
) -> dict[str, float]:
    """Bytes that training needs: weights, gradients, optimiser, activations, and their total.

    settings: train.Settings. apply: see run_step. The optimiser keeps 8 bytes per float32 weight,
    and 12 or 4 per bfloat16 weight, with or without float32 masters.
    """
    dtype, T = DTYPES[settings.dtype], settings.context
    sequences, J = settings.micro_batch or settings.batch_size, thinking(settings, thoughts)
    with torch.device("meta"):
        model = QuietStar(Mistral(shape).to(dtype), thoughts)
    weights = sum(p.nbytes for p in model.parameters())
    narrow = 12 if settings.masters else 4
    kept = step_bytes(shape, thoughts, sequences, T, J, dtype, apply)
    state = sum(p.numel() * (8 if p.itemsize == 4 else narrow) for p in model.parameters())
    plan = {"weights": weights, "gradients": weights, "optimiser": state, "activations": kept}
    return plan | {"total": sum(plan.values())}


LESS = [  # options of train.py that need less memory; the first ones change no result
    ("--micro-batch 1", {"micro_batch": 1}),
    ("--fast --checkpointing", {"fast": True, "checkpointing": True}),
    ("--positions 32", {"positions": 32}),
    ("--dtype bfloat16 --no-masters", {"fast": True, "dtype": "bfloat16", "masters": False}),
]


def advice(shape: MistralConfig, thoughts: ThoughtConfig, settings, fast_path, free: float) -> str:
    """Options with which a step fits into `free` bytes, and what it needs then."""
    given, J = [], thinking(settings, thoughts)
    for option, change in LESS:
        change = {name: value for name, value in change.items() if getattr(settings, name) != value}
        if not change or change.get("positions", 0) >= J:
            continue
        settings, given = replace(settings, **change), [*given, option]
        total = memory_plan(shape, thoughts, settings, fast_path(settings))["total"]
        if total <= free:
            return f"{' '.join(given)} needs {total / GIGABYTE:.1f} GB"
    return "take a smaller --context, --thought-length or model"


def check_memory(
    shape: MistralConfig, thoughts: ThoughtConfig, settings, fast_path, device
) -> None:
    """Raise ValueError, with options that fit, if a training step needs more than is free.

    fast_path(settings) -> the `apply` of run_step.
    """
    free = free_memory(device)
    total = memory_plan(shape, thoughts, settings, fast_path(settings))["total"]
    if free is not None and total > free:
        needs = f"a step needs {total / GIGABYTE:.1f} GB and {free / GIGABYTE:.1f} are free"
        hint = advice(shape, thoughts, settings, fast_path, free)
        raise ValueError(f"{needs} on {device}: {hint}")
