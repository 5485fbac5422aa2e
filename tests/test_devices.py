"""Tensors are made on the device of their inputs. Here that is the meta device, which has no data.

Only random numbers and the positions that think may be made on the CPU; both are moved once.
tests/test_cuda.py has what only a GPU can show: numbers, kernels, random generators.
"""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_quiet_star
from torch.fx.experimental import _config as meta_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fast
from fast.attention import RecomputingThoughtCache
from model import KVCache
from support import memory
from thoughts import quiet_star_loss


class OnTheCPU(TorchDispatchMode):
    """Notes the operations that return a tensor on the CPU."""

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" for x in tensors):
            self.operations.add(operation._schema.name)
        return result


@pytest.fixture(autouse=True)
def meta_device():
    """What the meta device does not choose by itself: see support/memory.py."""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", memory.one_kernel_attention),
        mock.patch.object(meta_config, "meta_nonzero_assume_all_nonzero", True),
    ):
        yield


def apply(model, checkpointing=False, compile=False):
    fast.apply(model, checkpointing=checkpointing)
    if checkpointing:
        assert model.thought_cache is RecomputingThoughtCache  # not that of a CPU


@pytest.mark.parametrize("path", [None, apply, partial(apply, checkpointing=True)])
@pytest.mark.parametrize(("positions", "window"), [(None, None), (torch.tensor([0, 2]), 3)])
def test_a_training_step(path, window, positions):
    model = tiny_quiet_star(window=window, start_id=3, end_id=4).to("meta")
    if path:
        path(model)
    ids, mask = (torch.zeros(2, 9, dtype=kind, device="meta") for kind in (torch.long, torch.bool))
    with OnTheCPU() as noted:
        output = model(ids, positions=positions, target_mask=mask)
        loss, metrics = quiet_star_loss(output, model.config, (16, 14))
        loss.backward()
    default = {"aten::arange", "aten::min", "aten::max", "aten::ge", "aten::le"}
    assert noted.operations - default == {"aten::rand"}
    tensors = [*output, loss, *metrics.values(), *(p.grad for p in model.parameters())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_thinking_at_inference():
    model = tiny_quiet_star(window=3, start_id=3, end_id=4).to("meta")
    cache = KVCache(model.model.config)
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    with OnTheCPU() as noted:
        model.model(ids[:, :-1], cache)
        prediction = model.think_last(ids[:, -1], cache)
    assert not noted.operations
    assert {tensor.device.type for tensor in prediction} == {"meta"}


def test_a_tensor_on_the_cpu_is_noted():
    with OnTheCPU() as noted:
        torch.arange(3).to("meta")
    assert noted.operations == {"aten::arange"}
