"""The recipes of docs/change.md: each applies, fails exactly the tests that it names, and trains.

A process that has imported torch already forks one process for every recipe, two at a time. A
recipe has a copy of the tree, in which its tests run and two steps of each stage are trained.
"""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from processes import quick_context

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "change.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))

# The files of tests of model.py and thoughts.py that are run for a recipe: those that it concerns.
FILES = {
    "1": "test_mixing test_reward test_reinforce test_official",
    "2": "test_mixing test_parallel_thoughts test_lookahead test_official test_meta_tokens",
    "3": "test_model test_mixing test_official",
    "4": "test_mixing test_reward test_reinforce",
    "5": "test_mixing test_reward test_official test_padding",
    "6": "test_parallel_thoughts test_official fast/test_attention",
    "7": "test_mixing test_parallel_thoughts test_lookahead test_meta_tokens",
    "8": "test_reward",
}
# Slow ones that are left out. The same test functions run with other parameters.
SLOW = [
    "test_parallel_thoughts.py::test_parallel_equals_one_at_a_time[None-",
    "test_parallel_thoughts.py::test_parallel_equals_one_at_a_time[positions1-1]",
]
PLUGINS = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]  # which collects garbage
SMALL = "--base-steps 2 --steps 2 --batch-size 3 --context 16 --thought-length 2 --positions 6"
OPTIONS = {"8": "--objective tools.objectives:rlp"}


def changes(recipe: str) -> str:
    """The diff of a recipe."""
    return "".join(re.findall(r"^```diff\n(.*?)^```$", RECIPES[recipe], re.MULTILINE | re.DOTALL))


def named(recipe: str) -> set[str]:
    """The tests that a recipe says fail: in its lines "- `test_file.py`: `test_one`, ..."."""
    tests = set()
    for item in re.findall(r"^- (`[\w/]+\.py`: (?:.|\n  )*)", RECIPES[recipe], re.MULTILINE):
        file, *functions = re.findall(r"`([\w/]*test_\w+(?:\.py)?)`", item)
        tests |= {f"tests/{file}::{function}" for function in functions}
    return tests


class Failures:
    """A plugin of pytest: the test functions that failed, with the number of tests that ran."""

    def __init__(self):
        self.names, self.count = set(), 0

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "call"
        if report.failed:
            self.names.add(report.nodeid.split("[")[0])

    def pytest_collectreport(self, report):
        if report.failed:
            self.names.add(report.nodeid)


def perform(recipe: str, copy: Path) -> tuple[set[str], str]:
    """In a process of its own: copy the tree, apply a recipe, run its tests, train.

    Returns the tests that failed, and what the training printed.
    """
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("support", "fast", "tools", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, copy)
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)}  # no repository around it
    applied = subprocess.run(
        ["git", "apply", "-"], input=changes(recipe), cwd=copy, env=alone, text=True,
        capture_output=True,
    )  # fmt: skip
    assert applied.returncode == 0, applied.stderr

    os.chdir(copy)
    own = {ROOT, ROOT / "tests", ROOT / "tests" / "support"}  # pythonpath of pyproject.toml
    elsewhere = [path for path in sys.path if Path(path).resolve() not in own]
    sys.path[:] = [str(copy), str(copy / "tests"), *elsewhere]
    failures, printed = Failures(), io.StringIO()
    left_out = [f"--deselect=tests/{test}" for test in SLOW]
    files = [f"tests/{name}.py" for name in FILES[recipe].split()]
    with redirect_stdout(printed), redirect_stderr(printed):
        pytest.main([*PLUGINS, *left_out, *files], [failures])
        assert failures.count >= 8, printed.getvalue()
        train_a_little(OPTIONS.get(recipe, ""))
    assert Path(sys.modules["thoughts"].__file__).parent == copy
    if check := EFFECTS.get(recipe):
        check(copy / "run")
    return failures.names, printed.getvalue()


def train_a_little(options: str) -> None:
    """python train.py in the working directory, with a corpus and a model that take no time."""
    train, corpus = (importlib.import_module(name) for name in ("train", "support.corpus"))
    train.CORPUS_LINES, all_puzzles = 300, corpus.all_puzzles
    train.BASE = train.MistralConfig(258, 16, 32, 1, 2, 1)
    corpus.all_puzzles = lambda held_out: all_puzzles(held_out)[:20]
    train.main([*SMALL.split(), *options.split(), "--device", "cpu", "--out", "run"])


