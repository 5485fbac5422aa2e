"""Linear layers that add the gradient of their weight to .grad at once.

A layer runs K + 2 times in a forward pass. Autograd adds up the gradients of these runs in a buffer
of its own, and adds the buffer to .grad when the last one is there: a second copy of all gradients.
Here the backward pass of each run adds to .grad in the same matrix product. torch.autograd.grad
does not see such a gradient. torch.compile cannot trace it, and breaks its graph here.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x)
        ctx.weight, ctx.has_bias = weight, bias is not None  # the parameter itself, for its .grad
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, d_out):
        [x], weight, rows = ctx.saved_tensors, ctx.weight, d_out.flatten(0, -2)
        add_product(weight, rows, x.flatten(0, -2))
        return d_out @ weight, None, rows.sum(0) if ctx.has_bias else None


def add_product(weight: Tensor, d_out: Tensor, x: Tensor) -> None:
    """Add d_out' x to the gradient of a weight [out, in]; d_out [rows, out], x [rows, in]."""
    if not weight.requires_grad:
        return
    if weight.grad is None:
        weight.grad = d_out.mT @ x
    else:
        weight.grad.addmm_(d_out.mT, x)


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """The forward method of nn.Linear."""
    return _Linear.apply(x, module.weight, module.bias)


def add_gradients_at_once(module: nn.Module) -> None:
    """Do so in every nn.Linear inside a module."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.forward = partial(linear, part)
