"""Evaluation: the table of the puzzles and the perplexities of a text."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny import random_ids, think_slowly, tiny_quiet_star

import eval as evaluation
from model import save_mistral
from sample import generate
from support import corpus
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from thoughts import load_quiet_star, save_quiet_star
from tools import prepare


@pytest.fixture
def folder(tmp_path):
    save_quiet_star(tiny_quiet_star(V=258, init_id=257, thought_length=2), tmp_path)
    save_byte_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def few(monkeypatch):
    """A tenth of the puzzles: 15 are held out."""
    all_puzzles = corpus.all_puzzles
    monkeypatch.setattr(corpus, "all_puzzles", lambda held_out: all_puzzles(held_out)[::10])


def test_puzzles(folder):
    """Every held-out puzzle, as a prompt that ends with "=" and has no explanation in it.

    Before it stand three puzzles of the training with their answers, each on its line.
    """
    tokenizer = load_tokenizer(folder)
    puzzles = evaluation.held_out_puzzles(tokenizer, torch.device("cpu"), repeats=2)
    assert len(puzzles.ids) == 2 * 146
    asked = set()
    for row, answer in zip(puzzles.ids.tolist(), puzzles.answers.tolist(), strict=True):
        text = tokenizer.decode(row)
        assert text.endswith("=")
        assert "—" not in text
        begin, *before, last = text.split("\n")
        assert (begin, len(before)) == ("", 3)
        for line, held_out in ((last + str(answer), True), *((line, False) for line in before)):
            *moves, _, said = line
            assert corpus.is_held_out(moves) == held_out
            assert sum(map(int, moves)) % 3 == int(said)
        moves = [int(move) for move in last[:-1]]
        asked.add(tuple(moves))
    assert len(asked) == 146
    assert tokenizer.decode(puzzles.candidates.tolist()) == "012"


def test_an_aside_begun_right_begins_with_the_first_letter(folder, few, monkeypatch):
    """What is generated from: the puzzle, a dash and, if begun, where the hand stands first."""
    tokenizer, asked = load_tokenizer(folder), []

    def watch(model, ids, *rest, **more):
        asked.append(ids)
        return generate(model, ids, *rest, **more)

    monkeypatch.setattr(evaluation, "generate", watch)
    evaluation.puzzle_table(load_quiet_star(folder).model, tokenizer)
    free, begun = ([tokenizer.decode(row) for row in ids.tolist()] for ids in asked)
    for one, other in zip(free, begun, strict=True):
        moves = [int(move) for move in one.split("\n")[-1].removesuffix("=—")]
        assert other == one + str(moves[0])


@pytest.mark.parametrize("begun", [False, True])
def test_an_aside_is_written_token_by_token(folder, few, begun):
    """The likeliest token of all, six times with the given one; the answer stands after a dash."""
    model, tokenizer = load_quiet_star(folder).model, load_tokenizer(folder)
    puzzles = evaluation.held_out_puzzles(tokenizer, torch.device("cpu"), repeats=1)
    written, logits = evaluation.write_aside(model, puzzles, tokenizer, begun)
    dash = torch.full((15, 1), 257)
    text = torch.cat([puzzles.ids, dash, puzzles.work[:, :begun]], 1)
    while text.shape[1] < puzzles.ids.shape[1] + 1 + 6:
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, text[:, -6:])
    assert (logits - model(torch.cat([text, dash], 1))[:, -1]).abs().max() < 1e-5


def test_glance(folder, few):
    """A share of a third of the puzzles, and the greedy thought about the last of them."""
    model, tokenizer = load_quiet_star(folder), load_tokenizer(folder)
    line, enough, metrics = evaluation.look_at_puzzles(model, tokenizer)
    assert not enough
    puzzles = evaluation.held_out_puzzles(tokenizer, torch.device("cpu"), repeats=1)
    last = puzzles._replace(ids=puzzles.ids[-1:], answers=puzzles.answers[-1:])
    prediction = evaluation.predict_answers(model, last, None)
    answered = torch.cat([last.ids[0], last.candidates[last.answers]])
    slow = think_slowly(model, answered, len(answered) - 2, None)
    assert prediction.thought_ids[0].tolist() == slow["ids"]
    assert evaluation.score(prediction.logits, last).logp == pytest.approx(-slow["nll"][0].item())
    asked = tokenizer.decode(last.ids[0].tolist()).split("\n")[-1]
    every = evaluation.predict_answers(model, puzzles, None)
    right = [evaluation.score(x, puzzles).right for x in (every.logits, every.base_logits)]
    assert right[0] != right[1]
    thought = tokenizer.spell(slow["ids"])
    share = f"{100 * right[0]:3.0f}"
    assert metrics == {"eval_right": right[0]}
    assert line == f"greedy thoughts {share} % right; after {asked} it thinks {thought}"


@pytest.mark.parametrize(
    ("right", "aside", "count", "enough"),
    [
        (0.99, "mmmmmm", 146, False),
        (1.0, "mmmmmm", 146, True),
        (1.0, "mmmmmm", 145, True),
        (1.0, "mmmmmm", 144, False),
        (1.0, "nnnnnn", 146, False),
        (1.0, "mmmmmn", 146, False),
    ],
)
def test_a_base_model_is_trained_enough_when_it_hums_and_can_work(
    folder, monkeypatch, right, aside, count, enough
):
    """An aside hums only if all of its letters are m; it can work if begun right."""
    model, tokenizer = load_quiet_star(folder).model, load_tokenizer(folder)
    said = torch.tensor([tokenizer.encode(aside)] * count + [[0] * 6] * (146 - count))
    written = {False: (said, 0.5), True: (said * 0, right)}
    monkeypatch.setattr(evaluation, "write_aside", lambda *_, begun: written[begun])
    monkeypatch.setattr(evaluation, "score", lambda share, _: evaluation.Score(share, 0.0))
    hums = 100 * count / 146 if aside == "mmmmmm" else 0
    line = f"{hums:3.0f} % of asides hum; begun right, {100 * right:3.0f} % lead to the answer"
    assert evaluation.look_at_puzzles(model, tokenizer) == (line, enough, {})


def test_score_by_hand():
    puzzles = evaluation.Puzzles(None, torch.tensor([0, 2]), None, torch.tensor([1, 2, 3]), 0)
    logits = torch.tensor([[9.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    score = evaluation.score(logits, puzzles)
    assert score.right == 0.5  # token 0 is likelier than all, and no candidate
    expected = (1 - math.log(math.exp(9) + math.e + 2) - math.log(3 + math.e)) / 2
    assert abs(score.logp - expected) < 1e-6


def test_scores_of_bfloat16_logits_are_computed_in_float32():
    """log p(0) of three equal logits; in bfloat16 it would be -1.1015625."""
    puzzles = evaluation.Puzzles(None, torch.tensor([0]), None, torch.tensor([0, 1, 2]), 0)
    logits = torch.ones(1, 3, dtype=torch.bfloat16)
    assert evaluation.score(logits, puzzles).logp == pytest.approx(-math.log(3), abs=1e-6)


def test_table(folder, few, capsys):
    evaluation.main(["--model", str(folder), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    names = ["at once", "pause", "random", "shuffled", "sampled", "greedy", "aside", "begun"]
    assert len(lines) == 3 + len(names)
    for name, line in zip(names, lines[3:], strict=True):
        assert name in line
        assert "%" in line


def test_the_thoughts_of_the_table(folder, few, monkeypatch):
    """Pause: start tokens. Random: of the whole vocabulary. Shuffled: greedy, of other puzzles."""
    asked, predict = {}, evaluation.predict_answers

    def watch(model, puzzles, thought_ids):
        prediction = predict(model, puzzles, thought_ids)
        asked[len(asked)] = prediction.thought_ids
        return prediction

    monkeypatch.setattr(evaluation, "predict_answers", watch)
    model, tokenizer = load_quiet_star(folder), load_tokenizer(folder)
    table = evaluation.puzzle_table(model, tokenizer)
    greedy, pause, random, shuffled, sampled = asked.values()
    assert random.shape == greedy.shape == (3 * 15, 2)
    assert len(random.unique()) > 0.9 * 258 * (1 - (1 - 1 / 258) ** 90)  # those of 90 draws
    assert sorted(shuffled.tolist()) == sorted(greedy.tolist())
    assert (shuffled != greedy).any()
    puzzles = evaluation.held_out_puzzles(tokenizer, torch.device("cpu"))
    assert model.start_id != model.end_id
    assert (pause == model.start_id).all()
    assert torch.equal(sampled, evaluation.sampled_thoughts(model, puzzles.ids))
    for name, logits in (
        ("shuffled thoughts", predict(model, puzzles, shuffled).logits),
        ("greedy thoughts", predict(model, puzzles, greedy).logits),
        ("answers at once", model.model(puzzles.ids)[:, -1]),
    ):
        assert table[name] == pytest.approx(evaluation.score(logits, puzzles))


def test_sampled_thoughts_follow_the_last_token():
    """With logits as large as these, a sampled thought is the greedy one."""
    model, ids = tiny_quiet_star(n_thoughts=2), random_ids(5, 7)
    model.model.lm_head.weight.data *= 1e5
    sampled = evaluation.sampled_thoughts(model, ids)
    assert sampled.tolist() == [think_slowly(model, text, 6, None)["ids"] for text in ids]
    assert sampled.tolist() != [think_slowly(model, text, 5, None)["ids"] for text in ids]


def test_sampled_thoughts_are_sampled_at_temperature_1():
    """The first token in 20,000 samples, against its probability after the text and start."""
    model, ids = tiny_quiet_star(V=5, thought_length=1), random_ids(1, 3, 5)
    drawn = evaluation.sampled_thoughts(model, ids.expand(20000, 3))[:, 0]
    logp = [think_slowly(model, ids[0], 2, [token])["logp"][0] for token in range(5)]
    tau, shares = model.config.reinforce_temperature, torch.bincount(drawn, minlength=5) / 20000
    expected = torch.softmax(tau * torch.stack(logp).detach(), -1)
    assert (shares - expected).abs().max() < 0.018  # five standard deviations


@pytest.mark.parametrize("length", [13, 14, 15])
def test_text_nll_equals_thinking_slowly(length):
    """Sequences of 6, 6 and 3 or 2 tokens, or 1, which has no target; one token is no target."""
    model = tiny_quiet_star(n_thoughts=2)
    ids = random_ids(1, length)[0]
    is_target = torch.ones(length, dtype=torch.bool)
    is_target[8] = False
    base, talk = evaluation.text_nll(model, ids, is_target, context=6)
    unsure = evaluation.text_entropy(model.model, ids, is_target, context=6)
    expected_base, expected_talk, expected_unsure = [], [], []
    for start in (0, 6, 12):
        part = ids[start : start + 6]
        logp = torch.log_softmax(model.model(part[None])[0], -1)
        for j in range(len(part) - 1):
            if is_target[start + j + 1]:
                expected_base.append(-logp[j, part[j + 1]])
                expected_unsure.append(-(logp[j].exp() * logp[j]).sum())
                expected_talk.append(think_slowly(model, part, j, None)["nll"][0])
    assert (base - torch.stack(expected_base)).abs().max() < 1e-5
    assert (talk - torch.stack(expected_talk)).abs().max() < 1e-5
    assert (unsure - torch.stack(expected_unsure)).abs().max() < 1e-5
    assert model.config.n_thoughts == 2
    with pytest.raises(ValueError, match=f"a text of {length} tokens has nothing to predict"):
        evaluation.text_nll(model, ids, is_target & False, context=6)


def test_entropy_of_a_bfloat16_model_is_computed_in_float32():
    model, ids = tiny_quiet_star().to(torch.bfloat16), random_ids(1, 9)
    unsure = evaluation.text_entropy(model.model, ids[0], torch.ones(9, dtype=torch.bool), 9)
    logp = torch.log_softmax(model.model(ids)[0, :-1].double(), -1)
    assert (unsure + (logp.exp() * logp).sum(-1)).abs().max() < 1e-5


def test_distribution_of_gains():
    """Five tokens: changes of -3, 0, 0.009, 0.2 and 2; a bin includes its lower bound."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0])
    talk = base - torch.tensor([-3.0, 0.0, 0.009, 0.2, 2.0])
    head, *lines = evaluation.show_gains(base, talk).splitlines()
    assert head.startswith("change in log p") and len(lines) == 11
    found = [(line.split()[0], line.split()[3], line.split()[-1]) for line in lines]
    assert [row for row in found if row[1] != "0"] == [
        ("-inf", "1", "-3.00"), ("-0.01", "2", "+0.01"), ("0.10", "1", "+0.20"),
        ("2.00", "1", "+2.00"),
    ]  # fmt: skip
    assert "40.0 %" in lines[5]


