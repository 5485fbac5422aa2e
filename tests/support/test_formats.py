"""Checkpoints of all formats and families: what is read, and what is refused by name."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import Mistral, MistralConfig, build, save_mistral
from support.checkpoints import FamilyConfig, RopeScaling, load_any, read_config, read_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"


def expected(folder):
    return load_file(folder / "expected.safetensors")


def test_weights_that_were_read_are_used_up():
    """So that no second copy of a model stays in memory while it is converted."""
    folder = FIXTURES / "mistral_tiny_d"
    config = read_config(folder)
    weights = read_weights(folder, 3, config.head_dim)
    assert weights
    build(config, weights, folder, None, "cpu")
    assert not weights


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
        load_any(broken)


def test_unexpected_tensor_is_named(broken):
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    change_weights(broken, lambda weights: weights.update(bias))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.bias"):
        load_any(broken)


def test_misshapen_tensor_is_named(broken):
    change_weights(broken, lambda weights: weights.update({"model.norm.weight": torch.zeros(31)}))
    with pytest.raises(ValueError, match=r"norm\.weight.*31"):
        load_any(broken)


def test_truncated_file(broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_any(broken)


def test_missing_files(broken, tmp_path):
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or"):
        load_any(broken)
    with pytest.raises(ValueError, match=r"nowhere is not a checkpoint: no config\.json or params"):
        load_any(tmp_path / "nowhere")
    shutil.copytree(FIXTURES / "mistral_tiny_b", tmp_path / "b")
    (tmp_path / "b" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors' is missing or"):
        load_any(tmp_path / "b")


def test_tensors_of_no_use_or_of_no_floating_point(broken):
    """Old files hold rotary frequencies, which are computed; quantised weights are refused."""
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    change_weights(broken, lambda weights: weights.update(unused))
    load_any(broken)
    whole = {"model.norm.weight": torch.ones(32, dtype=torch.int32)}
    change_weights(broken, lambda weights: weights.update(whole))
    with pytest.raises(ValueError, match=r"norm\.weight' is of torch\.int32"):
        load_any(broken)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "model.layers.1.self_attn.k_proj", "model.norm", "lm_head"]
)
def test_one_dtype_for_a_file_of_several(broken, name):
    """The widest of them, whichever parameter is the narrow one."""

    def narrow(weights):
        weights[f"{name}.weight"] = weights[f"{name}.weight"].bfloat16()

    change_weights(broken, narrow)
    assert {p.dtype for p in load_any(broken).parameters()} == {torch.float32}


def test_eps_counts_in_every_norm(tmp_path):
    """An eps of 0.5 in a model with norms on q and k: x / sqrt(mean(x ** 2) + 0.5), weighted."""
    folder, seen = tmp_path / "qwen3", []
    shutil.copytree(FIXTURES / "qwen3_tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    model = load_any(folder)

    def compare(norm, inputs, output):
        x = inputs[0]
        expected = x * (x.square().mean(-1, keepdim=True) + 0.5).rsqrt() * norm.weight
        assert (output - expected).abs().max() < 1e-5
        seen.append(norm)

    norms = [module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)]
    for norm in norms:
        norm.register_forward_hook(compare)
    model(torch.arange(6)[None])
    assert len(seen) == len(norms) == 4 * model.config.num_hidden_layers + 1
    save_mistral(model, tmp_path / "saved")
    assert read_config(tmp_path / "saved").rms_norm_eps == 0.5


def test_saved_weights_name_their_framework(tmp_path):
    """Other tools refuse a safetensors file without this."""
    save_mistral(load_any(FIXTURES / "mistral_tiny_a"), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_consolidated_files(tmp_path):
    """Mistral's own format in parts: the weights of all of them, each once."""
    golden = expected(FIXTURES / "mistral_tiny_e")
    shutil.copytree(FIXTURES / "mistral_tiny_e", tmp_path / "e")
    [file] = (tmp_path / "e").glob("consolidated*.safetensors")
    weights = load_file(file)
    file.unlink()
    for part in range(3):
        own = {name: weights[name] for name in sorted(weights)[part::3]}
        save_file(own, tmp_path / "e" / f"consolidated.0{part}.safetensors")
    logits = load_any(tmp_path / "e")(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() < 2e-5
    save_file(own, tmp_path / "e" / "consolidated.03.safetensors")
    with pytest.raises(ValueError, match=r"consolidated.03.safetensors: '.*' is there twice"):
        load_any(tmp_path / "e")


def test_a_tensor_in_two_shards(tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(FIXTURES / "mistral_tiny_b", folder)
    shard, other = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file(load_file(shard) | dict([next(iter(load_file(other).items()))]), shard)
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors: '.*' is there twice"):
        load_any(folder)


@pytest.mark.parametrize("map_of", ["../x.safetensors", "/etc/passwd", "", 3, None, ["x"], "a\0b"])
def test_an_index_that_points_elsewhere(tmp_path, map_of):
    folder = tmp_path / "b"
    shutil.copytree(FIXTURES / "mistral_tiny_b", folder)
    shutil.copy(FIXTURES / "mistral_tiny_a" / "model.safetensors", tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    for weight_map in ({"model.norm.weight": map_of}, map_of):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(
            ValueError, match=r"index\.json: .* is missing or not a file of this folder"
        ):
            load_any(folder)


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
        ({"sliding_window": [8, None, 8]}, "sliding_window is [8, None, 8]"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types is ['full_attention', 'sliding_attention', 'full_attention']",
        ),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": "8"}, "sliding_window is '8'"),
        ({"model_type": "llama", "sliding_window": 8}, "sliding_window is 8"),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True},
            "sliding_window is 8",
        ),
        (
            {"num_key_value_heads": 3},
            "(4) must be a multiple of num_key_value_heads (3)",
        ),
        ({"head_dim": 7}, "head_dim (7) must be even"),
        ({"head_dim": 2**40}, "head_dim is 1099511627776; it must be between 1 and 1048576"),
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
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_configs_of_other_models(broken, change, message):
    """One line that names the file, the key and the value."""
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError) as refused:
        load_any(broken)
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
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": None}, None),
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True,
          "max_window_layers": 0}, 8),
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True,
          "layer_types": ["sliding_attention"] * 2, "max_window_layers": 28}, 8),
    ],
)  # fmt: skip
def test_windows_of_families(broken, given, window):
    config = json.loads((broken / "config.json").read_text())
    config = {name: config[name] for name in config if name != "sliding_window"}
    (broken / "config.json").write_text(json.dumps(config | given))
    config = read_config(broken)
    assert config.sliding_window == window
    assert not getattr(config, "max_window_layers", 0)  # or it would be refused once it is saved


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
    config = FamilyConfig(23, 16, 32, 1, 4, 2, sliding_window=5, model_type="qwen2")
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
        with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
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


