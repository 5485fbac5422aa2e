"""Damaged files of a run: --resume takes them rightly or refuses them in one line."""

import copy
import json
import random
import shutil

import pytest
import torch
from test_train import run, small  # noqa: F401  (a fixture)

import train

VALUES = [None, -1, 0, 1e300, 10**30, "x", "", [], {}, [1], True, float("nan"), "9" * 99, 1.5]


def mutated_json(value, chance):
    """One entry somewhere in it is removed or becomes something else."""
    value = copy.deepcopy(value)
    node = value
    while True:
        key = chance.choice([*node] if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], (dict, list)) and node[key] and chance.random() < 0.8:
            node = node[key]
        elif chance.random() < 0.2:
            del node[key]
            return value
        else:
            node[key] = chance.choice(VALUES)
            return value


def mutated_bytes(content, chance):
    """A few bytes are changed, removed, put in, or all after some point is lost."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            content[at : at + 1] = chance.randbytes(1)
        elif kind == 1:
            del content[at : at + chance.randint(1, 40)]
        elif kind == 2:
            content[at:at] = chance.randbytes(chance.randint(1, 8))
        else:
            del content[at:]
    return bytes(content)


@pytest.mark.parametrize("name", ["settings.json", "quiet_star/training_state.pt", "metrics.jsonl"])
def test_damaged_files_are_taken_rightly_or_refused(tmp_path, capsys, name):
    run(tmp_path / "whole", "--base-steps 2 --steps 2 --save-every 1")
    content, chance = (tmp_path / "whole" / name).read_bytes(), random.Random(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(15):
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", damaged)
        if name == "settings.json" and chance.random() < 0.7:
            text = json.dumps(mutated_json(json.loads(content), chance))
            (damaged / name).write_text(text)
        else:
            (damaged / name).write_bytes(mutated_bytes(content, chance))
        try:
            train.main(["--out", str(damaged), "--resume", "--device", "cpu"])
        except SystemExit as stopped:
            assert stopped.code == 2
            error = capsys.readouterr().err
            assert str(damaged) in error or "steps" in error or "must" in error, error
            assert error.count("\n") == 1, error
    torch.set_num_threads(threads)
