"""The structure of the repository: the five files, and which file may import which."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = ["model", "thoughts", "sample", "eval", "train"]
# Files of support/ that import nothing of the core.
LEAVES = [
    "files",
    "device",
    "terminal",
    "settings",
    "corpus",
    "text",
    "results",
    "tokenizer",
]  # of support/
OWN = {*TOP, "support", "fast", "tools"}


def allowed(path: Path) -> set[str]:
    """Names of this repository that a file may import."""
    room, name = path.relative_to(ROOT).parts[0], path.stem
    if path.parent == ROOT:
        lower = TOP[: TOP.index(name)]
        core = {"model", "thoughts"}
        return (
            {*lower}
            if name in core
            else {*lower, "support", *(["fast"] if name == "train" else [])}
        )
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
            used = [
                line.split()[1]
                for line in path.read_text().splitlines()
                if line.startswith("from support.")
            ]
            assert {name.split(".")[1] for name in used} <= set(LEAVES), path


def test_the_core_uses_public_operators_only():
    for path in ROOT.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [x for x in ("torch.ops", "autograd.Function", "torch._") if x in text], path
