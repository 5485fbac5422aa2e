"""Paper, section 4.2: all thoughts in parallel are the thoughts one would have one at a time."""

import itertools
from dataclasses import asdict

import pytest
import torch
from tiny import random_ids, think_slowly, tiny_quiet_star

from model import KVCache, Mistral, MistralConfig, in_window
from support.checkpoints import FamilyConfig, RopeScaling
from thoughts import QuietStar, ThoughtConfig, thought_mask

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("window", [None, 5, 2, 1])
@pytest.mark.parametrize("positions", [None, [0, 3, 4, 9, 10]])
def test_parallel_equals_one_at_a_time(window, positions):
    """Also where the text holds the ids of start and end: there they are ordinary tokens."""
    model, ids = tiny_quiet_star(window=window, start_id=3, end_id=4), random_ids(2, 12)
    ids[0, [1, 4, 9]], ids[0, [5, 10]] = 3, 4
    positions = None if positions is None else torch.tensor(positions)
    output = model(ids, positions=positions, temperature=0)
    assert output.thought_ids.shape == (2, 3, len(output.positions), 3)
    for b in range(2):
        for index, j in enumerate(output.positions.tolist()):
            slow = think_slowly(model, ids[b], j, None)
            for n in range(3):
                assert output.thought_ids[b, n, index].tolist() == slow["ids"]
                assert close(output.thought_logp[b, n, index], slow["logp"])
                targets = len(slow["nll"])
                assert close(output.talk_nll[:targets, b, n, index], slow["nll"])
                assert close(output.weight[:targets, b, n, index], slow["weight"])
                assert output.valid[:, b, index].sum() == targets
                assert not output.talk_nll[targets:, b, n, index].any()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_families_think_one_at_a_time_too(family):
    """Biases on q, k and v or norms on q and k, both with scaled rotary positions and a window."""
    model = tiny_quiet_star()
    scaling = RopeScaling(8.0, 1.0, 4.0, 16)
    changes = {"model_type": family, "rope_scaling": scaling, "sliding_window": 6}
    model.model = Mistral(FamilyConfig(**asdict(model.model.config) | changes))
    for parameter in model.model.parameters():
        if parameter.dim() == 1:  # biases and norms begin at 0 and 1
            torch.nn.init.normal_(parameter)
    ids = random_ids(2, 12)
    output = model(ids, temperature=0)
    for b in range(2):
        for j in output.positions.tolist():
            slow = think_slowly(model, ids[b], j, None)
            assert output.thought_ids[b, 0, j].tolist() == slow["ids"]
            assert close(output.thought_logp[b, 0, j], slow["logp"])
            assert close(output.talk_nll[:, b, 0, j], slow["nll"])
            assert close(output.weight[:, b, 0, j], slow["weight"])


def close(fast, slow):
    return (fast - torch.stack(slow)).abs().max() < 1e-5


def test_different_thoughts_do_not_see_each_other():
    model = tiny_quiet_star(window=6)
    ids = random_ids(2, 10)
    forced = random_ids(2 * 3 * 8, 3).view(2, 3, 8, 3)
    output = model(ids, thought_ids=forced)
    for b in range(2):
        for n in range(3):
            for j in range(8):
                slow = think_slowly(model, ids[b], j, forced[b, n, j].tolist())
                assert close(output.thought_logp[b, n, j], slow["logp"])
                assert close(output.talk_nll[:, b, n, j], slow["nll"])


def parallel_thought_mask(T, positions, n_thoughts, steps, window=None):
    """The paper's Figure 3 as one matrix: may this row look at that column? [M, M] bool.

    M = T + N * J * steps: the text, then every thought's steps, ordered by thought, origin, step.
    """
    text = torch.arange(T)
    origin = positions.repeat(n_thoughts).repeat_interleave(steps)
    thought = torch.arange(len(positions) * n_thoughts).repeat_interleave(steps)
    step = torch.arange(1, steps + 1).repeat(len(positions) * n_thoughts)
    rotary = torch.cat([text, origin + step])  # [M] positions as the rotary embedding counts them
    sees_text_up_to = torch.cat([text, origin])
    owner = torch.cat([torch.full((T,), -1), thought])
    up_to_origin = (owner == -1) & (rotary <= sees_text_up_to[:, None])
    same_owner = owner == owner[:, None]
    return (up_to_origin | same_owner) & in_window(rotary[:, None], rotary, window)


