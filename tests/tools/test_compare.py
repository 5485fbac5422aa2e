"""The comparison on a pretrained model: held-out text, losses, differences, resuming."""

import json
import math
import re
from itertools import chain

import numpy as np
import pytest
import torch
from commands import refused
from tiny import random_ids, think_slowly, tiny_quiet_star

from model import save_mistral
from support.text import Tokens
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from thoughts import save_quiet_star
from tools import compare

TRAINING = "--steps 2 --batch-size 2 --context 12 --lr 1e-2 --warmup 1 --thought-length 2"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, its folder, a text of 25 lines, and 20 questions in the form of GSM8K's."""
    folder, model = tmp_path_factory.mktemp("files"), tiny_quiet_star(V=258).model
    save_mistral(model, folder / "model")
    save_byte_tokenizer(folder / "model")
    text, questions = folder / "text.txt", folder / "questions.jsonl"
    text.write_text("".join(f"Line {i}.\n" for i in range(25)))
    pairs = [{"question": f"Is it {i}?", "answer": f"#### {i}"} for i in range(20)]
    questions.write_text("\n".join(map(json.dumps, pairs)))
    return model, folder / "model", [str(text), str(questions)]


def arguments(files, out, *more, seeds=2, limit=3, training=TRAINING):
    options = ["--checkpoint", str(files[1]), "--data", *files[2], "--device", "cpu"]
    options += ["--out", str(out), "--gsm8k", files[2][1], "--limit", str(limit), *more]
    return ["--seeds", str(seeds), *options, "--", *training.split()]


def test_the_last_tenth_is_held_out(files):
    known, held_out = compare.split_text(files[2])
    assert known[0].splitlines() == [f"Line {i}." for i in range(23)]
    assert held_out[0] == "Line 23.\nLine 24.\n"
    assert known[1:] == [f"Is it {i}?\n#### {i}" for i in range(18)]
    assert held_out[1:] == ["Is it 18?\n#### 18", "Is it 19?\n#### 19"]


def test_thoughts_equal_thinking_slowly(files):
    """At token 5 of 10: the thought after 5 tokens, and log p of the sixth."""
    model, ids = tiny_quiet_star(V=258), random_ids(2, 10, V=258)
    shown = compare.show_thoughts(model, load_tokenizer(files[1]), ids)
    for line, text in zip(shown.splitlines(), ids, strict=True):
        slow = think_slowly(model, text[:6], 4, None)
        plain = torch.log_softmax(model.model(text[None])[0, 4], -1)[text[5]]
        end = f"w {slow['weight'][0]:.3f}  log p {plain:.3f} -> {-slow['nll'][0]:.3f} "
        assert end in line


def test_losses_equal_thinking_slowly(monkeypatch):
    """Without, with greedy, with pause tokens; NaN where a text begins."""
    monkeypatch.setattr(compare, "READ", 2)
    model, ids = tiny_quiet_star(n_true=1), random_ids(3, 8)
    mask, positions = torch.ones_like(ids, dtype=torch.bool), torch.tensor([1, 4])
    mask[2, 5] = False
    greedy, pause, alone = (
        {way: torch.tensor(nll) for way, nll in found.items()}
        for found in (
            compare.held_out_nll(model, arm, ids, mask, positions)
            for arm in ("thoughts", "pause", "none")
        )
    )
    assert [[*found] for found in (greedy, pause, alone)] == [
        ["without", "with", "shuffled"],
        ["without", "with"],
        ["without"],
    ]
    for name in ("without", "with", "shuffled"):
        assert greedy[name].isnan().tolist() == [[False, False], [False, False], [False, True]]
    paused = tiny_quiet_star(n_true=1)  # which reads the start token as if it were a word
    paused.model.embed_tokens.weight.data[0] = model.start_embedding * model.config.embedding_scale
    paused.model.lm_head.weight = torch.nn.Parameter(model.model.lm_head.weight.detach().clone())
    for row, text in enumerate(ids):
        for place, j in enumerate(positions.tolist()):
            if not mask[row, j + 1]:
                continue
            plain = -torch.log_softmax(model.model(text[None])[0, j], -1)[text[j + 1]].item()
            slow = think_slowly(model, text, j, None)["nll"][0].item()
            assert greedy["without"][row, place].item() == pytest.approx(plain, abs=1e-5)
            assert alone["without"][row, place].item() == pytest.approx(plain, abs=1e-5)
            assert greedy["with"][row, place].item() == pytest.approx(slow, abs=1e-5)
            if 0 not in text[: j + 1]:
                slow = think_slowly(paused, text, j, [0, 0, 0])["nll"][0].item()
                assert pause["with"][row, place].item() == pytest.approx(slow, abs=1e-5)


