"""QuietStar.think_at: what think_last says after every beginning of a text, all in parallel."""

import pytest
import torch
from tiny import random_ids, tiny_mistral, tiny_quiet_star

from model import Cache
from thoughts import QuietStar, ThoughtConfig


def think_one_by_one(model, ids, positions):
    """think_last after ids[:, : j + 1] for every j: a list of predictions."""
    predictions = []
    for j in positions:
        cache = Cache(model.model, len(ids), ids.shape[1] + model.config.thought_length + 2)
        if j > 0:
            model.model.hidden_states(model.model.embed_tokens(ids[:, :j]), cache)
        predictions.append(model.think_last(ids[:, j], cache))
    return predictions


@pytest.mark.parametrize("K", [0, 1, 3])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("meta", [{}, {"start_id": 3, "end_id": 5}])  # outside, in the vocabulary
def test_equals_think_last_at_every_position(K, window, meta):
    """The last position too; in any order; the logits of excluded tokens as well."""
    model = tiny_quiet_star(window=window, thought_length=K, **meta)
    ids, positions = random_ids(2, 9), [8, 0, 5, 7]
    at = model.think_at(ids, torch.tensor(positions))
    assert at.logits.shape == at.base_logits.shape == (2, 4, 23)
    assert at.thought_ids.shape == (2, 4, K)
    for place, last in enumerate(think_one_by_one(model, ids, positions)):
        assert torch.equal(at.thought_ids[:, place], last.thought_ids)
        assert (at.logits[:, place] - last.logits).abs().max() < 1e-5
        assert (at.base_logits[:, place] - last.base_logits).abs().max() < 1e-5
        assert (at.weight[:, place] - last.weight).abs().max() < 1e-5


def test_equals_forward():
    """The likelihoods that forward reports of the true next tokens; N and A stay the model's."""
    model, ids, positions = tiny_quiet_star(), random_ids(2, 9), torch.tensor([1, 4, 7])
    at = model.think_at(ids, positions)
    output = model(ids, positions=positions, temperature=0)
    targets = ids[:, positions + 1, None]
    talk = -torch.log_softmax(at.logits, -1).gather(-1, targets)[..., 0]  # [B, J]
    base = -torch.log_softmax(at.base_logits, -1).gather(-1, targets)[..., 0]
    assert (talk - output.talk_nll[0, :, 0]).abs().max() < 1e-5
    assert (base - output.base_nll[:, positions]).abs().max() < 1e-5
    assert torch.equal(at.thought_ids, output.thought_ids[:, 0])
    assert (model.config.n_thoughts, model.config.n_true) == (3, 2)


def test_a_new_quiet_star_predicts_exactly_what_its_model_does():
    mistral, ids = tiny_mistral(), random_ids(1, 6)
    at = QuietStar(mistral, ThoughtConfig(thought_length=3)).think_at(ids, torch.arange(6))
    assert torch.equal(at.logits, at.base_logits)
    assert (at.logits - mistral(ids)).abs().max() < 1e-6


@pytest.mark.parametrize("positions", [[6], [-1], [], [[1]], [1.0]])
def test_bad_positions(positions):
    with pytest.raises(ValueError, match=r"positions must be whole numbers in 0 \.\. 5"):
        tiny_quiet_star().think_at(random_ids(1, 6), torch.tensor(positions))
