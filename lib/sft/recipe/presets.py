"""Model geometries by name, and what follows from a geometry alone: parameters, FLOPs. Standard library only.

Figures: the published configurations of OLMo 2, OLMo 3, Qwen 3 and Llama 3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from sft.common.errors import SftError
from sft.recipe.schema import Model


@dataclass(frozen=True)
class Yarn:
    """YaRN rotary scaling (arXiv 2309.00071), applied to full-attention layers only."""

    factor: float = 8.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    old_context: int = 8192


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's rotary scaling: long waves slowed by `factor`, short ones kept, a ramp in between. Applied to all layers."""

    factor: float = 8.0
    low: float = 1.0  # waves longer than old_context / low are slowed
    high: float = 4.0  # waves shorter than old_context / high are kept
    old_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A resolved architecture: a decoder with RMS norms, rotary embedding, SwiGLU and no biases. The defaults are OLMo's."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    window: int = 0
    rope_theta: float = 500_000.0
    yarn: Yarn | None = None
    init_std: float = 0.02
    norm_eps: float = 1e-6
    prenorm: bool = False  # the norms come before attention and SwiGLU, not after them
    qk_norm: str = "full"  # queries and keys are normalised over the 'full' projection, each 'head', or ''
    tied: bool = False  # the head's matrix is the embedding
    llama3_rope: Llama3Rope | None = None

    def layer_window(self, layer: int) -> int:
        """Window of one layer in tokens, itself included; 0 = full. Every fourth layer of a windowed model is full."""
        return 0 if layer % 4 == 3 else self.window

    @property
    def windows(self) -> tuple[int, ...]:
        return tuple(self.layer_window(i) for i in range(self.n_layers))

    @property
    def parameters(self) -> int:
        """Trainable scalars: embedding and head, four projections, three SwiGLU matrices, norms."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        norms = 2 * self.d_model + {"full": q + kv, "head": 2 * self.head_dim, "": 0}[self.qk_norm]
        block = self.d_model * (2 * q + 2 * kv + 3 * self.intermediate_size) + norms
        return self.n_layers * block + self.d_model * ((2 - self.tied) * self.vocab_size + 1)


_OLMO2_7B = ModelConfig(32, 4096, 32, 32, 128, 11008, 100352)
_OLMO3_7B = replace(_OLMO2_7B, window=4096, yarn=Yarn())
_QWEN3_8B = ModelConfig(
    36, 4096, 32, 8, 128, 12288, 151936, rope_theta=1e6, prenorm=True, qk_norm="head"
)  # fmt: skip
_LLAMA3_8B = ModelConfig(
    32, 4096, 32, 8, 128, 14336, 128256, norm_eps=1e-5, prenorm=True, qk_norm="", llama3_rope=Llama3Rope()
)  # fmt: skip
PRESETS = {
    "olmo2-1b": ModelConfig(16, 2048, 16, 16, 128, 8192, 100352),
    "olmo2-7b": _OLMO2_7B,
    "olmo2-13b": ModelConfig(40, 5120, 40, 40, 128, 13824, 100352),
    "olmo2-32b": ModelConfig(64, 5120, 40, 8, 128, 27648, 100352),
    "olmo3-7b": _OLMO3_7B,
    "olmo3-32b": ModelConfig(64, 5120, 40, 8, 128, 27648, 100352, window=4096, yarn=Yarn()),
    "qwen3-0.6b": replace(_QWEN3_8B, n_layers=28, d_model=1024, n_heads=16, intermediate_size=3072, tied=True),
    "qwen3-1.7b": replace(_QWEN3_8B, n_layers=28, d_model=2048, n_heads=16, intermediate_size=6144, tied=True),
    "qwen3-4b": replace(_QWEN3_8B, d_model=2560, intermediate_size=9728, tied=True),
    "qwen3-8b": _QWEN3_8B,
    "llama3.1-8b": _LLAMA3_8B,
    "llama3.2-1b": replace(
        _LLAMA3_8B,
        n_layers=16,
        d_model=2048,
        head_dim=64,
        intermediate_size=8192,
        tied=True,
        llama3_rope=Llama3Rope(factor=32.0),
    ),
    # Tiny geometries for laptops: 0 in vocab_size means "the tokenizer's, padded to a multiple of 128".
    "olmo2-tiny": ModelConfig(4, 128, 4, 4, 32, 384, 0),
    "olmo3-tiny": ModelConfig(4, 128, 4, 2, 32, 384, 0, window=64),
    "qwen3-tiny": replace(
        _QWEN3_8B,
        n_layers=4,
        d_model=128,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        intermediate_size=384,
        vocab_size=0,
        tied=True,
    ),
    "llama3-tiny": replace(
        _LLAMA3_8B, n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, intermediate_size=384, vocab_size=0
    ),
}


def recipe_field(name: str) -> str:
    """The field of the recipe's [model] that sets this field of ModelConfig."""
    return "hidden" if name == "intermediate_size" else name


def resolve(model: Model, tokenizer_size: int = 0) -> ModelConfig:
    """The architecture a recipe asks for.

    `tokenizer_size` is the number of ids of the tokenizer; it decides vocab_size where neither recipe nor preset does
    and must fit it where they do. Raises SftError with both values.
    """
    base = PRESETS[model.preset]
    options = {f.name: getattr(model, recipe_field(f.name), None) for f in fields(ModelConfig)}
    config = replace(base, **{name: value for name, value in options.items() if value is not None})
    if model.yarn_factor is not None:
        config = replace(
            config, yarn=replace(config.yarn or Yarn(), factor=model.yarn_factor) if model.yarn_factor else None
        )
    if not config.vocab_size and tokenizer_size:
        config = replace(config, vocab_size=-(-tokenizer_size // 128) * 128)
    if tokenizer_size > config.vocab_size > 0:
        raise SftError(
            f"[model] vocab_size {config.vocab_size} is smaller than the tokenizer's {tokenizer_size} ids; raise it"
        )
    if config.n_heads % config.n_kv_heads:
        raise SftError(f"[model] n_heads {config.n_heads} is not a multiple of n_kv_heads {config.n_kv_heads}")
    return config
