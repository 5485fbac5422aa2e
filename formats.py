"""Checkpoints as other people write them: configs and weights under the names of model.py.

A folder is in one of two formats, and in the first if it has both:

    config.json, model*.safetensors           Hugging Face's
    params.json, consolidated*.safetensors    Mistral's own

Configs are refused where they ask for what model.py does not compute: it would load, and be wrong.
"""

from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data import read_json, short

ALLOWED = {  # what changes the computation in a config.json, and what of it is computed here
    "model_type": ("mistral", "llama", "qwen2", "qwen3"),
    "layer_types": (None, "full_attention", "sliding_attention"),
    "hidden_act": (None, "silu"), "partial_rotary_factor": (None, 1),
} | dict.fromkeys((
    "attention_bias", "mlp_bias", "quantization_config", "num_experts", "num_local_experts",
    "attn_logit_softcapping", "attention_logit_softcapping", "final_logit_softcapping",
    "mrope_section", "full_attention", "sliding_attention",  # the last two: rotary by layer
), (None, False))  # fmt: skip

ALLOWED_PARAMS = {"model_type": "transformer", "activation": "silu", "causal": True}  # likewise

PARAMS_JSON = {  # Mistral's own names -> Hugging Face's, which are ours
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps", "head_dim": "head_dim", "vocab_size": "vocab_size",
    "rope_theta": "rope_theta", "sliding_window": "sliding_window",
    "tied_embeddings": "tie_word_embeddings", "max_seq_len": "max_position_embeddings",
}  # fmt: skip

CONSOLIDATED = {  # likewise, the parts of a tensor's name
    "tok_embeddings": "embed_tokens", "output": "lm_head", "attention_norm": "input_layernorm",
    "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "ffn_norm": "post_attention_layernorm", "feed_forward": "mlp",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip


# ------------------------------------------------------------------------------------- configs


def read_config(folder: Path) -> tuple[dict, Path]:
    """A folder's config.json, or else its params.json, by the names of MistralConfig; the file.

    Raises ValueError if there is none, and for what would load and then compute something else.
    """
    for name, translate in (("config.json", from_config_json), ("params.json", from_params_json)):
        if (path := folder / name).is_file():
            return translate(read_json(path), path), path
    inside = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
    hint = f"; do you mean {' or '.join(inside)} in it?" if inside else ""
    raise ValueError(f"{folder} is no checkpoint: neither config.json nor params.json in it{hint}")


def refuse(path: Path, name: str, value: object) -> NoReturn:
    """ValueError: a config asks for something that is not computed here."""
    raise ValueError(f"{path}: {name} is {short(value)}; this model does not compute that")


def of_all_layers(path: Path, name: str, value):
    """What a config says of every layer, as one value or as a list of equal ones."""
    if isinstance(value, list):
        return value[0] if value and value == value[:1] * len(value) else refuse(path, name, value)
    return value


def from_params_json(raw: dict, path: Path) -> dict:
    """Fields of MistralConfig from a params.json. A key that is not known may change anything."""
    window = of_all_layers(path, "sliding_window", raw.get("sliding_window"))
    theta = 1e4 if window else 1e6  # where it is left out: as mistral-inference infers it
    for name, value in raw.items():
        if name not in PARAMS_JSON and value not in (None, ALLOWED_PARAMS.get(name)):
            refuse(path, name, value)
    given = {ours: raw[name] for name, ours in PARAMS_JSON.items() if raw.get(name) is not None}
    return {"rope_theta": theta} | given | {"sliding_window": window}


def from_config_json(raw: dict, path: Path) -> dict:
    """A config.json, with what it leaves out as in transformers."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # since transformers 5; 4
    scaled = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if scaled not in ("default", "llama3") or raw.get("rope_scaling") not in (None, {}, rope):
        refuse(path, "rope_scaling", rope)
    family, kind = raw.get("model_type"), of_all_layers(path, "layer_types", raw.get("layer_types"))
    raw = {"rms_norm_eps": 1e-6, "sliding_window": 4096 if family == "mistral" else None} | raw
    raw |= rope | {"layer_types": kind}
    for name, allowed in ALLOWED.items():
        if raw.get(name) not in allowed:
            refuse(path, name, raw.get(name))

    window, qwen = of_all_layers(path, "sliding_window", raw["sliding_window"]), "qwen" in family
    first = raw.get("max_window_layers", 28) if qwen and not kind else 0  # so many have none
    unused = (None, False) if qwen else (False,)
    if kind == "full_attention" or raw.get("use_sliding_window") in unused:
        window = None
    elif window and (first or family == "llama"):
        refuse(path, "sliding_window", window)
    raw |= {"sliding_window": window, "rope_scaling": rope if scaled == "llama3" else None}
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = raw.get("num_attention_heads")
    return raw


# ------------------------------------------------------------------------------------- weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the index's shards, one file, or Mistral's own."""
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        own = sorted(folder.glob("consolidated*.safetensors"))
        return [file] if file.is_file() or not own else own
    shards = read_json(index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else [shards]
    present = [path.name for path in folder.glob("*.safetensors")]
    for name in names:
        if name not in present:
            raise ValueError(f"{index}: {short(name)} is missing or no file of this folder")
    return [folder / name for name in sorted(set(names))]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; what is not used is not read from the disk.

    ValueError if it is missing, broken, cut short or holds other than floating-point numbers.
    """
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing or no whole safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{file}: {name!r} is of {tensor.dtype}, not in floating point")
    return tensors


def read_weights(folder: Path, layers: int, head_dim: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of either format, under the names of Mistral's parameters.

    ValueError if one is there twice, or if there are not as many layers as the config says.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for name, tensor in read_tensors(file).items():
            if file.name.startswith("consolidated"):
                name = ".".join(CONSOLIDATED.get(part, part) for part in name.split("."))
                heads = name.endswith(("q_proj.weight", "k_proj.weight"))
                if heads and tensor.shape[:1].numel() % head_dim == 0:
                    # rotary pairs stand side by side: row 2i of a head becomes i, 2i + 1 Dh/2 + i
                    pairs = tensor.unflatten(0, (-1, head_dim // 2, 2))
                    tensor = pairs.transpose(1, 2).flatten(0, 2)
            name = name.removeprefix("model.")
            if name in weights:
                raise ValueError(f"{file}: {name!r} is there twice")
            if not name.endswith("rotary_emb.inv_freq"):  # in old files; computed here
                weights[name] = tensor
    found = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    if found != layers:
        given = f"num_hidden_layers is {layers}"
        raise ValueError(f"{folder}: {given}, and the weights have {found} layers")
    return weights
