"""GSM8K with the working taken out: the text, where thoughts are, and what is measured."""

import json
import math

import numpy as np
import pytest
import torch
from commands import refused
from test_clock import folder  # noqa: F401 - a tiny model with tokens for the dash and the hum
from tiny import random_ids, tiny_mistral, tiny_quiet_star

import train
from model import save_mistral
from support.text import read_tokens
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from tools import unsaid

RECORDS = [
    (
        "Ann sells 48 of 50 clips, 3 a day.",
        "She sold 48/2 = <<48/2=24>>24 clips.\nShe got 24 x $2 = $<<24*2=48>>48.\n#### 48",
        "Ann sells 48 of 50 clips, 3 a day.\nShe sold 24 clips.\nShe got $48.\n",
        ["48/2", "24*2"],
        ["24", "48"],
    ),
    (
        "How much?",
        "On day 3, (2+3)*20% = <<(2+3)*20*.01=1>>1,000.50 came; $80,000 + $.5=$<<80000+.5=9>>9. "
        "Then 16 feet * 12 feet = <<16*12=192>>192 feet because of <<5=5>>5.\n#### 5",
        "How much?\nOn day 3, 1,000.50 came; $9. Then 16 feet * 12 feet = 192 feet because of 5.\n",
        ["(2+3)*20*.01", "80000+.5"],
        ["1,000.50", "9"],
    ),
]
SOLUTION = unsaid.Solution(["a ", "24 b ", "5.\n"], ["48/2", "1+1+1+1+1"], ["24", "5"])


@pytest.mark.parametrize(("question", "answer", "silent", "workings", "results"), RECORDS)
def test_the_working_is_taken_out(question, answer, silent, workings, results):
    """An annotation without an expression before it goes alone, and its result is not counted."""
    solution = unsaid.take_out({"question": question, "answer": answer}, "line 1")
    assert "".join(solution.texts) == silent
    assert (solution.workings, solution.results) == (workings, results)
    for text, result in zip(solution.texts[1:], results, strict=True):
        assert text.startswith(result)


def test_asides(folder):  # noqa: F811
    """Of K tokens; without them, the text is the silent one; a longer working has none."""
    tokenizer = load_tokenizer(folder)
    silent = unsaid.encode(SOLUTION, tokenizer)
    spoken = unsaid.encode(SOLUTION, tokenizer, lambda: True)
    assert tokenizer.decode(silent.ids) == "a 24 b 5.\n"
    assert tokenizer.decode(spoken.ids) == "a —48/2 um um um um—24 b 5.\n"
    dash = tokenizer.token_id("—")
    first, last = (i for i, token in enumerate(spoken.ids) if token == dash)
    assert last - first - 1 == unsaid.K
    assert spoken.ids[:first] + spoken.ids[last + 1 :] == silent.ids
    assert spoken.ids[first + 1 : last] == silent.workings[0] == spoken.workings[0]
    assert silent.workings[1] is None
    for encoded in (silent, spoken):
        said = [tokenizer.decode([encoded.ids[i] for i in where]) for where in encoded.results]
        assert said == ["24", "5"]


def test_tokens_for_training(folder, tmp_path):  # noqa: F811
    tokenizer = load_tokenizer(folder)
    silent = unsaid.encode(SOLUTION, tokenizer).ids
    for share, low, high in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)):
        unsaid.write_tokens([SOLUTION] * 200, tokenizer, share, 0, tmp_path / str(share))
        tokens = read_tokens([tmp_path / str(share)], tokenizer)
        asides = (torch.from_numpy(tokens.ids.astype(int)) == tokenizer.token_id("—")).sum() / 2
        assert low <= asides <= high
        assert (~tokens.is_target).sum() == 200
        if share == 0:
            assert tokens.ids.tolist() == silent * 200


def test_positions_where_an_aside_is_likely():
    """Every fourth of the positions given, and those after which the dash is likeliest."""
    model, ids = tiny_quiet_star(init_id=5), random_ids(1, 30)
    targets = torch.ones_like(ids) > 0
    targets[0, 20] = False  # so that positions 18 and 19 do not have both targets
    positions = torch.tensor([1, 4, 7, 9, 11, 15, 21, 25])
    chosen = unsaid.likely_asides(model, ids, targets, positions).tolist()
    logp = model.model(ids)[0].log_softmax(-1)[:, 5]
    others = sorted({*range(28)} - {1, 11, 18, 19}, key=lambda j: -logp[j])[:6]
    assert chosen == sorted([1, 11, *others])


