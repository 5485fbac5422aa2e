"""Paper, section 4.4: REINFORCE, against the gradient enumerated over every possible thought."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import random_ids, tiny_quiet_star

from thoughts import NEVER, quiet_star_loss, sample_tokens

V, K = 3, 2
THOUGHTS = list(itertools.product(range(V), repeat=K))
J = 3  # the one position that thinks


def model_and_text(N):
    model = tiny_quiet_star(
        seed=1,
        V=V,
        n_thoughts=N,
        thought_length=K,
        n_true=2,
        reinforce_temperature=1.0,
        base_weight=1.0,
    )
    return model, random_ids(1, 6, V)


def run(model, ids, thoughts):
    """Force N thoughts at position J of one text."""
    forced = torch.tensor(thoughts)[None, :, None]  # [1, N, 1, K]
    return model(ids, thought_ids=forced, positions=torch.tensor([J]))


def each_thought(N):
    """log p and R of every possible thought, one at a time -> two tensors [V ** K]."""
    model, ids = model_and_text(N)
    outputs = [run(model, ids, [thought] * N) for thought in THOUGHTS]
    logp = torch.stack([output.thought_logp[0, 0, 0].sum() for output in outputs])
    R = torch.stack([-output.talk_nll[:, 0, 0, 0].sum() for output in outputs]).detach()
    return model, logp, R


def gradient_of(loss, model):
    """Gradient as one vector; parameters that the loss does not reach count as 0."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = zip(gradients, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def alone(output, b):
    """The output of one text of a batch."""
    one, by_text = slice(b, b + 1), ("thought_ids", "thought_logp", "base_nll", "target_mask")
    parts = {name: getattr(output, name)[one] for name in by_text}  # [B, ..]
    by_token = {name: getattr(output, name)[:, one] for name in ("talk_nll", "weight", "valid")}
    return output._replace(**parts, **by_token)  # [A, B, ..]


def policy_gradient(N, drop_negative):
    """The expected gradient of our policy loss: the sum over all N-tuples of thoughts."""
    model, ids = model_and_text(N)
    config = replace(model.config, drop_negative=drop_negative)
    forced = torch.tensor([*itertools.product(THOUGHTS, repeat=N)])[:, :, None]  # [B, N, 1, K]
    output = model(ids.expand(len(forced), -1), thought_ids=forced, positions=torch.tensor([J]))
    total, mass = 0, 0
    for b in range(len(forced)):
        one = alone(output, b)
        loss, metrics = quiet_star_loss(one, config)  # base_weight 1: the base loss is a part
        policy = loss - one.base_nll.mean()
        assert abs(policy - metrics["policy_loss"]) < 1e-5
        p = one.thought_logp.sum().exp().detach()
        total = total + p * policy
        mass += p
    assert abs(mass - 1) < 1e-5  # every tuple was there once
    return gradient_of(total, model)


@pytest.mark.parametrize("N", [1, 2])
def test_expected_gradient_is_that_of_the_expected_reward(N):
    """With the mean of N as baseline it is (N - 1) / N of it; the base model is no such bias."""
    got = policy_gradient(N, drop_negative=False)
    model, logp, R = each_thought(N)
    expected = gradient_of(-(logp.exp() * R).sum(), model) * ((N - 1) / N if N > 1 else 1)
    assert expected.abs().max() > 1e-3
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("N", [1, 2])
def test_expected_gradient_without_negatives(N):
    """The enumerated surrogate: sum over tuples of p * mean_n max(r_n, 0) * -grad log p_n."""
    got = policy_gradient(N, drop_negative=True)
    model, logp, R = each_thought(N)
    _, ids = model_and_text(N)
    base = -run(model, ids, [THOUGHTS[0]] * N).base_nll[0, J : J + 2].sum().detach()
    p = logp.exp().detach()
    surrogate = 0
    for tuple_ in itertools.product(range(len(THOUGHTS)), repeat=N):
        index = list(tuple_)
        baseline = R[index].mean() if N > 1 else base
        r = (R[index] - baseline).clamp(min=0)
        surrogate = surrogate - p[index].prod() * (r * logp[index]).mean()
    expected = gradient_of(surrogate, model)
    assert expected.abs().max() > 1e-3
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_no_gradient_through_the_reward():
    """What only the reward depends on, end token and mixing head, gets nothing from the policy."""
    model, ids = model_and_text(2)
    output = run(model, ids, THOUGHTS[1:3])
    loss, _ = quiet_star_loss(output, model.config)
    (loss - output.base_nll.mean()).backward()
    assert not model.end_embedding.grad.any()
    assert all(not parameter.grad.any() for parameter in model.mixing_head.parameters())
    assert model.start_embedding.grad.any()
    assert model.model.embed_tokens.weight.grad.any()


