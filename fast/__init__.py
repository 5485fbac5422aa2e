"""The same results in less time and memory. README.md beside this file has a row for each trick.

Nothing here is needed to understand the method. train.py --fast calls `enter`; without it, the code
of model.py and thoughts.py runs as it stands. (parallel.py is for several GPUs: torchrun.)
"""

import copy
from functools import partial

import torch
from torch import Tensor

from fast.adamw import BFloat16AdamW
from fast.attention import FastThoughtCache, RecomputingThoughtCache
from fast.layers import treat_layers
from fast.linear import add_gradients_at_once
from fast.logp import token_logits, token_logp
from thoughts import QuietStar

PROBE = 64  # tokens on which the two paths are compared, beside those that a thought predicts
LAYERS = 2  # the first layers of the model, on which they are compared, in float32
TOLERANCE = 1e-3  # relative differences that are rounding


def apply(
    model: QuietStar, checkpointing: bool = False, compile: bool = False, masters: bool = True
) -> type[torch.optim.Optimizer]:
    """Make a model compute its results in less time and memory; return the AdamW to train it with.

    checkpointing: keep fewer activations and compute them again in the backward pass. compile:
    torch.compile the layers, which is slow to start. masters: AdamW keeps float32 copies of
    bfloat16 weights; otherwise it rounds stochastically.
    """
    if model.start_embedding.device.type == "cpu":
        model.thought_cache = FastThoughtCache
    elif checkpointing:
        model.thought_cache = RecomputingThoughtCache
    model.token_logits, model.token_logp = token_logits, token_logp
    treat_layers(model.model.layers, checkpointing, compile)
    add_gradients_at_once(model.model.layers)
    if model.start_embedding.dtype != torch.bfloat16:
        return torch.optim.AdamW
    return partial(BFloat16AdamW, masters=masters)


def enter(
    model: QuietStar, ids: Tensor, targets: Tensor, checkpointing=False, compile=False, masters=True
) -> type[torch.optim.Optimizer]:
    """`apply`, after a check that both paths agree on a batch ids, targets [B, T].

    The first PROBE + A tokens of two sequences are read by a float32 copy of the first LAYERS
    layers: in bfloat16, rounding may change a gradient by half. Raises ValueError, and names the
    output or the gradient that differs most, if the difference is more than rounding. (Compiled
    layers are not checked: they are compiled from the same code.)
    """
    few = slice(2), slice(PROBE + model.config.n_true)
    small = first_layers(model)
    plain = probe(small, ids[few], targets[few])
    apply(small, checkpointing)
    quick = probe(small, ids[few], targets[few])
    found = differences(plain, quick)
    if wrong := [name for name in found if not found[name] <= TOLERANCE]:
        name = max(wrong, key=found.get)
        raise ValueError(
            f"fast/ computes other results than model.py and thoughts.py: {name} differs by "
            f"{100 * found[name]:.2g} %. Leave out --fast, or make the same change in fast/"
        )
    return apply(model, checkpointing, compile, masters)


def first_layers(model: QuietStar) -> QuietStar:
    """A float32 copy of a model with its first LAYERS layers."""
    small, base = copy.copy(model), copy.copy(model.model)
    small._modules, base._modules = dict(small._modules), dict(base._modules)
    small.model, base.layers = base, base.layers[:LAYERS]
    return copy.deepcopy(small).float()


def probe(model: QuietStar, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of a model that thinks at three positions of ids [B, T].

    The loss is the sum of the means of all outputs. Thoughts are tokens of the text. The last layer
    of the mixing head becomes random, so that w is not 1 and every parameter has a gradient.
    """
    config, (B, T), device = model.config, ids.shape, ids.device
    generator = torch.Generator().manual_seed(0)
    positions = torch.linspace(0, T - 1 - config.n_true, 3).long().unique()
    shape = B, config.n_thoughts, len(positions), config.thought_length
    thoughts = ids.flatten()[torch.randint(B * T, shape, generator=generator).to(device)]
    last = model.mixing_head[4].weight
    last.data.copy_(torch.randn(last.shape, generator=generator) / last.shape[1] ** 0.5)
    output = model(ids, thoughts, positions, targets, generator=generator)
    names = "base_nll", "talk_nll", "weight", "thought_logp"
    results = {name: getattr(output, name) for name in names}
    sum(value.mean() for value in results.values() if value.numel()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"the gradient of {name}"], parameter.grad = parameter.grad, None
    return {name: value.detach() for name, value in results.items()}


def differences(plain: dict[str, Tensor], quick: dict[str, Tensor]) -> dict[str, float]:
    """||plain - quick|| of every tensor, relative to its norm, or if that is very small to the norm
    of all gradients together."""
    norms = {name: value.float().norm().item() for name, value in plain.items()}
    least = 1e-3 * sum(norms[name] ** 2 for name in norms if "gradient" in name) ** 0.5
    return {
        name: (value.float() - quick[name].float()).norm().item() / max(norms[name], least)
        for name, value in plain.items()
        if norms[name]
    }
