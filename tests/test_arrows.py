"""The house holds itself up: which file may import which, and no private operators in the core."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = ["data tokenizer", "model", "thoughts", "sample", "eval", "train"]  # leaves first
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}


def test_imports_go_down():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FLOOR)
    rooms = [path for room in ("fast", "tools") for path in (ROOT / room).glob("*.py")]
    for path in [*ROOT.glob("*.py"), *rooms]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in [name.split(".")[0] for name in names]:
                if path.stem in FLOOR and path.parent == ROOT and name in FLOOR:
                    assert FLOOR[name] < FLOOR[path.stem], f"{path.name} imports {name}"
                assert name != "fast" or path.stem in ("train", "bench") or path.parent != ROOT
                assert name != "tools" or path.parent.name == "tools", f"{path.name} imports tools"
                assert name not in ("transformers", "datasets", "tokenizers", "huggingface_hub")
        private = ("torch.ops", "autograd.Function", "torch._")
        assert path.parent != ROOT or not [x for x in private if x in path.read_text()], path
