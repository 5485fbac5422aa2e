"""The transformer against recorded logits; loading and saving a Hugging Face folder."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_ids, tiny_mistral

from model import (
    KVCache,
    Mistral,
    MistralConfig,
    rotary_tables,
    save_mistral,
)
from support.checkpoints import load_any

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
    logits = load_any(FIXTURES / name)(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() < 2e-5


@pytest.mark.parametrize("name", TINY)
def test_golden_logits_token_by_token(name):
    golden, model = expected(FIXTURES / name), load_any(FIXTURES / name)
    cache = KVCache(model.config)
    logits = [model(token, cache) for token in golden["input_ids"].split(1, dim=1)]
    assert (torch.cat(logits, 1) - golden["logits"]).abs().max() < 2e-5


@pytest.mark.parametrize("name", TINY)
def test_save_and_load(name, tmp_path):
    model = load_any(FIXTURES / name)
    save_mistral(model, tmp_path)
    again = load_any(tmp_path)
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
    save_mistral(load_any(FIXTURES / name), tmp_path)
    saved, original = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FIXTURES / name)
    )
    for key in ("architectures", "model_type", "rope_scaling", "rope_theta", "rms_norm_eps"):
        assert saved[key] == original[key], key
    assert not saved.get("use_sliding_window")
    assert saved["sliding_window"] is None


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
    model = load_any(FIXTURES / "mistral_tiny_d", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.lm_head.weight is model.embed_tokens.weight
    save_mistral(model, tmp_path)
    assert {p.dtype for p in load_any(tmp_path).parameters()} == {dtype}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")  # for other tools


def test_random_weights_fit_the_width():
    """Standard deviation 1 / sqrt(64): 64,000 numbers have it to within 0.3 % (one sigma)."""
    torch.manual_seed(0)
    model = Mistral(MistralConfig(1000, 64, 64, 1, 2, 1))
    assert abs(8 * model.embed_tokens.weight.std() - 1) < 0.02
    assert abs(8 * model.lm_head.weight.std() - 1) < 0.02


def test_rotary_angles_are_exact_in_bfloat16():
    """bfloat16 has 8 bits: position 4001 itself would be 4000 in it."""
    tables = rotary_tables(torch.tensor([4001]), MistralConfig(9, 8, 8, 1, 1, 1), torch.bfloat16)
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

    model = load_any(SMOLLM2, dtype=torch.float32)
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
