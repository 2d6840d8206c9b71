"""Model geometries by name, and what follows from a geometry alone: parameters, FLOPs. Standard library only.

Figures: the published OLMo 2 and OLMo 3 configurations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from sft.errors import SftError
from sft.schema import Model


@dataclass(frozen=True)
class Yarn:
    """YaRN rotary scaling (arXiv 2309.00071), applied to full-attention layers only."""

    factor: float = 8.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    old_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A resolved architecture: reordered-norm OLMo block, QK-norm over the full projection, SwiGLU, no biases."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    vocab_size: int
    window: int = 0
    rope_theta: float = 500_000.0
    yarn: Yarn | None = None
    init_std: float = 0.02
    norm_eps: float = 1e-6

    def layer_window(self, layer: int) -> int:
        """Window of one layer in tokens, itself included; 0 = full. Every fourth layer of a windowed model is full."""
        return 0 if layer % 4 == 3 else self.window

    @property
    def windows(self) -> tuple[int, ...]:
        return tuple(self.layer_window(i) for i in range(self.n_layers))

    @property
    def parameters(self) -> int:
        """Trainable scalars: untied embedding and head, four projections, three SwiGLU matrices, norms."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        block = self.d_model * (2 * q + 2 * kv + 3 * self.hidden) + q + kv + 2 * self.d_model
        return self.n_layers * block + self.d_model * (2 * self.vocab_size + 1)


_OLMO2_7B = ModelConfig(32, 4096, 32, 32, 128, 11008, 100352)
_OLMO3_7B = replace(_OLMO2_7B, window=4096, yarn=Yarn())
PRESETS = {
    "olmo2-1b": ModelConfig(16, 2048, 16, 16, 128, 8192, 100352),
    "olmo2-7b": _OLMO2_7B,
    "olmo2-13b": ModelConfig(40, 5120, 40, 40, 128, 13824, 100352),
    "olmo2-32b": ModelConfig(64, 5120, 40, 8, 128, 27648, 100352),
    "olmo3-7b": _OLMO3_7B,
    "olmo3-32b": ModelConfig(64, 5120, 40, 8, 128, 27648, 100352, window=4096, yarn=Yarn()),
    # Tiny geometries for laptops: 0 in vocab_size means "the tokenizer's, padded to a multiple of 128".
    "olmo2-tiny": ModelConfig(4, 128, 4, 4, 32, 384, 0),
    "olmo3-tiny": ModelConfig(4, 128, 4, 2, 32, 384, 0, window=64),
}


def resolve(model: Model, tokenizer_size: int = 0) -> ModelConfig:
    """The architecture a recipe asks for.

    `tokenizer_size` is the number of ids of the tokenizer; it decides vocab_size where neither recipe nor preset does
    and must fit it where they do. Raises SftError with both values.
    """
    base = PRESETS[model.preset]
    given = {f.name: getattr(model, f.name) for f in fields(ModelConfig) if getattr(model, f.name, None) is not None}
    config = replace(base, **given)
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
