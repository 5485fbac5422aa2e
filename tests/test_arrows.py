"""The house holds itself up: which file may import which, and no private operators in the core."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Leaves first; fast/ stands between thoughts and sample, tools/ above all.
FLOORS = ["data tokenizer", "formats", "model", "thoughts", "sample", "eval runs", "train"]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}


def test_imports_go_down():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FLOOR)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("fast/*.py"), *ROOT.glob("tools/*.py")]:
        floor = (
            FLOOR[path.stem] if path.parent == ROOT else {"fast": 3.5, "tools": 9}[path.parent.name]
        )
        tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = [
            alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names
        ]
        names += [node.module for node in tree if isinstance(node, ast.ImportFrom)]
        for name in {name.split(".")[0] for name in names}:
            assert FLOOR.get(name, -1) < floor, f"{path} imports {name}"
            assert name != "tools" or floor == 9, f"{path} imports tools"
            assert name != "fast" or path.stem == "train" or path.parent != ROOT, (
                f"{path} imports fast"
            )
            assert name not in ("transformers", "datasets", "tokenizers", "huggingface_hub")
        private = [
            x for x in ("torch.ops", "autograd.Function", "torch._") if x in path.read_text()
        ]
        assert path.parent != ROOT or not private, f"{path} uses {private}"
