"""Checkpoints of all formats and families, the authors' release, and models that think.

A folder is in one of two formats. If it has both, the first one is read:

    config.json, model*.safetensors           Hugging Face's
    params.json, consolidated*.safetensors    Mistral's own

The families are mistral, llama, qwen2 and qwen3. A config that asks for another computation than
that of model.py, with FamilyConfig, is refused: the checkpoint would load and give wrong results.
"""

import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

import model as core
from model import ACTIVATION, Mistral, MistralConfig, build, check_range
from support.device import free_memory
from support.files import hub_hint, read_json, short
from support.settings import settings_from
from support.tokenizer import Tokenizer, load_tokenizer
from thoughts import QuietStar, ThoughtConfig, with_thoughts

ALLOWED = {  # the keys of a config.json that change the computation, and their supported values
    "model_type": ("mistral", "llama", "qwen2", "qwen3"),
    "layer_types": (None, "full_attention", "sliding_attention"),
    "hidden_act": (None, ACTIVATION.__name__), "partial_rotary_factor": (None, 1),
} | dict.fromkeys((
    "attention_bias", "mlp_bias", "quantization_config", "num_experts", "num_local_experts",
    "attn_logit_softcapping", "attention_logit_softcapping", "final_logit_softcapping",
    "mrope_section", "full_attention", "sliding_attention",  # the last two: rotary by layer
), (None, False))  # fmt: skip

ALLOWED_PARAMS = {"model_type": "transformer", "activation": "silu", "causal": True}  # params.json

PARAMS_JSON = {  # Mistral's own names -> Hugging Face's, which are ours
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps", "head_dim": "head_dim", "vocab_size": "vocab_size",
    "rope_theta": "rope_theta", "sliding_window": "sliding_window",
    "tied_embeddings": "tie_word_embeddings", "max_seq_len": "max_position_embeddings",
}  # fmt: skip

CONSOLIDATED = {  # the same for the parts of a tensor's name
    "tok_embeddings": "embed_tokens", "output": "lm_head", "attention_norm": "input_layernorm",
    "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "ffn_norm": "post_attention_layernorm", "feed_forward": "mlp",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip

SPARE_ROWS = 512  # embeddings beyond the tokenizer's tokens; Qwen has 400


@dataclass(frozen=True)
class RopeScaling:
    """Scaled rotary positions of Llama 3.1, which extend a model to longer texts."""

    factor: float  # low frequencies are divided by this
    low_freq_factor: float  # rotations over the original length up to which a frequency is low
    high_freq_factor: float  # rotations from which it is kept
    original_max_position_embeddings: int  # the original length, in tokens
    rope_type: str = "llama3"

    def __post_init__(self):
        check_range(self, 1, math.inf, "factor", "original_max_position_embeddings")
        check_range(self, 0, math.inf, "low_freq_factor")
        check_range(self, self.low_freq_factor + 1e-6, math.inf, "high_freq_factor")


@dataclass(frozen=True)
class FamilyConfig(MistralConfig):
    """MistralConfig with the fields that Llama and Qwen checkpoints add."""

    rope_scaling: RopeScaling | None = None
    use_sliding_window: bool = field(init=False)  # for other tools: whether there is a window
    max_window_layers: int = field(default=0, init=False)  # for other tools: all layers have it

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "use_sliding_window", self.sliding_window is not None)

    def frequencies(self, device: torch.device) -> Tensor:
        """Rotary frequencies [Dh/2]. Llama 3.1: low ones are divided by `factor`, high ones kept.

        Those between are interpolated.
        """
        inv_freq, scaling = super().frequencies(device), self.rope_scaling  # [Dh/2]
        if scaling is None:
            return inv_freq
        rotations = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        return inv_freq * (kept + (1 - kept) / scaling.factor)


