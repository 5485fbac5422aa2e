"""A GPU computes what the CPU computes; skipped where there is none.

Only a GPU can show these: the numbers of its kernels, also in bfloat16 and with checkpointing; the
check on entering fast/; AdamW for bfloat16, whose random numbers come from the device; generation.
Where tensors are made is tested without one: test_devices.py.
"""

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_entering_fast_and_a_step_of_its_optimizer(dtype, checkpointing):
    """The paths agree on a GPU, and an update moves every parameter."""
    import fast

    model = tiny_quiet_star().to(DEVICE)
    model.model.to(dtype)
    model.start_embedding.data, model.end_embedding.data = (
        x.data.to(dtype) for x in (model.start_embedding, model.end_embedding)
    )
    ids = random_ids(1, 12).to(DEVICE)
    AdamW = fast.enter(model, ids, ids >= 0, checkpointing, masters=False)
    before = [p.detach().clone() for p in model.parameters()]
    quiet_star_loss(model(ids), model.config)[0].backward()
    AdamW([{"params": model.parameters(), "lr": 1e-2}], weight_decay=0.0).step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_the_same_text():
    """Thinking and writing greedily."""
    texts = [
        generate(tiny_quiet_star().to(device).eval(), random_ids(2, 6).to(device), 8, temperature=0)
        for device in (DEVICE, "cpu")
    ]
    assert torch.equal(texts[0].cpu(), texts[1])
