"""Other objectives on numbers worked out by hand, and the thoughts of the controls."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_reward import BASE_NLL, POSITIONS, TALK_NLL, VALID
from tiny import random_ids, tiny_quiet_star

import fast
import train
from model import KVCache
from thoughts import (
    Output,
    QuietStar,
    ThoughtConfig,
    count_targets,
    load_quiet_star,
    quiet_star_loss,
    save_quiet_star,
    token_logp,
)
from tools import experiments, objectives

# B = 2, N = 3: S = -2, -3, -7 and -1, -2, -3 in test_reward; here exp(S) is
P = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 1 / 2]])  # means 1/3 and 1/4
LOGP = -torch.arange(1.0, 7).view(2, 3, 1, 1) * torch.tensor([0.25, 0.75])  # of K = 2 tokens
CONFIG = ThoughtConfig(3, 2, 2, base_weight=0.25, policy_weight=10.0)
BASE = 40.75 / 8  # the mean of BASE_NLL


def output_of(talk_nll=TALK_NLL, valid=VALID):
    return Output(
        thought_ids=torch.zeros(2, 3, 1, 2, dtype=torch.long),
        thought_logp=LOGP,
        base_nll=BASE_NLL,
        talk_nll=talk_nll,
        weight=torch.full((2, 2, 3, 1), 0.25),
        valid=valid,
        positions=POSITIONS,
        target_mask=torch.ones(2, 5, dtype=torch.bool),
    )


def with_probabilities():
    """The first true token has nll 1; the second makes exp(S) what P says."""
    first = torch.ones(2, 3, 1)
    return output_of(torch.stack([first, -P[..., None].log() - first]))


def language(output):
    """base_weight L_base + (1 - base_weight) L_NLL."""
    return 0.25 * BASE + 0.75 * output.talk_nll.mean().item()


ALL = [
    objectives.all_advantages,
    objectives.base_as_baseline,
    objectives.log_mean,
    objectives.probability_reward,
    objectives.rlp,
    objectives.rlp_base,
]


@pytest.mark.parametrize(
    ("objective", "output", "policy", "r"),
    [
        # r = 2, 1, -3 and 1, 0, -1; thought n of 6 has log p = -n
        (objectives.all_advantages, output_of(), (2 + 2 - 9 + 4 - 0 - 6) / 6, 0),
        # b = -3.5 and -1.25: r = 1.5, 0.5, -3.5 and 0.25, -0.75, -1.75
        (objectives.base_as_baseline, output_of(), (1.5 + 2 * 0.5 + 4 * 0.25) / 6, 2.25),
        # r = 1/6, -1/12, -1/12 and -1/8, -1/8, 1/4
        (objectives.probability_reward, with_probabilities(), (1 / 6 + 6 / 4) / 6, 1 / 6 + 1 / 4),
    ],
)
def test_another_advantage(objective, output, policy, r):
    """The language losses stay; policy loss: mean of -r log p; reward: mean of the r it used."""
    loss, metrics = objective(output, CONFIG)
    assert metrics["reward"].item() == pytest.approx(r / 6, abs=1e-6)
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)
    assert loss.item() == pytest.approx(language(output) + 10 * policy, rel=1e-5)
    assert metrics["loss"].item() == loss.item()


def test_negatives_are_kept_if_asked():
    """-3.5, -0.75 and -1.75 against the base model; -1/12, -1/12, -1/8 and -1/8 of the means."""
    config = replace(CONFIG, drop_negative=False)
    _, metrics = objectives.base_as_baseline(output_of(), config)
    policy = (1.5 + 2 * 0.5 - 3 * 3.5 + 4 * 0.25 - 5 * 0.75 - 6 * 1.75) / 6
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)
    _, metrics = objectives.probability_reward(with_probabilities(), config)
    policy = (1 / 6 - 2 / 12 - 3 / 12 - 4 / 8 - 5 / 8 + 6 / 4) / 6
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "output", "r"),
    [
        (objectives.all_advantages, output_of(), [[2, 1, -3], [1, 0, -1]]),
        (objectives.base_as_baseline, output_of(), [[1.5, 0.5, 0], [0.25, 0, 0]]),
        (objectives.log_mean, output_of(), [[2, 1, 0], [1, 0, 0]]),
        (objectives.probability_reward, with_probabilities(), [[1 / 6, 0, 0], [0, 0, 1 / 4]]),
        (objectives.rlp, output_of(), [[3, 1.5, -4.5], [1.5, 0, -1.5]]),
        (objectives.rlp_base, output_of(), [[3, 1.5, -4.5], [1.5, 0, -1.5]]),
    ],
)
@pytest.mark.parametrize("policy_weight", [10.0, None])
def test_policy_gradient(objective, output, r, policy_weight):
    """d loss / d log p of a token = - weight r / 6; without a weight, the authors' 1e6 / K."""
    logp = LOGP.clone().requires_grad_()
    config = replace(CONFIG, policy_weight=policy_weight)
    loss, _ = objective(output._replace(thought_logp=logp), config)
    loss.backward()
    expected = -(policy_weight or 5e5) * torch.tensor(r) / 6  # [B, N]
    assert torch.allclose(logp.grad, expected[..., None, None].expand(2, 3, 1, 2), rtol=1e-4)


