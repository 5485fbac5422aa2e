"""A Mistral-compatible transformer that reads and writes Mistral's and Hugging Face's checkpoints.

The architecture of Mistral 7B (Jiang et al. 2023, arXiv 2310.06825): RMSNorm, rotary positions,
grouped-query attention in a sliding window, SwiGLU. A Llama checkpoint without biases or scaled
rotary positions is the same thing without a window and loads too.

What a query sees is decided by a cache: KVCache for the text, ThoughtCache in thoughts.py for
thoughts. So there is one layer and one loop over layers for both.

Letters of the shape comments, here and in thoughts.py:
    B, T      sequences in a batch, positions in a sequence
    S         keys that a query can look back on, T of them new (S = T where the text begins)
    V, D      vocabulary, width
    H, Hkv    heads of queries, heads of keys and values (H is a multiple of Hkv)
    Dh        size of a head

The file reads bottom-up: config, attention, layers, model, then reading and writing checkpoints.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data import check_at_least, read_json, settings_from, write_file, write_json


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
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if heads % kv_heads or self.head_dim % 2:
            raise ValueError(
                f"{heads} heads are no multiple of {kv_heads}, or {self.head_dim} is odd"
            )
        check_at_least(self, vocab_size=1, head_dim=2, sliding_window=1)


# ---------------------------------------------------------------------------------- attention


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Cosines and sines [2, T, Dh] of the rotary angles at integer positions [T].

    Angles are computed in float32: at position 4,000 bfloat16 would be off by whole turns.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] / theta ** (pairs / head_dim)  # [T, Dh/2]
    angles = torch.cat([angles, angles], dim=-1)  # [T, Dh]: both halves of a head turn alike
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn queries or keys x [B, T, heads, Dh] by the angles rotary [2, T, Dh] (rotate-half)."""
    cos, sin = rotary[:, :, None, :]  # [T, 1, Dh] each: the same for every head
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def in_window(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """Whether a query sees a key: not later than itself, and among its `window` latest positions.

    Exactly `window` keys with its own, as in Mistral: key > query - window. The shapes broadcast.
    """
    visible = key_position <= query_position
    return visible if window is None else visible & (key_position > query_position - window)


class KVCache:
    """What a query of the text sees: the text up to itself, within the sliding window.

    It holds the keys and values [B, Hkv, length, Dh] of the text read so far, for every layer.
    """

    def __init__(self, config: MistralConfig):
        self.window = config.sliding_window
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """Tokens that have been read."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the next T tokens in a layer over all S: q [B, H, T, Dh] -> the same shape.

        k, v [B, Hkv, T, Dh] are their own keys and values, which the cache keeps.
        """
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            before_k, before_v = self.layers[layer]
            k, v = torch.cat([before_k, k], dim=2), torch.cat([before_v, v], dim=2)
            self.layers[layer] = k, v  # [B, Hkv, S, Dh]
        T, S = q.shape[2], k.shape[2]
        if S == T and (self.window is None or self.window >= S):  # the plain case has a fast kernel
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        position = torch.arange(S, device=q.device)
        visible = in_window(position[S - T :, None], position, self.window)  # [T, S]
        return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens: a thought leaves no trace in the text."""
        self.layers = [(k[:, :, :length], v[:, :, :length]) for k, v in self.layers]


# ---------------------------------------------------------------------------------- the model


class Attention(nn.Module):
    """Queries, keys and values, and what becomes of what was attended to."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        D, Dh, self.head_dim = config.hidden_size, config.head_dim, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * Dh, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * Dh, D, bias=False)

    def project(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D], rotary [2, T, Dh] -> q [B, H, T, Dh], k and v [B, Hkv, T, Dh]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))  # [B, T, heads, Dh]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotary), rotate(k, rotary)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, rotary: Tensor, attend: Callable) -> Tensor:
        """x [B, T, D] -> [B, T, D]; attend(q, k, v) -> [B, H, T, Dh]."""
        attended = attend(*self.project(x, rotary))  # [B, H, T, Dh]
        return self.o_proj(attended.transpose(1, 2).flatten(2))  # [B, T, D]


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
    """Attention behind a norm, MLP behind a norm."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Tensor, attend: Callable) -> Tensor:
        """x [B, T, D] -> [B, T, D]; attend is the cache's: it decides what a query sees."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Mistral(nn.Module):
    """ids [B, T] -> logits [B, T, V].

    Weights are random until they are loaded: normal, with standard deviation 1 / sqrt(D), so that
    a small model learns as readily as a wide one (0.016 at the width of Mistral 7B).
    """

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.config = config
        # Not nn.Embedding(V, D): on the meta device that costs every start a second of imports.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=config.hidden_size**-0.5)
        self.tie_head()

    def tie_head(self) -> None:
        """Make the head the embeddings, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def run(self, x: Tensor, cache, positions: Tensor | None = None) -> Tensor:
        """Embeddings x [B, T, D] through all layers -> final hidden states h [B, T, D].

        cache: a KVCache or ThoughtCache, which decides what the T queries see and keeps their keys.
        positions [T]: their rotary positions; None: those after the text in the KVCache.
        """
        if positions is None:
            positions = torch.arange(cache.length, cache.length + x.shape[1], device=x.device)
        config = self.config
        rotary = rotary_tables(positions, config.head_dim, config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, partial(cache.attend, index))
        return self.norm(x)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, V] of the next token, in the model's dtype.

        cache: holds the text before ids and is continued; None: ids begin a text.
        """
        return self.lm_head(self.run(self.embed_tokens(ids), cache or KVCache(self.config)))


