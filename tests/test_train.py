"""The training loop: resuming, splitting batches, repeating a seed, refusing what cannot work."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import random_ids, tiny_mistral, tiny_quiet_star

import train
from model import Mistral, MistralConfig, load_mistral, save_mistral
from sample import generate
from support import corpus, memory, runs
from support.files import write_json
from support.settings import comments
from support.text import Tokens, read_tokens, tokenize
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from thoughts import ThoughtConfig, load_quiet_star, quiet_star_loss, save_quiet_star

SMALL = "--base-steps 4 --steps 4 --batch-size 3 --context 16 --thought-length 2 --save-every 2"
SMALL += " --positions 6"
BASE_SETTINGS = {**train.BASE_SETTINGS}  # without the fixture below


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A corpus, a model and a table that take no time."""
    monkeypatch.setattr(train, "CORPUS_LINES", 300)
    monkeypatch.setattr(train, "BASE", MistralConfig(258, 16, 32, 1, 2, 1))
    monkeypatch.setitem(train.BASE_SETTINGS, "batch_size", 4)
    monkeypatch.setattr(train.evaluation, "puzzle_table", lambda model, tokenizer: {})
    monkeypatch.setattr(
        train.evaluation, "look_at_puzzles", lambda model, tokenizer: ("seen", False, {})
    )


def run(out, options="", small=SMALL):
    train.main([*small.split(), "--out", str(out), "--device", "cpu", *options.split()])