def read_config(folder: str | Path) -> MistralConfig:
    """The config of a checkpoint, from its config.json or else its params.json.

    Raises ValueError if there is none, or if it asks for a computation that is not supported.
    """
    folder = Path(folder)
    for name, translate in (("config.json", from_config_json), ("params.json", from_params_json)):
        if (path := folder / name).is_file():
            values, kind = translate(read_json(path), path), MistralConfig
            if scaling := values.get("rope_scaling"):
                values["rope_scaling"] = config_from(RopeScaling, scaling, path)
            if scaling or values.get("model_type", "mistral") != "mistral":
                kind = FamilyConfig
            return config_from(kind, values, path)
    inside = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
    hint = f"; do you mean {' or '.join(inside)} in it?" if inside else hub_hint(folder)
    raise ValueError(f"{folder} is not a checkpoint: no config.json or params.json in it{hint}")


def config_from(kind: type, values: dict, path: Path):
    """A config dataclass from those of the values that are its fields."""
    names = [field.name for field in fields(kind) if field.init]
    known = {name: values[name] for name in names if name in values}
    return settings_from(kind, known, path)


def refuse(path: Path, name: str, value: object) -> NoReturn:
    """Raise ValueError for a key of a config that asks for something that is not supported."""
    name = name if name.isidentifier() else short(name)
    raise ValueError(f"{path}: {name:.200} is {short(value)}; this model does not compute that")


def of_all_layers(path: Path, name: str, value):
    """The value that a config gives for all layers, as one value or as a list of equal values."""
    if isinstance(value, list):
        return value[0] if value and value == value[:1] * len(value) else refuse(path, name, value)
    return value


def from_params_json(raw: dict, path: Path) -> dict:
    """Fields of MistralConfig from a params.json. Any unknown key may change the computation."""
    window = of_all_layers(path, "sliding_window", raw.get("sliding_window"))
    theta = 1e4 if window else 1e6  # default, as in mistral-inference
    for name, value in raw.items():
        if name not in PARAMS_JSON and value not in (None, ALLOWED_PARAMS.get(name)):
            refuse(path, name, value)
    given = {ours: raw[name] for name, ours in PARAMS_JSON.items() if raw.get(name) is not None}
    return {"rope_theta": theta} | given | {"sliding_window": window}


