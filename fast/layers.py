"""Activation checkpointing and torch.compile of a layer's halves, before and after attention.

Attention is left out. It keeps little for the backward pass (attention.py), it takes longest to
compute again, and its cache must not receive a key twice.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def again(half: Callable, *tensors: Tensor):
    """Run half a layer, keep only its inputs, and run it again in the backward pass."""
    if not torch.is_grad_enabled():
        return half(*tensors)
    return checkpoint(half, *tensors, use_reentrant=False, preserve_rng_state=False)


def treat_layers(layers: nn.ModuleList, checkpointing: bool, compile: bool) -> None:
    """Compile or checkpoint every layer's methods before and after, which Layer.forward calls."""
    for layer in layers:
        for name in ("before", "after"):
            half = getattr(type(layer), name).__get__(layer)
            half = torch.compile(half) if compile else half
            setattr(layer, name, partial(again, half) if checkpointing else half)