def test_gradient_of_log_mean():
    """d L_NLL / d nll of a token = its thought's share of the mean p, over A and 2 positions."""
    talk = with_probabilities().talk_nll.clone().requires_grad_()
    loss, _ = objectives.log_mean(output_of(talk), replace(CONFIG, policy_weight=0.0))
    loss.backward()
    share = P / P.sum(1, keepdim=True)  # [B, N]
    assert torch.allclose(talk.grad, (0.75 * share / 2 / 2)[..., None].expand(2, 2, 3, 1))


@pytest.mark.parametrize("objective", [objectives.probability_reward, objectives.rlp])
def test_a_lone_thought_cannot_be_compared(objective):
    with pytest.raises(ValueError, match="n_thoughts is 1"):
        objective(output_of(), replace(CONFIG, n_thoughts=1))


def test_no_valid_position_is_no_loss():
    """Where no position has all its targets, the rest is 0, not NaN."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3] = False
    output = output_of(valid=torch.tensor([[[True], [True]], [[False], [False]]]))
    for objective in ALL:
        loss, _ = objective(output._replace(target_mask=mask), CONFIG)
        assert loss.isfinite(), objective


def test_the_share_of_positions_with_a_reward():
    """S = -2 and -1 against b = -3.5 and -1; the second text has no reward other than 0."""
    output = output_of(torch.tensor([1.0, 0.5]).view(1, 2, 1, 1).expand(2, 2, 3, 1))
    output = output._replace(base_nll=torch.tensor([[9.0, 1.5, 2.0, 9.0], [9.0, 0.5, 0.5, 9.0]]))
    assert objectives.base_as_baseline(output, CONFIG)[1]["rewarded"] == 0.5


def test_log_mean():
    """- (log 1/3 + log 1/4) / 2 over A = 2 tokens; REINFORCE stays Quiet-STaR's."""
    output = with_probabilities()
    loss, metrics = objectives.log_mean(output, CONFIG)
    quiet_star, expected = quiet_star_loss(output, CONFIG)
    L_NLL = (math.log(3) + math.log(4)) / 2 / 2
    rest = quiet_star.item() - 0.75 * output.talk_nll.mean().item()
    assert loss.item() == pytest.approx(rest + 0.75 * L_NLL, rel=1e-5)
    assert metrics["talk_nll"] == expected["talk_nll"]
    assert output.talk_nll.mean() > L_NLL  # Jensen


def test_rlp():
    """1.5 times r = 2, 1, -3 and 1, 0, -1, and no language loss."""
    loss, metrics = objectives.rlp(output_of(), CONFIG)
    assert metrics["reward"] == 0
    policy = 1.5 * (2 + 2 - 9 + 4 - 0 - 6) / 6
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)
    assert loss.item() == pytest.approx(10 * policy, rel=1e-5)


def test_rlp_with_the_loss_without_thoughts():
    """As rlp, and 0.25 of the mean of BASE_NLL."""
    base = BASE_NLL.clone().requires_grad_()
    loss, metrics = objectives.rlp_base(output_of()._replace(base_nll=base), CONFIG)
    policy = 1.5 * (2 + 2 - 9 + 4 - 0 - 6) / 6
    assert loss.item() == pytest.approx(10 * policy + 0.25 * BASE, rel=1e-5)
    assert metrics["loss"].item() == loss.item()
    loss.backward()
    assert torch.allclose(base.grad, torch.tensor(0.25 / 8))


