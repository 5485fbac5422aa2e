"""Linear layers that add to .grad at once, and fast.apply as a whole, against plain PyTorch."""

import copy

import pytest
import torch
from tiny import random_ids, tiny_quiet_star
from torch import nn

import fast
from fast.linear import add_gradients_at_once
from thoughts import quiet_star_loss


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_runs_twice_in_each_of_two_steps(bias, dtype):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6, bias)).to(dtype)
    quick = copy.deepcopy(plain)
    add_gradients_at_once(quick)
    inputs = [torch.randn(2, 5, 6, dtype=dtype) for _ in range(2)]
    found = {}
    for name, module in (("plain", plain), ("quick", quick)):
        found[name] = []
        for x in inputs:
            x = x.clone().requires_grad_()
            module(module(x)).pow(2).sum().backward()
            found[name] += [x.grad]
        found[name] += [parameter.grad for parameter in module.parameters()]
    for x, y in zip(found["plain"], found["quick"], strict=True):
        assert x.dtype == y.dtype == dtype
        assert (x - y).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * x.norm()


def test_a_frozen_weight_gets_no_gradient():
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    add_gradients_at_once(layer)
    x = torch.ones(2, 3, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(2, 3))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_of_fast_together(checkpointing):
    """Loss and gradients of two micro-batches, one after the other."""
    losses, gradients = [], []
    for path in ("plain", "fast"):
        model = tiny_quiet_star(window=5)
        if path == "fast":
            fast.apply(model, checkpointing)
        for seed in (1, 2):
            forced = random_ids(2 * 3 * 6, 3, seed=seed).view(2, 3, 6, 3)
            output = model(random_ids(2, 8, seed=seed), thought_ids=forced)
            losses.append(quiet_star_loss(output, model.config)[0])
            losses[-1].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.allclose(torch.stack(losses[:2]), torch.stack(losses[2:]), rtol=1e-5)
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-4 * gradient.norm(), name
