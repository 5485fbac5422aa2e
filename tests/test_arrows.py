"""The structure of the repository: the five files, and which file may import which."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TOP = ["model", "thoughts", "sample", "eval", "train"]
# Files of support/ that import nothing of the core.
LEAVES = ["files", "device", "terminal", "settings", "corpus", "text", "questions", "results"]
LEAVES += ["tokenizer"]
OWN = {*TOP, "support", "fast", "tools"}


def allowed(path: Path) -> set[str]:
    """Names of this repository that a file may import."""
    room, name = path.relative_to(ROOT).parts[0], path.stem
    if path.parent == ROOT:
        lower = TOP[: TOP.index(name)]
        rooms = {"model": set(), "thoughts": set(), "train": {"support", "fast"}}
        return {*lower} | rooms.get(name, {"support"})
    if room == "support":
        leaf = path.relative_to(ROOT).parts[1].removesuffix(".py") in (*LEAVES, "__init__")
        return {"support"} if leaf else {"support", "model", "thoughts"}
    return {"fast", "model", "thoughts"} if room == "fast" else OWN


def imports(path: Path) -> set[str]:
    tree = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in tree if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_the_top_level():
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP)
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*.py")}
    assert folders == {"support", "fast", "tools", "tests"}


def test_imports_go_down():
    files = [path for path in ROOT.rglob("*.py") if "tests" not in path.relative_to(ROOT).parts]
    assert len(files) > 30
    for path in files:
        found = imports(path)
        assert found & OWN <= allowed(path), path
        assert not found & {"transformers", "datasets", "tokenizers", "huggingface_hub"}, path


def test_leaves_of_support_import_leaves():
    for path in ROOT.glob("support/**/*.py"):
        if path.relative_to(ROOT).parts[1].removesuffix(".py") in LEAVES:
            lines = path.read_text(encoding="utf-8").splitlines()
            used = [line.split()[1] for line in lines if line.startswith("from support.")]
            assert {name.split(".")[1] for name in used} <= set(LEAVES), path


def test_the_core_uses_public_operators_only():
    for path in ROOT.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [x for x in ("torch.ops", "autograd.Function", "torch._") if x in text], path


def test_waiting_threads_sleep():
    """GNU's OpenMP reads OMP_WAIT_POLICY when torch is imported. It shows 300000 spins without."""
    for path in [ROOT / f"{name}.py" for name in ("sample", "eval", "train")]:
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        names = [node.names[0].name for node in nodes if isinstance(node, ast.Import)]
        assert names.index("support") < names.index("torch"), path
    if torch.backends.openmp.is_available() and sys.platform == "linux":
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        done = subprocess.run(
            [sys.executable, "-c", "import tools.plan"], cwd=ROOT, capture_output=True, text=True,
            env=environment | {"OMP_DISPLAY_ENV": "verbose"}, check=True,
        )  # fmt: skip
        assert "SPINCOUNT = '0'" in done.stderr or "SPINCOUNT" not in done.stderr