def losses(out):
    """(stage, step) -> every metric that is no measure of time."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        (line.pop("stage"), line.pop("step")): line
        for line in lines
        if line.pop("tokens_per_second")
    }


def test_same_seed_same_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, f"--seed {seed}")
    a, b, c = (losses(tmp_path / name) for name in "abc")
    assert len(a) == 8
    assert a == b
    assert all(a[key]["loss"] != c[key]["loss"] for key in a)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("stage", ["base", "quiet_star"])
@pytest.mark.parametrize("stopped_at", [1, 3, 4])
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    tmp_path, monkeypatch, stage, stopped_at
):
    """Killed in the middle of a step, or while a checkpoint is being written (step 4)."""
    run(tmp_path / "whole")
    log = runs.log

    def log_or_die(folder, step, *rest):
        log(folder, step, *rest)
        if folder.name == stage and step == stopped_at:
            raise KilledError

    monkeypatch.setattr(runs, "log", log_or_die)
    with pytest.raises(KilledError):
        run(tmp_path / "killed")
    monkeypatch.setattr(runs, "log", log)
    train.main(["--out", str(tmp_path / "killed"), "--resume", "--device", "cpu"])
    lines = [len((tmp_path / x / "metrics.jsonl").read_text().split()) for x in ("whole", "killed")]
    assert lines[0] == lines[1]  # no step was logged twice
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    same_weights(tmp_path / "whole" / "quiet_star", tmp_path / "killed" / "quiet_star")


def same_weights(one, other):
    pairs = zip(load_quiet_star(one).parameters(), load_quiet_star(other).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("stage", ["base", "quiet_star"])
@pytest.mark.parametrize("half_deleted", [False, True])
def test_a_crash_while_a_checkpoint_is_replaced_loses_nothing(tmp_path, stage, half_deleted):
    """The complete new one stands beside what is left of the old one; nothing is run again."""
    run(tmp_path)
    new, old = tmp_path / f"{stage}.tmp", tmp_path / stage
    old.rename(new)
    if half_deleted:
        old.mkdir()
        (old / "config.json").write_text("{}")
    before = (tmp_path / "metrics.jsonl").read_text()
    train.main(["--out", str(tmp_path), "--resume", "--device", "cpu"])
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert (old / "model.safetensors").exists()
    assert not new.exists()


def test_a_half_written_checkpoint_is_none(tmp_path):
    """Without its state, which is written last, it does not take the place of the old one.

    Nor does anything of it get into the next one.
    """
    run(tmp_path)
    names = {path.name for path in (tmp_path / "quiet_star").iterdir()}
    (tmp_path / "quiet_star.tmp").mkdir()
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (tmp_path / "quiet_star.tmp" / name).write_text("half")
    for more in ([], ["--steps", "5"]):
        train.main(["--out", str(tmp_path), "--resume", "--device", "cpu", *more])
        assert load_quiet_star(tmp_path / "quiet_star").config.thought_length == 2
    assert {path.name for path in (tmp_path / "quiet_star").iterdir()} == names


@pytest.mark.parametrize("positions", [None, 5])
def test_splitting_a_batch_changes_neither_gradient_nor_metrics(positions):
    """4 sequences at once, one by one, or 3 and 1; with targets missing in some of them."""
    ids = random_ids(4, 12)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, 3] = mask[2, 7:] = False
    results = []
    for size in (None, 1, 3):
        model, settings = tiny_quiet_star(), train.Settings(micro_batch=size, positions=positions)
        generator = torch.Generator().manual_seed(7)
        metrics = train.batch_gradient(model, train.thought_loss, ids, mask, settings, 2, generator)
        results.append((metrics, {name: p.grad for name, p in model.named_parameters()}))
    for metrics, gradients in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-5)
        for name, whole in results[0][1].items():
            assert (whole - gradients[name]).abs().max() < 1e-5 * (1 + whole.abs().max()), name


def test_what_is_no_target_has_no_loss():
    """Both losses without thoughts are the mean over the targets, computed directly."""
    model, ids = tiny_quiet_star(), random_ids(4, 12)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, 3] = mask[2, 7:] = False
    logp = torch.log_softmax(model.model(ids)[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    of = {"loss": (model.model, train.language_loss), "base_nll": (model, train.thought_loss)}
    for name, losses_of in of.items():
        metrics = train.batch_gradient(*losses_of, ids, mask, train.Settings(), 2, None)
        assert metrics[name] == pytest.approx(-logp[mask[:, 1:]].mean().item())


def test_the_loss_is_that_of_the_thoughts_at_the_positions():
    """Positions, mask, counts and generator all reach the model."""
    model, ids, positions = tiny_quiet_star(), random_ids(2, 12), torch.tensor([1, 4])
    seeded, mask = torch.Generator().manual_seed, random_ids(2, 12) > 5
    loss, _ = train.thought_loss(model, ids, mask, positions, (40, 7), seeded(0))
    output = model(ids, positions=positions, target_mask=mask, generator=seeded(0))
    assert loss == quiet_star_loss(output, model.config, (40, 7))[0]


def test_distinct_thoughts_by_hand():
    """Two sequences, two thoughts at two positions: 1 of 4, and 2 of the 2 at a valid position."""
    thoughts = torch.tensor(
        [[[[1, 1], [1, 1]], [[1, 1], [1, 1]]], [[[1, 2], [3, 3]], [[4, 2], [3, 4]]]]
    )
    valid = torch.tensor([[[True, True], [True, True]], [[True, True], [True, False]]])
    output = train.Output(thoughts, *[None] * 4, valid, None, None)
    assert train.distinct_thoughts(output, (9, 3)) == pytest.approx((1 + 2) / 6)
    none = train.Output(thoughts[..., :0], *[None] * 4, valid, None, None)
    assert train.distinct_thoughts(none, (9, 3)) == 0


def test_positions_are_drawn_anew_every_step():
    """5 of the 10 that have 2 of 12 tokens ahead, the same for all parts of a batch."""
    seen, generator = [], torch.Generator().manual_seed(0)

    def loss_of(model, ids, targets, positions, counts, generator):
        seen.append(positions.tolist())
        return torch.zeros((), requires_grad=True), {}

    ids, settings = random_ids(2, 12), train.Settings(positions=5, micro_batch=1)
    for _ in range(20):
        train.batch_gradient(None, loss_of, ids, torch.ones_like(ids) > 0, settings, 2, generator)
    assert all(one == other for one, other in zip(seen[::2], seen[1::2], strict=True))
    assert all(len(set(drawn)) == 5 and drawn == sorted(drawn) for drawn in seen)
    assert {position for drawn in seen for position in drawn} == set(range(10))


def test_all_that_is_random_has_the_seed(tmp_path, monkeypatch):
    """Both corpora, the weights of both stages, and every batch.

    The first corpus explains eight lines in ten, the second one in ten, both with the same work.
    """
    seen = {"corpus": [], "weights": [], "batch": []}
    make_corpus, batch, manual_seed = corpus.make_corpus, Tokens.batch, torch.manual_seed

    def noting(kind, function, place):
        def noted(*arguments):
            seen[kind].append(arguments[place])
            return function(*arguments)

        return noted

    monkeypatch.setattr(corpus, "make_corpus", noting("corpus", make_corpus, slice(4)))
    monkeypatch.setattr(torch, "manual_seed", noting("weights", manual_seed, 0))
    monkeypatch.setattr(Tokens, "batch", noting("batch", batch, slice(1, 5)))
    run(tmp_path, "--seed 7 --work 0.25")
    assert seen["corpus"] == [(7, 300, 0.8, 0.25), (8, 300, 0.1, 0.25)]
    assert seen["weights"] == [7, 7]
    steps = [0, 1, 2, 3]  # stage 2 begins with a look whether the text is long enough
    given = [(step, 4, 16, 7) for step in steps] + [(step, 3, 16, 7) for step in [0, *steps]]
    assert seen["batch"] == given


def test_thoughts_are_seeded_and_the_rates_are_those_given(tmp_path, monkeypatch):
    """The generator of positions and thoughts, and both learning rates, after a warm-up of 2.

    14 of 16 tokens have 2 (n_true) ahead.
    """
    seen = []

    def loss_of(model, ids, targets, positions, counts, generator):
        seen.append((generator.initial_seed(), *positions.tolist()))
        return train.thought_loss(model, ids, targets, positions, counts, generator)

    changed = partial(train.train_thoughts, loss_of=loss_of)
    monkeypatch.setattr(train, "train_thoughts", changed)
    options = "--seed 7 --lr 0.25 --mixing-lr 0.5 --warmup 2 --cooldown 0 --weight-decay 0.125"
    run(tmp_path, options + " --positions 14")
    assert set(seen) == {(7, *range(14))}
    rates = [line["lr"] for (stage, _), line in losses(tmp_path).items() if stage == "quiet_star"]
    assert rates == [0.125, 0.25, 0.25, 0.25]
    state = torch.load(tmp_path / "quiet_star" / "training_state.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (0.25, 0.125),
        (0.5, 0.125),
    ]


def test_the_learning_rate_rises_and_falls(tmp_path, monkeypatch):
    """To lr in 2 steps of 6, and to 0 in the last 3; the base model's does not fall."""
    monkeypatch.setitem(train.BASE_SETTINGS, "warmup", 2)
    run(tmp_path, "--steps 6 --base-steps 6 --warmup 2 --cooldown 0.5 --lr 0.5")
    rates = {key: line["lr"] for key, line in losses(tmp_path).items()}
    last = [rates["quiet_star", step] for step in range(1, 7)]
    assert last == pytest.approx([0.25, 0.5, 0.5, 0.5, 1 / 3, 1 / 6])
    assert [rates["base", step] for step in (1, 2, 6)] == pytest.approx([5e-4, 1e-3, 1e-3])