def test_sums_out_of_order_draw_no_impossible_token(monkeypatch):
    """As on a GPU, where a sum may rise at a token of probability 0: the likeliest stands in."""
    logits = torch.tensor([[1.0, NEVER, 2.0]])
    assert sample_tokens(logits, torch.tensor([0.1])).tolist() == [0]
    monkeypatch.setattr(torch, "searchsorted", lambda cdf, point, right: torch.tensor([[1]]))
    assert sample_tokens(logits, torch.tensor([0.1])).tolist() == [2]


def test_every_token_of_a_thought_has_randomness_of_its_own():
    """20,000 sampled thoughts of two tokens: how often each pair comes against its probability."""
    model = tiny_quiet_star(
        V=V, n_thoughts=200, thought_length=2, n_true=1, reinforce_temperature=1.0
    )
    ids = random_ids(1, 3, V).expand(100, 3)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        output = model(ids, positions=torch.tensor([1]), generator=generator)
    pairs = output.thought_ids[:, :, 0].flatten(0, 1) @ torch.tensor([V, 1])
    p = output.thought_logp[:, :, 0].flatten(0, 1).sum(-1).exp()
    for pair in range(V * V):
        share = (pairs == pair).float().mean()
        expected = p[pairs == pair].mean() if share else 0.0
        assert abs(share - expected) < 0.018, pair  # five standard deviations, as below


def test_sampling_follows_the_probabilities():
    """20,000 sampled thoughts of one token against the softmax, at two temperatures."""
    for temperature in (1.0, 0.5):
        model = tiny_quiet_star(V=V, n_thoughts=200, thought_length=1, n_true=1)
        with torch.no_grad():
            output = model(
                random_ids(1, 3, V).expand(100, 3),
                positions=torch.tensor([1]),
                temperature=temperature,
                generator=torch.Generator().manual_seed(0),
            )
        ids, logp = output.thought_ids.flatten(), output.thought_logp.flatten()
        counts = torch.bincount(ids, minlength=V) / len(ids)
        by_id = torch.stack([logp[ids == i][0] for i in range(V)])
        tau = model.config.reinforce_temperature
        expected = torch.softmax(by_id * tau / temperature, -1)
        # a share of 20,000 draws has a standard deviation of at most 0.0036: five of them
        assert (counts - expected).abs().max() < 0.018


def test_a_sampled_thought_has_the_gradient_of_a_forced_one():
    """log p of every sampled token is differentiated, the first one included."""
    model, ids = tiny_quiet_star(), random_ids(2, 8)
    sampled = model(ids, generator=torch.Generator().manual_seed(0))
    forced = model(ids, thought_ids=sampled.thought_ids)
    for k in range(3):
        head = model.model.lm_head.weight
        one, other = (
            torch.autograd.grad(x.thought_logp[..., k].sum(), head, retain_graph=True)[0]
            for x in (sampled, forced)
        )
        assert one.abs().max() > 0
        assert (one - other).abs().max() < 1e-5