def test_thinking_above_an_entropy_by_hand():
    """Three of four tokens have an entropy of 1 or more; none has 4."""
    base, talk = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 1.0, 1.0, 3.0])
    lines = evaluation.show_think_above(base, talk, torch.tensor([0.2, 1.0, 1.2, 3.5]))
    rows = {row.split()[0]: row.split()[1:] for row in lines.splitlines()[1:]}
    assert rows["0.0"] == ["100.0", "%", "1.7500"]
    assert rows["1.0"] == ["75.0", "%", "1.5000"]
    assert rows["4.0"] == rows["inf"] == ["0.0", "%", "2.5000"]


def test_dtype_is_that_of_the_computation(folder, few, monkeypatch, capsys):
    load, seen = evaluation.load, []

    def noting(*arguments):
        model, tokenizer = load(*arguments)
        seen.append(next(model.parameters()).dtype)
        return model, tokenizer

    monkeypatch.setattr(evaluation, "load", noting)
    for options in ([], ["--dtype", "bfloat16"]):
        evaluation.main(["--model", str(folder), "--device", "cpu", *options])
    assert seen == [torch.float32, torch.bfloat16]


def test_difficulty_of_a_third_model():
    """Bins by nll 4, 3, 2, 1: the first two tokens are the hard ones."""
    base, talk, by = torch.tensor([[1.0, 2, 3, 4], [0.5, 1, 3, 4], [4.0, 3, 2, 1]])
    perplexities, _, *lines = evaluation.show_text(base, talk, by, bins=2).splitlines()
    assert [line.split() for line in lines] == [
        ["1.000", "..", "2.000", "2", "3.5000", "3.5000", "+0.0000"],
        ["3.000", "..", "4.000", "2", "1.5000", "0.7500", "+0.7500"],
    ]
    # e ** 2.5 and e ** 2.125
    assert perplexities == "4 tokens; perplexity 12.182 without thoughts, 8.373 with"


