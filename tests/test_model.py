"""The transformer against recorded logits, and its two checkpoint formats."""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_mistral

from formats import read_weights
from model import (
    KVCache,
    Mistral,
    MistralConfig,
    RopeScaling,
    load_mistral,
    read_config,
    rotary_tables,
    save_mistral,
    stretch,
)

FIXTURES = Path(__file__).parent / "fixtures"
SMOLLM2 = os.environ.get("QUIET_STAR_SMOLLM2")


def expected(folder):
    return load_file(folder / "expected.safetensors")


# Mistral: a plain; b sliding window 8, shards; d tied head; e its own format with a's logits.
# Llama with scaled rotary positions; Qwen2 with biases, and a window that is not used; Qwen3 with
# norms on q and k, and heads wider than width / heads. All three have tied heads.
TINY = [f"mistral_tiny_{name}" for name in "abde"] + ["llama3_tiny", "qwen2_tiny", "qwen3_tiny"]


@pytest.mark.parametrize("name", TINY)
def test_golden_logits(name):
    golden = expected(FIXTURES / name)
    logits = load_mistral(FIXTURES / name)(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() < 2e-5


@pytest.mark.parametrize("name", TINY)
def test_golden_logits_token_by_token(name):
    golden, model = expected(FIXTURES / name), load_mistral(FIXTURES / name)
    cache = KVCache(model.config)
    logits = [model(token, cache) for token in golden["input_ids"].split(1, dim=1)]
    assert (torch.cat(logits, 1) - golden["logits"]).abs().max() < 2e-5


@pytest.mark.parametrize("name", TINY)
def test_save_and_load(name, tmp_path):
    model = load_mistral(FIXTURES / name)
    save_mistral(model, tmp_path)
    again = load_mistral(tmp_path)
    assert again.config == model.config
    ids = expected(FIXTURES / name)["input_ids"]
    assert torch.equal(again(ids), model(ids))
    assert not list(tmp_path.glob("*.tmp"))
    saved = load_file(tmp_path / "model.safetensors")
    if name != "mistral_tiny_e":  # the names are those of the Hugging Face checkpoint it came from
        original = {}
        for file in (FIXTURES / name).glob("model*.safetensors"):
            original |= load_file(file)
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[key], original[key]) for key in saved)


@pytest.mark.parametrize("name", ["llama3_tiny", "qwen2_tiny", "qwen3_tiny"])
def test_saved_config_is_the_familys(name, tmp_path):
    """What other tools read says the same as in the config.json that it came from."""
    save_mistral(load_mistral(FIXTURES / name), tmp_path)
    saved, original = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FIXTURES / name)
    )
    for key in ("architectures", "model_type", "rope_scaling", "rope_theta", "rms_norm_eps"):
        assert saved[key] == original[key], key
    assert not saved.get("use_sliding_window")
    assert saved["sliding_window"] is None


def test_stretched_rotary_positions_by_hand():
    """Wavelengths of 10, 80 and 20 positions against the 40 of the first learned length.

    That is 4, 0.5 and 2 turns: kept, slowed by 8, and between, with (2 - 1) / (4 - 1) of it kept.
    """
    radian = torch.tensor([10.0, 80.0, 20.0]) / (2 * math.pi)
    frequency = 1 / stretch(radian, RopeScaling(8.0, 1.0, 4.0, 40)) * radian
    assert (frequency - torch.tensor([1, 1 / 8, 1 / 3 + 2 / 3 / 8])).abs().max() < 1e-6


