"""The training loop: resuming, splitting batches, repeating a seed, refusing what cannot work."""

import json

import pytest
import torch
from tiny import random_ids, tiny_quiet_star

import train
from model import MistralConfig, load_mistral, save_mistral
from sample import generate
from thoughts import load_quiet_star
from tokenizer import load_tokenizer, save_byte_tokenizer

SMALL = "--base-steps 4 --steps 4 --batch-size 3 --context 16 --thought-length 2 --save-every 2"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A corpus, a model and a table that take no time."""
    monkeypatch.setattr(train, "CORPUS_LINES", 300)
    monkeypatch.setattr(train, "BASE", MistralConfig(258, 16, 32, 1, 2, 1))
    monkeypatch.setattr(train, "BASE_BATCH", 4)
    monkeypatch.setattr(train.evaluation, "puzzle_table", lambda model, tokenizer: {})


def run(out, options="", small=SMALL):
    train.main([*small.split(), "--out", str(out), "--device", "cpu", *options.split()])


def losses(out):
    """(stage, step) -> every metric that is no measure of time."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        (line.pop("stage"), line.pop("step")): line
        for line in lines
        if line.pop("tokens_per_second") and line.pop("utilisation")
    }


def test_same_seed_same_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, f"--seed {seed}")
    a, b, c = (losses(tmp_path / name) for name in "abc")
    assert len(a) == 8
    assert a == b
    assert all(a[key]["loss"] != c[key]["loss"] for key in a)


@pytest.mark.parametrize("stage", ["base", "quiet_star"])
@pytest.mark.parametrize("stopped_at", [1, 3, 4])
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    tmp_path, monkeypatch, stage, stopped_at
):
    """Killed in the middle of a step, or while a checkpoint is being written (step 4)."""
    run(tmp_path / "whole")

    class KilledError(Exception):
        pass

    log = train.log

    def log_or_die(path, current, step, metrics, left):
        log(path, current, step, metrics, left)
        if current.name == stage and step == stopped_at:
            raise KilledError

    monkeypatch.setattr(train, "log", log_or_die)
    with pytest.raises(KilledError):
        run(tmp_path / "killed")
    monkeypatch.setattr(train, "log", log)
    train.main(["--out", str(tmp_path / "killed"), "--resume", "--device", "cpu"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    same_weights(tmp_path / "whole" / "quiet_star", tmp_path / "killed" / "quiet_star")


def same_weights(one, other):
    pairs = zip(load_quiet_star(one).parameters(), load_quiet_star(other).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_crash_between_two_renames_loses_nothing(tmp_path):
    run(tmp_path)
    (tmp_path / "quiet_star").rename(tmp_path / "quiet_star.old")
    before = losses(tmp_path)
    train.main(["--out", str(tmp_path), "--resume", "--device", "cpu"])
    assert losses(tmp_path) == before
    assert (tmp_path / "quiet_star").exists()


@pytest.mark.parametrize("positions", [None, 5])
def test_splitting_a_batch_changes_neither_gradient_nor_metrics(positions):
    """4 sequences at once, one by one, or 3 and 1; with targets missing in some of them."""
    ids = random_ids(4, 12)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, 3] = mask[2, 7:] = False
    results = []
    for size in (None, 1, 3):
        model = tiny_quiet_star()
        settings = train.Settings(micro_batch=size, positions=positions)
        generator = torch.Generator().manual_seed(7)
        metrics = train.quiet_star_step(model, ids, mask, settings, generator)
        results.append((metrics, {name: p.grad for name, p in model.named_parameters()}))
    for other in results[1:]:
        for whole, parts in zip(results[0], other, strict=True):
            for name, value in whole.items():
                assert (value - parts[name]).abs().max() < 1e-5 * (1 + value.abs().max()), name


def test_metrics_and_files(tmp_path):
    run(tmp_path)
    last = losses(tmp_path)["quiet_star", 4]
    expected = {
        "loss",
        "base_nll",
        "talk_nll",
        "policy_loss",
        "reward",
        "weight",
        "grad_norm",
        "lr",
    }
    assert set(last) == expected
    model = load_quiet_star(tmp_path / "quiet_star")
    assert model.config.thought_length == 2
    assert model.config.init_id == 257
    assert load_tokenizer(tmp_path / "quiet_star").token_id("—") == 257
    assert load_mistral(tmp_path / "base").config.hidden_size == 16
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".new", ".old")]


