"""AdamW for bfloat16 weights whose small updates are not rounded away.

A bfloat16 number has 8 significant bits: next to 1.0 it moves in steps of 0.0078, while Adam at the
paper's learning rate of 1e-6 moves a weight by about 0.000001. Rounded to nearest, nearly all of
those updates are lost. Two remedies, both here:

    float32 masters        the optimiser keeps a float32 copy of every weight and float32 moments:
                           12 bytes a parameter beside the 2 of the weight and 2 of its gradient
    stochastic rounding    weights and moments stay in bfloat16, 4 bytes a parameter, and every
                           result is rounded up or down at random, so that its mean is right
"""

import os

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch's, and the paper's


def round_stochastically(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """Write source (float32) into target (bfloat16), each number rounded to one of its neighbours.

    The probability is the nearness, so the mean over many roundings is the number itself. A
    bfloat16 is the upper half of a float32: a random number below one unit of that half is added
    to the bits, and the lower half is cut off. Numbers that bfloat16 has are kept.
    """
    if hasattr(source, "to_local"):  # this process' part of it: parallel.py
        target, source = target.to_local(), source.to_local()
    bits = source.contiguous().view(torch.int32)
    noise = torch.empty_like(bits).random_(1 << 16, generator=generator)
    target.copy_(((bits + noise) & -(1 << 16)).view(torch.float32))


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) for bfloat16 parameters; see the top of this file.

    masters: keep float32 masters and moments; otherwise round stochastically. A float32 parameter,
    such as those of the mixing head, is updated as by torch's AdamW.
    """

    def __init__(self, params, masters: bool, weight_decay: float):
        super().__init__(params, {"lr": 1e-3, "weight_decay": weight_decay})
        self.masters = masters

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            dtype = torch.float32 if self.masters else parameter.dtype
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
            if self.masters and parameter.dtype != torch.float32:
                state["master"] = parameter.float()
        state["step"] += 1
        gradient = parameter.grad.float()
        mean = state["exp_avg"].float().lerp_(gradient, 1 - BETA1)
        square = state["exp_avg_sq"].float().lerp_(gradient.square(), 1 - BETA2)
        unbias1, unbias2 = 1 - BETA1 ** state["step"], 1 - BETA2 ** state["step"]
        move = mean / unbias1 / ((square / unbias2).sqrt_() + EPSILON)
        weight = state.get("master", parameter.float())  # itself if it is in float32
        weight.mul_(1 - lr * weight_decay).sub_(move, alpha=lr)
        if self.masters or parameter.dtype == torch.float32:
            state["exp_avg"], state["exp_avg_sq"] = mean, square
            parameter.copy_(weight)
            return
        # Seeded by step and process: a resumed run rounds as the uninterrupted one did.
        seed = (int(os.environ.get("RANK", 0)) << 20) + state["step"]  # 32 bits count on a CPU
        generator = torch.Generator(parameter.device).manual_seed(seed)
        round_stochastically(state["exp_avg"], mean, generator)
        round_stochastically(state["exp_avg_sq"], square, generator)
        round_stochastically(parameter, weight, generator)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but float32 masters and moments stay float32."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            self.state[parameter] = {
                name: value.to(parameter.device) if isinstance(value, Tensor) else value
                for name, value in saved.items()
            }
