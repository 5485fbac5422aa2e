"""The program in docs/usage.md, and the packaging that it needs."""

import re
import tomllib
from pathlib import Path

import torch
from tiny import tiny_mistral

from model import save_mistral
from support.tokenizer import load_tokenizer, save_byte_tokenizer
from thoughts import load_quiet_star

ROOT = Path(__file__).parents[1]


def test_the_program_for_users_of_the_library(tmp_path, monkeypatch, capsys):
    """It runs as it stands; the saved model has thoughts of six tokens and begins with the dash."""
    page = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    [program] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    model = tiny_mistral(V=258)
    (tmp_path / "FOLDER").mkdir()
    save_mistral(model, tmp_path / "FOLDER")
    save_byte_tokenizer(tmp_path / "FOLDER")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(program, names)
    metrics, thoughts, text = capsys.readouterr().out.splitlines()[:3]
    assert metrics.startswith("{'loss': ") and thoughts.startswith("[")
    assert text.startswith("The sum of 2 and 3 is 5.")
    saved = load_quiet_star(tmp_path / "thinking")
    assert saved.config.thought_length == 6
    assert saved.config.init_id == load_tokenizer(tmp_path / "FOLDER").token_id("—")
    assert not torch.equal(saved.model.lm_head.weight, model.lm_head.weight)
    for name, parameter in names["model"].named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name)), name


def test_pyproject_and_requirements_name_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = re.findall(r"([\w-]+)==", " ".join(lines))
    every = [*needed, *(x for extra in extras.values() for x in extra)]
    bounded = [re.match(r"[\w-]+", x)[0] for x in every]
    assert sorted(pinned) == sorted(bounded)
    assert [*extras] == ["plot", "data", "dev"]
    modules = project["tool"]["setuptools"]["py-modules"]
    assert sorted(modules) == sorted(path.stem for path in ROOT.glob("*.py"))