def from_config_json(raw: dict, path: Path) -> dict:
    """Fields of MistralConfig from a config.json, with the defaults of transformers."""
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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the index's shards, one file, or Mistral's own."""
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        own = sorted(folder.glob("consolidated*.safetensors"))
        return [file] if file.is_file() or not own else own
    shards = read_json(index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else [shards]
    present = [path.name for path in folder.glob("*.safetensors")]
    if missing := [name for name in names if name not in present]:
        raise ValueError(f"{index}: {short(missing[0])} is missing or not a file of this folder")
    return [folder / name for name in sorted(set(names))]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """model.read_tensors; raises ValueError for a tensor that is not of a floating-point dtype."""
    tensors = core.read_tensors(file)
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{file}: {short(name)} is of {tensor.dtype}, not in floating point")
    return tensors


def read_weights(folder: Path, layers: int, head_dim: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint of either format, under the names of Mistral's parameters.

    Raises ValueError for a tensor that is there twice, and for another number of layers.
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
                raise ValueError(f"{file}: {short(name)} is there twice")
            if not name.endswith("rotary_emb.inv_freq"):  # in old files; computed here
                weights[name] = tensor
    found = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    if found != layers:
        raise ValueError(f"{folder}: num_hidden_layers is {layers}, and the weights have {found}")
    return weights


def read_thought_config(folder: str | Path) -> ThoughtConfig | None:
    """The thought config in a folder of save_quiet_star. None: there is no quiet_star.json."""
    path = Path(folder) / "quiet_star.json"
    return settings_from(ThoughtConfig, read_json(path), path) if path.is_file() else None


def load_any(folder: str | Path, dtype=None, device="cpu") -> QuietStar | Mistral:
    """Load a model of any supported format and family.

    It is a QuietStar if the folder was written by save_quiet_star or is the authors' release, else
    a Mistral. dtype None keeps the dtype of the file. Raises ValueError if a file is missing,
    damaged or not supported.
    """
    folder = Path(folder)
    config, shape = read_thought_config(folder), read_config(folder)
    weights = read_weights(folder, shape.num_hidden_layers, shape.head_dim)
    if config:
        own = read_tensors(folder / "quiet_star.safetensors")
    elif "start_embedding" in weights:
        config, own = authors_thoughts(shape, weights)
    base = build(shape, weights, folder, dtype, device)
    if config is None:
        return base
    if config.init_id is not None and config.init_id >= shape.vocab_size:
        raise ValueError(f"{folder}: init_id is {config.init_id}; it is not a token")
    return with_thoughts(base, config, own, folder)


def authors_thoughts(shape: MistralConfig, weights: dict) -> tuple[ThoughtConfig, dict]:
    """Config and weights of the thoughts in the authors' release; takes them out of `weights`.

    Their "8 ahead" counts start and end. Their ids are the last two of the vocabulary. Row 1 of an
    embedding is unused. Their talk_head is our mixing head (see QuietStar.mixing_weight).
    """
    V, D = shape.vocab_size, shape.hidden_size
    config = ThoughtConfig(thought_length=6, start_id=V - 2, end_id=V - 1)
    theirs = [name for name in weights if name.startswith(("talk_head.0.", "start_", "end_"))]
    own = {name.replace("talk_head.0.", "mixing_head."): weights.pop(name) for name in theirs}
    own |= {name: row.flatten()[:D] for name, row in own.items() if "_embedding" in name}
    return config, own


def dtype_that_fits(folder: Path, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which to read a checkpoint on a CPU.

    dtype, or if it is None float32 if that fits into the free memory, else the checkpoint's own.
    Raises ValueError if it does not fit. Computing is given a tenth of the size of the weights.
    """
    tensors = [t for file in weight_files(folder) for t in read_tensors(file).values()]
    own = max(tensors, key=torch.numel).dtype if tensors else torch.float32
    choices = [dtype] if dtype else [torch.float32, own]  # bfloat16 is slow on most CPUs
    sizes = {kind: 1.1e-9 * sum(t.numel() for t in tensors) * kind.itemsize for kind in choices}
    free = (free_memory(torch.device("cpu")) or math.inf) / 1e9
    needed = ", ".join(f"{size:.1f} GB in {str(kind)[6:]}" for kind, size in sizes.items())
    line = f"{folder} needs {needed}, and {free:.1f} GB of memory are free"
    fitting = next((kind for kind, size in sizes.items() if size <= free), None)
    if fitting is None:
        raise ValueError(line)
    if fitting != choices[0]:
        print(f"{line}: read in {str(own)[6:]}", file=sys.stderr)
    return fitting


def load(folder, device: torch.device, dtype=None) -> tuple[Mistral | QuietStar, Tokenizer]:
    """The plain or thinking model in a folder, and its tokenizer.

    dtype None: the dtype of the file; on a CPU, see dtype_that_fits. Raises ValueError if there is
    no model, if it does not fit, or if the tokenizer is not the model's: a model may have up to
    SPARE_ROWS embeddings more than tokens (padding to a round number, appended meta tokens).
    """
    vocab_size = read_config(folder).vocab_size
    tokenizer = load_tokenizer(folder)
    if not tokenizer.vocab_size <= vocab_size <= tokenizer.vocab_size + SPARE_ROWS:
        sizes = f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}"
        raise ValueError(f"{folder}: {sizes}; put the checkpoint's own tokenizer into its folder")
    dtype = dtype_that_fits(Path(folder), dtype) if device.type == "cpu" else dtype
    return load_any(folder, dtype, device), tokenizer
