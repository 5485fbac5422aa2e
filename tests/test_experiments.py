"""The experiments: what they cost by hand, what is run again and what is not, the tables."""

import json
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest

import experiments
import train
from model import MistralConfig

TINY = {"steps": 3, "base_steps": 3, "context": 16, "lr": 1e-3}


@pytest.fixture
def small(monkeypatch):
    """Runs that take no time, in this process."""
    monkeypatch.setattr(train, "CORPUS_LINES", 300)
    monkeypatch.setattr(train, "BASE", MistralConfig(258, 16, 32, 1, 2, 1))
    monkeypatch.setattr(train, "BASE_BATCH", 4)
    monkeypatch.setattr(train, "EMBEDDED", TINY)
    monkeypatch.setattr(train, "EMBEDDED_THOUGHTS", {"thought_length": 2, "n_true": 2})
    monkeypatch.setattr(experiments, "HELD_OUT_LINES", 9)
    context = SimpleNamespace(Pool=lambda workers, initializer: ThreadPool(1))
    monkeypatch.setattr(experiments, "get_context", lambda method: context)


def test_cost_by_hand():
    """T = 64, J = 62, N = 2, K = 6, A = 2, 100 steps of 8 sequences."""
    assert experiments.tokens_of({}) == 800 * (64 + 2 * 62 * 9)
    assert experiments.tokens_of({"thoughts": "none"}) == 800 * 64
    assert experiments.tokens_of({"n_true": 4}) == 800 * (64 + 2 * 60 * 11)
    assert experiments.tokens_of({"positions": 16}) == 800 * (64 + 2 * 16 * 9)
    steps = experiments.EXPERIMENTS["quarter-equal-cost"]["steps"]
    assert steps == 335  # 100 * 1180 / 352


def test_every_experiment_is_in_a_table():
    named = {name for rows in experiments.TABLES.values() for name in rows.values()}
    assert named == set(experiments.EXPERIMENTS)
    for options in experiments.EXPERIMENTS.values():
        train.make_settings(options)


def test_only_what_has_no_result_is_run(tmp_path, small, monkeypatch):
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--only", "full", "none"]
    experiments.main(arguments)
    names = ("base", "full", "none")
    results = [tmp_path / f"seed{seed}" / f"{name}.json" for seed in (0, 1) for name in names]
    before = {path: path.read_text() for path in results}
    tables = (tmp_path / "tables.md").read_text()

    trained, perform = [], experiments.perform
    monkeypatch.setattr(experiments, "perform", lambda job: trained.append(job) or perform(job))
    removed = tmp_path / "seed1" / "none.json"
    removed.unlink()
    experiments.main(arguments)
    assert trained == [(tmp_path, "none", 1)]
    assert {path: path.read_text() for path in results if path != removed} == {
        path: text for path, text in before.items() if path != removed
    }
    assert (tmp_path / "tables.md").read_text() == tables
    assert tables.count("| full Quiet-STaR | 2 | 1.00 |") == 1


def test_an_experiment_is_a_run_of_train(tmp_path, small, monkeypatch):
    """The same losses as of `python train.py` with its options and a base model of its own."""
    experiments.main(["--out", str(tmp_path), "--seeds", "2", "--only", "random"])
    options = ["--seed", "1", "--thoughts", "random", "--device", "cpu"]
    train.main([*options, "--out", str(tmp_path / "own")])

    def losses(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["stage"] == "quiet_star"]

    assert losses(tmp_path / "seed1" / "random") == losses(tmp_path / "own")
    assert losses(tmp_path / "seed0" / "random") != losses(tmp_path / "own")
    result = json.loads((tmp_path / "seed1" / "random.json").read_text())
    assert result["metrics"]["loss"] == losses(tmp_path / "own")[-1]
    assert result["settings"]["seed"] == 1
    assert result["settings"]["thoughts"] == "random"


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
    row = " | ".join(["full Quiet-STaR", "2", "1.00", *[share] * 7, logp, logp])
    assert f"| {row} |" in text
    row = " | ".join(["trained on without thoughts", "1", "0.05", *["100.0"] * 7, *["-0.250"] * 2])
    assert f"| {row} |" in text
    row = " | ".join(["base model", "1", "-", "25.0", *["-"] * 8])
    assert f"| {row} |" in text
    assert "pause tokens in training" not in text  # it has no results
    assert "5 tokens; perplexity 7.389 without thoughts, 4.953 with" in text  # e^2, e^1.6
    assert " 4.000 ..  4.000           1   4.0000   4.0000  +0.0000" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds and --workers must be at least 1"),
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--tables"], "run without --tables first"),
    ],
)
def test_bad_input(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        experiments.main(["--out", str(tmp_path), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_begun_with_other_settings_is_not_continued(tmp_path, small, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--seeds", "1", "--only", "full"]
    experiments.main(arguments)
    (tmp_path / "seed0" / "full.json").unlink()  # as if it had been stopped
    monkeypatch.setitem(experiments.EXPERIMENTS, "full", {"n_true": 1})
    with pytest.raises(SystemExit) as stopped:
        experiments.main(arguments)
    assert stopped.value.code == 2
    assert "was begun with other settings" in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed_in(tmp_path, small, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--seeds", "1", "--only", "full"]
    experiments.main(arguments)
    monkeypatch.setattr(train, "EMBEDDED", TINY | {"lr": 2e-3})
    with pytest.raises(SystemExit) as stopped:
        experiments.main(arguments)
    assert stopped.value.code == 2
    assert "is of other settings; delete it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        experiments.main([*arguments, "--tables"])
    assert "is of other settings; delete it" in capsys.readouterr().err
