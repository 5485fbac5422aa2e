"""model.py and thoughts.py stand alone: copied into an empty folder, they load, think and learn."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import load_mistral, save_mistral
from thoughts import QuietStar, ThoughtConfig, load_quiet_star, save_quiet_star

ROOT, FIXTURES = Path(__file__).parents[1], Path(__file__).parent / "fixtures"
SCRIPT = """
import sys
from pathlib import Path
import torch
from model import load_mistral
from thoughts import QuietStar, ThoughtConfig, quiet_star_loss

for folder in sys.argv[1:]:
    torch.manual_seed(0)
    model = QuietStar(load_mistral(folder), ThoughtConfig(2, 3, 2, init_id=5))
    ids = torch.arange(1, 15)[None]
    output = model(ids)
    loss, _ = quiet_star_loss(output, model.config)
    loss.backward()
    assert output.thought_ids.shape == (1, 2, 12, 3), output.thought_ids.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    print(loss.item())
files = [Path(getattr(module, "__file__", None) or "/") for module in [*sys.modules.values()]]
print(sorted(file.name for file in files if file.parent == Path.cwd()))
"""


def test_two_files_in_an_empty_folder(tmp_path):
    for name in ("model.py", "thoughts.py"):
        shutil.copy(ROOT / name, tmp_path)
    folders = [str(FIXTURES / f"mistral_tiny_{x}") for x in "ab"]  # one file, and shards
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, '.')\n{SCRIPT}", *folders],
        cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, other, modules = done.stdout.splitlines()
    assert 0 < float(one) != float(other) > 0
    assert modules == "['model.py', 'thoughts.py']"


@pytest.mark.parametrize("name", ["a", "b", "d"])
def test_load_mistral_computes_the_recorded_logits(name):
    golden = load_file(FIXTURES / f"mistral_tiny_{name}" / "expected.safetensors")
    logits = load_mistral(FIXTURES / f"mistral_tiny_{name}")(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; load_mistral supports 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; load_mistral supports 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is {'rope_type': 'yarn'}"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types is "),
        ({"sliding_window": [8, 8]}, "not supported between"),
        ({"head_dim": 7}, "must be even"),
        ({"num_hidden_layers": 4}, "layers.3.self_attn.q_proj.weight"),
    ],
)
def test_load_mistral_refuses_by_name(tmp_path, change, message):
    shutil.copytree(FIXTURES / "mistral_tiny_a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError) as refused:
        load_mistral(tmp_path / "a")
    assert message in str(refused.value)


def test_what_is_not_given_is_as_in_transformers(tmp_path):
    """Window 4096, eps 1e-6; rope_theta in rope_parameters since transformers 5."""
    shutil.copytree(FIXTURES / "mistral_tiny_a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for name in ("sliding_window", "rms_norm_eps", "rope_theta"):
        config.pop(name)
    config["rope_parameters"] = {"rope_theta": 3e5, "rope_type": "default"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    read = load_mistral(tmp_path / "a").config
    assert (read.sliding_window, read.rms_norm_eps, read.rope_theta) == (4096, 1e-6, 3e5)


def test_a_cut_file_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "mistral_tiny_a", tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_mistral(tmp_path / "a")


def test_the_activation_is_saved_by_name(tmp_path, monkeypatch):
    """config.json says what the MLP computes, and another one is refused."""
    import model

    monkeypatch.setattr(model, "ACTIVATION", torch.nn.functional.gelu)
    save_mistral(load_tiny(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == "gelu"
    monkeypatch.undo()
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        load_mistral(tmp_path)


def load_tiny():
    from tiny import tiny_mistral

    return tiny_mistral()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_thinking_model_comes_back(tmp_path, dtype):
    model = QuietStar(load_tiny(), ThoughtConfig(2, 3, 2, init_id=5))
    torch.nn.init.normal_(model.mixing_head[4].weight)
    save_quiet_star(model, tmp_path)
    again = load_quiet_star(tmp_path, dtype)
    assert again.config == model.config
    assert again.mixing_head[4].weight.dtype == torch.float32
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.to(other.dtype), other)
