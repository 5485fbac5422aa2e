"""The transformer against recorded logits, and its two checkpoint formats."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_mistral

from model import (
    KVCache,
    Mistral,
    MistralConfig,
    load_mistral,
    read_config,
    rotary_tables,
    save_mistral,
)

FIXTURES = Path(__file__).parent / "fixtures"
SMOLLM2 = os.environ.get("QUIET_STAR_SMOLLM2")


def expected(folder):
    return load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("name", ["a", "b", "d", "e"])
def test_golden_logits(name):
    """a plain; b sliding window 8, shards; d tied head; e Mistral's own format with a's logits."""
    folder = FIXTURES / f"mistral_tiny_{name}"
    golden = expected(folder)
    logits = load_mistral(folder)(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["a", "b", "d", "e"])
def test_save_and_load(name, tmp_path):
    model = load_mistral(FIXTURES / f"mistral_tiny_{name}")
    save_mistral(model, tmp_path)
    again = load_mistral(tmp_path)
    assert again.config == model.config
    ids = expected(FIXTURES / f"mistral_tiny_{name}")["input_ids"]
    assert torch.equal(again(ids), model(ids))
    assert not list(tmp_path.glob("*.tmp"))
    saved = load_file(tmp_path / "model.safetensors")
    if name != "e":  # the names are those of the Hugging Face checkpoint it came from
        original = {}
        for file in (FIXTURES / f"mistral_tiny_{name}").glob("model*.safetensors"):
            original |= load_file(file)
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[key], original[key]) for key in saved)


@pytest.mark.parametrize("window", [None, 5])
def test_cached_equals_uncached(window):
    model, ids = tiny_mistral(window=window), random_ids(2, 11)
    cache = KVCache(model.config)
    parts = [model(part, cache) for part in ids.split([4, 1, 3, 1, 1, 1], dim=1)]
    assert cache.length == 11
    assert (torch.cat(parts, 1) - model(ids)).abs().max() < 1e-5


def test_a_truncated_cache_forgets_the_rest():
    model, ids = tiny_mistral(), random_ids(1, 8)
    cache = KVCache(model.config)
    model(ids[:, :4], cache)
    model(random_ids(1, 3, seed=5), cache)
    cache.truncate(4)
    assert (model(ids[:, 4:], cache) - model(ids)[:, 4:]).abs().max() < 1e-5


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("cached", [False, True])
def test_window_is_exactly_w_keys_with_self(window, cached):
    """One layer: the token W - 1 back still counts, the one W back does not, nor W + 1."""
    torch.manual_seed(0)
    model = Mistral(MistralConfig(23, 16, 32, 1, 4, 2, sliding_window=window))

    def last_logits(ids):
        if not cached:
            return model(ids)[:, -1]
        cache = KVCache(model.config)
        model(ids[:, :-1], cache)
        return model(ids[:, -1:], cache)[:, -1]

    ids = random_ids(1, 9)
    before = last_logits(ids)
    for back in (window - 1, window, window + 1):
        other = ids.clone()
        other[0, 8 - back] = (other[0, 8 - back] + 1) % 23
        moved = not torch.equal(last_logits(other), before)
        assert moved == (back < window), f"{back} back with window {window}"


def test_dtype_and_allocation(tmp_path):
    model = load_mistral(FIXTURES / "mistral_tiny_d", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.embed_tokens.weight
    save_mistral(model, tmp_path)
    assert {p.dtype for p in load_mistral(tmp_path).parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------ bad checkpoints


@pytest.fixture
def broken(tmp_path):
    """A copy of checkpoint a to break."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / "mistral_tiny_a", folder)
    return folder


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_missing_tensor_is_named(broken):
    change_weights(broken, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_mistral(broken)


def test_unexpected_tensor_is_named(broken):
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    change_weights(broken, lambda weights: weights.update(bias))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.bias"):
        load_mistral(broken)


def test_misshapen_tensor_is_named(broken):
    change_weights(broken, lambda weights: weights.update({"model.norm.weight": torch.zeros(31)}))
    with pytest.raises(ValueError, match=r"norm\.weight.*31"):
        load_mistral(broken)


def test_truncated_file(broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_mistral(broken)


def test_missing_files(broken, tmp_path):
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or"):
        load_mistral(broken)
    with pytest.raises(ValueError, match=r"neither config\.json nor params\.json"):
        load_mistral(tmp_path / "nowhere")
    shutil.copytree(FIXTURES / "mistral_tiny_b", tmp_path / "b")
    (tmp_path / "b" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors is missing or"):
        load_mistral(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"num_key_value_heads": 3}, "4 heads are no multiple of 3"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"head_dim": 7}, "7 is odd"),
    ],
)
def test_configs_of_other_models(broken, change, message):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        read_config(broken)


def test_broken_config(broken):
    for text in ("{", "[]", '[["model_type", "mistral"]]'):
        (broken / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is no JSON object"):
            read_config(broken)


def test_rope_theta_as_newer_tools_write_it(broken):
    config = json.loads((broken / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    (broken / "config.json").write_text(json.dumps(config))
    assert read_config(broken).rope_theta == 5e5


def test_params_json(tmp_path):
    """Every name of Mistral's own is read."""
    raw = {
        "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "head_dim": 6,
        "norm_eps": 1e-6, "vocab_size": 99, "rope_theta": 5e5, "sliding_window": 7,
    }  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(raw))
    expected = MistralConfig(99, 32, 48, 2, 4, 2, 6, 1e-6, 5e5, 7)
    assert read_config(tmp_path) == expected


def test_rotary_angles_are_exact_in_bfloat16():
    """bfloat16 has 8 bits: position 4001 itself would be 4000 in it."""
    tables = rotary_tables(torch.tensor([4001]), 8, 10000.0, torch.bfloat16)
    angles = 4001 / 10000.0 ** (torch.arange(4, dtype=torch.float64) / 4)
    expected = torch.stack([angles.cos(), angles.sin()])
    assert (tables[:, 0, :4] - expected).abs().max() < 0.005


def test_config_of_defaults():
    config = MistralConfig(10, 12, 8, 1, 3, 1)
    assert config.head_dim == 4
    assert replace(config, num_key_value_heads=3).num_key_value_heads == 3


# ------------------------------------------------------------------------- a real pretrained model


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason="QUIET_STAR_SMOLLM2 names no checkpoint folder")
def test_smollm2():
    """Log-probabilities, top logits and greedy text of a real 135 M model."""
    from sample import generate

    model = load_mistral(SMOLLM2, dtype=torch.float32)
    for prompt in json.loads((FIXTURES / "smollm2_logits.json").read_text())["prompts"]:
        ids = torch.tensor([prompt["ids"]])
        with torch.no_grad():
            logits = model(ids)[0]
        logp = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        assert (logp - torch.tensor(prompt["token_logprobs"])).abs().max() < 1e-3
        top = logits[-1, prompt["last_top20_ids"]]
        assert (top - torch.tensor(prompt["last_top20_logits"])).abs().max() < 1e-3
        greedy = prompt["greedy_continuation_ids"]
        written = generate(model, ids, len(greedy), temperature=0)[0, ids.shape[1] :]
        assert written.tolist() == greedy