def test_the_loss_at_these_positions_has_their_counts(monkeypatch):
    model, ids = tiny_quiet_star(init_id=5), random_ids(1, 30)
    seen = []
    loss = unsaid.where_asides_are(lambda *batch: seen.append(batch), 5)
    targets, positions = torch.ones_like(ids) > 0, torch.arange(8)
    loss(model, ids, targets, positions, (58, 17), "generator")
    [(_, _, _, chosen, counts, generator)] = seen
    assert counts == (58, 40)
    assert torch.equal(chosen, unsaid.likely_asides(model, ids, targets, positions))
    assert generator == "generator"


def test_only_the_mixing_head_learns_to_hear():
    model, ids = tiny_quiet_star(), random_ids(1, 12)
    batch = ids, torch.ones_like(ids) > 0, torch.arange(4), (11, 4), torch.Generator()
    loss, _ = unsaid.hearing(train.thought_loss)(model, *batch)
    loss.backward()
    learn = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learn == {name for name, _ in model.named_parameters() if "mixing_head" in name}


def held_out(model, T=30, J=4):
    """A text of random tokens with two results: x_5 x_6, and x_20 whose working is not known."""
    workings = torch.full((1, J, 3), -1)
    workings[0, 0] = torch.tensor([7, 8, 9])
    result = np.array([[0, 0, -1, 1]])
    return unsaid.HeldOut(random_ids(1, T), torch.tensor([[4, 5, 10, 19]]), result, workings)


def test_predictions():
    """As QuietStar.forward, which returns no hits; w = 0 is p_thought alone."""
    model = tiny_quiet_star(n_true=1, n_thoughts=1)
    text, J = held_out(model), torch.tensor([4, 5, 10, 19])
    plan = {
        "without": ("greedy", 1.0), "greedy": ("greedy", None), "alone": ("greedy", 0.0),
        "true": ("true", None), "shuffled": ("shuffled", None), "pause": ("pause", None),
    }  # fmt: skip
    found = unsaid.predict_all(model, text, plan)
    greedy = model(text.ids, positions=J, temperature=0)
    thoughts = greedy.thought_ids[0, 0]
    true = thoughts.clone()
    true[0] = torch.tensor([7, 8, 9])
    forced = {
        "true": true, "shuffled": thoughts[[0, 3, 1, 2]], "pause": torch.full((4, 3), 23),
    }  # fmt: skip
    assert torch.allclose(torch.tensor(found["without"]["nll"][0]), greedy.base_nll[0, J])
    hits = model.model(text.ids)[0, J].argmax(-1) == text.ids[0, J + 1]
    assert found["without"]["hit"][0] == hits.tolist()
    assert found["greedy"]["thoughts"][0] == thoughts.tolist()
    outputs = {way: model(text.ids, x[None, None], J) for way, x in forced.items()}
    for way, output in [("greedy", greedy), *outputs.items()]:
        assert torch.allclose(torch.tensor(found[way]["nll"][0]), output.talk_nll[0, 0, 0]), way
        assert torch.allclose(torch.tensor(found[way]["weight"][0]), output.weight[0, 0, 0]), way
    model.mixing_head[4].weight.data.zero_()
    model.mixing_weight = lambda h_init, h_thought: torch.zeros(h_init.shape[:-1])
    alone = model(text.ids, greedy.thought_ids, J).talk_nll[0, 0, 0]
    assert torch.allclose(torch.tensor(found["alone"]["nll"][0]), alone)
    assert found["alone"]["weight"] == [[0.0] * 4]


def test_groups_of_tokens():
    """A result is right if all of its tokens are hits."""
    text = held_out(None)
    found = {"nll": [[1.0, 2.0, 3.0, 4.0]], "hit": [[True, False, True, True]]}
    groups, nan = unsaid.values(found, text), math.nan
    for name, expected in {
        "first": [1, nan, nan, 4], "result": [1, 2, nan, 4], "other": [nan, nan, 3, nan],
        "right": [0, nan, nan, 100],
    }.items():  # fmt: skip
        assert np.array_equal(groups[name], [expected], equal_nan=True), name
    found["hit"] = [[True, True, False, False]]
    assert np.array_equal(unsaid.values(found, text)["right"], [[100, nan, nan, 0]], equal_nan=True)
    row = unsaid.score_row("label", [found | {"weight": [[0.5, 1.0, 0.9, 0.7]]}], text)
    share = 3 / 29
    whole = share * 7 / 3 + (1 - share) * 3
    assert row == ["label", "2.500", "2.333", "3.000", f"{whole:.3f}", "50.0", "0.60", "0.90"]


