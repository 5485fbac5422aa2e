"""In bfloat16, thoughts are heard from the first steps on, at the paper's learning rate of 1e-6.

In this small model, 1 - w is then some 1e-6. bfloat16 has no number between 0.996 and 1, so w, the
mixture and the logits of the mixture are float32 (section 4.3; QuietStar.mixing_weight, mix,
token_logits).
"""

import torch
from tiny import random_ids

import fast
import train
from model import Mistral, MistralConfig
from thoughts import QuietStar, ThoughtConfig, mix, quiet_star_loss, reward

STEPS = 3


def run(dtype):
    """1 - w and the rewards of the same thoughts in a few steps from the same weights."""
    torch.manual_seed(0)
    base = Mistral(MistralConfig(258, 64, 128, 2, 4, 2)).bfloat16().to(dtype)
    torch.manual_seed(1)
    model = QuietStar(base, ThoughtConfig(2, 3, 2, init_id=5, policy_weight=1.0))
    narrow = {"dtype": "bfloat16", "masters": False} if dtype == torch.bfloat16 else {}
    settings = train.Settings(fast=True, **narrow)
    optimizer = train.make_optimizer(model, settings, fast.apply(model, masters=settings.masters))
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    ids, forced = random_ids(2, 24, 258), random_ids(88, 3, 258, seed=3).view(2, 2, 22, 3)
    results = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        output = model(ids, thought_ids=forced)
        quiet_star_loss(output, model.config)[0].backward()
        r = reward(output.talk_nll, output.base_nll, output.positions, output.valid)
        results.append((1 - output.weight.detach(), r))
        optimizer.step()
    return results


def test_the_mixing_weight_leaves_1_in_the_same_step_and_rewards_agree():
    exact, narrow = run(torch.float32), run(torch.bfloat16)
    for step, ((heard, r), (heard_too, r_too)) in enumerate(zip(exact, narrow, strict=True)):
        assert heard_too.dtype == r_too.dtype == torch.float32
        if step == 0:
            assert not (heard.any() or heard_too.any() or r.any() or r_too.any())
            continue
        assert 1e-6 < heard.mean() < 1e-4
        assert abs(heard_too.mean() / heard.mean() - 1) < 0.05
        both = torch.stack([r.flatten(), r_too.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.95
        assert abs(r_too.std() / r.std() - 1) < 0.1
        assert (both[0].sign() == both[1].sign()).float().mean() > 0.9


def test_without_a_heard_thought_both_losses_are_the_same():
    """At w = 1 exactly: both heads are evaluated in float32, and so is the mixing head."""
    torch.manual_seed(0)
    model = QuietStar(Mistral(MistralConfig(258, 64, 128, 2, 4, 2)).bfloat16(), ThoughtConfig())
    assert {p.dtype for p in model.mixing_head.parameters()} == {torch.float32}
    output = model(random_ids(2, 12, 258))
    for a in range(4):
        ahead = output.base_nll[:, None, a : a + 8].expand(-1, 2, -1)
        assert (output.talk_nll[a] - ahead).abs().max() < 1e-5


def test_a_small_share_of_a_thought_is_not_rounded_away():
    h_init, h_thought = torch.ones(4).bfloat16(), 2 * torch.ones(4).bfloat16()
    mixed = mix(h_init, h_thought, torch.tensor(1 - 1e-5))
    assert mixed.dtype == torch.float32
    assert (mixed - 1.00001).abs().max() < 1e-6
