"""A Mistral-compatible transformer that reads and writes Mistral's and Hugging Face's checkpoints.

The architecture of Mistral 7B (Jiang et al. 2023, arXiv 2310.06825): RMSNorm, rotary positions,
grouped-query attention in a sliding window, SwiGLU. A Llama checkpoint without biases or scaled
rotary positions is the same thing without a window and loads too.

Letters of the shape comments, here and in thoughts.py:
    B, T      sequences in a batch, positions in a sequence
    S         keys that a query can look back on, T of them new (S = T without a cache)
    V, D      vocabulary, width
    H, Hkv    heads of queries, heads of keys and values (H is a multiple of Hkv)
    Dh        size of a head

The file reads bottom-up: config, attention, layers, model, then the two checkpoint formats.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class MistralConfig:
    """The shape of a model, with the names of config.json."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # width inside the MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # Hkv
    head_dim: int | None = None  # Dh; None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = None  # keys a query sees, itself included; None: all
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768  # what it was trained on; this and the two ids below
    bos_token_id: int | None = None  # are kept for the tokenizer and for other tools
    eos_token_id: int | list[int] | None = None

    def __post_init__(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for name in (*sizes, "num_attention_heads", "num_key_value_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of "
                f"num_key_value_heads ({kv_heads})"
            )
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) is no multiple of num_attention_heads "
                    f"({heads}); give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}; give at least 1, or null")


# ---------------------------------------------------------------------------------- attention


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Cosines and sines [2, ..., Dh] of the rotary angles at integer positions [...].

    Angles are computed in float32: at position 4,000 bfloat16 would be off by whole turns.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[..., None] / theta ** (pairs / head_dim)  # [..., Dh/2]
    angles = torch.cat([angles, angles], dim=-1)  # [..., Dh]: both halves of a head turn alike
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn queries or keys x [..., T, heads, Dh] by the angles rotary [2, T, Dh] (rotate-half)."""
    cos, sin = rotary[:, :, None, :]  # [T, 1, Dh] each: the same for every head
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def in_window(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """Whether a query sees a key: not later than itself, and among its `window` latest positions.

    Exactly `window` keys with its own, as in Mistral: key > query - window. The shapes broadcast.
    """
    visible = key_position <= query_position
    if window is not None:
        visible = visible & (key_position > query_position - window)
    return visible


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Grouped-query attention of the T newest positions over all S of them.

    q [B, H, T, Dh], k and v [B, Hkv, S, Dh] with S >= T -> [B, H, T, Dh].
    """
    T, S = q.shape[-2], k.shape[-2]
    whole = window is None or window >= S  # no key is too old
    visible = None  # a lone query that sees every key, or plain causal: the kernel needs no mask
    if not (whole and T in (1, S)):
        position = torch.arange(S, device=q.device)
        visible = in_window(position[S - T :, None], position, window)  # [T, S]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # [B, H, S, Dh]
    return F.scaled_dot_product_attention(q, k, v, visible, is_causal=whole and T == S > 1)


class Cache:
    """Keys and values of text already read, [layers, 2, B, Hkv, capacity, Dh], `length` of them.

    Allocated once, so that a step of generation copies nothing. Setting `length` back forgets
    what came after: that is how a thought leaves no trace in the text's cache.
    """

    def __init__(self, model: "Mistral", batch: int, capacity: int):
        config, weight = model.config, model.embed_tokens.weight
        self.length = 0
        per_layer = (2, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys_values = weight.new_empty(config.num_hidden_layers, *per_layer)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k, v [B, Hkv, T, Dh] of a layer; return all S of them.

        `length` moves once per pass, not per layer: Mistral.hidden_states does it at its end.
        """
        end = self.length + k.shape[-2]
        if end > self.keys_values.shape[-2]:
            raise ValueError(
                f"the cache holds {self.keys_values.shape[-2]} positions, {end} are needed; "
                "make it with a larger capacity"
            )
        stored = self.keys_values[layer]
        stored[:, :, :, self.length : end] = torch.stack([k, v])
        return stored[0, :, :, :end], stored[1, :, :, :end]

    def repeat(self, samples: int) -> None:
        """Turn the cache of one sequence into that of `samples` copies: they share a prefill."""
        self.keys_values = self.keys_values.repeat_interleave(samples, dim=2)


# ---------------------------------------------------------------------------------- the model


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if it is in less: norms, softmax and losses lose too much in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the norm computed in float32 also where x is bfloat16."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """The four projections; what a query sees is decided by whoever calls the layer."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        D, Dh = config.hidden_size, config.head_dim
        self.head_dim = Dh
        self.q_proj = nn.Linear(D, config.num_attention_heads * Dh, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * Dh, D, bias=False)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One layer, in two halves with the attention between them.

    Text and thoughts differ only in which keys a query sees, so that is all the caller supplies.
    """

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def project(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D], rotary [2, T, Dh] -> q [B, H, T, Dh], k and v [B, Hkv, T, Dh]."""
        attn, x = self.self_attn, self.input_layernorm(x)
        q, k, v = (
            projection(x).unflatten(-1, (-1, attn.head_dim))  # [B, T, heads, Dh]
            for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = rotate(q, rotary), rotate(k, rotary)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [B, T, D] and what its queries attended to [B, H, T, Dh] -> the layer's output."""
        x = x + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))  # [B, T, D]
        return x + self.mlp(self.post_attention_layernorm(x))


