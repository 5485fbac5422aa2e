"""The comparison on a pretrained model: what is held out, what is compared, what is resumed."""

import json

import pytest
import torch
from tiny import random_ids, think_slowly, tiny_quiet_star

from model import save_mistral
from thoughts import save_quiet_star
from tokenizer import load_tokenizer, save_byte_tokenizer
from tools import compare


@pytest.fixture
def files(tmp_path):
    """A model, a text of 25 lines, and 20 questions."""
    model = tiny_quiet_star(V=258).model
    save_mistral(model, tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text("".join(f"Line {i}.\n" for i in range(25)))
    pairs = [{"question": f"Is it {i}?", "answer": "Yes."} for i in range(20)]
    questions.write_text("\n".join(map(json.dumps, pairs)))
    return model, [str(text), str(questions)]


def test_the_last_tenth_is_held_out(files):
    known, held_out = compare.split_text(files[1])
    assert known[0].splitlines() == [f"Line {i}." for i in range(23)]
    assert held_out[0] == "Line 23.\nLine 24.\n"
    assert known[1:] == [f"Is it {i}?\nYes." for i in range(18)]
    assert held_out[1:] == ["Is it 18?\nYes.", "Is it 19?\nYes."]


def test_thoughts_equal_thinking_slowly(files, tmp_path):
    """At token 5 of 10: the thought after 5 tokens, and log p of the sixth."""
    model, ids = tiny_quiet_star(V=258), random_ids(2, 10, V=258)
    shown = compare.show_thoughts(model, load_tokenizer(tmp_path / "model"), ids)
    for line, text in zip(shown.splitlines(), ids, strict=True):
        slow = think_slowly(model, text[:6], 4, None)
        plain = torch.log_softmax(model.model(text[None])[0, 4], -1)[text[5]]
        end = f"w {slow['weight'][0]:.3f}  log p {plain:.3f} -> {-slow['nll'][0]:.3f} "
        assert end in line


def arguments(tmp_path, files, training="--steps 2 --batch-size 2 --context 12 --lr 1e-2"):
    options = ["--checkpoint", str(tmp_path / "model"), "--data", *files[1], "--device", "cpu"]
    options += ["--out", str(tmp_path / "out"), "--gsm8k", files[1][1], "--limit", "7"]
    return [*options, "--", *training.split(), "--thought-length", "2"]


def test_comparison(tmp_path, files, monkeypatch):
    asked = []
    monkeypatch.setattr(compare.evaluation, "main", lambda a: asked.append(a) or print("1 %"))
    compare.main(arguments(tmp_path, files))
    report = (tmp_path / "out" / "report.md").read_text()
    names = ("before", "trained on without thoughts", "Quiet-STaR, no", "Quiet-STaR, greedy")
    losses = [float(report.split(name)[1].split("\n")[0].split()[-1]) for name in names]
    assert len(set(losses)) == 4

    held_out = "Line 23.\nLine 24.\n", "Is it 18?\nYes.", "Is it 19?\nYes."
    ids = torch.tensor([token for text in held_out for token in text.encode()])
    nll = []
    for start in range(0, len(ids) - 11, 12):
        logp = torch.log_softmax(files[0](ids[None, start : start + 12])[0], -1)
        at = range(start + 1, start + 12)
        nll += [-logp[i - start - 1, ids[i]] for i in at if i not in (18, 32)]  # a text begins
    assert losses[0] == pytest.approx(torch.stack(nll).mean().item(), abs=1e-4)
    assert report.count("thought '") + report.count('thought "') == len(ids) // 12

    assert report.count("1 %") == 3
    models = [tmp_path / "model", *(tmp_path / "out" / run / "quiet_star" for run in RUNS)]
    assert [options[1] for options in asked] == [str(model) for model in models]
    assert all(options[2:6] == ["--task", "gsm8k", "--data", files[1][1]] for options in asked)
    assert all(options[-2:] == ["--limit", "7"] for options in asked)
    assert len({options[7] for options in asked}) == 3
    assert all(options[7].endswith(".jsonl") for options in asked)

    metrics = [(tmp_path / "out" / run / "metrics.jsonl").read_text() for run in RUNS]
    compare.main(arguments(tmp_path, files))  # finished: nothing is trained again
    assert metrics == [(tmp_path / "out" / run / "metrics.jsonl").read_text() for run in RUNS]


RUNS = ("none", "thoughts")


def test_a_comparison_keeps_its_settings(tmp_path, files, monkeypatch, capsys):
    monkeypatch.setattr(compare.evaluation, "main", lambda a: None)
    compare.main(arguments(tmp_path, files))
    with pytest.raises(SystemExit) as stopped:
        compare.main(arguments(tmp_path, files, training="--steps 9"))
    assert stopped.value.code == 2
    assert "thoughts/settings.json has other settings (" in capsys.readouterr().err
    with open(files[1][0], "a") as text:
        text.write("One more line.\n" * 20)
    with pytest.raises(SystemExit) as stopped:
        compare.main(arguments(tmp_path, files))
    assert stopped.value.code == 2
    assert "train.jsonl is of other --data" in capsys.readouterr().err


def test_bad_input(tmp_path, files, capsys):
    (tmp_path / "short.txt").write_text("One line.")
    out = ["--out", str(tmp_path / "out")]
    for options, message in (
        (["--data", str(tmp_path / "short.txt")], "nothing can be held out"),
        (["--data", *files[1], "--sequences", "0"], "--sequences is 0; it must be at least 1"),
        (["--data", *files[1], "--csqa", "nowhere"], "there is no file nowhere"),
    ):
        with pytest.raises(SystemExit) as stopped:
            compare.main(["--checkpoint", str(tmp_path / "model"), *options, *out])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--", "--context", "4000"], "one sequence needs 4000"),
        (["--", "--steps", "0"], "steps is 0"),
        (["--", "--out", "x"], "--out behind -- is set by this script"),
        (["--limit", "0"], "--limit is 0"),
    ],
)
def test_what_cannot_work_fails_before_training(tmp_path, files, capsys, options, message):
    given = ["--checkpoint", str(tmp_path / "model"), "--data", *files[1]]
    with pytest.raises(SystemExit) as stopped:
        compare.main([*given, "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_reinforce_has_a_part_in_one_of_the_two(tmp_path, files, monkeypatch):
    monkeypatch.setattr(compare.evaluation, "main", lambda a: None)
    compare.main([*arguments(tmp_path, files), "--policy-weight", "0.5"])
    saved = [(tmp_path / "out" / run / "settings.json").read_text() for run in RUNS]
    assert all(json.loads(text)["thoughts"]["policy_weight"] == 0.5 for text in saved)
    for run in RUNS:
        lines = (tmp_path / "out" / run / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2
        for line in map(json.loads, lines):
            assert ("policy_loss" in line) == (run == "thoughts")
            assert ("reward" in line) == (run == "thoughts")


def test_a_model_that_thinks_already_can_be_compared(files, tmp_path, monkeypatch):
    save_quiet_star(tiny_quiet_star(V=258, thought_length=1), tmp_path / "model")
    monkeypatch.setattr(compare.evaluation, "main", lambda a: print("1 %"))
    compare.main(arguments(tmp_path, files))
    assert "before" in (tmp_path / "out" / "report.md").read_text()