@pytest.mark.parametrize("window", [None, 4, 1])
@pytest.mark.parametrize("passes", [[1, 1, 1, 1, 1], [1, 1, 3], [2, 3], [5]])
def test_thought_cache_equals_dense_mask(window, passes):
    """Attention of a ThoughtCache, with 5 steps in these passes, against the dense matrix.

    Forward and backward.
    """
    torch.manual_seed(0)
    B, H, Hkv, Dh, T, N, steps = 2, 4, 2, 6, 7, 3, 5
    positions, P = torch.tensor([0, 2, 5]), 3 * N
    shape = MistralConfig(23, 16, 32, 1, H, Hkv, head_dim=Dh, sliding_window=window)
    text = KVCache(shape)
    leaves = [torch.randn(B, Hkv, T, Dh, requires_grad=True) for _ in range(2)]
    text.layers = [tuple(leaves)]
    own = [
        [torch.randn(B, heads, P, Dh, requires_grad=True) for heads in (H, Hkv, Hkv)]
        for _ in range(steps)
    ]
    config = ThoughtConfig(N, thought_length=steps - 2, n_true=1)
    cache = QuietStar.thought_cache(text, positions, config)
    got, begin = [], 0
    for n in passes:
        together = (torch.stack(x, 3).flatten(2, 3) for x in zip(*own[begin:][:n], strict=True))
        got.append(cache.attend(0, *together).unflatten(2, (P, n)))  # [B, H, P, n, Dh]
        begin += n
        assert cache.length == begin
    got = torch.cat(got, dim=3)  # [B, H, P, steps, Dh]

    def dense(index, text):
        rows = torch.stack([step[index] for step in own], dim=3).flatten(2, 3)
        return torch.cat([text, rows], dim=2)  # [B, heads, T + P * steps, Dh]

    q = dense(0, torch.zeros(B, H, T, Dh))
    k, v = (dense(i + 1, leaves[i]).repeat_interleave(H // Hkv, 1) for i in (0, 1))
    mask = parallel_thought_mask(T, positions, N, steps, window)
    scores = (q @ k.mT / Dh**0.5).masked_fill(~mask, -torch.inf)
    slow = (torch.softmax(scores, -1) @ v)[:, :, T:].unflatten(2, (P, steps))
    assert (got - slow).abs().max() < 1e-6

    everything = leaves + [tensor for step in own for tensor in step]
    direction = torch.randn_like(slow)
    gradients = torch.autograd.grad((got * direction).sum(), everything)
    slow_gradients = torch.autograd.grad((slow * direction).sum(), everything)
    for gradient, slow_gradient in zip(gradients, slow_gradients, strict=True):
        assert (gradient - slow_gradient).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 3, 1])
def test_thought_mask_is_the_rows_of_the_dense_mask(window):
    """Any range of steps: the text's columns, and the columns of the same thought."""
    T, positions, steps = 6, torch.tensor([0, 3, 4]), 4
    dense = parallel_thought_mask(T, positions, 1, steps, window)
    for begin, last in itertools.combinations_with_replacement(range(1, steps + 1), 2):
        mask = thought_mask(positions, range(begin, last + 1), T, window)
        assert mask.shape == (3, last + 1 - begin, T + last)
        for index, step in itertools.product(range(3), range(begin, last + 1)):
            first = T + index * steps
            row = dense[first + step - 1]
            expected = [*row[:T].tolist(), *row[first : first + last].tolist()]
            assert mask[index, step - begin].tolist() == expected
            assert not row[first + step : first + steps].any()


