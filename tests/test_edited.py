"""What you read is what runs: edit a line of model.py or thoughts.py, and every path follows.

The default run follows every edit. A run with --fast follows it too, or refuses to start.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("model", "thoughts", "sample", "eval", "train", "support", "fast")
RUN = "--device cpu --base-steps 1 --steps 3 --batch-size 2 --context 16 --thought-length 2"
RUN += " --positions 6 --lr 1e-3 --mixing-lr 1e-1 --warmup 1 --cooldown 0"

EDITS = {  # what is edited: (file, a line of it, the edited line)
    "ThoughtCache.attend": (
        "thoughts.py",
        "text_v, self.bias).flatten(2, 3)",
        "text_v, self.bias).flatten(2, 3) / 2",
    ),
    "ThoughtCache.attention": ("thoughts.py", "/ math.sqrt(q.shape[-1])\n", "/ 2\n"),
    "thought_mask": ("thoughts.py", "(text <= origin[", "(text < origin["),
    "token_logits": (
        "thoughts.py",
        "head.to(dtype).mT).float()",
        "head.to(dtype).mT).float().div(3).tanh() * 3",
    ),
    "token_logp": ("thoughts.py", "(logits / temperature, dim=-1)", "(logits / 3, dim=-1)"),
    "mix": ("thoughts.py", "* (h_thought - h_init)", "* h_thought"),
    "mixing_weight": ("thoughts.py", "return 1 - widen(", "return 1 - 2 * widen("),
    "Layer.forward": (
        "model.py",
        "return self.after(x, attend(",
        "return x + self.after(x, attend(",
    ),
    "Layer.after": ("model.py", "return x + self.mlp(", "return x - self.mlp("),
    "Attention.project": ("model.py", "rotate(both, rotary)", "both"),
    "Attention.output": ("model.py", "return self.o_proj(", "return 2 * self.o_proj("),
    "MLP.forward": ("model.py", "* self.up_proj(x))", "* self.up_proj(x).tanh())"),
    "rotate": ("model.py", "return x * cos + ", "return x * cos - "),
}


@pytest.fixture
def train_of(tmp_path):
    """train_of(file, line, edited line) -> the module train of an edited copy of the tree."""
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in OWN}
    path = sys.path[:]

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
            del sys.modules[name]

    def load(file=None, line=None, edited=None):
        forget()
        tree = tmp_path / "tree"
        for part in ("*.py", "support/**/*.py", "fast/*.py"):
            for source in ROOT.glob(part):
                target = tree / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        if file:
            text = (tree / file).read_text(encoding="utf-8")
            assert text.count(line) == 1, f"{line} stands {text.count(line)} times in {file}"
            (tree / file).write_text(text.replace(line, edited), encoding="utf-8")
        sys.path.insert(0, str(tree))
        train = importlib.import_module("train")
        assert Path(train.__file__).parent == tree
        train.CORPUS_LINES, train.BASE = 300, train.MistralConfig(258, 16, 32, 1, 2, 1)
        train.BASE_SETTINGS["batch_size"] = 2
        train.evaluation.puzzle_table = lambda model, tokenizer: {}
        return train

    yield load
    forget()
    sys.modules.update(kept)
    sys.path[:] = path


def metrics(train, out, options=""):
    """The metrics of a run's steps, without those of time; None if --fast refuses to start."""
    try:
        train.main([*RUN.split(), "--out", str(out), *options.split()])
    except SystemExit as stopped:
        assert stopped.code == 2
        return None
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if k not in ("stage", "tokens_per_second")} for x in lines]


def same(one, other):
    return all(a == pytest.approx(b, rel=1e-3, abs=1e-6) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def unedited(tmp_path_factory):
    import train

    out = tmp_path_factory.mktemp("unedited")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CORPUS_LINES", 300)
        patch.setattr(train, "BASE", train.MistralConfig(258, 16, 32, 1, 2, 1))
        patch.setitem(train.BASE_SETTINGS, "batch_size", 2)
        patch.setattr(train.evaluation, "puzzle_table", lambda model, tokenizer: {})
        plain, quick = metrics(train, out / "plain"), metrics(train, out / "fast", "--fast")
    assert same(plain, quick)
    return plain


@pytest.mark.parametrize("edit", EDITS)
def test_every_path_follows_an_edit_or_refuses(tmp_path, train_of, unedited, edit, capsys):
    train = train_of(*EDITS[edit])
    plain = metrics(train, tmp_path / "plain")
    assert not same(plain, unedited)
    for options in ("--fast", "--fast --checkpointing"):
        capsys.readouterr()
        quick = metrics(train, tmp_path / options.replace(" ", ""), options)
        if quick is None:
            error = capsys.readouterr().err
            assert "fast/ computes other results than model.py and thoughts.py: " in error
            assert error.count("\n") == 1
            assert not (tmp_path / options.replace(" ", "") / "quiet_star").exists()
        else:
            assert same(quick, plain)
    refuses = edit in ("ThoughtCache.attend", "ThoughtCache.attention")
    assert (quick is None) == refuses


def test_a_broken_import_in_fast_is_an_error(train_of, tmp_path):
    train = train_of("fast/logp.py", "import thoughts\n", "import thoughts\nimport nowhere\n")
    metrics(train, tmp_path / "plain")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        metrics(train, tmp_path / "fast", "--fast")
