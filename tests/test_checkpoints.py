"""A thinking model survives saving and loading; the authors' checkpoint format loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_quiet_star

from model import load_mistral, save_mistral
from thoughts import load_quiet_star, save_quiet_star

FIXTURES = Path(__file__).parent / "fixtures"


def same_output(one, other, ids):
    for name, got, expected in zip(
        one(ids)._fields, one(ids, temperature=0), other(ids, temperature=0), strict=True
    ):
        assert torch.equal(got, expected), name


def test_round_trip(tmp_path):
    """Learned meta embeddings come back too; the folder is a Mistral's with two files more."""
    model = tiny_quiet_star(start_id=21, end_id=22, embedding_scale=100.0)
    save_quiet_star(model, tmp_path)
    again = load_quiet_star(tmp_path)
    assert again.config == model.config
    same_output(again, model, random_ids(2, 8, 21))
    plain = load_mistral(tmp_path)
    assert torch.equal(plain(random_ids(1, 5)), model.model(random_ids(1, 5)))
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "quiet_star.json", "quiet_star.safetensors"
    }  # fmt: skip


def test_tied_head_stays_tied(tmp_path):
    from thoughts import QuietStar, ThoughtConfig

    model = QuietStar(load_mistral(FIXTURES / "mistral_tiny_d"), ThoughtConfig(2, 2, 1, init_id=3))
    save_quiet_star(model, tmp_path)
    again = load_quiet_star(tmp_path)
    assert again.model.lm_head.weight is again.model.embed_tokens.weight
    same_output(again, model, random_ids(1, 6))


def test_the_authors_checkpoint(tmp_path):
    """Their names, their two meta tokens at the end of the vocabulary, their [2, D] embeddings."""
    numbers = json.loads((FIXTURES / "official_case.json").read_text())
    tensors = load_file(FIXTURES / "official_case.safetensors")
    weights = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w.")}
    weights["end_embedding"] = weights["end_embedding"] + 1  # theirs begin alike
    save_file(weights, tmp_path / "model.safetensors")
    config = {**numbers["config"], "model_type": "mistral"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_quiet_star(tmp_path)
    assert (model.start_id, model.end_id) == (65, 66)
    assert model.config.embedding_scale == 100
    assert torch.equal(model.start_embedding, weights["start_embedding"][0])
    assert torch.equal(model.end_embedding, weights["end_embedding"][0])
    assert model.config.thought_length == 6  # their "8 ahead", start and end taken off
    assert torch.equal(model.mixing_head[4].weight, weights["talk_head.0.4.weight"])
    ids = tensors["input_ids"]
    base = model(ids, temperature=0).base_nll
    assert (base - tensors["loss_list.0"][::2]).abs().max() < 5e-5


def test_a_plain_model_is_no_thinking_model(tmp_path):
    save_mistral(tiny_quiet_star().model, tmp_path)
    with pytest.raises(ValueError, match="holds no thinking model"):
        load_quiet_star(tmp_path)


def test_broken_quiet_star_files(tmp_path):
    save_quiet_star(tiny_quiet_star(), tmp_path)
    path = tmp_path / "quiet_star.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"speed": 1}))
    with pytest.raises(ValueError, match=r"quiet_star\.json: .*'speed'"):
        load_quiet_star(tmp_path)
    path.write_text(json.dumps(good | {"n_true": 0}))
    with pytest.raises(ValueError, match="n_true is 0; it must be at least 1"):
        load_quiet_star(tmp_path)
    path.write_text(json.dumps(good))
    weights = load_file(tmp_path / "quiet_star.safetensors")
    del weights["start_embedding"]
    save_file(weights, tmp_path / "quiet_star.safetensors")
    with pytest.raises(ValueError, match="start_embedding"):
        load_quiet_star(tmp_path)