def test_mask_by_hand():
    """T = 3, thoughts at 0 and 1, N = 1, two steps. Rows look, columns are looked at."""
    expected = """
        x.. .. ..
        xx. .. ..
        xxx .. ..
        x.. x. ..
        x.. xx ..
        xx. .. x.
        xx. .. xx
    """
    mask = parallel_thought_mask(3, torch.tensor([0, 1]), 1, 2)
    assert draw(mask) == expected.replace(" ", "").split()


def test_mask_by_hand_with_window():
    """Window 2, T = 4, one position, two thoughts of three steps at rotary positions 3, 4, 5."""
    expected = """
        x... ... ...
        xx.. ... ...
        .xx. ... ...
        ..xx ... ...
        ..x. x.. ...
        .... xx. ...
        .... .xx ...
        ..x. ... x..
        .... ... xx.
        .... ... .xx
    """
    mask = parallel_thought_mask(4, torch.tensor([2]), 2, 3, window=2)
    assert draw(mask) == expected.replace(" ", "").split()


def draw(mask):
    return ["".join("x" if cell else "." for cell in row) for row in mask]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_bfloat16_thoughts_are_near_the_oracle(device):
    """In bfloat16 against one thought at a time in float32 with the same weights.

    bfloat16 keeps 8 bits, an error of 0.004 relative to every activation: after two layers and a
    head whose logits reach 5, log-probabilities may be off by 0.1 nats, and by 0.02 on average.
    """
    model = tiny_quiet_star(window=6).bfloat16().to(device)
    exact = tiny_quiet_star(window=6).bfloat16().float()
    ids, forced = random_ids(2, 10), random_ids(2 * 3 * 8, 3).view(2, 3, 8, 3)
    output = model(ids.to(device), thought_ids=forced.to(device))
    errors = []
    for b, n, j in itertools.product(range(2), range(3), range(8)):
        slow = think_slowly(exact, ids[b], j, forced[b, n, j].tolist())
        got = torch.cat([output.thought_logp[b, n, j], output.talk_nll[:, b, n, j]]).cpu()
        errors.append(got - torch.stack(slow["logp"] + slow["nll"]))
    errors = torch.stack(errors).abs()
    assert output.talk_nll.dtype == output.thought_logp.dtype == torch.float32
    assert errors.max() < 0.1
    assert errors.mean() < 0.02


def test_no_thought_at_all():
    """K = 0 is legal: start, end and the look-ahead, nothing sampled."""
    model = tiny_quiet_star(thought_length=0)
    ids = random_ids(1, 8)
    output = model(ids)
    assert output.thought_ids.shape == (1, 3, 6, 0)
    assert output.thought_logp.shape == (1, 3, 6, 0)
    for j in range(6):
        assert close(output.talk_nll[:, 0, 0, j], think_slowly(model, ids[0], j, None)["nll"])


def test_same_generator_same_thoughts_and_split_batches_too():
    model = tiny_quiet_star()
    ids = random_ids(4, 9)
    whole = model(ids, generator=torch.Generator().manual_seed(5)).thought_ids
    again = model(ids, generator=torch.Generator().manual_seed(5)).thought_ids
    generator = torch.Generator().manual_seed(5)
    parts = [model(part, generator=generator).thought_ids for part in ids.split([1, 3])]
    assert torch.equal(whole, again)
    assert torch.equal(whole, torch.cat(parts))
    other = model(ids, generator=torch.Generator().manual_seed(6)).thought_ids
    assert not torch.equal(whole, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": torch.tensor([7])}, "0 .. 6"),
        ({"positions": torch.tensor([-1])}, "0 .. 6"),
        ({"positions": torch.tensor([], dtype=torch.long)}, "give some"),
        ({"thought_ids": torch.zeros(1, 3, 5, 3, dtype=torch.long)}, "thought_ids is "),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_quiet_star()(random_ids(1, 8), **arguments)


def test_text_too_short():
    with pytest.raises(ValueError, match=r"positions \[\]: give some"):
        tiny_quiet_star()(random_ids(1, 2))
