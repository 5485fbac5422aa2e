"""One training step of the authors' code, recorded as numbers, against ours.

official_case holds a tiny model's weights, forced thoughts, per-position losses, rewards,
log-likelihoods and gradients. Their averages differ from ours, so the losses are put together here
from the per-entry outputs.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import Mistral, MistralConfig
from thoughts import QuietStar, ThoughtConfig, reward

CASE = Path(__file__).parent / "fixtures" / "official_case"
SCALE = 100.0  # their embedding_scale


@pytest.fixture(scope="module")
def recorded():
    numbers = json.loads(CASE.with_suffix(".json").read_text())
    return numbers, load_file(CASE.with_suffix(".safetensors"))


def our_name(name: str) -> str:
    """Their parameter's name -> ours in QuietStar."""
    if name.startswith("talk_head.0."):
        return name.replace("talk_head.0.", "mixing_head.")
    return f"model.{name}" if name.startswith("lm_head.") else name  # "model.*" is the same


@pytest.fixture(scope="module")
def case(recorded):
    """Our model with their weights, its output, and their tensors."""
    numbers, tensors = recorded
    raw, quiet = numbers["config"], numbers["quiet"]
    skip = ("hidden_act", "rope_style")
    config = MistralConfig(**{name: value for name, value in raw.items() if name not in skip})
    thoughts = ThoughtConfig(
        n_thoughts=2,
        thought_length=3,
        n_true=3,
        start_id=quiet["start_id"],
        end_id=quiet["end_id"],
        embedding_scale=SCALE,
        reinforce_temperature=quiet["reinforce_temperature"],
    )
    model = QuietStar(Mistral(config), thoughts)
    weights = {our_name(n[2:]): t for n, t in tensors.items() if n.startswith("w.")}
    for name in ("start_embedding", "end_embedding"):
        weights[name] = weights[name][0]  # row 1 is unused
    model.load_state_dict(weights, strict=True)
    ids = tensors["input_ids"]
    S = ids.shape[1]
    # [K, row, position] with row = sequence * N + thought -> [B, N, J, K]
    forced = tensors["thought_ids"].permute(1, 2, 0).unflatten(0, (-1, 2))[:, :, : S - 1]
    output = model(ids, thought_ids=forced, positions=torch.arange(S - 1))
    return model, output, tensors, S


def theirs(x: torch.Tensor) -> torch.Tensor:
    """[B, N, J] -> [row, position]."""
    return x.flatten(0, 1)


def test_losses_at_every_position(case):
    _, output, tensors, S = case
    base = output.base_nll.repeat_interleave(2, 0)
    assert (base - tensors["loss_list.0"]).abs().max() < 5e-5
    for k in range(3):
        expected = tensors[f"loss_list.{5 + k}"]  # loss_list.{n_ahead - 1 + k}
        assert (theirs(output.talk_nll[k])[:, : S - 1 - k] - expected).abs().max() < 5e-5


def test_log_likelihood_of_thoughts(case):
    _, output, tensors, _ = case
    for k in range(3):
        got = theirs(output.thought_logp[..., k])
        assert (got - tensors[f"action_loglik.{k}"]).abs().max() < 5e-5


def test_rewards(case):
    _, output, tensors, S = case
    used = S - 1 - 3  # they reward one position fewer than have all targets
    r = theirs(reward(output.talk_nll, output.base_nll, output.positions, output.valid))[:, :used]
    assert (r.clamp(min=0) - tensors["policy_reward_used"]).abs().max() < 5e-5


def losses(case):
    """Their language and policy loss from our per-entry outputs."""
    _, output, tensors, S = case
    talk = [theirs(output.talk_nll[k])[:, : S - 1 - k].mean() for k in range(3)]
    language = 0.5 * output.base_nll.mean() + 0.5 * sum(talk) / 3
    used = S - 1 - 3
    r = reward(output.talk_nll, output.base_nll, output.positions, output.valid)[..., :used]
    policy = -(r.clamp(min=0)[..., None] * output.thought_logp[:, :, :used]).mean()
    return {"lm": (language, tensors["loss_lm_only"]), "dqn": (policy, tensors["dqn_loss"])}


@pytest.mark.parametrize("part", ["lm", "dqn"])
def test_loss_and_gradients(case, part):
    model, _, tensors, _ = case
    got, expected = losses(case)[part]
    assert abs(got.item() - expected.item()) < 1e-4 * abs(expected.item())

    model.zero_grad()
    got.backward(retain_graph=True)
    recorded = {n: t for n, t in tensors.items() if n.startswith(f"grad_{part}.")}
    assert len(recorded) > 20
    for name, gradient in recorded.items():
        ours = model.get_parameter(our_name(name.split(".", 1)[1])).grad
        if "_embedding" in name:
            assert not gradient[1].any()
            gradient = gradient[0]
        error = (ours - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, f"{name}: {error}"
    without = {our_name(n.split(".", 1)[1]) for n in recorded}
    for name, parameter in model.named_parameters():
        if name not in without:
            assert parameter.grad is None or not parameter.grad.any(), name
