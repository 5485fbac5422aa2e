"""The training loop: resuming, splitting batches, repeating a seed, refusing what cannot work."""

import json

import pytest
import torch
from tiny import random_ids, tiny_mistral, tiny_quiet_star

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


@pytest.mark.parametrize(
    ("stage", "stopped_at", "options"),
    [(stage, step, "") for stage in ("base", "quiet_star") for step in (1, 3, 4)]
    + [("quiet_star", 3, f"--thoughts {kind}") for kind in ("pause", "random", "none")],
)
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    tmp_path, monkeypatch, stage, stopped_at, options
):
    """Killed in the middle of a step, or while a checkpoint is being written (step 4)."""
    run(tmp_path / "whole", options)

    class KilledError(Exception):
        pass

    log = train.log

    def log_or_die(path, current, step, metrics, left):
        log(path, current, step, metrics, left)
        if current.name == stage and step == stopped_at:
            raise KilledError

    monkeypatch.setattr(train, "log", log_or_die)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", options)
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


@pytest.mark.parametrize(
    ("positions", "thoughts"), [(None, "sampled"), (5, "sampled"), (None, "pause"), (5, "random")]
)
def test_splitting_a_batch_changes_neither_gradient_nor_metrics(positions, thoughts):
    """4 sequences at once, one by one, or 3 and 1; with targets missing in some of them."""
    ids = random_ids(4, 12)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, 3] = mask[2, 7:] = False
    results = []
    for size in (None, 1, 3):
        model = tiny_quiet_star()
        settings = train.Settings(micro_batch=size, positions=positions, thoughts=thoughts)
        generator = torch.Generator().manual_seed(7)
        metrics = train.quiet_star_step(model, ids, mask, settings, generator)
        results.append((metrics, {name: p.grad for name, p in model.named_parameters()}))
    for other in results[1:]:
        for whole, parts in zip(results[0], other, strict=True):
            for name, value in whole.items():
                assert (value - parts[name]).abs().max() < 1e-5 * (1 + value.abs().max()), name


def test_forced_thoughts():
    """2 sequences, 3 thoughts of 3 tokens at 40 positions, 23 tokens in the vocabulary."""
    model = tiny_quiet_star()
    generator = torch.Generator().manual_seed(3)
    pause = train.forced_thoughts("pause", model, 2, 40, generator)
    assert pause.shape == (2, 3, 40, 3)
    assert pause.unique().tolist() == [model.start_id]
    random = train.forced_thoughts("random", model, 2, 40, generator)
    assert random.shape == (2, 3, 40, 3)
    assert random.unique().tolist() == list(range(23))  # 720 draws: one is missing once in 1e12
    assert train.forced_thoughts("sampled", model, 2, 40, generator) is None


@pytest.mark.parametrize("thoughts", ["pause", "random"])
def test_thoughts_of_a_control_are_forced_and_not_reinforced(monkeypatch, thoughts):
    """The metrics are those of the language losses after just these thoughts."""
    model, ids = tiny_quiet_star(policy_weight=5.0), random_ids(2, 9)
    forced = train.forced_thoughts(thoughts, model, 2, 7, torch.Generator().manual_seed(7))
    mask = torch.ones(2, 9, dtype=torch.bool)
    settings, generator = train.Settings(thoughts=thoughts), torch.Generator().manual_seed(7)
    metrics = train.quiet_star_step(model, ids, mask, settings, generator)
    output = model(ids, forced)
    expected = output.base_nll.mean() / 2 + output.talk_nll.mean() / 2
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["policy_loss"] == 0


def test_a_stage_without_thoughts_is_a_language_model_stage(tmp_path):
    """The losses are those of the base model trained on, step by step, on the same batches."""
    run(tmp_path, "--thoughts none")
    saved = json.loads((tmp_path / "settings.json").read_text())
    assert saved["thoughts"]["policy_weight"] == 0
    settings, thoughts, _ = train.resume_run(str(tmp_path), {})
    (tmp_path / "quiet_star").rename(tmp_path / "trained")
    stage = train.quiet_star_stage(settings, thoughts, tmp_path, torch.device("cpu"))
    for step in range(4):
        for group, rate in zip(stage.optimizer.param_groups, (2e-4, 1e-3), strict=True):
            group["lr"] = rate * (step + 1) / 20
        ids, mask = stage.batch(step)
        stage.optimizer.zero_grad()
        logits = stage.model.model(ids)[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        loss = nll[mask[:, 1:]].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        stage.optimizer.step()
        line = losses(tmp_path)["quiet_star", step + 1]
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert "reward" not in line
    assert not load_quiet_star(tmp_path / "trained").mixing_head[4].weight.any()  # w is still 1


def test_the_shape_of_a_step():
    """T - A positions think, or as many as were asked for; none without thoughts."""
    thoughts = train.ThoughtConfig(n_true=4)
    settings = [{}, {"positions": 5}, {"thoughts": "pause"}, {"thoughts": "none"}]
    works = [train.work_of(train.Settings(context=16, **given), thoughts) for given in settings]
    assert [work.J for work in works] == [12, 5, 12, 0]


def test_init(tmp_path):
    """Start and end begin as the em dash, or as two unlike vectors; the rest is the same."""
    run(tmp_path / "run")
    settings, thoughts, _ = train.resume_run(str(tmp_path / "run"), {})
    (tmp_path / "run" / "quiet_star").rename(tmp_path / "trained")
    models = {}
    for init in ("dash", "random"):
        settings = train.replace(settings, init=init)
        stage = train.quiet_star_stage(settings, thoughts, tmp_path / "run", torch.device("cpu"))
        models[init] = stage.model
    dash, other = models["dash"], models["random"]
    table = dash.model.embed_tokens.weight
    assert torch.equal(dash.start_embedding, table[257])
    assert torch.equal(dash.end_embedding, table[257])
    assert not torch.equal(other.start_embedding, other.end_embedding)
    assert not (other.start_embedding == table).all(1).any()


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
        ("--thoughts deep", "thoughts is deep; it must be sampled, pause, random, none"),
        ("--init zero", "init is zero; it must be dash or random"),
        ("--thoughts pause --policy-weight 5", "leaves nothing to reinforce"),
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
        train.main(["--thinking", "3"])
    assert stopped.value.code == 2


def test_every_setting_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for settings in (train.Settings, train.ThoughtConfig):
        assert set(train.comments(settings)) == {field.name for field in train.fields(settings)}
    assert "--thought-length N" in text


def test_loss_in_float32_of_a_bfloat16_model():
    model, settings = tiny_mistral().bfloat16(), train.Settings()
    ids = random_ids(2, 8)
    loss = train.language_step(model, ids, torch.ones_like(ids) > 0, settings, None)["loss"]
    assert loss.dtype == torch.float32