class Mistral(nn.Module):
    """ids [B, T] -> logits [B, T, V].

    Weights are random until they are loaded: normal, with standard deviation 1 / sqrt(D), so that
    a small model learns as readily as a wide one (0.016 at the width of Mistral 7B).
    """

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.config = config
        # Not nn.Embedding(V, D), which draws weights itself; on the meta device that alone costs
        # seconds of imports, before every start from a checkpoint.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=config.hidden_size**-0.5)
        self.tie_head()

    def tie_head(self) -> None:
        """Make the head the embeddings, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def rotary(self, positions: Tensor) -> Tensor:
        """The rotary tables [2, T, Dh] of integer positions [T], in the model's dtype."""
        dtype = self.embed_tokens.weight.dtype
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta, dtype)

    def hidden_states(
        self, x: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Embeddings x [B, T, D] -> final hidden states [B, T, D] and every layer's (k, v).

        Without a cache x is the text from its start. With one, x continues what it holds, its
        keys are added, and the (k, v) returned are all S of them.
        """
        start = cache.length if cache else 0
        rotary = self.rotary(torch.arange(start, start + x.shape[1], device=x.device))
        keys_values = []
        for index, layer in enumerate(self.layers):
            q, k, v = layer.project(x, rotary)
            if cache:
                k, v = cache.append(index, k, v)
            x = layer.finish(x, causal_attention(q, k, v, self.config.sliding_window))
            keys_values.append((k, v))
        if cache:
            cache.length += x.shape[1]
        return self.norm(x), keys_values

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, V] of the next token, in the model's dtype."""
        return self.lm_head(self.hidden_states(self.embed_tokens(ids), cache)[0])


# ---------------------------------------------------------------------------------- checkpoints


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, then rename it: never half of a file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    write_file(path, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if it is missing, broken or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def read_config(folder: Path) -> MistralConfig:
    """MistralConfig from a folder's config.json (Hugging Face) or params.json (Mistral).

    Raises ValueError for what would load and then compute something else: another architecture,
    biases, scaled rotary positions.
    """
    if (folder / "config.json").is_file():
        return hugging_face_config(folder / "config.json")
    if (folder / "params.json").is_file():
        return mistral_config(folder / "params.json")
    raise ValueError(f"{folder} is no checkpoint folder: neither config.json nor params.json in it")


def hugging_face_config(path: Path) -> MistralConfig:
    """MistralConfig from a Hugging Face config.json."""
    raw = read_json(path)
    rope = raw.get("rope_parameters") or {}  # where transformers 5 writes what was rope_theta
    refused = {
        "model_type": raw.get("model_type") not in ("mistral", "llama"),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "rope_scaling": raw.get("rope_scaling") is not None,
        "rope_parameters": rope.get("rope_type", "default") != "default",
    }
    for name, bad in refused.items():
        if bad:
            raise ValueError(
                f"{path}: {name} is {raw.get(name)!r}; this model has mistral's or llama's "
                "architecture with silu, without biases and without scaled rotary positions"
            )
    names = {field.name for field in fields(MistralConfig)}
    known = {name: value for name, value in raw.items() if name in names}
    if "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    known.setdefault("num_key_value_heads", known.get("num_attention_heads"))
    return _config(known, path)


def mistral_config(path: Path) -> MistralConfig:
    """MistralConfig from Mistral's own params.json."""
    raw = read_json(path)
    names = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "hidden_dim": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "head_dim": "head_dim",
        "vocab_size": "vocab_size",
        "rope_theta": "rope_theta",
        "sliding_window": "sliding_window",
    }
    return _config({ours: raw[theirs] for theirs, ours in names.items() if theirs in raw}, path)


def _config(known: dict, path: Path) -> MistralConfig:
    try:
        return MistralConfig(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the index's shards, one file, or Mistral's own."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no weight_map")
        files = [folder / name for name in sorted(set(shards.values()))]
    else:
        files = [folder / "model.safetensors"]
        if not files[0].is_file():
            files = sorted(folder.glob("consolidated*.safetensors")) or files
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing")
    return files


SAFETENSORS_DTYPES = {  # of weights, as safetensors names them; no quantised ones
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def open_tensors(file: Path):
    """A safetensors file, opened; ValueError if it is broken or cut short."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}); fetch it again") from None


def read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor of safetensors files, each read into memory of its own.

    Ours: not through safetensors' memory map, whose pages cost as much time again as reading and
    stay resident beside the copies. (A file is the length of a JSON header in 8 bytes, the header,
    and the data, to which its offsets refer.)
    """
    for file in files:
        with open_tensors(file) as reader:  # checks the whole layout
            names = list(reader.keys())
        with file.open("rb") as stream:
            begin = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(begin - 8))
            for name in names:
                entry = header[name]
                if entry["dtype"] not in SAFETENSORS_DTYPES:
                    raise ValueError(
                        f"{file}: {name} is {entry['dtype']}; allowed are "
                        f"{', '.join(SAFETENSORS_DTYPES)}"
                    )
                first, end = entry["data_offsets"]
                raw = torch.empty(end - first, dtype=torch.uint8)
                stream.seek(begin + first)
                stream.readinto(raw.numpy())
                yield name, raw.view(SAFETENSORS_DTYPES[entry["dtype"]]).view(entry["shape"])


def hugging_face_name(name: str) -> str:
    """A tensor's name in Mistral's own checkpoints -> its name here."""
    for theirs, ours in (
        ("tok_embeddings.", "embed_tokens."),
        ("output.", "lm_head."),
        (".attention_norm.", ".input_layernorm."),
        (".ffn_norm.", ".post_attention_layernorm."),
        (".attention.w", ".self_attn.w"),
        (".self_attn.wq.", ".self_attn.q_proj."),
        (".self_attn.wk.", ".self_attn.k_proj."),
        (".self_attn.wv.", ".self_attn.v_proj."),
        (".self_attn.wo.", ".self_attn.o_proj."),
        (".feed_forward.w1.", ".mlp.gate_proj."),
        (".feed_forward.w2.", ".mlp.down_proj."),
        (".feed_forward.w3.", ".mlp.up_proj."),
    ):
        name = name.replace(theirs, ours)
    return name


def interleaved_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k projection: rotary pairs side by side (Mistral's own) -> rotate-half.

    weight [heads * Dh, D]; row 2i of a head becomes row i, row 2i + 1 row Dh/2 + i.
    """
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def read_weights(
    folder: Path,
    config: MistralConfig,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of either format, under the names of Mistral's parameters."""
    files = weight_files(folder)
    weights = {}
    for name, tensor in read_tensors(files):
        if files[0].name.startswith("consolidated"):
            name = hugging_face_name(name)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = interleaved_to_halves(tensor, config.head_dim)
        weights[name.removeprefix("model.")] = tensor.to(device=device, dtype=dtype)
    return weights


def load_weights(module: nn.Module, weights: dict[str, Tensor], where: Path) -> None:
    """Make these tensors the parameters of a module built on the meta device, copying nothing.

    Strict: ValueError names every tensor that is missing, unexpected or misshapen.
    """
    try:
        module.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{where} does not fit its config: {' '.join(problems)}") from None


def build_mistral(config: MistralConfig, weights: dict[str, Tensor], where: Path) -> Mistral:
    """A model whose parameters are these tensors; `where` they came from is for error messages."""
    with torch.device("meta"):
        model = Mistral(config)
    if config.tie_word_embeddings and "embed_tokens.weight" in weights:
        weights = weights | {"lm_head.weight": weights["embed_tokens.weight"]}
    load_weights(model, weights, where)
    model.tie_head()
    return model


def load_mistral(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Mistral:
    """A model from a checkpoint folder in Hugging Face's format or Mistral's own.

    dtype None keeps that of the file. Tensors are read one at a time: there are never two copies
    of the whole model.
    Raises ValueError for a missing or broken file, a config that asks for something else than
    this architecture, and weights that do not fit it.
    """
    folder = Path(folder)
    config = read_config(folder)
    return build_mistral(config, read_weights(folder, config, dtype, device), folder)


def save_mistral(model: Mistral, folder: str | Path) -> None:
    """Write config.json and model.safetensors as Hugging Face's tools expect them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name if name.startswith("lm_head.") else f"model.{name}": parameter.detach().contiguous()
        for name, parameter in model.named_parameters()  # lists a tied head once, as embed_tokens
    }
    write_tensors(folder / "model.safetensors", weights)
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        **asdict(model.config),
    }
    write_json(folder / "config.json", config)