def test_stretched_rotary_positions_by_hand():
    """Four frequencies, which turn 7.96, 1.99, 0.5 and 0.12 times over the original 50 positions.

    From 4 turns on they are kept, up to 1 they are divided by 8, and of 1.99 a third is kept.
    """
    scaling = RopeScaling(8.0, 1.0, 4.0, 50)
    config = FamilyConfig(9, 8, 8, 1, 1, 1, 8, rope_theta=256.0, rope_scaling=scaling)
    kept = (50 / (2 * math.pi) / 4 - 1) / 3
    expected = torch.tensor([1, (kept + (1 - kept) / 8) / 4, 1 / 8 / 16, 1 / 8 / 64])
    assert torch.allclose(config.frequencies(torch.device("cpu")), expected)
    plain = replace(config, rope_scaling=None).frequencies(torch.device("cpu"))
    assert torch.allclose(plain, 4.0 ** -torch.arange(4))


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


@pytest.mark.parametrize("name", ["x" * 20_000, "a\nb", ""])
def test_an_odd_key_of_params_json(tmp_path, name):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | {name: ["y\n" * 20_000]}))
    with pytest.raises(ValueError, match="this model does not compute that") as refused:
        read_config(tmp_path)
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)


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
    logits = load_any(folder)(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() < 2e-5