# ---------------------------------------------------------------------------------- checkpoints


PARAMS_JSON = {  # Mistral's own names -> Hugging Face's, which are ours
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps", "head_dim": "head_dim", "vocab_size": "vocab_size",
    "rope_theta": "rope_theta", "sliding_window": "sliding_window",
}  # fmt: skip

CONSOLIDATED = {  # likewise, the parts of a tensor's name
    "tok_embeddings": "embed_tokens", "output": "lm_head", "attention_norm": "input_layernorm",
    "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "ffn_norm": "post_attention_layernorm", "feed_forward": "mlp",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip


def read_config(folder: Path) -> MistralConfig:
    """MistralConfig from a folder's config.json (Hugging Face) or params.json (Mistral).

    Raises ValueError for what would load and then compute something else.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "params.json").is_file():
        raw = read_json(path := folder / "params.json")
        known = {ours: raw[theirs] for theirs, ours in PARAMS_JSON.items() if theirs in raw}
        return settings_from(MistralConfig, known, path)
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint: neither config.json nor params.json in it")
    raw = read_json(path)
    rope = raw.get("rope_parameters") or {}  # where transformers 5 writes what was rope_theta
    refused = {
        "model_type": raw.get("model_type") not in ("mistral", "llama"),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "rope_scaling": raw.get("rope_scaling"),
        "rope_parameters": rope.get("rope_type", "default") != "default",
    }
    for name in filter(refused.get, refused):
        raise ValueError(
            f"{path}: {name} is {raw.get(name)!r}; this model has mistral's or llama's "
            "architecture with silu, without biases and without scaled rotary positions"
        )
    known = {f.name: (raw | rope)[f.name] for f in fields(MistralConfig) if f.name in raw | rope}
    known.setdefault("num_key_value_heads", known.get("num_attention_heads"))
    return settings_from(MistralConfig, known, path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the index's shards, one file, or Mistral's own."""
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        shards = read_json(index).get("weight_map", {})
        return [folder / name for name in sorted(set(shards.values()))]
    return [file] if file.is_file() else sorted(folder.glob("consolidated*.safetensors")) or [file]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError if it is missing, broken or cut short."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing or no whole safetensors file: {error}") from None


def read_weights(folder: Path, dtype: torch.dtype | None, device) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of either format, under the names of Mistral's parameters."""
    weights, half = {}, read_config(folder).head_dim // 2
    for file in weight_files(folder):
        for name, tensor in read_tensors(file).items():
            if file.name.startswith("consolidated"):
                name = ".".join(CONSOLIDATED.get(part, part) for part in name.split("."))
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    # rotary pairs stand side by side: row 2i of a head becomes i, 2i + 1 Dh/2 + i
                    tensor = tensor.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
            weights[name.removeprefix("model.")] = tensor.to(device=device, dtype=dtype)
    return weights


def assign_weights(module: nn.Module, weights: dict[str, Tensor], where: Path) -> None:
    """Make these tensors the parameters of a module built on the meta device, copying nothing.

    Strict: ValueError names every tensor that is missing, unexpected or misshapen.
    """
    try:
        module.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{where} does not fit its config: {' '.join(problems)}") from None


def load_mistral(folder: str | Path, dtype=None, device="cpu", weights=None) -> Mistral:
    """A model from a checkpoint folder in Hugging Face's format or Mistral's own.

    dtype None keeps that of the file. weights: those of the folder, if they have been read already.
    Raises ValueError for a missing or broken file, a config that asks for something else than
    this architecture, and weights that do not fit it.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = Mistral(read_config(folder))
    weights = read_weights(folder, dtype, device) if weights is None else weights
    if model.config.tie_word_embeddings and "embed_tokens.weight" in weights:
        weights = weights | {"lm_head.weight": weights["embed_tokens.weight"]}
    assign_weights(model, weights, folder)
    model.tie_head()
    return model


def save_mistral(model: Mistral, folder: str | Path) -> None:
    """Write config.json and model.safetensors as Hugging Face's tools expect them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name if name.startswith("lm_head.") else f"model.{name}": parameter.detach().contiguous()
        for name, parameter in model.named_parameters()  # lists a tied head once, as embed_tokens
    }
    write_file(folder / "model.safetensors", partial(save_file, weights, metadata={"format": "pt"}))
    head = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"}
    head["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", head | asdict(model.config))
