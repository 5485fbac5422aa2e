"""Paper, section 4.3: the mixing head, and what the prediction is made of."""

import torch
import torch.nn.functional as F
from tiny import random_ids, tiny_mistral, tiny_quiet_star

from thoughts import QuietStar, ThoughtConfig, mix, quiet_star_loss, token_logits


def test_untrained_quiet_star_is_the_base_model():
    """w = 1 exactly, so the talk loss is the base loss of the same targets, whatever is thought."""
    mistral = tiny_mistral()
    model = QuietStar(mistral, ThoughtConfig(thought_length=2, n_true=2, init_id=7))
    ids = random_ids(2, 9)
    output = model(ids)
    logits = mistral(ids)[:, :-1]
    base = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    base = base.view(2, 8)
    assert torch.equal(output.weight, torch.ones_like(output.weight))
    assert (output.base_nll - base).abs().max() < 1e-6
    for a in range(2):
        expected = base[:, None, a : a + 7].expand(2, 2, 7)
        assert (output.talk_nll[a] - expected).abs().max() < 1e-6
    _, metrics = quiet_star_loss(output, model.config)
    assert metrics["reward"].abs() < 1e-6
    assert metrics["weight"] == 1
    assert not any(value.requires_grad for value in metrics.values())


def test_hidden_mixing_is_log_probability_mixing():
    """log_softmax(head(mix)) = log_softmax(w log p_init + (1 - w) log p_thought), also w > 1."""
    torch.manual_seed(0)
    h_init, h_thought, head = torch.randn(5, 8), torch.randn(5, 8), torch.randn(11, 8)
    w = torch.tensor([0.0, 0.3, 1.0, 1.7, -0.5])
    mixed = torch.log_softmax(token_logits(mix(h_init, h_thought, w), head), -1)
    log_p_init = torch.log_softmax(h_init @ head.T, -1)
    log_p_thought = torch.log_softmax(h_thought @ head.T, -1)
    expected = torch.log_softmax(w[:, None] * log_p_init + (1 - w[:, None]) * log_p_thought, -1)
    assert (mixed - expected).abs().max() < 1e-5


def test_mixing_head_sees_both_states_in_order():
    """w = 1 - MLP([h_init ; h_thought]): written out with the head's own weights."""
    model = tiny_quiet_star()
    h_init, h_thought = torch.randn(4, 16), torch.randn(4, 16)
    p = dict(model.mixing_head.named_parameters())
    x = torch.relu(torch.cat([h_init, h_thought], 1) @ p["0.weight"].T + p["0.bias"])
    x = torch.relu(x @ p["2.weight"].T + p["2.bias"]) @ p["4.weight"].T
    assert torch.allclose(model.mixing_weight(h_init, h_thought), 1 - x[:, 0], atol=1e-6)
    assert sorted(p) == ["0.bias", "0.weight", "2.bias", "2.weight", "4.weight"]


def test_token_logp_and_its_gradient():
    """log p and gradient of given tokens, with excluded tokens and a temperature, written out."""
    torch.manual_seed(0)
    h = torch.randn(3, 4, 8, requires_grad=True)
    head = torch.randn(11, 8, requires_grad=True)
    ids, upstream = torch.randint(9, (3, 4)), torch.randn(3, 4)
    upstream[1] = 0  # as where a reward is dropped
    logits = QuietStar.token_logits(h, head, (9, 10))
    got = QuietStar.token_logp(logits, ids, 3.0)
    plain = (h @ head.T)[..., :9] / 3.0
    expected = torch.log_softmax(plain, -1).gather(-1, ids[..., None])[..., 0]
    assert (got - expected).abs().max() < 1e-6
    ours = torch.autograd.grad((got * upstream).sum(), (h, head))
    theirs = torch.autograd.grad((expected * upstream).sum(), (h, head))
    for gradient, slow in zip(ours, theirs, strict=True):
        assert (gradient - slow).abs().max() < 1e-6
