"""A Mistral-compatible transformer in plain PyTorch.

The architecture is Mistral 7B (Jiang et al. 2023, arXiv 2310.06825): RMSNorm, rotary
position embeddings, grouped-query attention with a sliding window, SwiGLU. Two switches cover its
relatives: biases on q, k and v (Qwen2), norms on q and k (Qwen3). (Scaled rotary positions of
Llama 3.1 override MistralConfig.frequencies in support/checkpoints.py.)

A cache decides which keys a query attends to: KVCache for text, ThoughtCache (thoughts.py) for
thoughts. Layers and the loop over layers are the same for both.

Letters of the shape comments, here and in thoughts.py:
    B, T      sequences in a batch, positions in a sequence
    S         keys that a query may attend to, T of them new (S = T at the start of a text)
    V, D      vocabulary size, hidden size
    H, Hkv    query heads, key/value heads (H is a multiple of Hkv)
    Dh        size of a head

The file is ordered from the parts to the whole: config, attention, layers, model, then loading and
saving. It imports nothing else of this repository. "Ours:" marks a choice of this project.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ACTIVATION = F.silu  # of the MLP; config.json stores its name as hidden_act


def check_range(settings: object, low: float, high: float, *names: str) -> None:
    """Raise ValueError if one of the named settings is not in low .. high. None is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:  # NaN is refused too
            allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"{name} is {value}; it must be {allowed}")


@dataclass(frozen=True)
class MistralConfig:
    """The shape of a model. Names are those of config.json."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # width of the MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # Hkv
    head_dim: int | None = None  # Dh; None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = None  # keys that a query attends to, its own included; None: all
    tie_word_embeddings: bool = False  # whether lm_head is the embedding matrix
    max_position_embeddings: int = 32768  # not used by the model; kept for other tools
    bos_token_id: int | None = None  # not used by the model; kept for the tokenizer
    eos_token_id: int | list[int] | None = None  # not used by the model; kept for the tokenizer
    model_type: str = "mistral"  # or llama, qwen2, qwen3, with support.checkpoints.FamilyConfig

    def __post_init__(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // max(heads, 1))
        sizes = [field.name for field in fields(self)[:7]]
        check_range(self, 1, 2**20, *sizes)  # products of sizes fit into int64
        if heads % kv_heads or self.head_dim % 2:
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
                f"({kv_heads}), and head_dim ({self.head_dim}) must be even"
            )
        check_range(self, 1, math.inf, "sliding_window")
        check_range(self, 1e-12, math.inf, "rms_norm_eps", "rope_theta")

    def frequencies(self, device: torch.device) -> Tensor:
        """The rotary frequencies [Dh/2] of the pairs of a head, in radians per position."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        return self.rope_theta ** (-pairs / self.head_dim)


# ---------------------------------------------------------------------------------- attention


def rotary_tables(positions: Tensor, config: MistralConfig, dtype: torch.dtype) -> Tensor:
    """Cosines and sines [2, T, Dh] of the rotary angles at integer positions [T].

    Angles are computed in float32. bfloat16 would round positions near 4,000 to multiples of 16.
    """
    angles = positions.float()[:, None] * config.frequencies(positions.device)  # [T, Dh/2]
    angles = torch.cat([angles, angles], dim=-1)  # [T, Dh] the same for both halves of a head
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Apply rotary embeddings rotary [2, T, Dh] to queries or keys x [B, heads, T, Dh].

    Dimension i of a head forms a pair with i + Dh/2 (rotate-half).
    """
    cos, sin = rotary  # [T, Dh] each: the same for every head
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def in_window(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """Causal sliding-window mask. The shapes broadcast.

    A query attends to exactly `window` keys, its own included, as in Mistral: key > query - window.
    """
    visible = key_position <= query_position
    return visible if window is None else visible & (key_position > query_position - window)


class KVCache:
    """Keys and values of a text. Queries attend to the text up to their own position.

    layers holds the keys and values [B, Hkv, length, Dh] of every layer.
    """

    def __init__(self, config: MistralConfig):
        self.window = config.sliding_window
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """The number of tokens that have been read."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the next T tokens in a layer: q [B, H, T, Dh] -> the same shape.

        k, v [B, Hkv, T, Dh] are the keys and values of these tokens. They are added to the cache.
        """
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            before_k, before_v = self.layers[layer]
            k, v = torch.cat([before_k, k], dim=2), torch.cat([before_v, v], dim=2)
            self.layers[layer] = k, v  # [B, Hkv, S, Dh]
        T, S = q.shape[2], k.shape[2]
        if S == T and (self.window is None or self.window >= S):  # plain causal: a faster kernel
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        position = torch.arange(S, device=q.device)
        visible = in_window(position[S - T :, None], position, self.window)  # [T, S]
        return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)

    def truncate(self, length: int) -> None:
        """Keep only the first `length` tokens. think_last removes a thought in this way."""
        self.layers = [(k[:, :, :length], v[:, :, :length]) for k, v in self.layers]


# ---------------------------------------------------------------------------------- the model


class Attention(nn.Module):
    """The projections before and after attention. The cache computes attention itself."""

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
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, Dh]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        both = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)  # one rotation for q and k
        q, k = rotate(both, rotary).split([q.shape[1], k.shape[1]], dim=1)
        return q, k, v

    def output(self, attended: Tensor) -> Tensor:
        """The output projection: attended [B, H, T, Dh] -> [B, T, D]."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ACTIVATION(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A pre-norm transformer layer: before attention, attention in the cache, after attention."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D], rotary [2, T, Dh] -> q [B, H, T, Dh], k and v [B, Hkv, T, Dh]."""
        return self.self_attn.project(self.input_layernorm(x), rotary)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [B, T, D] and attended [B, H, T, Dh] -> the output of the layer [B, T, D]."""
        x = x + self.self_attn.output(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, rotary: Tensor, attend: Callable) -> Tensor:
        """x [B, T, D] -> [B, T, D]. attend(q, k, v) -> [B, H, T, Dh] is a method of the cache."""
        return self.after(x, attend(*self.before(x, rotary)))


