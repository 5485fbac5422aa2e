"""A GPU computes what the CPU does; skipped where there is none."""

import pytest
import torch
from tiny import random_ids, tiny_quiet_star

from sample import generate
from thoughts import quiet_star_loss

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def step_on(device, window, path):
    """Output, loss and gradients of a step, on the CPU."""
    model = tiny_quiet_star(window=window).to(device)
    if path != "plain":
        pytest.importorskip("fast.attention")
        from fast import apply

        apply(model, checkpointing=path == "checkpointing")
    generator = torch.Generator().manual_seed(0)
    output = model(random_ids(2, 12).to(device), generator=generator)
    loss, metrics = quiet_star_loss(output, model.config)
    loss.backward()
    results = [*output, loss, *metrics.values(), *(p.grad for p in model.parameters())]
    return [result.detach().cpu().double() for result in results]


@pytest.mark.parametrize("path", ["plain", "fast", "checkpointing"])
@pytest.mark.parametrize("window", [None, 4])
def test_the_same_step(window, path):
    """The same thoughts from the same seed; losses and gradients but for rounding."""
    ours, theirs = (step_on(device, window, path) for device in (DEVICE, "cpu"))
    assert torch.equal(ours[0], theirs[0])
    for here, there in zip(ours, theirs, strict=True):
        assert (here - there).abs().max() < 1e-4 * max(there.abs().max(), 1)


def test_the_same_text():
    """Thinking and writing greedily."""
    texts = [
        generate(tiny_quiet_star().to(device).eval(), random_ids(2, 6).to(device), 8, temperature=0)
        for device in (DEVICE, "cpu")
    ]
    assert torch.equal(texts[0].cpu(), texts[1])