# ---------------------------------------------- what the recipes do that fail no test of the core


def sees_the_last_16(run: Path) -> None:
    """x_{j-15} changes log p of a thought at j = 19, x_{j-16} does not.

    In one layer: in two, the hidden state of x_{j-15} holds what it has read.
    """
    tiny, torch = (importlib.import_module(name) for name in ("tiny", "torch"))
    model = tiny.tiny_quiet_star()
    del model.model.layers[1:]
    forced, position = torch.zeros(1, 3, 1, 3, dtype=torch.long), torch.tensor([19])
    before = model(tiny.random_ids(1, 24), forced, position).thought_logp
    for back in (15, 16):
        ids = tiny.random_ids(1, 24)
        ids[0, 19 - back] = (ids[0, 19 - back] + 1) % 23
        after = model(ids, forced, position).thought_logp
        assert torch.equal(before, after) == (back == 16)


def stops_at_the_dash(run: Path) -> None:
    """After t_1, t_2 and the dash, token 7, nothing counts: neither log p nor the prediction."""
    tiny, torch = (importlib.import_module(name) for name in ("tiny", "torch"))
    model = tiny.tiny_quiet_star(init_id=7, thought_length=5, n_thoughts=4)
    thoughts = torch.tensor([[1, 2, 7, 3, 4], [1, 2, 7, 5, 7], [1, 2, 3, 3, 4], [1, 2, 7, 8, 9]])
    forced = thoughts[None, :, None].expand(1, 4, 6, 5)
    output = model(tiny.random_ids(1, 8), forced)
    logp, nll = output.thought_logp[0], output.talk_nll[:, 0]  # [N, J, K], [A, N, J]
    assert output.thought_ids[0, 1, 0].tolist() == [1, 2, *[model.end_id] * 3]
    assert logp[0, :, :3].all() and not logp[[0, 1, 3], :, 3:].any() and logp[2].all()
    for n, same in ((1, True), (3, True), (2, False)):
        assert torch.allclose(nll[:, 0], nll[:, n], atol=1e-6) == same
    again = model(tiny.random_ids(1, 8), output.thought_ids)
    assert torch.equal(again.thought_logp, output.thought_logp)


def learns_from_the_other_loss(run: Path) -> None:
    """RLP has no other loss than that of REINFORCE; a name that is none is one line."""
    train = importlib.import_module("train")
    settings = json.loads((run / "settings.json").read_text())
    assert settings["settings"]["objective"] == "tools.objectives:rlp"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["stage"] == "quiet_star"
    assert abs(last["loss"] - 10 * last["policy_loss"]) < 1e-5
    for name in ("tools.objectives:none", "tools.objectives", "nowhere:loss", "a:b:c"):
        with pytest.raises(SystemExit) as stopped, redirect_stderr(io.StringIO()) as error:
            train.main(["--out", "other", "--objective", name])
        assert stopped.value.code == 2
        assert f"objective {name}: " in error.getvalue()


EFFECTS = {"6": sees_the_last_16, "7": stops_at_the_dash, "8": learns_from_the_other_loss}


# ---------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Recipe -> the future result of perform. All of them are begun at once."""
    with ProcessPoolExecutor(2, quick_context(), max_tasks_per_child=1) as pool:
        yield {
            recipe: pool.submit(perform, recipe, tmp_path_factory.mktemp(f"recipe{recipe}"))
            for recipe in FILES
        }


def test_a_recipe_is_short():
    assert RECIPES.keys() == FILES.keys()
    for recipe in RECIPES:
        lines = re.findall(r"^[-+](?!--|\+\+).*$", changes(recipe), re.MULTILINE)
        assert 1 <= len(lines) <= 15, recipe
        assert max(map(len, lines)) <= 101, recipe  # with the sign


@pytest.mark.parametrize("recipe", FILES)
def test_a_recipe_does_what_it_says(recipe, results):
    failed, printed = results[recipe].result()
    assert failed == named(recipe), printed
    assert "the model is in run/quiet_star" in printed
