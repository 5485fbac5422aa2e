"""Activation checkpointing and torch.compile of a layer, in two halves around the attention.

Attention stays outside: it keeps little for the backward pass anyway (attention.py), takes the most
time to compute again, and its cache must not see a key twice.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import Layer


def project(layer: Layer, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The half before the attention: x [B, T, D] -> q [B, H, T, Dh], k and v [B, Hkv, T, Dh]."""
    return layer.self_attn.project(layer.input_layernorm(x), rotary)


def finish(layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
    """The half after it: x [B, T, D] and attended [B, H, T, Dh] -> the layer's output [B, T, D]."""
    x = x + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def again(half: Callable, *tensors: Tensor):
    """Run half a layer and keep only its inputs for the backward pass, which runs it once more."""
    if not torch.is_grad_enabled():
        return half(*tensors)
    return checkpoint(half, *tensors, use_reentrant=False, preserve_rng_state=False)


def split_layers(layers: nn.ModuleList, checkpointing: bool, compile: bool) -> None:
    """Replace the forward method of every layer by its two halves, one of them or both treated."""
    for layer in layers:
        halves = [partial(half, layer) for half in (project, finish)]
        if compile:
            halves = [torch.compile(half) for half in halves]
        if checkpointing:
            halves = [partial(again, half) for half in halves]
        layer.forward = partial(run_halves, *halves)


def run_halves(before: Callable, after: Callable, x: Tensor, rotary: Tensor, attend: Callable):
    """Layer.forward in two halves."""
    return after(x, attend(*before(x, rotary)))