def test_rlp_with_all_losses_is_all_advantages():
    """With N = 2 and twice the policy weight, as in the experiment."""
    output = output_of(TALK_NLL[:, :, :2])
    output = output._replace(thought_logp=LOGP[:, :2], weight=output.weight[:, :, :2])
    options = (experiments.EXPERIMENTS[name].options for name in ("rlp", "rlp-language"))
    one, other = (replace(train.make_settings(given)[1], base_weight=0.25) for given in options)
    loss, _ = objectives.all_advantages(output, other)
    rlp, _ = objectives.rlp(output, one)
    assert loss.item() == pytest.approx(rlp.item() + language(output), rel=1e-5)


@pytest.mark.parametrize("objective", ALL)
def test_missing_targets_do_not_count(objective):
    """A position without all A targets, whatever its losses are."""
    valid, base_nll = VALID.clone(), BASE_NLL.clone()
    target_mask = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 1] = target_mask[1, 3] = False  # x_3 of the second text: j = 1, a = 1
    base_nll[1, 2] = 0
    losses = []
    for filler in (5.0, 7.0):
        talk = TALK_NLL.clone()
        talk[0, 1] = filler
        output = output_of(talk, valid)._replace(base_nll=base_nll, target_mask=target_mask)
        losses.append(objective(output, CONFIG)[0].item())
    assert losses[0] == losses[1] == objective(output, CONFIG, (7, 1))[0].item()


@pytest.mark.parametrize("objective", ALL)
def test_rewards_are_constants(objective):
    """A policy weight changes nothing of the gradient through the predictions after thoughts."""
    gradients = []
    for weight in (0.0, 10.0):
        talk = TALK_NLL.clone().requires_grad_()
        loss, _ = objective(output_of(talk), replace(CONFIG, policy_weight=weight))
        if loss.requires_grad:
            loss.backward()
        gradients.append(talk.grad)
    assert (gradients[0] is None) == (objective in (objectives.rlp, objectives.rlp_base))
    assert gradients[0] is None or torch.equal(*gradients)


@pytest.mark.parametrize(
    "objective", [*ALL, objectives.rpt_loss, objectives.kl_loss, train.thought_loss]
)
def test_splitting_a_batch_changes_neither_gradient_nor_loss(objective):
    ids, mask = random_ids(4, 12), torch.ones(4, 12, dtype=torch.bool)
    mask[0, 3] = mask[2, 7:] = False
    loss_of, results = objectives.trained_by(objective) if objective in ALL else objective, []
    for size in (None, 3):
        make = straight_through if objective is train.thought_loss else tiny_quiet_star
        model, settings = make(), train.Settings(micro_batch=size, positions=5)
        model.reference = (tiny_quiet_star(seed=1),)
        generator = torch.Generator().manual_seed(7)
        metrics = train.batch_gradient(model, loss_of, ids, mask, settings, 2, generator)
        gradient = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((metrics["loss"], gradient))
    (loss, whole), (other, parts) = results
    assert other == pytest.approx(loss, rel=1e-5)
    for name in whole:
        tolerance = 1e-5 * (1 + whole[name].abs().max())
        assert (whole[name] - parts[name]).abs().max() < tolerance, name