@pytest.fixture
def checkpoint(tmp_path):
    """A pretrained model in a folder, and text to continue on."""
    folder = tmp_path / "pretrained"
    save_mistral(tiny_quiet_star(V=258).model.to(torch.bfloat16), folder)
    save_byte_tokenizer(folder)
    (tmp_path / "text.txt").write_text("Two and two is four. " * 20)
    return f"--checkpoint {folder} --data {tmp_path / 'text.txt'}"


def test_a_checkpoint_with_the_papers_settings(tmp_path, checkpoint):
    run(tmp_path / "out", checkpoint + " --steps 2 --context 16 --micro-batch 3", small="")
    saved = json.loads((tmp_path / "out" / "settings.json").read_text())
    thoughts, settings = saved["thoughts"], saved["settings"]
    paper = {"n_thoughts": 2, "thought_length": 9, "n_true": 4, "embedding_scale": 100.0}
    assert paper.items() <= thoughts.items()
    assert thoughts["policy_weight"] is None  # 1e6 / K
    assert thoughts["reinforce_temperature"] == 3
    assert (settings["lr"], settings["warmup"], settings["weight_decay"]) == (1e-6, 20, 1e-3)
    model = load_quiet_star(tmp_path / "out" / "quiet_star")
    assert generate(model, random_ids(1, 4), 3).shape == (1, 7)


@pytest.mark.parametrize("options", ["--masters", "--no-masters", "--checkpointing"])
def test_bfloat16_trains_and_resumes(tmp_path, checkpoint, options):
    """3 + 1 steps are 4 steps, bit for bit, also with random rounding."""
    settings = f"{checkpoint} --steps 4 --context 16 --dtype bfloat16 --lr 1e-3 {options}"
    run(tmp_path / "whole", settings + " --save-every 3", small="")
    model = load_quiet_star(tmp_path / "whole" / "quiet_star")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    class KilledError(Exception):
        pass

    def killed(*arguments):
        raise KilledError

    stop = train.nn.utils.clip_grad_norm_
    count = iter(range(10))
    train.nn.utils.clip_grad_norm_ = lambda *a: stop(*a) if next(count) < 3 else killed()
    try:
        with pytest.raises(KilledError):
            run(tmp_path / "killed", settings + " --save-every 3", small="")
    finally:
        train.nn.utils.clip_grad_norm_ = stop
    train.main(["--out", str(tmp_path / "killed"), "--resume", "--device", "cpu"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    same_weights(tmp_path / "whole" / "quiet_star", tmp_path / "killed" / "quiet_star")


def test_preset(tmp_path, checkpoint):
    options = checkpoint + " --preset mistral-7b --steps 1 --context 16"
    run(tmp_path / "out", options, small="")
    saved = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert (saved["dtype"], saved["micro_batch"], saved["checkpointing"]) == ("bfloat16", 1, True)
    assert saved["masters"]  # there is room for them here


def test_a_plan_that_does_not_fit_is_refused(tmp_path, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(train, "free_memory", lambda device: 1e5)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", checkpoint, small="")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "memory plan (GB)" in error
    assert "try --micro-batch 1" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compiled_losses_are_the_same(tmp_path, checkpoint):
    for name, option in (("plain", ""), ("compiled", " --compile")):
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
        ("--n-thoughts 0", "n_thoughts is 0; it must be at least 1"),
        ("--base-weight 2", "base_weight is 2.0; it must be between 0 and 1"),
        ("--lr 0", "lr is 0.0; it must be positive"),
        ("--n-true 16", "n_true (16) must be below context (16)"),
        ("--positions 15", "positions is 15; of 16 tokens 14 have 2 ahead"),
        ("--checkpoint nowhere", "--checkpoint and --data go together"),
        ("--checkpoint nowhere --data text --base-steps 0", "nowhere is no checkpoint folder"),
        ("--resume --seed 1", "leave out"),
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


def test_a_run_is_never_overwritten(tmp_path, capsys):
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--lr 1e30")
    assert "the last checkpoint is kept" in capsys.readouterr().err


def test_unknown_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--thoughts", "3"])
    assert stopped.value.code == 2


def test_every_setting_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for settings in (train.Settings, train.ThoughtConfig):
        assert set(train.comments(settings)) == {field.name for field in train.fields(settings)}
    assert "--thought-length N" in text