def test_shuffled_thoughts_are_those_of_another_sequence(monkeypatch):
    """The same thoughts, each once, none in the sequence it was thought in; no part is alone."""
    monkeypatch.setattr(compare, "READ", 2)
    model, ids, seen = tiny_quiet_star(n_true=1), random_ids(5, 9), []
    forward = compare.QuietStar.forward

    class Watched(compare.QuietStar):
        def forward(self, ids, thought_ids=None, **more):
            output = forward(self, ids, thought_ids, **more)
            seen.append(output.thought_ids[:, 0].tolist())
            return output

    model.__class__ = Watched
    positions = torch.tensor([2, 3, 5])
    compare.held_out_nll(model, "thoughts", ids, torch.ones_like(ids, dtype=bool), positions)
    for own, others in zip(seen[::2], seen[1::2], strict=True):
        assert sorted(chain(*own)) == sorted(chain(*others))
        for thoughts, forced in zip(own, others, strict=True):
            assert not any(thought in thoughts for thought in forced)
    assert [len(own) for own in seen] == [3, 3, 2, 2]


def test_pausing_thinks_start_tokens():
    model, ids = tiny_quiet_star(), random_ids(2, 1)[:, 0]
    thought = torch.full((2, 3), model.start_id)
    cache, other = (compare.KVCache(model.model.config) for _ in range(2))
    expected = model.think_last(ids, cache, thought)
    for found, wanted in zip(compare.pausing(model).think_last(ids, other), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert (model.think_last(ids, cache).thought_ids != thought).all()


def test_a_difference_by_hand():
    """Two seeds, two sequences of two tokens, one of them no target."""
    nan = math.nan
    first = np.array([[[1.0, 2.0], [3.0, nan]], [[1.5, 2.0], [2.0, nan]]])
    second = np.array([[[2.0, 2.0], [3.5, nan]]])  # of the model before: one for both seeds
    values, seeds = compare.difference(first, second)
    assert values == pytest.approx([0.75 / 1.5, 1 / 1.5])  # (1 + .5) / 2, (.5 + 1.5) / 2
    assert seeds == pytest.approx([1.5 / 3, 2 / 3])
    row = compare.difference_row("label", first, second)
    sequences = seeds = 2 * (1 / 12) ** 2 / (2 - 1)
    detectable = 2.8 * math.sqrt(sequences / 2 + seeds / 2)
    gains = ["+0.5833", "+0.5000 .. +0.6667", "+0.5000 +0.6667"]
    assert row == ["label", *gains, f"{detectable:.4f}"]


def test_a_report_by_hand():
    """Bins by the loss before; a task's gain, paired; of every seed its own."""
    before = torch.arange(10.0).reshape(2, 5)  # [n, J]: each bin has two tokens
    found = {
        "before": [{"nll": {"without": before.tolist()}}],
        "none": [],
        "pause": [],
        "thoughts": [],
    }
    for seed in (0, 1):
        for arm, way in [*compare.LABELS][1:]:
            nll = {
                "without": before.flip(0, 1),
                "with": before.flip(0, 1) - 0.1,
                "shuffled": before,
            }[way]
            results = found[arm]
            if len(results) == seed:
                results.append({"nll": {}, "csqa": {}})
            results[seed]["nll"][way] = (nll + seed).tolist()
            percent = {"without": 0.25, "with": 0.75 + 0.25 * seed}.get(way)
            if percent:
                scores = {"answer_probability": percent, "letter_accuracy": 1}
                results[seed]["csqa"][way] = [scores] * 3
    scores = {"answer_probability": 0.5, "letter_accuracy": 0}
    found["before"][0]["csqa"] = {"without": [scores] * 3}
    text = compare.report(found, "    what was thought")
    assert "10 tokens of 2 sequences" in text
    hardest = [line.split()[-4:] for line in text.splitlines() if line.startswith("     8.000")]
    assert hardest == [["2", "1.0000", "0.9000", "+0.1000"]] * 2
    assert "| before | 50.00 [50.00, 50.00] | 0.00 [0.00, 0.00] |" in text
    assert "| Quiet-STaR, greedy thoughts | 87.50 [87.50, 87.50] | 100.00 [" in text
    gain = "62.50 [62.50, 62.50] | 0.00 [0.00, 0.00] |"
    assert f"| Quiet-STaR, greedy thoughts - trained without thoughts | {gain}" in text
    assert "| trained without thoughts | 5.0000 | 4.5000 5.5000 |" in text
    assert text.endswith("    what was thought\n")


RUNS = [f"seed{seed}/{arm}" for seed in (0, 1) for arm in ("none", "pause", "thoughts")]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The folder of a comparison, and the arguments of all Tokens.batch calls."""
    out, batch, drawn = tmp_path_factory.mktemp("finished") / "out", Tokens.batch, []

    def watch(self, step, *rest):
        drawn.append((step, *rest[:3]))
        return batch(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokens, "batch", watch)
        compare.main(arguments(files, out))
    return out, drawn


def test_comparison(files, finished, monkeypatch):
    out = finished[0]
    report = (out / "report.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (\d+\.\d{4}) \| ([\d. ]+) \|$", report, re.MULTILINE)
    assert [name for name, *_ in rows] == [*compare.LABELS.values()]
    assert len({loss for _, loss, _ in rows}) >= 6  # a tiny model thinks the same everywhere
    assert [len(seeds.split()) for *_, seeds in rows] == [1, 2, 2, 2, 2, 2, 2]

    held_out = "Line 23.\nLine 24.\n", "Is it 18?\n#### 18", "Is it 19?\n#### 19"
    ids = torch.tensor([token for text in held_out for token in text.encode()])
    nll = []
    for start in range(0, len(ids) - 11, 12):
        logp = torch.log_softmax(files[0](ids[None, start : start + 12])[0], -1)
        at = range(start + 1, start + 12)
        nll += [-logp[i - start - 1, ids[i]] for i in at if i not in (18, 35)]  # a text begins
    assert float(rows[0][1]) == pytest.approx(torch.stack(nll).mean().item(), abs=1e-4)
    assert f"{len(nll)} tokens of {len(ids) // 12} sequences" in report
    assert report.count("thought '") + report.count('thought "') == len(ids) // 12

    task = report.split("| gsm8k |")[1].split("Greedy thoughts in the middle")[0]
    assert len(re.findall(r"^\| .* \[.*\] \| .* \[.*\] \|$", task, re.MULTILINE)) == 8
    for name in ("before", *RUNS):
        lines = (out / f"{name}-gsm8k.jsonl").read_text().splitlines()
        assert len(lines) == 1 + 3
        assert ("with thoughts" in lines[1]) == ("pause" in name or "thoughts" in name)

    metrics = [(out / run / "metrics.jsonl").read_text() for run in RUNS]
    compare.main(arguments(files, out, "--sequences", "2"))  # measured again, not trained again
    assert "of 2 sequences" in (out / "report.md").read_text()
    compare.main(arguments(files, out))
    monkeypatch.setattr(compare, "held_out_nll", None)  # finished: nothing is done again
    compare.main(arguments(files, out))
    assert metrics == [(out / run / "metrics.jsonl").read_text() for run in RUNS]
    assert report == (out / "report.md").read_text()


def test_questions_are_answered_after_pauses(tmp_path, files, monkeypatch):
    monkeypatch.setattr(compare, "pausing", lambda model: model.model)
    compare.main(arguments(files, tmp_path, seeds=1, limit=1))
    for arm in ("pause", "thoughts"):
        line = (tmp_path / "seed0" / f"{arm}-gsm8k.jsonl").read_text().splitlines()[1]
        assert ("with thoughts" in line) == (arm == "thoughts")


def test_batches_are_the_same_and_reinforce_has_a_part_in_one(finished):
    out, drawn = finished
    # The first batch is drawn once more, to check that the text is long enough.
    drawn = [given for given in drawn if given[1] == 2 and given[2] == 12]
    assert [drawn.count((step, 2, 12, seed)) for step in (0, 1) for seed in (0, 1)] == [6, 6, 3, 3]
    for run in RUNS:
        saved = json.loads((out / run / "settings.json").read_text())
        assert saved["thoughts"]["thought_length"] == 2
        lines = (out / run / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2
        last = json.loads(lines[-1])  # at first w = 1, and all thoughts are equal
        assert ("reward" in last) == ("none" not in run)
        assert (last.get("policy_loss", 0.0) != 0) == ("thoughts" in run)


def test_a_comparison_keeps_its_settings(files, finished, tmp_path, capsys):
    error = refused(capsys, compare.main, arguments(files, finished[0], training="--steps 9"))
    assert "seed0/none/settings.json has other settings (" in error
    (tmp_path / "other.txt").write_text("Another line.\n" * 20)
    error = refused(
        capsys, compare.main, arguments(files, finished[0], "--data", str(tmp_path / "other.txt"))
    )
    assert "train.jsonl is of other --data" in error


@pytest.mark.parametrize(
    ("more", "training", "message"),
    [
        ([], "--context 4000", "two sequences of 4000"),
        ([], "--steps 0", "steps is 0"),
        ([], "--seed 1", "--seed after -- is set by this tool"),
        ([], "--out x", "unrecognized arguments: --out x"),
        (["--limit", "0"], "", "limit is 0"),
        (["--data", "SHORT"], "", "nothing can be held out"),
        (["--sequences", "1"], "", "sequences is 1; it must be at least 2"),
        (["--csqa", "nowhere"], "", "cannot read nowhere"),
    ],
)
def test_what_cannot_work_fails_before_training(tmp_path, files, capsys, more, training, message):
    (tmp_path / "short.txt").write_text("One line.")
    more = [option.replace("SHORT", str(tmp_path / "short.txt")) for option in more]
    error = refused(
        capsys, compare.main, arguments(files, tmp_path / "out", *more, training=training)
    )
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_thinks_already_can_be_compared(tmp_path):
    save_quiet_star(tiny_quiet_star(V=258, thought_length=1), tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("One line.\n" * 40)
    given = ["--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt")]
    given += ["--out", str(tmp_path / "out"), "--seeds", "1", "--device", "cpu"]
    compare.main([*given, "--", *TRAINING.split()])
    assert "| before | " in (tmp_path / "out" / "report.md").read_text()