def test_thoughts_are_sampled_at_the_temperature_given():
    model, ids = tiny_quiet_star(), random_ids(2, 12)
    mask, positions = torch.ones(2, 12, dtype=torch.bool), torch.arange(10)
    for temperature in (1.0, 3.0):
        seen = []

        def objective(output, config, counts, seen=seen):
            seen.append(output.thought_ids)
            return output.base_nll.sum(), {}

        loss_of = objectives.trained_by(objective, temperature)
        loss_of(model, ids, mask, positions, (22, 20), torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(3)
        expected = model(ids, temperature=temperature, generator=generator).thought_ids
        assert torch.equal(seen[0], expected)


# --------------------------------------------------------------------- objectives of the model


class Made:
    """A model whose thoughts and predictions are those of an Output, and logits [B, N, J, A, V]."""

    config, token_logp = CONFIG, staticmethod(token_logp)

    def __init__(self, output, logits):
        self.output, self.logits = output, logits

    def __call__(self, ids, thought_ids, positions, targets, generator=None):
        assert thought_ids is None or thought_ids is self.output.thought_ids
        self.token_logp(torch.zeros(2, 4, 4), ids[:, 1:])  # of the text
        true = ids[:, None, 2:4, None].transpose(2, 3).expand(2, 3, 1, 2)
        self.token_logp(self.logits, true)
        return self.output


def test_the_likeliest_next_token_is_rewarded():
    """Of x_2 = 1 and 3, thoughts predict 1, 2, 1 and 0, 0, 3: hits 1, 0, 1 and 0, 0, 1.

    r = 1/3, -2/3, 1/3 and -1/3, -1/3, 2/3; thought n of 6 has log p = -n. What they predict for x_3
    = 2 does not matter.
    """
    ids = torch.tensor([[0, 0, 1, 2, 0], [0, 0, 3, 2, 0]])
    first = torch.tensor([[1, 2, 1], [0, 0, 3]])
    second = torch.tensor([[2, 2, 0], [2, 0, 2]])
    logits = F.one_hot(torch.stack([first, second], -1)[:, :, None], 4).float()
    model = Made(output_of(), logits)
    for drop, policy in ((True, 1 + 3 + 2 * 6), (False, 1 - 4 + 3 - 4 - 5 + 12)):
        model.config = replace(CONFIG, drop_negative=drop)
        loss, metrics = objectives.rpt_loss(model, ids, None, None, None, None)
        assert metrics["policy_loss"].item() == pytest.approx(policy / 3 / 6, rel=1e-5)
        expected = language(output_of()) + 10 * policy / 3 / 6
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_hits_are_of_every_token_predicted(path):
    """The text, K tokens of every thought, the true tokens; weights and results stay the same."""
    model, ids = tiny_quiet_star(), random_ids(2, 9)
    if path == "fast":
        fast.apply(model)
    token_logits, seen = model.token_logits, []
    model.token_logits = lambda *given: seen.append(token_logits(*given)) or seen[-1]
    watched, hits = objectives.watch_hits(model)
    output = watched(ids, generator=torch.Generator().manual_seed(3))
    true = torch.stack([ids[:, 1:8], ids[:, 2:9]], dim=-1)[:, None].expand(2, 3, 7, 2)
    tokens = [ids[:, 1:], *output.thought_ids.unbind(-1), true]
    assert len(hits) == len(seen) == 5
    for hit, logits, token in zip(hits, seen, tokens, strict=True):
        best = logits.gather(-1, token[..., None])[..., 0] == logits.amax(-1)
        assert torch.equal(hit, best)
    assert hits[-1].any()
    assert not hits[-1].all()

    gradients = []
    for one in (watched, model):
        model.zero_grad()
        output = one(ids, generator=torch.Generator().manual_seed(3))
        loss, _ = quiet_star_loss(output, model.config)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert len(hits) == 10  # the model itself is not watched


def test_leaving_the_initial_model_costs_a_tenth():
    """log p = -1 .. -6, of the reference -11, -2, -23 and -4, -5, -16: S_n - 0.1 KL is -3, -3, -9
    and -1, -2, -4, less the means -5 and -7/3."""
    before = LOGP - torch.tensor([[10.0, 0, 20], [0, 0, 10]])[..., None, None] / 2
    talk, logp = TALK_NLL.clone().requires_grad_(), LOGP.clone().requires_grad_()
    output = output_of(talk)._replace(thought_logp=logp)
    model, ids = Made(output, torch.zeros(2, 3, 1, 2, 4)), random_ids(2, 5, 4)
    model.reference = (Made(output._replace(thought_logp=before), model.logits),)
    model.config = replace(CONFIG, drop_negative=False)
    loss, metrics = objectives.kl_loss(model, ids, None, None, None, None)
    policy = (2 + 2 * 2 - 4 * 3 + 4 * 4 / 3 + 5 / 3 - 6 * 5 / 3) / 6
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)
    assert loss.item() == pytest.approx(language(output) + 10 * policy, rel=1e-5)
    loss.backward()
    r = torch.tensor([[2, 2, -4], [4 / 3, 1 / 3, -5 / 3]])
    assert torch.allclose(logp.grad, -10 * r[..., None, None].expand(2, 3, 1, 2) / 6)
    assert torch.allclose(talk.grad, torch.tensor(0.75 / 12))
    model.config = CONFIG  # negatives dropped
    _, metrics = objectives.kl_loss(model, ids, None, None, None, None)
    policy = (2 + 2 * 2 + 4 * 4 / 3 + 5 / 3) / 6
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-5)


@pytest.mark.parametrize("loss_of", [objectives.rpt_loss, objectives.kl_loss])
def test_a_lone_thought_has_no_mean_to_beat(loss_of):
    with pytest.raises(ValueError, match="n_thoughts is 1"):
        loss_of(tiny_quiet_star(n_thoughts=1), random_ids(1, 9), None, None, None, None)