def test_text_report(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Thoughts are free. " * 5)
    options = ["--text", str(tmp_path / "text.txt"), "--context", "16", "--device", "cpu"]
    evaluation.main(["--model", str(folder), *options])
    lines = capsys.readouterr().out.splitlines()
    assert "perplexity" in lines[0]
    assert len(lines) == (2 + 5) + (1 + 11) + (1 + 8)
    assert lines[20].split()[:2] == ["0.0", "100.0"]
    for part in (lines[2:7], lines[8:19]):
        assert sum(int(line.split()[3]) for line in part) == int(lines[0].split()[0])


def tokens_read(capsys, folder, text, *options):
    """The number of targets that --text reports, and the whole report."""
    evaluation.main(["--model", str(folder), "--text", str(text), "--device", "cpu", *options])
    report = capsys.readouterr().out
    return int(report.split()[0]), report


def test_context_is_the_length_of_a_sequence(folder, tmp_path, capsys):
    """Of 600 tokens, or the first 100, the first of each sequence is no target."""
    (tmp_path / "text.txt").write_text("Thoughts are free. " * 31 + "Thoughts ar")
    for options, count in (
        (["--context", "100"], 594),
        (["--context", "30"], 580),
        ([], 597),
        (["--max-tokens", "100", "--context", "50"], 98),
    ):
        assert tokens_read(capsys, folder, tmp_path / "text.txt", *options)[0] == count


def test_prepared_text_gives_the_same_report(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    (tmp_path / "text.txt").write_text("Thoughts are free. " * 5)
    out, file = tmp_path / "prepared", tmp_path / "text.txt"
    given = ["--data", str(file), "--checkpoint", str(folder), "--out", str(out)]
    prepare.main([*given, "--workers", "1"])
    capsys.readouterr()
    for options in ([], ["--context", "16", "--max-tokens", "40"]):
        count, report = tokens_read(capsys, folder, out, *options)
        assert count > 30
        assert report == tokens_read(capsys, folder, file, *options)[1]


@pytest.mark.parametrize("part", ["model.norm.weight", "mixing_head.4.weight"])
@pytest.mark.parametrize("evaluated", ["puzzles", "text", "task"])
def test_logits_that_are_not_finite_are_refused(folder, tmp_path, capsys, evaluated, part):
    """Broken weights of the language model, and of the thoughts only."""
    model = load_quiet_star(folder)
    torch.nn.init.constant_(model.get_parameter(part), float("nan"))
    save_quiet_star(model, folder)
    (tmp_path / "text.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    file, out = str(tmp_path / "text.jsonl"), str(tmp_path / "out.jsonl")
    task = ["--task", "gsm8k", "--data", file, "--out", out]
    options = {"puzzles": [], "text": ["--text", file], "task": task}[evaluated]
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["--model", str(folder), "--device", "cpu", *options])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(
        "error: the logits are not finite: weights are broken, or their dtype too small\n"
    )
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "nowhere is not a checkpoint"),
        (["--text", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--context", "8"], "--context means nothing without --text"),
        (["--max-tokens", "8"], "--max-tokens means nothing without --text"),
        (["--limit", "8"], "--limit means nothing without --task"),
        (["--out", "x"], "--out means nothing without --task"),
        (["--text", "x", "--context", "1"], "context is 1; it must be at least 2"),
        (["--text", "x", "--max-tokens", "0"], "max_tokens is 0; it must be at least 2"),
    ],
)
def test_bad_input(folder, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["--model", str(folder), "--device", "cpu", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_text_needs_a_thinking_model(tmp_path, capsys):
    save_mistral(tiny_quiet_star(V=258).model, tmp_path)
    save_byte_tokenizer(tmp_path)
    with pytest.raises(SystemExit):
        evaluation.main(["--model", str(tmp_path), "--text", "x", "--device", "cpu"])
    assert "is a plain model" in capsys.readouterr().err


def test_puzzles_are_for_models_of_the_built_in_corpus(tmp_path, capsys):
    save_mistral(tiny_quiet_star(V=32000).model, tmp_path)
    shutil.copy(Path(__file__).parent / "fixtures" / "tokenizer.model", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["--model", str(tmp_path), "--device", "cpu"])
    assert stopped.value.code == 2
    assert "is not of the built-in corpus: give --text or --task" in capsys.readouterr().err
