"""The walk through Algorithm 1 prints what the functions of thoughts.py return."""

import re

import numpy as np
import pytest
import torch
from commands import refused
from tiny import random_ids, tiny_quiet_star

from model import save_mistral
from support import corpus
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from thoughts import quiet_star_loss, reward, save_quiet_star
from tools import walk

TEXT = "ab=cd=ef\n"


@pytest.fixture
def folder(tmp_path):
    save_quiet_star(tiny_quiet_star(V=258, policy_weight=7.0), tmp_path)
    save_byte_tokenizer(tmp_path)
    return tmp_path


def refused_on(capsys, folder, *options):
    """The one line of the error message about a model and TEXT."""
    return refused(capsys, walk.main, ["--model", str(folder), "--text", TEXT, *options])


def numbers(text, label):
    """The numbers behind every line that begins with a label."""
    lines = re.findall(rf"^ *{re.escape(label)}(.*)$", text, re.MULTILINE)
    return [[float(x) for x in re.findall(r"-?[0-9]+\.[0-9]+", line)] for line in lines]


def test_the_numbers_are_those_of_the_step(folder, capsys):
    """N = 3 thoughts of K = 3 tokens after position 2, A = 2 tokens ahead."""
    walk.main(["--model", str(folder), "--text", TEXT, "--position", "2", "--seed", "5"])
    text = capsys.readouterr().out
    model, tokenizer = tiny_quiet_star(V=258, policy_weight=7.0), load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    generator = torch.Generator().manual_seed(5)
    output = model(ids, positions=torch.tensor([2]), generator=generator)
    loss, metrics = quiet_star_loss(output, model.config)
    assert numbers(text, "p_init of these") == [
        pytest.approx((-output.base_nll[0, 2:4]).exp().tolist(), abs=1e-4)
    ]
    alone = walk.thoughts_alone(model, ids, output)[:, 0, :, 0]
    r = reward(output.talk_nll, output.base_nll, output.positions, output.valid)[0, :, 0]
    [[base]] = numbers(text, "without a thought    R")
    assert pytest.approx(-output.base_nll[0, 2:4].sum().item(), abs=1e-4) == base
    p_of_tokens = numbers(text, "p of each token")
    for n in range(3):
        talk, weight = output.talk_nll[:, 0, n, 0], output.weight[:, 0, n, 0]
        assert numbers(text, f"p_talk {n + 1} ") == [
            pytest.approx((-talk).exp().tolist(), abs=1e-4)
        ]
        assert numbers(text, f"w {n + 1} ") == [pytest.approx(weight.tolist(), abs=1e-4)]
        [rewards] = numbers(text, f"thought {n + 1}            R")
        assert rewards == pytest.approx([-talk.sum().item(), r[n].item()], abs=1e-4)
        p_thought = pytest.approx((-alone[:, n]).exp().tolist(), abs=1e-4)
        assert numbers(text, f"p_thought {n + 1} ") == [p_thought]
        logp = output.thought_logp[0, n, 0]
        assert p_of_tokens[n] == pytest.approx(logp.exp().tolist(), abs=1e-4)
        assert f"log p = {logp.sum():.4f}" in text
        spelled = tokenizer.spell(output.thought_ids[0, n, 0].tolist())
        assert f"thought {n + 1}  {spelled!r}" in text
    [losses] = numbers(text, "6 loss:")
    expected = [metrics[name].item() for name in ("base_nll", "talk_nll", "policy_loss")]
    assert losses == pytest.approx(expected, abs=1e-4)
    assert f"0.5 L_base + 0.5 L_NLL + 7 L_REINFORCE = {loss:.4f}" in text


def test_every_R_is_that_of_log_likelihood(folder, capsys, monkeypatch):
    monkeypatch.setattr(walk, "log_likelihood", lambda nll: nll.new_full(nll.shape[1:], 123.0))
    walk.main(["--model", str(folder), "--text", TEXT])
    printed = re.findall(r"R = (-?[0-9.]+)", capsys.readouterr().out)
    assert printed == ["123.0000"] * 4  # without a thought, and of three thoughts