# ------------------------------------------------------------------------------------ the controls


@pytest.mark.parametrize(
    ("loss_of", "tokens"),
    [(objectives.pause_loss, [23]), (objectives.random_loss, list(range(23)))],
)
def test_forced_thoughts(monkeypatch, loss_of, tokens):
    """2 sequences, 3 thoughts of 3 tokens at 40 positions, 23 tokens in the vocabulary."""
    model, ids, positions = tiny_quiet_star(), random_ids(2, 42), torch.arange(40)
    monkeypatch.setattr(
        objectives.thoughts, "quiet_star_loss", lambda output, config, counts: output
    )
    generator = torch.Generator().manual_seed(3)
    targets = torch.ones_like(ids) > 0
    thoughts = loss_of(model, ids, targets, positions, (82, 80), generator).thought_ids
    assert thoughts.shape == (2, 3, 40, 3)
    assert model.start_id == 23
    assert thoughts.unique().tolist() == tokens  # 720 draws: one is missing once in 1e12


@pytest.mark.parametrize("name", ["pause", "random"])
def test_thoughts_of_a_control_are_forced_and_not_reinforced(name):
    """The metrics are those of the language losses after just these thoughts."""
    model, ids = tiny_quiet_star(policy_weight=5.0), random_ids(2, 9)
    generator = torch.Generator().manual_seed(7)
    forced = {
        "pause": torch.full((2, 3, 7, 3), model.start_id),
        "random": torch.randint(23, (2, 3, 7, 3), generator=generator),
    }[name]
    mask, positions = torch.ones(2, 9, dtype=torch.bool), torch.arange(7)
    loss_of, generator = getattr(objectives, f"{name}_loss"), torch.Generator().manual_seed(7)
    counts = count_targets(mask, positions, 2)
    loss, metrics = loss_of(model, ids, mask, positions, counts, generator)
    output = model(ids, forced)
    expected = output.base_nll.mean() / 2 + output.talk_nll.mean() / 2
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == metrics["loss"].item()
    assert metrics["policy_loss"] == 0


# ------------------------------------------------------------------------- models to begin with


def test_without_mixing_only_the_thought_is_heard(tmp_path, monkeypatch):
    """w = 0 exactly, also after saving and loading; the mixing head is not trained."""
    monkeypatch.setattr(train, "thinking_model", lambda *run: tiny_quiet_star())
    model = objectives.begin_without_mixing()
    assert not model(random_ids(2, 9)).weight.any()
    save_quiet_star(model, tmp_path)
    assert not load_quiet_star(tmp_path)(random_ids(2, 9)).weight.any()
    loss, _ = objectives.rlp(model(random_ids(2, 9)), model.config)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.mixing_head.parameters())
    assert model.start_embedding.grad.any()


def test_the_reference_is_what_the_run_began_with(tmp_path):
    """Also when the run is resumed; it is neither trained nor saved."""
    settings, config = train.make_settings({})
    train.runs.make_folder(settings, config, tmp_path / "run")
    start = QuietStar(train.Mistral(train.BASE), replace(config, init_id=1))
    for folder, source in (("start", start), ("run/quiet_star", start)):
        save_quiet_star(source, tmp_path / folder)
        train.runs.copy_tokenizer(tmp_path / "run", tmp_path / folder)
        torch.nn.init.zeros_(start.end_embedding)  # what training has changed
    settings = replace(settings, checkpoint=str(tmp_path / "start"))
    cpu = torch.device("cpu")
    model = objectives.begin_with_reference(settings, config, tmp_path / "run", cpu)
    [reference] = model.reference
    assert reference.end_embedding.any()
    assert not model.end_embedding.any()
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in start.named_parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_squashed_weight(tmp_path, monkeypatch):
    """1 - sigmoid(-3) = 0.9526 if the MLP returns 0; 0.5 if it returns 3."""
    monkeypatch.setattr(train, "thinking_model", lambda *run: tiny_quiet_star())
    model, h = objectives.begin_squashed(), torch.ones(2, 16)
    _, _, hidden, _, last = model.mixing_head
    save_quiet_star(model, tmp_path)
    ids, thought = random_ids(2, 9), torch.zeros(2, 3, 7, 3, dtype=torch.long)
    ordinary = load_quiet_star(tmp_path)(ids, thought).weight
    assert torch.allclose(model(ids, thought).weight, torch.sigmoid(2 + ordinary))
    torch.nn.init.zeros_(hidden.weight), torch.nn.init.constant_(hidden.bias, 3 / 16)
    for weight, w in ((0.0, 0.952574), (1.0, 0.5)):
        torch.nn.init.constant_(last.weight, weight)
        assert model.mixing_weight(h, h).tolist() == pytest.approx([w, w], rel=1e-5)