class Mistral(nn.Module):
    """The language model: ids [B, T] -> logits [B, T, V].

    Weights are initialised from a normal distribution of standard deviation 1 / sqrt(D). Ours: a
    fixed 0.02 is too small for the narrow model of the built-in corpus.
    """

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(V, D, _weight=torch.empty(V, D))  # initialised below
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(D, config.rms_norm_eps)
        self.lm_head = nn.Linear(D, V, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=D**-0.5)
        self.tie_head()

    def tie_head(self) -> None:
        """Make lm_head share the embedding matrix if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def run(self, x: Tensor, cache, positions: Tensor | None = None) -> Tensor:
        """Embeddings x [B, T, D] through all layers -> final hidden states h of the same shape.

        cache: a KVCache or ThoughtCache; it stores the keys and decides which of them are visible.
        positions [T]: rotary positions. None: the positions after the text in the KVCache.
        """
        if positions is None:
            positions = torch.arange(cache.length, cache.length + x.shape[1], device=x.device)
        rotary = rotary_tables(positions, self.config, x.dtype)  # [2, T, Dh]
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, partial(cache.attend, index))
        return self.norm(x)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, V] of the next token, in the dtype of the model.

        cache: holds the text before ids, and is extended by ids. None: ids start a text.
        """
        return self.lm_head(self.run(self.embed_tokens(ids), cache or KVCache(self.config)))


# ---------------------------------------------------------------------------------- checkpoints


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Memory-mapped tensors of a file. Raises ValueError if it is missing or damaged."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing or not a complete safetensors file: {error}") from None


def assign_weights(module: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Assign `weights` to the parameters of `module` without copying.

    Raises ValueError that names every tensor that is missing, unexpected or of the wrong shape.
    """
    try:
        module.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{source} does not fit its config: {' '.join(problems)}") from None


def build(config: MistralConfig, weights: dict[str, Tensor], source: Path, dtype, device):
    """Build a Mistral from `weights`, keyed by parameter name. Clears `weights`.

    dtype None keeps the dtype of the weights. Raises ValueError if the weights do not fit.
    """
    with torch.device("meta"):
        model = Mistral(config)
    if config.tie_word_embeddings and "embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    assign_weights(model, weights, source)
    weights.clear()  # so that a file is unmapped when the last of its tensors has been converted
    model.tie_head()
    widest = reduce(torch.promote_types, (parameter.dtype for parameter in model.parameters()))
    return model.to(device=device, dtype=dtype or widest)  # a file may hold several dtypes


def load_mistral(folder: str | Path, dtype: torch.dtype | None = None, device="cpu") -> Mistral:
    """Load a Mistral from a Hugging Face folder: config.json and model.safetensors, or shards.

    dtype None keeps the dtype of the file. Raises ValueError for another model_type, a config that
    asks for another computation, and weights that are missing or do not fit. Other formats and
    families (params.json, Llama, Qwen) are read by support.checkpoints.load_any.
    """
    folder = Path(folder)
    raw = {"rms_norm_eps": 1e-6, "sliding_window": 4096}  # what transformers takes if not given
    raw |= json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw |= raw.get("rope_parameters") or {}  # since transformers 5
    computed = {"model_type": "mistral", "hidden_act": ACTIVATION.__name__, "rope_type": "default"}
    computed |= {"rope_scaling": None, "layer_types": None, "quantization_config": None}
    for name, value in computed.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{folder}: {name} is {raw[name]!r}; load_mistral supports {value!r}")
    names = [field.name for field in fields(MistralConfig)]
    try:
        config = MistralConfig(**{name: raw[name] for name in names if name in raw})
    except TypeError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    tensors = [item for file in sorted(files) for item in read_tensors(folder / file).items()]
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors}
    del tensors
    return build(config, weights, folder, dtype, device)


def save_mistral(model: Mistral, folder: str | Path) -> None:
    """Write config.json and model.safetensors as Hugging Face's tools expect them."""
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name if name.startswith("lm_head.") else f"model.{name}": parameter.detach().contiguous()
        for name, parameter in model.named_parameters()  # lists a tied head once, as embed_tokens
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    metadata = {
        "architectures": [f"{config.model_type.capitalize()}ForCausalLM"],
        "hidden_act": ACTIVATION.__name__,
        "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
    }
    text = json.dumps(metadata | asdict(config), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