def test_a_rate_that_rises_and_falls_at_once_is_the_lower_one():
    """As in the default run: warm-up in 4 steps of 6, cool-down in all."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "peak_lr": 12.0}])
    settings, rates = train.Settings(steps=6, warmup=4, cooldown=1.0), []
    for step in range(6):
        train.set_learning_rates(optimizer, step, settings)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([3, 6, 8, 6, 4, 2])


@pytest.mark.parametrize(("given", "rate"), [(None, 1e-6), (0.0, 0.0)])
def test_the_whole_mixing_head_has_a_rate_of_its_own(given, rate):
    model = tiny_quiet_star()
    rest, head = train.make_optimizer(model, train.Settings(mixing_lr=given)).param_groups
    assert (rest["peak_lr"], head["peak_lr"]) == (1e-6, rate)
    assert [*map(id, head["params"])] == [*map(id, model.mixing_head.parameters())]
    assert len(rest["params"] + head["params"]) == len([*model.parameters()])


def test_gradients_are_clipped(tmp_path):
    """Adam forgets the size of gradients, but its moments do not."""
    run(tmp_path, "--clip 1e-6")
    state = torch.load(tmp_path / "quiet_star" / "training_state.pt", weights_only=True)
    moments = [moment["exp_avg"] for moment in state["optimizer"]["state"].values()]
    assert 0 < torch.cat([moment.flatten() for moment in moments]).norm() < 1e-6


def test_metrics_and_files(tmp_path, monkeypatch):
    """The clock goes on by a second whenever it is read: once a step."""
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=count().__next__))
    run(tmp_path)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["tokens_per_second"] for line in lines] == [4 * 16] * 4 + [3 * 16] * 4
    last = losses(tmp_path)["quiet_star", 4]
    expected = {
        "loss",
        "base_nll",
        "init_nll",
        "talk_nll",
        "policy_loss",
        "reward",
        "weight",
        "rewarded",
        "entropy",
        "distinct",
        "grad_norm",
        "lr",
    }
    assert set(last) == expected
    model = load_quiet_star(tmp_path / "quiet_star")
    assert model.config.thought_length == 2
    assert model.config.init_id == 257
    assert load_tokenizer(tmp_path / "quiet_star").token_id("—") == 257
    assert load_mistral(tmp_path / "base").config.hidden_size == 16
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


@pytest.fixture
def checkpoint(tmp_path):
    """A pretrained model in a folder, and text to continue on."""
    folder = tmp_path / "pretrained"
    save_mistral(tiny_quiet_star(V=258).model.to(torch.bfloat16), folder)
    save_byte_tokenizer(folder)
    (tmp_path / "text.txt").write_text("Two and two is four. " * 20)
    return f"--checkpoint {folder} --data {tmp_path / 'text.txt'}"


def test_a_checkpoint_with_the_papers_settings(tmp_path, checkpoint):
    """All files of its tokenizer go along."""
    (tmp_path / "pretrained" / "tokenizer_config.json").write_text("{}")
    run(tmp_path / "out", checkpoint + " --steps 2 --context 16 --micro-batch 3", small="")
    saved = json.loads((tmp_path / "out" / "settings.json").read_text())
    thoughts, settings = saved["thoughts"], saved["settings"]
    paper = {"n_thoughts": 2, "thought_length": 9, "n_true": 4, "embedding_scale": 100.0}
    assert paper.items() <= thoughts.items()
    assert thoughts["policy_weight"] is None  # 1e6 / K
    assert thoughts["reinforce_temperature"] == 3
    assert (settings["lr"], settings["warmup"], settings["weight_decay"]) == (1e-6, 20, 1e-3)
    assert (settings["batch_size"], train.Settings().context, settings["clip"]) == (8, 256, 1.0)
    assert (thoughts["base_weight"], thoughts["drop_negative"]) == (0.5, True)
    model = load_quiet_star(tmp_path / "out" / "quiet_star")
    assert generate(model, random_ids(1, 4), 3).shape == (1, 7)
    assert all((tmp_path / x / "tokenizer_config.json").exists() for x in ("out", "out/quiet_star"))


def test_a_vocabulary_without_the_em_dash(tmp_path, checkpoint, capsys):
    """The meta tokens begin as the first token of its encoding; the tokenizer goes along."""
    folder = tmp_path / "pretrained"
    shutil.copy(Path(__file__).parent / "fixtures" / "tekken_cut" / "tekken.json", folder)
    (folder / "tokenizer.json").unlink()
    document = json.loads((folder / "tekken.json").read_text(encoding="utf-8"))
    document["config"] |= {"default_vocab_size": 258 + 20, "default_num_special_tokens": 20}
    (folder / "tekken.json").write_text(json.dumps(document))
    save_mistral(tiny_quiet_star(V=278).model, folder)
    run(tmp_path / "out", checkpoint + " --steps 1 --context 16 --micro-batch 3", small="")
    model = load_quiet_star(tmp_path / "out" / "quiet_star")
    assert model.config.init_id == 20 + "—".encode()[0]
    assert "start and end begin as the embedding of '\\\\xe2'\n" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "out" / "quiet_star").vocab_size == 278


@pytest.fixture
def prepared(tmp_path, checkpoint):
    """The same text as a folder of tokens, in the form that tools/prepare.py gives it."""
    folder, tokenizer = tmp_path / "prepared", load_tokenizer(tmp_path / "pretrained")
    tokens = tokenize([(tmp_path / "text.txt").read_text()], tokenizer)
    folder.mkdir()
    tokens.ids.numpy().astype("uint16").tofile(folder / "tokens.bin")
    tokens.is_target.numpy().tofile(folder / "is_target.bin")
    about = {"tokens": len(tokens.ids), "dtype": "uint16", "tokenizer": tokenizer.identity()}
    write_json(folder / "manifest.json", about)
    return folder


FEW = " --steps 4 --context 16 --positions 6 --thought-length 2 --save-every 2 --lr 1e-3"


def test_prepared_text_is_trained_on_like_the_text_itself(tmp_path, checkpoint, prepared):
    run(tmp_path / "text", checkpoint + FEW, small="")
    run(tmp_path / "tokens", checkpoint.replace("text.txt", "prepared") + FEW, small="")
    assert losses(tmp_path / "text") == losses(tmp_path / "tokens")


@pytest.mark.parametrize("edited", ["text.txt", "held_out.txt", "prepared/manifest.json"])
def test_a_run_is_not_resumed_on_edited_text(tmp_path, checkpoint, prepared, capsys, edited):
    (tmp_path / "held_out.txt").write_text("One and one is two. " * 20)
    options = checkpoint.replace("text.txt", "prepared") if "/" in edited else checkpoint
    options += f" --eval-data {tmp_path / 'held_out.txt'}"
    run(tmp_path / "out", options + FEW, small="")
    with (tmp_path / edited).open("a") as file:
        file.write("\n")
    resume = ["--out", str(tmp_path / "out"), "--resume", "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        train.main(resume)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"{(tmp_path / edited).parent if '/' in edited else tmp_path / edited} has" in error
    assert error.count("\n") == 1


def held_out(lines):
    """(step, nll without and with thoughts) of the lines that have it; taken out of them."""
    names = "eval_init_nll", "eval_talk_nll"
    there = {key: line for key, line in lines.items() if names[0] in line}
    return [(key[1], *(line.pop(name) for name in names)) for key, line in there.items()]


@pytest.mark.parametrize("kind", ["text.txt", "prepared"])
def test_looks_at_held_out_text_leave_the_training_as_it_is(
    tmp_path, monkeypatch, checkpoint, prepared, kind
):
    """Every loss is the same with them, without them, and in a run that was killed and resumed."""
    run(tmp_path / "without", checkpoint + FEW, small="")
    options = f"{checkpoint}{FEW} --eval-data {tmp_path / kind} --eval-every 2 --eval-sequences 3"
    run(tmp_path / "with", options, small="")
    log = runs.log

    def log_or_die(folder, step, *rest):
        log(folder, step, *rest)
        if step == 4:
            raise KilledError

    monkeypatch.setattr(runs, "log", log_or_die)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", options, small="")
    monkeypatch.setattr(runs, "log", log)
    train.main(["--out", str(tmp_path / "killed"), "--resume", "--device", "cpu"])
    without, whole, killed = (losses(tmp_path / name) for name in ("without", "with", "killed"))
    seen = held_out(whole)
    assert [step for step, _, _ in seen] == [2, 4]
    assert seen == held_out(killed)
    assert without == whole == killed

    model, tokenizer = (f(tmp_path / "with/quiet_star") for f in (load_quiet_star, load_tokenizer))
    tokens = read_tokens([tmp_path / kind], tokenizer)
    ids, mask = tokens.batch(0, 3, 16, 0, torch.device("cpu"))
    assert not torch.equal(ids[0], ids[1])
    nlls = train.evaluation.text_nll(model, ids.flatten(), mask.flatten(), 16)
    assert seen[-1][1:] == pytest.approx([nll.mean().item() for nll in nlls], rel=1e-5)
    assert seen[-1][1] != seen[-1][2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--eval-every 2", "eval_every has no effect without eval_data"),
        ("--eval-sequences 2", "eval_sequences has no effect without eval_data"),
        ("--eval-data text.txt --eval-every 0", "eval_every is 0; it must be at least 1"),
        ("--eval-data nowhere", "cannot read"),
        ("--context 999", "tokens, one sequence needs 999"),
        ("--eval-data text.txt --eval-sequences 0", "eval_sequences is 0"),
        ("--data folder", "python -m tools.prepare reads folders"),
        ("--data a.zst", "a.zst, which is not plain text"),
    ],
)
def test_text_that_cannot_be_used(tmp_path, monkeypatch, checkpoint, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", checkpoint + FEW + " " + options, small="")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", ["--masters", "--no-masters", "--checkpointing"])
def test_bfloat16_trains_and_resumes(tmp_path, checkpoint, options):
    """3 + 1 steps are 4 steps, bit for bit, also with random rounding."""
    settings = f"{checkpoint}{FEW} --batch-size 3 --fast --dtype bfloat16 {options}"
    run(tmp_path / "whole", settings + " --save-every 3", small="")
    model = load_quiet_star(tmp_path / "whole" / "quiet_star")
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.mixing_head.parameters()} == {torch.float32}

    def killed(*arguments):
        raise KilledError

    stop = train.nn.utils.clip_grad_norm_
    calls = iter(range(10))
    train.nn.utils.clip_grad_norm_ = lambda *a: stop(*a) if next(calls) < 3 else killed()
    try:
        with pytest.raises(KilledError):
            run(tmp_path / "killed", settings + " --save-every 3", small="")
    finally:
        train.nn.utils.clip_grad_norm_ = stop
    train.main(["--out", str(tmp_path / "killed"), "--resume", "--device", "cpu"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    same_weights(tmp_path / "whole" / "quiet_star", tmp_path / "killed" / "quiet_star")


def test_what_fast_is_asked_for(tmp_path, monkeypatch, checkpoint):
    """The run's first batch of 8 sequences; checkpointing, compile, masters."""
    asked = []

    def enter(model, ids, targets, *options):
        asked.append((ids.shape, targets.shape, *options))
        raise ValueError("asked")

    monkeypatch.setattr("fast.enter", enter)
    for options in (
        "", "--checkpointing", "--compile", "--dtype bfloat16", "--dtype bfloat16 --no-masters"
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            run(tmp_path / "out", f"{checkpoint} --context 16 --fast {options}", small="")
    assert asked == [
        ((8, 16), (8, 16), *options)
        for options in (
            (False, False, True), (True, False, True), (False, True, True), (False, False, True),
            (False, False, False),
        )
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fast", [False, True])
def test_memory_is_counted_before_training(tmp_path, monkeypatch, checkpoint, capsys, fast):
    """For the model's shape, the settings and the path of the run; not enough is one line."""
    seen = []

    def check_memory(shape, thoughts, settings, path_of, device):
        seen.append((shape, thoughts.thought_length, settings.context, path_of(settings), device))
        raise ValueError("a step needs more")

    monkeypatch.setattr(train, "check_memory", check_memory)
    options = f"{checkpoint} --context 16 --thought-length 2" + " --fast --checkpointing" * fast
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", options, small="")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith(": error: a step needs more\n") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    [(shape, *settings, path, device)] = seen
    assert shape == load_mistral(tmp_path / "pretrained").config
    assert (settings, device) == ([2, 16], torch.device("cpu"))
    assert getattr(path, "keywords", None) == ({"checkpointing": True} if fast else None)


@pytest.mark.parametrize(
    ("preset", "settings", "thoughts"),
    [
        (
            "mistral-7b",
            {"fast": True, "dtype": "bfloat16", "masters": False, "checkpointing": True}
            | {"micro_batch": 1},
            {},
        ),
        (
            "small",
            {"micro_batch": 1, "positions": 32, "lr": 3e-5, "mixing_lr": 3e-4, "cooldown": 0.5},
            {"embedding_scale": 1.0, "reinforce_temperature": 1.0, "policy_weight": 10.0},
        ),
    ],
)
def test_preset(tmp_path, monkeypatch, checkpoint, preset, settings, thoughts):
    """Its memory is counted, too."""
    monkeypatch.setattr(train, "check_memory", memory.check_memory)
    options = f" --preset {preset} --steps 1 --context 34 --thought-length 1 --n-true 1"
    run(tmp_path / "out", checkpoint + options, small="")
    saved = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert saved["settings"] == saved["settings"] | settings
    assert saved["thoughts"] == saved["thoughts"] | thoughts


def test_tricks_need_fast(tmp_path, checkpoint, capsys):
    for option in ("--checkpointing", "--compile", "--dtype bfloat16"):
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / "out", f"{checkpoint} --context 16 {option}", small="")
        assert stopped.value.code == 2
        assert "need --fast" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_plain_and_fast_runs_are_the_same(tmp_path):
    for name, option in (("plain", ""), ("fast", "--fast")):
        run(tmp_path / name, option)
    plain, quick = (losses(tmp_path / name) for name in ("plain", "fast"))
    assert len(plain) == 8
    for key, metrics in plain.items():
        assert quick[key] == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_compiled_losses_are_the_same(tmp_path, checkpoint):
    for name, option in (("plain", ""), ("compiled", " --fast --compile")):
        settings = " --steps 2 --context 16 --lr 1e-3 --policy-weight 1"  # 1e6 amplifies rounding
        run(tmp_path / name, checkpoint + settings + option, small="")
    plain, compiled = (losses(tmp_path / name) for name in ("plain", "compiled"))
    for step, metrics in plain.items():
        for name, value in metrics.items():
            assert compiled[step][name] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_runs_get_their_own_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main([*SMALL.split(), "--device", "cpu"])
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "steps is 0; it must be at least 1"),
        ("--batch-size 0", "batch_size is 0; it must be at least 1"),
        ("--micro-batch 0", "micro_batch is 0; it must be at least 1"),
        ("--positions 0", "positions is 0; it must be at least 1"),
        ("--save-every 0", "save_every is 0; it must be at least 1"),
        ("--warmup -1", "warmup is -1; it must be at least 0"),
        ("--base-steps -1", "base_steps is -1; it must be at least 0"),
        ("--mixing-lr -1", "mixing_lr is -1.0; it must be between 0 and 100"),
        ("--weight-decay -1", "weight_decay is -1.0; it must be between 0 and 100"),
        ("--n-thoughts 0", "n_thoughts is 0; it must be between 1 and 10000"),
        ("--base-weight 2", "base_weight is 2.0; it must be between 0 and 1"),
        ("--lr -1", "lr is -1.0; it must be between 0 and 100"),
        ("--lr nan", "lr is nan; it must be between 0 and 100"),
        ("--seed -1", "seed is -1; it must be at least 0"),
        ("--context 1", "context is 1; it must be at least 2"),
        ("--clip 0", "clip is 0.0; it must be between"),
        ("--keep -1", "keep is -1; it must be at least 0"),
        ("--policy-weight -1", "policy_weight is -1.0; it must be between 0 and"),
        ("--thought-length -1", "thought_length is -1; it must be between 0 and 10000"),
        ("--base-weight -1", "base_weight is -1.0; it must be between 0 and 1"),
        ("--reinforce-temperature 0", "reinforce_temperature is 0.0; it must be between"),
        ("--n-true 16", "of 16 tokens (context) 0 have 16 (n_true) ahead"),
        ("--positions 15", "positions is 15; of 16 tokens (context) 14 have 2 (n_true) ahead"),
        ("--base-steps 0", "base_steps is 0; without --checkpoint a base model has to be trained"),
        ("--work 1.5", "work is 1.5; it must be between 0 and 1"),
        ("--cooldown 10", "cooldown is 10.0; it must be between 0 and 1"),
        ("--data text", "--data needs --checkpoint"),
        ("--eval-data text", "eval_data has no effect without data"),
        ("--checkpoint nowhere --data text", "base_steps is of the built-in corpus"),
        ("--resume --seed 1", "leave out"),
        ("--dtype float16", "dtype is float16; it must be float32 or bfloat16"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", options, small=SMALL if "resume" not in options else "")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_position_has_to_think_where_all_may():
    with pytest.raises(ValueError, match=r"positions is all; of 4 tokens \(context\) 0 have 4"):
        runs.check_ahead(train.Settings(context=4), ThoughtConfig(n_true=4))


def test_options_of_the_built_in_corpus_are_for_it_alone(tmp_path, capsys, checkpoint):
    """A foreign checkpoint needs text of its own, and no share of asides."""
    for options, message in (
        (checkpoint + " --work 0.5", "work is of the built-in corpus, which is not used here"),
        ("--checkpoint nowhere --data text", "nowhere is not a checkpoint"),
        (checkpoint.split(" --data")[0], "is no model of the built-in corpus: give it --data"),
    ):
        save_mistral(tiny_mistral(), tmp_path / "pretrained")  # 23 tokens
        with pytest.raises(SystemExit):
            run(tmp_path / "out", options, small="")
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_thinking_model_thinks_on(tmp_path):
    """Without further options as it did, with them otherwise; nothing that it learned is lost."""
    run(tmp_path / "first")
    folder = tmp_path / "first" / "quiet_star"
    first = load_quiet_star(folder)
    small = "--steps 1 --lr 0 --mixing-lr 0 --context 16 --positions 6 --work 0.5"
    small += f" --checkpoint {folder} "
    run(tmp_path / "same", small=small)
    same_weights(folder, tmp_path / "same" / "quiet_star")
    assert load_quiet_star(tmp_path / "same" / "quiet_star").config == first.config

    other = "--thought-length 1 --n-true 3 --n-thoughts 4 --embedding-scale 50"
    run(tmp_path / "other", other, small=small)
    again = load_quiet_star(tmp_path / "other" / "quiet_star")
    assert again.config == replace(
        first.config, thought_length=1, n_true=3, n_thoughts=4, embedding_scale=50.0
    )
    ids = torch.tensor([[first.start_id, first.end_id]])
    assert torch.allclose(first.embed_thought(ids), again.embed_thought(ids))
    assert torch.equal(first.mixing_head[4].weight, again.mixing_head[4].weight)
    assert "base" not in {stage for stage, _ in losses(tmp_path / "other")}


def test_a_model_with_ids_of_its_own_thinks_on(tmp_path):
    """As the authors', whose start and end are the last two tokens of the vocabulary."""
    first = tiny_quiet_star(V=260, start_id=258, end_id=259, init_id=257)
    save_quiet_star(first, tmp_path)
    save_byte_tokenizer(tmp_path)
    settings, thoughts = train.Settings(checkpoint=str(tmp_path)), ThoughtConfig()
    again = train.thinking_model(settings, thoughts, tmp_path / "run", torch.device("cpu"))
    assert again.config == replace(thoughts, start_id=258, end_id=259, init_id=257)


def test_paths_are_kept_from_the_root_on(tmp_path, monkeypatch, checkpoint):
    """A run may be resumed from another folder than it began in."""
    monkeypatch.chdir(tmp_path)
    given = {"checkpoint": "pretrained", "data": ("text.txt",), "eval_data": "text.txt"}
    settings, _ = train.make_settings(given)
    root, text = str(tmp_path / "pretrained"), str(tmp_path / "text.txt")
    assert (settings.checkpoint, settings.data, settings.eval_data) == (root, (text,), text)


def test_held_out_text_is_the_same_for_every_seed_and_none_of_it_comes_twice(
    tmp_path, monkeypatch, checkpoint
):
    """Of 60 tokens there are 5 sequences of 12, though 16 are asked for."""
    (tmp_path / "held_out.txt").write_text("One and one is two! " * 3)
    seen = []

    def text_nll(model, ids, is_target, context):
        seen.append(ids.view(-1, context))
        return torch.zeros(2, 1)

    monkeypatch.setattr(train.evaluation, "text_nll", text_nll)
    for seed in (0, 7):
        options = f"{checkpoint}{FEW} --context 12 --steps 1"
        options += f" --eval-data {tmp_path / 'held_out.txt'}"
        run(tmp_path / str(seed), f"{options} --eval-every 1 --seed {seed}", small="")
    assert torch.equal(*seen)
    assert seen[0].shape == (5, 12)
    assert len(seen[0].unique(dim=0)) == 5


def test_the_base_model_has_settings_of_its_own(tmp_path, monkeypatch):
    """Of those given it takes only steps, context and what concerns the run's folder."""
    seen = []

    def note(model, loss_of, optimizer, tokens, settings, n_true, folder, look, **more):
        seen.append((settings, n_true, more))
        raise ValueError("seen")

    monkeypatch.setattr(train, "train", note)
    monkeypatch.setattr(train, "BASE_SETTINGS", BASE_SETTINGS)
    given = "--fast --dtype bfloat16 --no-masters --checkpointing --compile --micro-batch 1 --lr 1"
    with pytest.raises(SystemExit):
        run(tmp_path, given + " --warmup 3 --cooldown 0.25 --base-steps 5 --mixing-lr 3e-3")
    own = {"batch_size": 16, "lr": 1e-3, "warmup": 50, "cooldown": 0.0}
    shared = {"steps": 5, "base_steps": 5, "context": 16, "save_every": 2, "mixing_lr": 3e-3}
    assert seen == [(train.Settings(**own, **shared), 1, {"look_every": 50})]


def test_the_base_model_of_the_built_in_corpus_is_trained_in_float32(tmp_path):
    run(tmp_path, "--fast --dtype bfloat16 --base-steps 1 --steps 1")
    assert load_mistral(tmp_path / "base").lm_head.weight.dtype == torch.float32
    thinking = load_quiet_star(tmp_path / "quiet_star")
    assert thinking.model.lm_head.weight.dtype == torch.bfloat16


def test_a_base_model_that_can_work_is_trained_no_longer(tmp_path, monkeypatch, capsys):
    """Looked at every 2 steps, it can after 4 of 9; a resumed run does not train it again."""
    looks = iter([False, True])

    def glance(model, tokenizer):
        return "seen", isinstance(model, Mistral) and next(looks), {}

    def train_and_look(
        model, loss_of, optimizer, tokens, settings, n_true, folder, look, *rest, **_
    ):
        one_stage(model, loss_of, optimizer, tokens, settings, n_true, folder, look, 2)

    one_stage = train.train
    monkeypatch.setattr(train.evaluation, "look_at_puzzles", glance)
    monkeypatch.setattr(train, "train", train_and_look)
    run(tmp_path, "--base-steps 9")
    assert capsys.readouterr().out.count(": seen") == 2 + 2
    steps = [step for stage, step in losses(tmp_path) if stage == "base"]
    assert steps == [1, 2, 3, 4]
    before = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "quiet_star")
    train.main(["--out", str(tmp_path), "--resume", "--device", "cpu"])
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:4] == before.splitlines()[:4]
    assert list(losses(tmp_path)) == [*(("base", n) for n in steps)] + [
        ("quiet_star", n) for n in steps
    ]


