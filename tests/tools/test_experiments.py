"""The experiments: controls, costs, tables, and which of them are run again."""

import json
import math
import shutil
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest
import torch
from commands import refused
from test_train import losses
from tiny import random_ids, tiny_quiet_star

import eval as evaluation
import train
from model import MistralConfig, load_mistral
from support import corpus, runs
from support.text import tokenize
from support.tokenizer import load_tokenizer
from thoughts import load_quiet_star
from tools import experiments, objectives

TINY = {"steps": 4, "base_steps": 4, "context": 16, "lr": 1e-3, "save_every": 2}
RUNS = {  # experiments that are run once for all tests, and the options of train.py that they mean
    "full": "", "A1": "--n-true 1", "few-positions": "--positions 4", "pause": "", "random": "",
    "none": "", "init-random": "", "rlp": "", "kl": "", "squashed": "", "straight-through": "",
}  # fmt: skip
OWN_MODEL = [x for x in RUNS if experiments.EXPERIMENTS[x].model is not train.thinking_model]


@contextmanager
def small_runs():
    """Runs that take no time, in this process, on every twentieth puzzle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CORPUS_LINES", 300)
        patch.setattr(train, "BASE", MistralConfig(258, 16, 32, 1, 2, 1))
        patch.setitem(train.BASE_SETTINGS, "batch_size", 4)
        patch.setattr(train, "BUILT_IN", TINY)
        patch.setattr(train, "BUILT_IN_THOUGHTS", {"thought_length": 2, "n_true": 2})
        patch.setattr(experiments, "HELD_OUT_LINES", 9)
        all_puzzles = corpus.all_puzzles
        patch.setattr(corpus, "all_puzzles", lambda held_out: all_puzzles(held_out)[::20])
        context = SimpleNamespace(Pool=lambda workers, initializer: ThreadPool(1))
        patch.setattr(experiments, "get_context", lambda method: context)
        yield


@pytest.fixture
def small():
    with small_runs():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the results of RUNS, seeds 0 and 1. Tests must not write into it."""
    out = tmp_path_factory.mktemp("finished")
    with small_runs():
        experiments.main(["--out", str(out), "--seeds", "2", "--only", *RUNS])
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, and the arguments that made "full"."""
    out = shutil.copytree(finished, tmp_path / "copied")
    return out, ["--out", str(out), "--seeds", "1", "--only", "full"]


# ------------------------------------------------------------------------------------ the controls


@pytest.mark.parametrize(
    ("positions", "name"), [(None, "pause"), (5, "random"), (None, "none"), (5, "none")]
)
def test_splitting_a_batch_changes_neither_gradient_nor_metrics(positions, name):
    """4 sequences at once, one by one, or 3 and 1; with targets missing in some of them."""
    ids = random_ids(4, 12)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, 3] = mask[2, 7:] = False
    loss_of, results = experiments.EXPERIMENTS[name].loss, []
    for size in (None, 1, 3):
        model, settings = tiny_quiet_star(), train.Settings(micro_batch=size, positions=positions)
        generator = torch.Generator().manual_seed(7)
        metrics = train.batch_gradient(model, loss_of, ids, mask, settings, 2, generator)
        gradient = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append(({n: torch.tensor(value) for n, value in metrics.items()}, gradient))
    for other in results[1:]:
        for whole, parts in zip(results[0], other, strict=True):
            assert whole.keys() == parts.keys()
            for n, value in whole.items():
                assert (value - parts[n]).abs().max() < 1e-5 * (1 + value.abs().max()), n


def test_training_without_thoughts_is_that_of_a_language_model(finished, small):
    """The losses are those of the base model trained further, step by step, on the same batches."""
    home, folder = finished / "seed0", finished / "seed0" / "none"
    assert len(losses(folder)) == 4
    model = load_mistral(home / "base" / "base")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    tokens = tokenize([corpus.make_corpus(1, 300, train.EXPLAINED)], load_tokenizer(folder))
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / 20
        ids, mask = tokens.batch(step, 8, 16, 0, torch.device("cpu"))
        optimizer.zero_grad()
        nll = torch.nn.functional.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none")
        loss = nll[mask[:, 1:]].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        line = losses(folder)["quiet_star", step + 1]
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert "reward" not in line
    trained = load_quiet_star(folder / "quiet_star")
    assert not trained.mixing_head[4].weight.any()  # w is still 1
    assert torch.allclose(trained.model.lm_head.weight, model.lm_head.weight, atol=1e-6)


def test_start_and_end_begin_as_the_em_dash_or_at_random(finished, tmp_path, small):
    """As the em dash, or as two different vectors; the rest is the same."""
    settings, thoughts = train.make_settings({})
    settings = train.replace(settings, checkpoint=str(finished / "seed0" / "base" / "base"))
    dash, other = (
        experiments.EXPERIMENTS[name].model(
            settings, thoughts, tmp_path / name, torch.device("cpu")
        )
        for name in ("full", "init-random")
    )
    table, scale = dash.model.embed_tokens.weight, dash.config.embedding_scale
    assert torch.equal(dash.start_embedding, table[257] / scale)
    assert torch.equal(dash.end_embedding, table[257] / scale)
    assert not torch.equal(other.start_embedding, other.end_embedding)
    assert not (other.start_embedding * scale == table).all(1).any()
    assert torch.equal(other.model.embed_tokens.weight, table)
    assert train.replace(dash.config, init_id=None) == other.config


def test_models_begin_with_their_own_mixing_weight_and_loss(finished):
    for name, w in (("full", 1.0), ("rlp", 0.0), ("squashed", 1 / (1 + math.exp(-3)))):
        assert losses(finished / "seed0" / name)["quiet_star", 1]["weight"] == pytest.approx(w)
    line = losses(finished / "seed0" / "straight-through")["quiet_star", 4]
    assert line["policy_loss"]
    assert line["loss"] == pytest.approx((line["base_nll"] + line["talk_nll"]) / 2)  # none of it


# ------------------------------------------------------------------------------------- the table


def test_cost_by_hand():
    """T = 64, J = 16, N = 2, K = 6, A = 2, 150 steps of 8 sequences."""
    costs = {name: experiment.tokens() for name, experiment in experiments.EXPERIMENTS.items()}
    assert costs["full"] == 1200 * (64 + 2 * 16 * 9)
    assert costs["none"] == 1200 * 64
    assert costs["pause"] == costs["random"] == costs["full"]
    assert costs["A4"] == 1200 * (64 + 2 * 16 * 11)
    assert costs["all-positions"] == 1200 * (64 + 2 * 62 * 9)


def test_every_experiment_can_be_trained_and_has_a_row():
    for experiment in experiments.EXPERIMENTS.values():
        train.make_settings(experiment.options)
    rows = {name for names in experiments.TABLES.values() for name in names.split()}
    assert rows == {*experiments.EXPERIMENTS}
    labels = [experiment.label for experiment in experiments.EXPERIMENTS.values()]
    assert len({*labels}) == len(labels)
    thoughts = train.make_settings({})[1]
    shape = f"(N = {thoughts.n_thoughts}, K = {thoughts.thought_length}, A = {thoughts.n_true})"
    assert shape in experiments.EXPERIMENTS["full"].label


# ------------------------------------------------------------------------------------- the runs


def test_a_curriculum_continues_what_was_learned(tmp_path, small, monkeypatch):
    """With learning rate 0 the second stage has the weights of the first, and its own K and A."""
    monkeypatch.setattr(train, "BUILT_IN", TINY | {"lr": 0.0, "mixing_lr": 0.0})
    experiments.main(["--out", str(tmp_path), "--seeds", "1", "--only", "K12-8"])
    assert {path.stem for path in (tmp_path / "seed0").glob("*.json")} == {
        "base",
        "K12-A4",
        "K12-8",
    }
    one, other = (
        load_quiet_star(tmp_path / "seed0" / name / "quiet_star") for name in ("K12-A4", "K12-8")
    )
    assert (one.config.thought_length, one.config.n_true) == (12, 4)
    assert (other.config.thought_length, other.config.n_true) == (8, 2)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    result = json.loads((tmp_path / "seed0" / "K12-8.json").read_text())
    assert result["begins"] == "K12-A4"


def test_stages_of_a_curriculum_are_run_in_order_and_paid_for():
    names = ["base", "K12-A4", "K12-8", "K12-8-6"]
    assert [job.name for job in experiments.Job(None, "K12-8-6", 0).chain()] == names
    steps = [12 + 4 + 1, 8 + 2 + 1, 6 + 1 + 1]  # of a thought, against 6 + 2 + 1
    tokens = sum(64 + 2 * 16 * n for n in steps) / (64 + 2 * 16 * 9)
    row = experiments.table_row("K12-8-6", [made(1.0)])
    assert row[:3] == ["then K = 6, A = 1", "1", f"{tokens:.2f}"]


def test_the_share_of_asides_that_work_is_that_of_both_stages(tmp_path, small, monkeypatch):
    seen, make_corpus = [], corpus.make_corpus

    def watched(seed, lines, explained, work=0.3, held_out=False):
        seen.append((explained, work))
        return make_corpus(seed, lines, explained, work, held_out)

    monkeypatch.setattr(corpus, "make_corpus", watched)
    experiments.main(["--out", str(tmp_path), "--seeds", "1", "--only", "work-10"])
    assert seen[:2] == [(train.BASE_EXPLAINED, 0.1), (train.EXPLAINED, 0.1)]


@pytest.mark.parametrize("changed", [{"begins": "K4"}, {"loss": objectives.log_mean}])
def test_results_of_another_start_or_loss_are_not_mixed_in(
    copied, small, monkeypatch, capsys, changed
):
    other = experiments.EXPERIMENTS["full"]._replace(**changed)
    monkeypatch.setitem(experiments.EXPERIMENTS, "full", other)
    error = refused(capsys, experiments.main, copied[1])
    assert f"has other settings ({next(iter(changed))} " in error


@pytest.mark.parametrize(
    ("name", "stopped_at"),
    [(name, 1) for name in ("base", "full", "init-random")]
    + [(name, 3) for name in ("base", "full", "none", *OWN_MODEL)],
)
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    tmp_path, finished, small, monkeypatch, name, stopped_at
):
    """Stopped in the middle of a step, before or after the first checkpoint."""

    def run():
        experiments.main(["--out", str(tmp_path), "--seeds", "1", "--only", name])
        return tmp_path / "seed0" / name

    class KilledError(Exception):
        pass

    def log_or_die(folder, step, *rest):
        log(folder, step, *rest)
        if folder.name == stage and step == stopped_at:
            raise KilledError

    whole, log = finished / "seed0" / name, runs.log
    stage = "base" if name == "base" else "quiet_star"
    monkeypatch.setattr(runs, "log", log_or_die)
    with pytest.raises(KilledError):
        run()
    monkeypatch.setattr(runs, "log", log)
    killed = run()
    assert losses(killed) == losses(whole)
    lines = [(run / "metrics.jsonl").read_text().count("\n") for run in (killed, whole)]
    assert lines == [4, 4]  # no step is there twice
    if name != "base":
        one, other = (load_quiet_star(run / "quiet_star").parameters() for run in (killed, whole))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_only_what_has_no_result_is_run(copied, small, monkeypatch):
    out, arguments = copied[0], ["--out", str(copied[0]), "--seeds", "2", "--only", *RUNS]
    names = ["base", *RUNS]
    results = [out / f"seed{seed}" / f"{name}.json" for seed in (0, 1) for name in names]
    before = {path: path.read_text() for path in results}
    tables = (out / "tables.md").read_text()

    trained, perform = [], experiments.perform
    monkeypatch.setattr(experiments, "perform", lambda job: trained.append(job) or perform(job))
    removed = out / "seed1" / "none.json"
    removed.unlink()
    experiments.main(["--out", str(out), "--seeds", "0"])
    assert not trained
    experiments.main(arguments)
    assert trained == [(out, "none", 1)]
    assert all(path.read_text() == before[path] for path in results if path != removed)
    assert (out / "tables.md").read_text() == tables
    assert tables.count("| full Quiet-STaR (N = 2, K = 6, A = 2) | 2 | 1.00 |") == 8


def test_right_answers_are_logged_and_change_nothing(tmp_path, finished, small, monkeypatch):
    """A look after every step: the same losses as without, and the share of the final table."""
    Record = runs.Record
    monkeypatch.setattr(runs, "Record", lambda *given: Record(*given[:-1], look_every=1))
    experiments.main(["--out", str(tmp_path), "--seeds", "1", "--only", "full"])
    looked, whole = (losses(out / "seed0" / "full") for out in (tmp_path, finished))
    rights = [line.pop("eval_right") for line in looked.values()]
    assert looked == whole
    model = load_quiet_star(tmp_path / "seed0" / "full" / "quiet_star")
    puzzles = evaluation.held_out_puzzles(load_tokenizer(tmp_path / "seed0" / "full"), "cpu", 1)
    prediction = evaluation.predict_answers(model, puzzles, None)
    assert len(rights) == 4 and rights[-1] == evaluation.score(prediction.logits, puzzles).right


@pytest.mark.parametrize("name", [name for name in RUNS if name not in OWN_MODEL])
def test_an_experiment_is_a_run_of_train(tmp_path, finished, small, monkeypatch, name):
    """The same losses as of `python train.py` with its options, its loss and its own base model."""
    with_its_loss = partial(train.train_thoughts, loss_of=experiments.EXPERIMENTS[name].loss)
    monkeypatch.setattr(train, "train_thoughts", with_its_loss)
    options = ["--seed", "1", "--device", "cpu", *RUNS[name].split()]
    train.main([*options, "--out", str(tmp_path / "own")])
    own = losses(tmp_path / "own")
    expected = {key: line for key, line in own.items() if key[0] == "quiet_star"}
    assert losses(finished / "seed1" / name) == expected
    assert losses(finished / "seed0" / name) != expected
    result = json.loads((finished / "seed1" / f"{name}.json").read_text())
    assert result["metrics"]["loss"] == expected["quiet_star", 4]["loss"]
    assert result["settings"]["seed"] == 1


def made(right, logp=0.0, without=(1.0,), with_thought=(1.0,)):
    """A result in which every row of the table has these scores."""
    rows = {row for row, _ in experiments.COLUMNS.values()}
    table = {row: {"right": right, "logp": logp} for row in rows}
    return {"table": table, "nll": {"without": list(without), "with": list(with_thought)}}


def test_tables_by_hand():
    base = {"table": {"answers at once": {"right": 0.25, "logp": -2.0}}}
    text = experiments.show_tables(
        {
            "full": [
                made(0.5, -1.0, (0.0, 1.0, 2.0), (0.0, 1.0, 1.0)),
                made(0.7, -2.0, (3.0, 4.0), (2.0, 4.0)),
            ],
            "none": [made(1.0, -0.25)],
            "base": [base],
        }
    )
    share, logp = "60.0 ± 14.1", "-1.500 ± 0.707"
    label = "full Quiet-STaR (N = 2, K = 6, A = 2)"
    row = " | ".join([label, "2", "1.00", *[share] * 9, logp, logp])
    assert f"| {row} |" in text
    row = " | ".join(
        ["trained further without thoughts", "1", "0.18", *["100.0"] * 9, *["-0.250"] * 2]
    )
    assert f"| {row} |" in text
    row = " | ".join(["base model", "1", "-", "25.0", *["-"] * 10])
    assert f"| {row} |" in text
    assert "pause tokens in training" not in text  # it has no results
    assert "5 tokens; perplexity 7.389 without thoughts, 4.953 with" in text  # e^2, e^1.6
    assert " 4.000 ..  4.000           1   4.0000   4.0000  +0.0000" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "-1"], "seeds is -1; it must be at least 0"),
        (["--workers", "0"], "--workers is 0; it must be between 1 and"),
        (["--workers", "2147483648"], "--workers is 2147483648; it must be between 1 and"),
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--seeds", "0"], "no results in"),
    ],
)
def test_bad_input(tmp_path, capsys, options, message):
    assert message in refused(capsys, experiments.main, ["--out", str(tmp_path), *options])


def test_a_run_begun_with_other_settings_is_not_continued(copied, small, monkeypatch, capsys):
    out, arguments = copied
    (out / "seed0" / "full.json").unlink()  # as if it had been stopped
    changed = experiments.Experiment("x", {"n_true": 1})
    monkeypatch.setitem(experiments.EXPERIMENTS, "full", changed)
    error = refused(capsys, experiments.main, arguments)
    assert "seed0/full/settings.json has other settings (n_true 2)" in error


def test_results_of_other_settings_are_not_mixed_in(copied, small, monkeypatch, capsys):
    monkeypatch.setattr(train, "BUILT_IN", TINY | {"lr": 2e-3})
    for arguments in (copied[1], [*copied[1], "--seeds", "0"]):
        assert "has other settings (lr 0.001)" in refused(capsys, experiments.main, arguments)
