"""The same results for less time and memory. README.md beside this file has a row for each trick.

A reader of the paper need not open this folder, and everything works without it: train.py enters it
by one guarded call of `apply`, and `train.py --plain` leaves it out. (parallel.py, for several
GPUs, has a door of its own: torchrun.)
"""

from functools import partial

import torch

from fast.adamw import BFloat16AdamW
from fast.attention import FastThoughtCache
from fast.layers import split_layers
from fast.logp import token_logits, token_logp
from thoughts import QuietStar


def apply(
    model: QuietStar, checkpointing: bool = False, compile: bool = False, masters: bool = True
) -> type[torch.optim.Optimizer]:
    """Let a model compute the same for less, and return the AdamW to train it with.

    checkpointing: keep fewer activations and compute them again in the backward pass. compile: the
    layers with torch.compile, slow to start. masters: whether AdamW keeps float32 copies of
    bfloat16 weights; it rounds stochastically otherwise. (Weights in float32: torch's own AdamW.)
    """
    model.thought_cache = FastThoughtCache
    model.token_logits, model.token_logp = token_logits, token_logp
    if checkpointing or compile:
        split_layers(model.model.layers, checkpointing, compile)
    if model.start_embedding.dtype != torch.bfloat16:
        return torch.optim.AdamW
    return partial(BFloat16AdamW, masters=masters)
