"""Updates of bfloat16 weights that rounding to nearest would lose."""

import copy

import pytest
import torch

from fast.adamw import BFloat16AdamW, round_stochastically

LR = 1e-4  # a 78th of the step from 1.0 to the next bfloat16, a 39th of that below


def test_rounding_goes_to_neighbours_and_is_right_on_average():
    generator = torch.Generator().manual_seed(0)
    for value in (1.0 + 0.3 / 128, -1.0 - 0.3 / 128, 3e-5, -7.7e20):
        source = torch.full((40_000,), value)
        target = torch.empty(40_000, dtype=torch.bfloat16)
        round_stochastically(target, source, generator)
        found = target.double().unique().tolist()
        assert len(found) == 2
        assert found[0] < source[0].double() < found[1]
        # a mean of 40,000 draws has a standard deviation of at most 0.0025 steps: five of them
        step = found[1] - found[0]
        assert abs(target.double().mean() - source[0].double()) < 0.0125 * step


def test_numbers_that_bfloat16_has_are_kept():
    source = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e30, 65536.0]).bfloat16().float()
    target = torch.empty(6, dtype=torch.bfloat16)
    for seed in range(20):
        round_stochastically(target, source, torch.Generator().manual_seed(seed))
        assert torch.equal(target.float(), source)


def steps(optimizer_of, count, dtype=torch.bfloat16):
    """A weight of 1 with gradient 1, many times over: Adam moves it by LR a step."""
    weight = torch.nn.Parameter(torch.ones(20_000, dtype=dtype))
    optimizer = optimizer_of([{"params": [weight], "lr": LR}])
    for _ in range(count):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().double().mean().item(), optimizer


def test_mean_update_is_right_where_rounding_to_nearest_gives_none():
    nearest, _ = steps(lambda w: torch.optim.AdamW(w, weight_decay=0.0), 50)
    assert nearest == 1.0
    expected = 1 - 50 * LR
    stochastic, _ = steps(lambda w: BFloat16AdamW(w, masters=False, weight_decay=0.0), 50)
    assert abs(stochastic - expected) < 0.03 * 50 * LR
    masters, optimizer = steps(lambda w: BFloat16AdamW(w, masters=True, weight_decay=0.0), 50)
    master = next(iter(optimizer.state.values()))["master"]
    assert abs(master.double().mean() - expected) < 1e-6
    assert masters == torch.tensor(expected).bfloat16()


def test_second_moment_decays():
    """Times 0.999 a step it never would in bfloat16 rounded to nearest."""
    weight = torch.nn.Parameter(torch.zeros(20_000, dtype=torch.bfloat16))
    optimizer = BFloat16AdamW([weight], masters=False, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    square = optimizer.state[weight]["exp_avg_sq"]
    before = square.double().mean()
    weight.grad = torch.zeros_like(weight)
    for _ in range(100):
        optimizer.step()
    after = optimizer.state[weight]["exp_avg_sq"].double().mean()
    assert abs(after / before - 0.999**100) < 0.005
    nearest = square.clone()
    assert torch.equal((nearest * 0.999).bfloat16(), nearest)


@pytest.mark.parametrize(
    ("dtype", "masters"),
    [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)],
)
def test_masters_and_float32_weights_are_torchs_adamw(dtype, masters):
    """The numbers are those of torch.optim.AdamW on float32 weights."""
    torch.manual_seed(0)
    start, gradients = torch.randn(50).bfloat16(), torch.randn(5, 50).bfloat16()
    ours = torch.nn.Parameter(start.to(dtype, copy=True))
    theirs = torch.nn.Parameter(start.float())
    optimizers = (
        BFloat16AdamW([{"params": [ours], "lr": 1e-2}], masters=masters, weight_decay=0.1),
        torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1),
    )
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.to(dtype), gradient.float()
        for optimizer in optimizers:
            optimizer.step()
    found = optimizers[0].state[ours].get("master", ours)
    assert found.dtype == torch.float32
    assert (found - theirs).abs().max() < 1e-6


def test_processes_round_differently(monkeypatch):
    """Each of several has a part of a weight, which must not be rounded like the others' parts."""
    weights = []
    for rank in "001":
        monkeypatch.setenv("RANK", rank)
        weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        weight.grad = torch.ones_like(weight)
        BFloat16AdamW([weight], masters=False, weight_decay=0.0).step()
        weights.append(weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("masters", [True, False])
def test_state_survives_saving(masters):
    """That of the weight that has a gradient; the other one stays as it is."""
    idle = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    weight = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 0.1)
    optimizer = BFloat16AdamW([weight, idle], masters=masters, weight_decay=0.5)
    optimizer.step()
    saved, twin = copy.deepcopy(optimizer.state_dict()), torch.nn.Parameter(weight.detach().clone())
    other = BFloat16AdamW([twin, idle], masters=masters, weight_decay=0.0)
    other.load_state_dict(saved)
    for name, value in optimizer.state[weight].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[twin][name])), name
        assert getattr(value, "dtype", None) == getattr(other.state[twin][name], "dtype", None)
    twin.grad = weight.grad
    optimizer.step()
    other.step()
    assert torch.equal(weight, twin)
    assert (idle == 1).all()
