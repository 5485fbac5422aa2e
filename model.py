"""A Mistral-compatible transformer that reads and writes Mistral's and Hugging Face's checkpoints.

The architecture of Mistral 7B (Jiang et al. 2023, arXiv 2310.06825): RMSNorm, rotary positions,
grouped-query attention in a sliding window, SwiGLU. Its relatives load too: Llama (no window, from
3.1 on scaled rotary positions), Qwen2 (biases on q, k and v) and Qwen3 (norms on q and k).

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

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import formats
from data import check_at_least, settings_from, write_file, write_json


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions of Llama 3.1, stretched for longer texts than it first learned."""

    factor: float  # how much longer slow turns take
    low_freq_factor: float  # at most so many turns in a text of the original length: slow
    high_freq_factor: float  # at least so many: kept as they are
    original_max_position_embeddings: int
    rope_type: str = "llama3"

    def __post_init__(self):
        check_at_least(self, factor=1, low_freq_factor=0, original_max_position_embeddings=1)
        check_at_least(self, high_freq_factor=self.low_freq_factor + 1e-6)


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
    rope_scaling: RopeScaling | None = None
    model_type: str = "mistral"  # or llama, qwen2, qwen3

    def __post_init__(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // max(heads, 1))
        for name in [field.name for field in fields(self)[:7]]:  # three multiplied: below 2**63
            if not 1 <= getattr(self, name) <= 2**20:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are 1 to {2**20}")
        if heads % kv_heads or self.head_dim % 2:
            raise ValueError(
                f"{heads} heads are no multiple of {kv_heads}, or {self.head_dim} is odd"
            )
        check_at_least(self, sliding_window=1, rms_norm_eps=1e-12, rope_theta=1e-3)
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for token in filter(None, [self.bos_token_id, *eos]):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"bos_token_id or eos_token_id is {token}; it is no token")


# ---------------------------------------------------------------------------------- attention


def stretch(radian: Tensor, scaling: RopeScaling) -> Tensor:
    """How many positions [Dh/2] each pair takes for a radian, longer where that is many already.

    So neighbours are told apart as before, and far tokens look no farther than in shorter texts.
    """
    turns = scaling.original_max_position_embeddings / (2 * math.pi * radian)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return radian / (kept + (1 - kept) / scaling.factor)


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> Tensor:  # fmt: skip
    """Cosines and sines [2, T, Dh] of the rotary angles at integer positions [T].

    Angles are computed in float32: at position 4,000 bfloat16 would be off by whole turns.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    radian = theta ** (pairs / head_dim)  # [Dh/2], in positions
    radian = stretch(radian, scaling) if scaling else radian
    angles = positions.float()[:, None] / radian  # [T, Dh/2]
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
        bias = config.model_type == "qwen2"
        self.q_proj = nn.Linear(D, config.num_attention_heads * Dh, bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias)
        self.o_proj = nn.Linear(config.num_attention_heads * Dh, D, bias=False)
        norm = nn.RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm, self.k_norm = norm(Dh, config.rms_norm_eps), norm(Dh, config.rms_norm_eps)

    def project(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D], rotary [2, T, Dh] -> q [B, H, T, Dh], k and v [B, Hkv, T, Dh]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))  # [B, T, heads, Dh]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
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
        rotary = rotary_tables(
            positions, config.head_dim, config.rope_theta, x.dtype, config.rope_scaling
        )
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, partial(cache.attend, index))
        return self.norm(x)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, V] of the next token, in the model's dtype.

        cache: holds the text before ids and is continued; None: ids begin a text.
        """
        return self.lm_head(self.run(self.embed_tokens(ids), cache or KVCache(self.config)))


# ---------------------------------------------------------------------------------- checkpoints


def read_config(folder: Path) -> MistralConfig:
    """The config of a checkpoint's folder; ValueError if it asks for what is not computed here."""
    values, path = formats.read_config(folder)
    if scaling := values.get("rope_scaling"):
        scaling = {f.name: scaling[f.name] for f in fields(RopeScaling) if f.name in scaling}
        values["rope_scaling"] = settings_from(RopeScaling, scaling, path)
    known = {f.name: values[f.name] for f in fields(MistralConfig) if f.name in values}
    return settings_from(MistralConfig, known, path)


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
    """A model from a checkpoint folder in Hugging Face's format or Mistral's own (formats.py).

    dtype None keeps that of the file. weights: what read_weights returned, which is used up.
    Raises ValueError for a missing or broken file, a config that asks for something else than
    this architecture, and weights that do not fit it.
    """
    folder, config = Path(folder), read_config(Path(folder))
    if weights is None:
        weights = formats.read_weights(folder, config.num_hidden_layers, config.head_dim)
    with torch.device("meta"):
        model = Mistral(config)
    if model.config.tie_word_embeddings and "embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    assign_weights(model, weights, folder)
    weights.clear()  # so that a file is let go when the last of its tensors has been converted
    model.tie_head()
    kept = reduce(torch.promote_types, (parameter.dtype for parameter in model.parameters()))
    return model.to(device=device, dtype=dtype or kept)


def save_mistral(model: Mistral, folder: str | Path) -> None:
    """Write config.json and model.safetensors as Hugging Face's tools expect them."""
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name if name.startswith("lm_head.") else f"model.{name}": parameter.detach().contiguous()
        for name, parameter in model.named_parameters()  # lists a tied head once, as embed_tokens
    }
    write_file(folder / "model.safetensors", partial(save_file, weights, metadata={"format": "pt"}))
    head = {"architectures": [f"{config.model_type.capitalize()}ForCausalLM"], "hidden_act": "silu"}
    head["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    if config.model_type.startswith("qwen"):
        head |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    write_json(folder / "config.json", head | asdict(config))