@pytest.mark.parametrize("window", [None, 5, 10])
def test_cached_equals_uncached(window):
    """Also where the text is one token longer than the window: its first is seen no more."""
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_allocation(tmp_path, dtype):
    model = load_mistral(FIXTURES / "mistral_tiny_d", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.lm_head.weight is model.embed_tokens.weight
    save_mistral(model, tmp_path)
    assert {p.dtype for p in load_mistral(tmp_path).parameters()} == {dtype}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")  # for other tools


def test_weights_that_were_read_are_used_up():
    """So that no second copy of a model stays in memory while it is converted."""
    folder = FIXTURES / "mistral_tiny_d"
    weights = read_weights(folder, 3, read_config(folder).head_dim)
    assert weights
    load_mistral(folder, weights=weights)
    assert not weights


def test_random_weights_fit_the_width():
    """Standard deviation 1 / sqrt(64): 64,000 numbers have it to within 0.3 % (one sigma)."""
    torch.manual_seed(0)
    model = Mistral(MistralConfig(1000, 64, 64, 1, 2, 1))
    assert abs(8 * model.embed_tokens.weight.std() - 1) < 0.02
    assert abs(8 * model.lm_head.weight.std() - 1) < 0.02


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
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors' is missing or"):
        load_mistral(tmp_path / "b")


def test_tensors_of_no_use_or_of_no_floating_point(broken):
    """Old files hold rotary frequencies, which are computed; quantised weights are refused."""
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    change_weights(broken, lambda weights: weights.update(unused))
    load_mistral(broken)
    whole = {"model.norm.weight": torch.ones(32, dtype=torch.int32)}
    change_weights(broken, lambda weights: weights.update(whole))
    with pytest.raises(ValueError, match=r"norm\.weight' is of torch\.int32"):
        load_mistral(broken)


def test_one_dtype_for_a_file_of_several(broken):
    half = {"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)}
    change_weights(broken, lambda weights: weights.update(half))
    assert {p.dtype for p in load_mistral(broken).parameters()} == {torch.float32}


def test_a_tensor_in_two_shards(tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(FIXTURES / "mistral_tiny_b", folder)
    shard, other = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file(load_file(shard) | dict([next(iter(load_file(other).items()))]), shard)
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors: '.*' is there twice"):
        load_mistral(folder)


@pytest.mark.parametrize("map_of", ["../x.safetensors", "/etc/passwd", "", 3, None, ["x"], "a\0b"])
def test_an_index_that_points_elsewhere(tmp_path, map_of):
    folder = tmp_path / "b"
    shutil.copytree(FIXTURES / "mistral_tiny_b", folder)
    shutil.copy(FIXTURES / "mistral_tiny_a" / "model.safetensors", tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    for weight_map in ({"model.norm.weight": map_of}, map_of):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(
            ValueError, match=r"index\.json: .* is missing or no file of this folder"
        ):
            load_mistral(folder)


YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"attention_logit_softcapping": 50.0}, "attention_logit_softcapping is 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is {'type': 'linear'}"),
        ({"rope_scaling": YARN}, "rope_scaling is .*yarn"),
        ({"rope_parameters": {"rope_theta": 1e4} | YARN}, "rope_scaling is .*yarn"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN}, "rope_scaling is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention is"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "sliding_attention is"),
        ({"rope_scaling": {"mrope_section": [16, 24, 24]}}, "mrope_section is"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor is '8'; it must be float"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": -1.0}}, "low_freq_factor is -1.0"),
        ({"rope_scaling": LLAMA3 | {"factor": 0.5}}, "factor is 0.5; it must be at least 1"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings is 0",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "missing 4 required"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types is 'chunked_attention'"),
        ({"layer_types": []}, "layer_types is []"),
        ({"sliding_window": [8, None]}, "sliding_window is [8, None]"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": "8"}, "sliding_window is '8'"),
        ({"model_type": "llama", "sliding_window": 8}, "sliding_window is 8"),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True},
            "sliding_window is 8",
        ),
        ({"num_key_value_heads": 3}, "4 heads are no multiple of 3"),
        ({"head_dim": 7}, "7 is odd"),
        ({"head_dim": 2**40}, "head_dim is 1099511627776; allowed are 1 to 1048576"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be int"),
        ({"hidden_size": [32]}, "hidden_size is [32]; it must be int"),
        ({"hidden_size": None}, "hidden_size is None; it must be int"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; it must be int"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be int"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, and the weights have 3"),
        ({"vocab_size": 10**30}, "vocab_size is 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": True}, "rope_theta is True; it must be float"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": 10**400}, "rope_theta is 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be bool"),
        ({"bos_token_id": 10**6}, "bos_token_id or eos_token_id is 1000000"),
        ({"eos_token_id": [2, -1]}, "bos_token_id or eos_token_id is -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_configs_of_other_models(broken, change, message):
    """One line that names the file, the key and the value."""
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError) as refused:
        load_mistral(broken)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), str(refused.value))
    assert str(broken) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, 8),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),  # what transformers takes
        ({"model_type": "mistral", "sliding_window": [8, 8]}, 8),
        ({"model_type": "mistral", "sliding_window": 8, "use_sliding_window": False}, None),
        ({"model_type": "mistral", "sliding_window": 8, "use_sliding_window": None}, 8),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"]}, None),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["sliding_attention"]}, 8),
        ({"model_type": "llama"}, None),
        ({"model_type": "llama", "sliding_window": 8, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 8}, None),
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True,
          "max_window_layers": 0}, 8),
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True,
          "layer_types": ["sliding_attention"] * 2}, 8),
    ],
)  # fmt: skip
def test_windows_of_families(broken, given, window):
    config = json.loads((broken / "config.json").read_text())
    config = {name: config[name] for name in config if name != "sliding_window"}
    (broken / "config.json").write_text(json.dumps(config | given))
    assert read_config(broken).sliding_window == window