def test_a_run_is_never_overwritten(tmp_path, capsys):
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("metric", "factor"), [(math.nan, 1.0), (1.0, math.nan)])
def test_a_loss_or_gradient_that_is_no_number_stops_the_run(
    tmp_path, capsys, monkeypatch, metric, factor
):
    loss, seen = train.language_loss, {"loss": torch.tensor(metric)}
    monkeypatch.setattr(train, "language_loss", lambda *given: (factor * loss(*given)[0], seen))
    with pytest.raises(SystemExit):
        run(tmp_path)
    error = capsys.readouterr().err
    assert "step 1 of base: loss" in error and "the last checkpoint is kept" in error


def test_unknown_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--thinking", "3"])
    assert stopped.value.code == 2


def test_every_setting_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for settings in (train.Settings, train.ThoughtConfig):
        assert set(comments(settings)) == {field.name for field in train.fields(settings)}
    assert "--thought-length N" in text


def test_loss_in_float32_of_a_bfloat16_model():
    model, ids = tiny_mistral().bfloat16(), random_ids(2, 8)
    mask = torch.ones_like(ids) > 0
    loss, _ = train.language_loss(model, ids, mask, None, (14, 0), None)
    assert loss.dtype == torch.float32
    model, positions = tiny_quiet_star().bfloat16(), torch.arange(6)
    loss, metrics = train.thought_loss(model, ids, mask, positions, (14, 12), None)
    assert {value.dtype for value in (loss, *metrics.values())} == {torch.float32}
