"""What a training step costs, counted before it is run.

The step is run on PyTorch's meta device, which computes shapes but no numbers, with one and with
two layers. Memory, operations and floating-point operations are linear in the number of layers
(tests/support/test_memory.py), so both counts give that of the whole model.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental import _config as meta_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import Mistral, MistralConfig
from thoughts import QuietStar, ThoughtConfig, quiet_star_loss

GIGABYTE = 1e9


class Cost(NamedTuple):
    """The cost of a forward and backward pass, without weights and their gradients."""

    bytes: float  # peak of what is kept for the backward pass and what comes and goes
    operations: float  # launched, views left out
    flops: float  # floating-point operations


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
        self.operations += not (view or "empty" in operation._schema.name)
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


def step_of(
    shape: MistralConfig, thoughts: ThoughtConfig, sequences: int, T: int, J: int,
    dtype: torch.dtype, apply: Callable | None = None,
) -> Cost:  # fmt: skip
    """The cost of a forward and backward pass of a Quiet-STaR model, or a Mistral without thoughts.

    sequences of T tokens at once, of which J positions think; J = 0: a language-model step.
    apply(model) is called before: fast.apply, for example. Runs on the meta device.
    """
    costs = []
    for layers in (1, 2):
        with torch.device("meta"):
            base = Mistral(replace(shape, num_hidden_layers=layers)).to(dtype)
            model = QuietStar(base, thoughts)
        if apply:
            apply(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # so that later ones are added to it
        watch, ids = Watch(model), torch.zeros(sequences, T, dtype=torch.long, device="meta")
        with (
            mock.patch.object(F, "scaled_dot_product_attention", one_kernel_attention),
            mock.patch.object(F, "rms_norm", one_kernel_norm),
            mock.patch.object(meta_config, "meta_nonzero_assume_all_nonzero", True),
            FlopCounterMode(display=False) as flops,
            watch,
        ):
            if J:
                output = model(ids, positions=torch.arange(J))
                counts = sequences * (T - 1), sequences * J
                quiet_star_loss(output, thoughts, counts)[0].backward()
                del output
            else:
                logits = base(ids)[:, :-1].flatten(0, 1).float()
                F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        costs.append(Cost(watch.peak, watch.operations, flops.get_total_flops()))
    more = shape.num_hidden_layers - 1
    return Cost(*(one + more * (two - one) for one, two in zip(*costs, strict=True)))


def parameter_bytes(shape: MistralConfig, thoughts: ThoughtConfig, dtype: torch.dtype, state: int):
    """Bytes of the weights of a QuietStar, and of an optimiser's state of `state` bytes a weight.

    The mixing head is in float32, with a state of 8 bytes a weight.
    """
    with torch.device("meta"):
        model = QuietStar(Mistral(shape).to(dtype), thoughts)
    weights = sum(p.nbytes for p in model.parameters())
    return weights, sum(
        p.numel() * (8 if p.dtype == torch.float32 else state) for p in model.parameters()
    )
