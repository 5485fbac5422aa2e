"""The start and end tokens: how they begin, how they move, that they are never written."""

import pytest
import torch
from tiny import random_ids, tiny_mistral, tiny_quiet_star

from model import KVCache
from sample import generate
from thoughts import NEVER, QuietStar, ThoughtConfig, em_dash_id, quiet_star_loss, sample_tokens


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_both_begin_as_the_em_dash(scale):
    mistral = tiny_mistral()
    model = QuietStar(mistral, ThoughtConfig(init_id=7, embedding_scale=scale))
    dash = mistral.embed_tokens.weight[7]
    for token in (model.start_id, model.end_id):
        assert torch.allclose(model.embed_thought(torch.tensor([token]))[0], dash, rtol=1e-6)
    assert torch.allclose(model.start_embedding * scale, dash, rtol=1e-6)


def test_at_random_they_are_of_the_size_of_embeddings():
    mistral = tiny_mistral()
    with torch.no_grad():
        mistral.embed_tokens.weight.mul_(10)
    model = QuietStar(mistral, ThoughtConfig(embedding_scale=1.0))
    both = torch.cat([model.start_embedding, model.end_embedding])
    assert 0.5 < both.std() / mistral.embed_tokens.weight.std() < 1.5


def test_an_adam_step_moves_them_embedding_scale_times_as_far():
    moved = {}
    for scale in (1.0, 100.0):
        model = tiny_quiet_star(init_id=7, embedding_scale=scale)
        with torch.no_grad():  # the same embeddings in use for both scales
            model.start_embedding.copy_(torch.linspace(-1, 1, 16) / scale)
            model.end_embedding.copy_(torch.linspace(1, -1, 16) / scale)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        start = torch.tensor([model.start_id, model.end_id])
        before = model.embed_thought(start).detach()
        forced = random_ids(2 * 3 * 6, 3).view(2, 3, 6, 3)
        loss, _ = quiet_star_loss(model(random_ids(2, 8), thought_ids=forced), model.config)
        loss.backward()
        optimizer.step()
        moved[scale] = model.embed_thought(start).detach() - before
    assert torch.allclose(moved[1.0].abs(), torch.full((2, 16), 1e-3), rtol=1e-2)
    assert torch.allclose(moved[100.0], 100 * moved[1.0], rtol=1e-2)


def lean_towards(model, token):
    """Make `token` by far the likeliest everywhere."""
    with torch.no_grad():
        model.model.norm.weight.zero_()[0] = 1.0  # h is one number
        h = model.model.run(
            model.model.embed_tokens(random_ids(1, 4, 4)), KVCache(model.model.config)
        )
        model.model.lm_head.weight[token, 0] = 1e4 * h[0, -1, 0].sign()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_meta_tokens_are_never_sampled(temperature):
    model = tiny_quiet_star(V=6, start_id=4, end_id=5, n_thoughts=50)
    for token in (4, 5):
        lean_towards(model, token)
        output = model(random_ids(2, 8, 4), temperature=temperature)
        assert output.thought_ids.max() < 4
        assert torch.isfinite(output.thought_logp).all()
        prediction = model.think_last(torch.tensor([1, 2]), KVCache(model.model.config))
        assert max(prediction.logits[:, 4:].max(), prediction.base_logits[:, 4:].max()) <= NEVER
        text = generate(model, random_ids(2, 3, 4), 8, temperature=temperature)
        assert text.max() < 4


def test_probability_zero_is_never_drawn():
    """At both ends of the cumulative sum, for the smallest and the largest uniform number."""
    logits = torch.tensor([[-1e38, 0.0, -1e38, 1.0, -1e38]]).expand(3, 5)
    largest = 1 - 2.0**-24
    drawn = sample_tokens(logits, torch.tensor([0.0, 0.5, largest]))
    assert drawn.tolist() == [1, 3, 3]
    for V in range(2, 200):  # probabilities whose sum may round to less than 1
        assert sample_tokens(torch.zeros(1, V), torch.tensor([largest])).tolist() == [V - 1]


def test_forced_pause_tokens_are_finite():
    """The start token in place of a thought: as many tokens, no content."""
    model = tiny_quiet_star(policy_weight=0.0)
    forced = torch.full((1, 3, 6, 3), model.start_id)
    output = model(random_ids(1, 8), thought_ids=forced)
    loss, _ = quiet_star_loss(output, model.config)
    loss.backward()
    assert torch.isfinite(loss)
    assert output.thought_logp.max() < -1e9  # the log of a probability of 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


class Letters:
    """A tokenizer of given pieces: "—" is these ids, in this order."""

    def __init__(self, pieces, dash=None):
        self.pieces, self.dash = pieces, dash

    def token_id(self, text):
        if self.dash is None:
            raise ValueError(text)
        return self.dash

    def encode(self, text):
        return list(range(len(self.pieces)))

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def test_the_em_dash_is_a_token_or_the_first_that_is_not_white_space():
    assert em_dash_id(Letters([" ", "—"], dash=7)) == 7
    assert em_dash_id(Letters([" ", "\t", "\ufffd", "x"])) == 2
    assert em_dash_id(Letters(["-", " "])) == 0
    assert em_dash_id(Letters([" "])) == 0


def test_a_greedy_thought_holds_no_meta_token():
    """Not even where the head would prefer one."""
    model = tiny_quiet_star(start_id=3, end_id=4)
    with torch.no_grad():
        model.model.norm.weight.abs_()
        states = model.model.run(
            model.model.embed_tokens(random_ids(1, 5)), KVCache(model.model.config)
        )
        model.model.lm_head.weight[3] = 100 * states[0, -1]
        model.model.lm_head.weight[4] = -100 * states[0, -1]
    cache = KVCache(model.model.config)
    ids = random_ids(1, 5)
    model.model(ids[:, :-1], cache)
    thought = model.think_last(ids[:, -1], cache).thought_ids
    assert not ((thought == 3) | (thought == 4)).any()
    head = model.model.lm_head.weight
    assert (head[3:5] @ states[0, -1]).max() > (head @ states[0, -1])[5:].max()