def test_what_a_config_leaves_out_is_as_in_transformers(broken):
    config = json.loads((broken / "config.json").read_text())
    for name in ("rms_norm_eps", "rope_theta", "num_key_value_heads", "tie_word_embeddings"):
        config.pop(name, None)
    config.pop("hidden_act")  # silu
    (broken / "config.json").write_text(json.dumps(config))
    read = read_config(broken)
    assert (read.rms_norm_eps, read.rope_theta, read.tie_word_embeddings) == (1e-6, 1e4, False)
    assert read.num_key_value_heads == read.num_attention_heads


def test_a_window_of_qwen_survives(tmp_path):
    config = MistralConfig(23, 16, 32, 1, 4, 2, sliding_window=5, model_type="qwen2")
    save_mistral(Mistral(config), tmp_path)
    assert read_config(tmp_path) == config


def test_nested_too_deeply(broken):
    for text in (
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"vocab_size": ' + "[" * 400 + "]" * 400 + "}",
    ):
        (broken / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_config(broken)


def test_broken_config(broken):
    for text in ("{", "[]", '[["model_type", "mistral"]]'):
        (broken / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is no JSON object"):
            read_config(broken)


def test_rope_as_newer_tools_write_it(tmp_path):
    """transformers 5: rope_theta in rope_parameters, dtype instead of torch_dtype."""
    folder = tmp_path / "llama"
    shutil.copytree(FIXTURES / "llama3_tiny", folder)
    before = read_config(folder)
    config = json.loads((folder / "config.json").read_text())
    scaling, theta = config.pop("rope_scaling"), config.pop("rope_theta")
    config |= {
        "rope_parameters": scaling | {"rope_theta": theta},
        "dtype": config.pop("torch_dtype"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(folder) == before
    config |= {"rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(folder) == replace(before, rope_theta=3e5, rope_scaling=None)


PARAMS = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "head_dim": 6,
    "norm_eps": 1e-6, "vocab_size": 99,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "theta", "window"),
    [
        ({"rope_theta": 5e5, "sliding_window": 7}, 5e5, 7),
        ({}, 1e6, None),
        ({"sliding_window": 7}, 1e4, 7),  # Mistral 7B v0.1
        ({"sliding_window": None, "moe": None}, 1e6, None),
        ({"sliding_window": [7, 7]}, 1e4, 7),
        ({"model_type": "transformer", "rope_theta": 5e5}, 5e5, None),
        ({"activation": "silu", "causal": None}, 1e6, None),
    ],
)
def test_params_json(tmp_path, more, theta, window):
    """Every name of Mistral's own is read."""
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | more))
    assert read_config(tmp_path) == MistralConfig(99, 32, 48, 2, 4, 2, 6, 1e-6, theta, window)
    more = {"max_seq_len": 500, "tied_embeddings": True}
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | more))
    read = read_config(tmp_path)
    assert (read.max_position_embeddings, read.tie_word_embeddings) == (500, True)


@pytest.mark.parametrize(
    "more",
    [
        {"yarn": {"beta": 32}}, {"llama_4_scaling": {}}, {"moe": {"num_experts": 8}},
        {"quantization": {"qformat_weight": "fp8_e4m3"}}, {"lora": {"rank": 8}}, {"anything": 1},
        {"model_type": "mamba"}, {"sliding_window": [7, 8]}, {"_sliding_window": 7},
        {"causal": False}, {"activation": "gelu"},
    ],
)  # fmt: skip
def test_a_key_of_params_json_that_is_not_known(tmp_path, more):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | more))
    with pytest.raises(ValueError, match=rf"params\.json: {next(iter(more))} is "):
        read_config(tmp_path)


def test_types_in_params_json(tmp_path):
    """Named as in config.json: dim is hidden_size."""
    for wrong in ([32, 32], "32"):
        (tmp_path / "params.json").write_text(json.dumps(PARAMS | {"dim": wrong}))
        with pytest.raises(ValueError, match=r"params\.json: hidden_size is .*; it must be int"):
            read_config(tmp_path)


@pytest.mark.parametrize("name", ["mistral_tiny_b", "mistral_tiny_d"])
def test_both_formats_in_one_folder(tmp_path, name):
    """Hugging Face's is taken, as in the folders that Mistral publishes; never both."""
    golden = expected(FIXTURES / name)
    folder = tmp_path / "both"
    shutil.copytree(FIXTURES / "mistral_tiny_e", folder)
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    logits = load_mistral(folder)(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() < 2e-5


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