def test_held_out_sequences(folder):  # noqa: F811
    """Positions before all tokens of results, and others; an aside where a result begins."""
    tokenizer = load_tokenizer(folder)
    text = unsaid.hold_out([SOLUTION] * 20, tokenizer, 2, 80)
    stream = unsaid.encode(SOLUTION, tokenizer).ids * 20
    assert text.ids.flatten().tolist() == stream[:160]
    assert text.positions.shape == text.result.shape == (2, 8)
    for row in range(2):
        for j, result, aside in zip(
            text.positions[row], text.result[row], text.workings[row], strict=True
        ):
            after = (80 * row + int(j) + 1) % (len(stream) // 20)
            assert (after in (2, 3, 7)) == (result >= 0)
            said = tokenizer.decode(aside.tolist()) if aside[0] >= 0 else None
            assert said == ("48/2 um um um um" if after == 2 else None)
    begins = unsaid.hold_out([SOLUTION] * 20, tokenizer, 2, 42)  # the second row, with a result
    assert begins.positions.min() >= 0
    with pytest.raises(ValueError, match="--test has 200 tokens, but 3 sequences need 240"):
        unsaid.hold_out([SOLUTION] * 20, tokenizer, 3, 80)
    merging = SOLUTION._replace(texts=["a 2", *SOLUTION.texts[1:]])
    tokenizer.adds_bos, tokenizer.bos_id = True, 0
    assert unsaid.hold_out([SOLUTION] * 20, tokenizer, 2, 80).ids[0, 0] == 0
    encode = tokenizer.encode  # as if digits were merged
    tokenizer.encode = lambda text, bos=False: encode(text.replace("224", "x"), bos=bos)
    with pytest.raises(ValueError, match="merges numbers with other text"):
        unsaid.hold_out([merging] * 20, tokenizer, 2, 80)


def test_the_experiment(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """From a checkpoint to the report; a second start trains and measures nothing."""
    data = tmp_path / "gsm8k.jsonl"
    lines = [json.dumps(dict(zip(("question", "answer"), r[:2], strict=True))) for r in RECORDS]
    data.write_text("\n".join(lines * 20))
    monkeypatch.setattr(unsaid, "TEACH", unsaid.TEACH | {"steps": 1, "context": 40})
    small = {"steps": 2, "context": 80, "positions": 4, "n_thoughts": 2}
    monkeypatch.setattr(unsaid, "STUDY", unsaid.STUDY | small)
    monkeypatch.setattr(unsaid, "HEAR", unsaid.HEAR | {"steps": 1, "positions": 3})
    given = ["--checkpoint", str(folder), "--data", str(data), "--test", str(data)]
    given += ["--out", str(tmp_path / "out"), "--sequences", "2", "--seeds", "2"]
    unsaid.main(given)
    report = (tmp_path / "out" / "report.md").read_text()
    for label in unsaid.LABELS.values():
        assert f"| {label} |" in report
    assert report.count("thought '") == 3  # results of two sequences
    assert "day 3, ' -> '1,000.50'" in report
    hear = json.loads((tmp_path / "out/hear-full/metrics.jsonl").read_text().splitlines()[0])
    assert hear["weight"] == 1
    monkeypatch.setattr(unsaid, "predict_all", None)
    unsaid.main(given)
    assert (tmp_path / "out" / "report.md").read_text() == report
    for more, message in (
        (["--lr", "1"], "has other settings"),
        (["--micro-batch", "1"], "--micro-batch after -- is set by this tool"),
    ):
        assert message in refused(capsys, unsaid.main, [*given, "--", *more])
    data.write_text("\n".join(lines * 21))
    assert "teach is of other --data" in refused(capsys, unsaid.main, given)
    save_byte_tokenizer(folder)
    save_mistral(tiny_mistral(V=258), folder)
    assert "' um'" in refused(capsys, unsaid.main, given)