def test_p_thought_is_the_prediction_at_weight_0():
    """w log p_init + (1 - w) log p_thought over all of V gives p_talk."""
    model, ids = tiny_quiet_star(), random_ids(1, 8)
    output = model(ids, positions=torch.tensor([3]), temperature=0)
    alone = walk.thoughts_alone(model, ids, output)
    talk = []
    for token in range(23):  # the distribution of x_4 after each thought, token by token
        other = ids.clone()
        other[0, 4] = token
        again = model(other, output.thought_ids, output.positions)
        talk.append(
            again.weight[0, 0, 0, 0] * -again.base_nll[0, 3]
            + (1 - again.weight[0, 0, 0, 0]) * -walk.thoughts_alone(model, other, again)[0, 0, 0, 0]
        )
    expected = torch.log_softmax(torch.stack(talk), 0)[ids[0, 4]]
    assert alone.shape == output.talk_nll.shape
    assert abs(expected + output.talk_nll[0, 0, 0, 0]) < 1e-5


def test_the_mask_is_drawn_from_thought_mask(folder, capsys):
    """K = 3, A = 2: six steps, the text up to j = 2 and the thought's own steps."""
    walk.main(["--model", str(folder), "--text", TEXT, "--position", "2"])
    rows = re.findall(r"^ +([1-6])  \S.* ([#.]{9}) \| (#+)$", capsys.readouterr().out, re.MULTILINE)
    assert rows == [(str(step), "###......", "#" * step) for step in range(1, 7)]


def test_where_gradients_go(folder, capsys):
    """L_base knows nothing of thoughts; REINFORCE does not reach what only the reward needs."""
    walk.main(["--model", str(folder), "--text", TEXT, "--position", "2"])
    text = capsys.readouterr().out
    cells = {
        part: re.search(rf"^ +{part} +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE).groups()
        for part in walk.PARTS
    }
    reached = {part: [cell != "-" for cell in row] for part, row in cells.items()}
    assert reached["embed_tokens"] == reached["layers"] == reached["lm_head"] == [True] * 3
    assert reached["start_embedding"] == [False, True, True]
    assert reached["end_embedding"] == reached["mixing_head"] == [False, True, False]


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"n_thoughts": 1}, "since N = 1"), ({"thought_length": 0}, "mean over N")],
)
def test_lone_and_empty_thoughts(tmp_path, capsys, settings, says):
    save_quiet_star(tiny_quiet_star(V=258, **settings), tmp_path)
    save_byte_tokenizer(tmp_path)
    walk.main(["--model", str(tmp_path), "--text", TEXT])
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "is a plain model: it has no thoughts to follow"),
        (["--position", "7"], "it can be 0 .. 6, because 2 tokens (n_true) must follow"),
        (["--text", "a"], "in a text of 1 tokens"),
        (["--seed", "-1"], "--seed is -1; it must be"),
    ],
)
def test_bad_input(folder, tmp_path, capsys, options, message):
    if not options:
        save_mistral(tiny_quiet_star(V=258).model, tmp_path / "plain")
        save_byte_tokenizer(tmp_path / "plain")
        folder = tmp_path / "plain"
    assert message in refused_on(capsys, folder, *options)


@pytest.mark.parametrize("weight", ["model.lm_head.weight", "end_embedding"])
def test_logits_that_are_not_finite_are_refused(tmp_path, capsys, weight):
    """Without a thought, or only after one; whether the position is given or not."""
    model = tiny_quiet_star(V=258)
    model.get_parameter(weight).data.flatten()[0] = float("inf")
    save_quiet_star(model, tmp_path)
    save_byte_tokenizer(tmp_path)
    for options in ([], ["--position", "2"]):
        assert "the logits are not finite" in refused_on(capsys, tmp_path, *options)


def test_the_text_is_two_lines_of_the_built_in_corpus():
    """The second is of a puzzle that is held out."""
    lines = walk.TEXT.splitlines(keepends=True)
    moves = [np.array([*map(int, line.split("=")[0])]) for line in lines]
    assert [corpus.puzzle_line(x) for x in moves] == lines
    assert [corpus.is_held_out(x) for x in moves] == [False, True]