# -------------------------------------------------------------------------- straight-through


def straight_through(**thoughts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "thinking_model", lambda: tiny_quiet_star(**thoughts))
        return objectives.begin_straight_through()


def test_gumbel_samples_have_the_probabilities_of_a_softmax():
    """4 tokens, 40 000 samples: standard errors are below 0.0025."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    uniform = torch.rand(1, 1, 40_000, generator=torch.Generator().manual_seed(0))
    noise = objectives.gumbel(uniform, 4)
    assert noise.shape == (1, 1, 40_000, 4)
    found = (p.log() + noise).argmax(-1).flatten().bincount() / 40_000
    assert (found - p).abs().max() < 0.01
    twice = objectives.gumbel(uniform[..., :5].expand(2, 1, 5).clone(), 4)
    assert torch.equal(twice[0], twice[1])
    uniform[0, 0, 0] /= 2
    assert not torch.equal(objectives.gumbel(uniform, 4), noise)


def test_straight_through_reads_the_tokens_that_it_samples():
    """Results are those of a QuietStar that is given its thoughts."""
    model, ids = straight_through(start_id=3, end_id=5), random_ids(4, 12)
    model.model.lm_head.weight.data[3] = model.model.lm_head.weight.data[5] = 9  # often the largest
    output = model(ids, generator=torch.Generator().manual_seed(3))
    assert output.thought_ids.shape == (4, 3, 10, 3)
    assert not torch.isin(output.thought_ids, torch.tensor([3, 5])).any()
    assert len(output.thought_ids.unique()) > 15
    again = model(ids, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.thought_ids, output.thought_ids)
    assert torch.equal(model(ids, output.thought_ids).talk_nll, output.talk_nll)
    plain = tiny_quiet_star(start_id=3, end_id=5)
    plain.load_state_dict(model.state_dict())
    expected = plain(ids, output.thought_ids)
    for name in ("talk_nll", "thought_logp", "weight"):
        assert torch.allclose(getattr(output, name), getattr(expected, name), atol=1e-5), name
    greedy = plain(ids, temperature=0).thought_ids
    for temperature in (0, 1e-6):
        assert torch.equal(model(ids, temperature=temperature).thought_ids, greedy)
    assert straight_through(thought_length=0)(ids).thought_ids.shape == (4, 3, 10, 0)


def test_gradient_of_straight_through():
    """Against one thought at j = 4, written out: a token is one-hot + p - p without gradient."""
    model = straight_through(n_thoughts=1, thought_length=2, n_true=1)
    text, mistral, V = random_ids(1, 7)[0], model.model, 23
    table, head, scale = mistral.embed_tokens.weight, mistral.lm_head.weight, 100.0
    names = [name for name, _ in model.named_parameters()]
    generator = torch.Generator().manual_seed(3)
    output = model(text[None], None, torch.tensor([4]), generator=generator)
    found = torch.autograd.grad(output.talk_nll.sum(), [*model.parameters()])

    def run(x):
        return mistral.run(x[None], KVCache(mistral.config))[0]  # [length, D]

    uniform = torch.rand(1, 1, 1, 2, generator=torch.Generator().manual_seed(3))
    h_init = run(table[text[:5]])[-1]
    x = torch.cat([table[text[:5]], model.start_embedding[None] * scale])
    for k in range(2):
        noisy = run(x)[-1] @ head.T + objectives.gumbel(uniform[..., k], V)[0, 0, 0]
        p, token = noisy.softmax(-1), noisy.argmax()
        assert token == output.thought_ids[0, 0, 0, k]
        x = torch.cat([x, ((F.one_hot(token, V) + p - p.detach()) @ table)[None]])
    h_thought = run(torch.cat([x, model.end_embedding[None] * scale]))[-1]
    w = model.mixing_weight(h_init, h_thought)
    nll = F.cross_entropy((w * h_init + (1 - w) * h_thought) @ head.T, text[5])
    assert output.talk_nll.item() == pytest.approx(nll.item(), rel=1e-5)
    expected = torch.autograd.grad(nll, [*model.parameters()])
    for name, one, other in zip(names, found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * (1 + other.abs().max())), name
