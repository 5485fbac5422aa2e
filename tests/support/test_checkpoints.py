"""A thinking model survives saving and loading; the authors' checkpoint format loads."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_quiet_star

from model import load_mistral
from support.checkpoints import load_any
from thoughts import load_quiet_star, save_quiet_star

FIXTURES = Path(__file__).parents[1] / "fixtures"


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
    half = load_quiet_star(tmp_path, dtype=torch.bfloat16)
    dtypes = {name.split(".")[0]: parameter.dtype for name, parameter in half.named_parameters()}
    assert dtypes.pop("mixing_head") == torch.float32
    assert {*dtypes.values()} == {torch.bfloat16}
    plain = load_mistral(tmp_path)
    assert torch.equal(plain(random_ids(1, 5)), model.model(random_ids(1, 5)))
    own = load_file(tmp_path / "quiet_star.safetensors")
    assert not [name for name in own if name.startswith("model.")]  # nothing is there twice
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


@pytest.fixture(params=["one file", "shards"])
def released(request, tmp_path):
    """A folder as the authors released theirs, made of their recorded step; its tensors."""
    numbers = json.loads((FIXTURES / "official_case.json").read_text())
    tensors = load_file(FIXTURES / "official_case.safetensors")
    weights = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w.")}
    assert weights["start_embedding"].shape == weights["end_embedding"].shape == (2, 32)
    if request.param == "one file":
        save_file(weights, tmp_path / "model.safetensors")
    else:
        weight_map = {}
        for shard in range(3):
            file = f"model-0000{shard + 1}-of-00003.safetensors"
            part = {name: weights[name] for name in sorted(weights)[shard::3]}
            save_file(part, tmp_path / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {**numbers["config"], "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, weights, tensors


def test_the_authors_checkpoint(released):
    """Their names, their two meta tokens at the end of the vocabulary, row 0 of [2, D]."""
    folder, weights, _ = released
    model = load_any(folder)
    assert (model.start_id, model.end_id) == (65, 66)
    assert model.config.embedding_scale == 100
    assert torch.equal(model.start_embedding, weights["start_embedding"][0])
    assert torch.equal(model.end_embedding, weights["end_embedding"][0])
    assert model.config.thought_length == 6  # their "8 ahead", start and end taken off
    assert torch.equal(model.mixing_head[4].weight, weights["talk_head.0.4.weight"])


def test_the_authors_checkpoint_computes_their_step(released):
    """The recorded losses with and without thoughts, from the folder alone."""
    folder, _, tensors = released
    model = load_any(folder)
    model.config = replace(model.config, thought_length=3, n_true=3)
    ids = tensors["input_ids"]
    S = ids.shape[1]
    forced = tensors["thought_ids"].permute(1, 2, 0).unflatten(0, (-1, 2))[:, :, : S - 1]
    output = model(ids, thought_ids=forced, positions=torch.arange(S - 1))
    assert (output.base_nll - tensors["loss_list.0"][::2]).abs().max() < 5e-5
    for k in range(3):
        expected = tensors[f"loss_list.{5 + k}"]  # [row, position], row = sequence * N + thought
        talk = output.talk_nll[k].flatten(0, 1)[:, : S - 1 - k]
        assert (talk - expected).abs().max() < 5e-5


def test_the_authors_end_embedding_is_read_apart(released):
    """In the recorded step both begin as the same vector."""
    folder, weights, _ = released
    for file in folder.glob("*.safetensors"):
        part = load_file(file)
        if "end_embedding" in part:
            save_file(part | {"end_embedding": part["end_embedding"] + 1}, file)
    assert torch.equal(load_any(folder).end_embedding, weights["end_embedding"][0] + 1)


def test_broken_quiet_star_files(tmp_path):
    save_quiet_star(tiny_quiet_star(), tmp_path)
    path = tmp_path / "quiet_star.json"
    good = json.loads(path.read_text())
    for name in ("speed", "x\n" * 10_000):
        path.write_text(json.dumps(good | {name: 1}))
        message = r"quiet_star\.json: .*'(speed|x\\nx.{10,100})' is not a field of ThoughtConfig"
        with pytest.raises(ValueError, match=message):
            load_any(tmp_path)
    path.write_text(json.dumps(good | {"n_true": 0}))
    with pytest.raises(ValueError, match="n_true is 0; it must be between 1 and 10000"):
        load_any(tmp_path)
    path.write_text(json.dumps(good))
    weights = load_file(tmp_path / "quiet_star.safetensors")
    del weights["start_embedding"]
    save_file(weights, tmp_path / "quiet_star.safetensors")
    with pytest.raises(ValueError, match="start_embedding"):
        load_any(tmp_path)
    for change, message in (
        ({"n_thoughts": "2"}, "n_thoughts is '2'; it must be int"),
        ({"n_true": 10**30}, "n_true is 1000000.*; it must be int"),
        ({"thought_length": 10**9}, "thought_length is 1000000000; it must be between 0 and 10000"),
        ({"n_thoughts": 10**6}, "n_thoughts is 1000000; it must be between 1 and 10000"),
        ({"n_true": 10_001}, "n_true is 10001; it must be between 1 and 10000"),
        ({"init_id": 23}, "init_id is 23; it is not a token"),
        ({"start_id": 5, "end_id": 5}, "start_id and end_id are both 5"),
        ({"start_id": -1}, "start_id is -1"),
        ({"embedding_scale": float("nan")}, "embedding_scale is nan"),
        ({"drop_negative": 1}, "drop_negative is 1; it must be bool"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            load_any(tmp_path)


# ------------------------------------------------------------------------------ files gone wrong


VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 8, 10**12, 10**30, 0.5, 1e-30, float("nan"), float("inf"),
    "", "x", "32", "llama", "qwen2", [], [1], [None, 8], {}, {"rope_type": "yarn"}, {"a": {"b": 1}},
]  # fmt: skip


def change_json(text: str, draw: random.Random) -> str:
    """One value, key or stretch of a JSON file is another."""
    values = json.loads(text)
    inside = values.get("weight_map", values)
    key = draw.choice(sorted(inside))
    kind = draw.randrange(5)
    if kind < 3:
        inside[key] = draw.choice(VALUES)
    elif kind == 3:
        del inside[key]
    else:
        at = draw.randrange(len(text))
        return text[:at] + draw.choice(["", "[", "9", "\x00", '"', "}"]) + text[at + 1 :]
    return json.dumps(values)


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """A byte of a safetensors file is another, most often in its header, or its end is missing."""
    header = 8 + int.from_bytes(content[:8], "little")
    at = draw.choice(
        [draw.randrange(8), *[draw.randrange(header)] * 6, draw.randrange(len(content))]
    )
    if draw.random() < 0.2:
        return content[:at]
    return content[:at] + draw.randbytes(1) + content[at + 1 :]


def test_changed_files_load_rightly_or_are_refused(tmp_path):
    """Two hundred random changes: a ValueError of one line that names the folder, or a model.

    If what was changed is not its weights and its config came out the same, so do its logits.
    """
    draw, ids, refused = random.Random(0), random_ids(1, 6), 0
    save_quiet_star(tiny_quiet_star(), tmp_path / "thinking")
    for name in ("b", "e"):
        shutil.copytree(FIXTURES / f"mistral_tiny_{name}", tmp_path / name)
        (tmp_path / name / "expected.safetensors").unlink()
        (tmp_path / name / "expected.json").unlink()
    for folder in sorted(tmp_path.iterdir()):
        other = load_any(folder)
        other = getattr(other, "model", other)
        expected = other(ids)
        for _ in range(70):
            path = draw.choice(sorted(folder.iterdir()))
            content = path.read_bytes()
            if path.suffix == ".json":
                changed = change_json(content.decode(), draw).encode()
            else:
                changed = change_bytes(content, draw)
            path.write_bytes(changed)
            try:
                model = load_any(folder)
                base = getattr(model, "model", model)
                logits = base(ids)
                if path.suffix == ".json" and base.config == other.config:
                    assert torch.equal(logits, expected), path
            except ValueError as error:
                assert str(folder) in str(error) and "\n" not in str(error), error
                refused += 1
            path.write_bytes(content)
    assert 70 < refused < 190
