"""Model architectures by name, and their number of parameters. Standard library only.

In:  the recipe's [model]. Out: a `ModelConfig`. The figures are those of the published configurations of OLMo 2, OLMo
     3, Qwen 3 and Llama 3.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace

from sft.common.errors import SftError
from sft.recipe.schema import Model


@dataclass(frozen=True)
class Yarn:
    """YaRN rotary scaling (arXiv 2309.00071). It applies to full-attention layers only."""

    factor: float = 8.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    old_context: int = 8192

    @property
    def attention_factor(self) -> float:
        """The factor on sin and cos (section 3.4 of the paper); 1.2079 for a factor of 8."""
        return 0.1 * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's rotary scaling, which applies to all layers: long wavelengths are stretched by `factor`, short ones
    are not, and a ramp connects them."""

    factor: float = 8.0
    low: float = 1.0  # wavelengths above old_context / low are stretched
    high: float = 4.0  # wavelengths below old_context / high are not
    old_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A resolved architecture: a decoder with RMS norms, rotary embedding, SwiGLU and no biases. The defaults are those
    of OLMo."""

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
    prenorm: bool = False  # True: the norms come before attention and SwiGLU; False: after them
    qk_norm: str = (
        "full"  # queries and keys are normalised over the 'full' projection, over each 'head', or not at all ('')
    )
    tied: bool = False  # the output matrix is the embedding
    llama3_rope: Llama3Rope | None = None

    def layer_window(self, layer: int) -> int:
        """Attention window of a layer in tokens, the token itself included; 0 = full. Every fourth layer of a windowed
        model has full attention."""
        return 0 if layer % 4 == 3 else self.window

    @property
    def windows(self) -> tuple[int, ...]:
        return tuple(self.layer_window(i) for i in range(self.n_layers))

    @property
    def parameters(self) -> int:
        """Number of trainable values: embedding, output matrix, four projections, three SwiGLU matrices, norms."""
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
    # Tiny models for laptops. A vocab_size of 0 means the tokenizer's size, padded to a multiple of 128.
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


_OTHER_NAMES = {"intermediate_size": "hidden"}
_RECIPE_FIELDS = {
    f.name: _OTHER_NAMES.get(f.name, f.name)
    for f in fields(ModelConfig)
    if _OTHER_NAMES.get(f.name, f.name) in {field.name for field in fields(Model)}
}
"""The recipe's field for every field of ModelConfig that has one."""


def recipe_field(name: str) -> str:
    """The field of the recipe's [model] that sets this field of ModelConfig: "preset" where no other field does."""
    return "yarn_factor" if name == "yarn" else _RECIPE_FIELDS.get(name, "preset")


def differing_fields(a: ModelConfig, b: ModelConfig, ignore: Collection[str] = ()) -> list[str]:
    """The names of the fields in which two architectures differ."""
    return [f.name for f in fields(ModelConfig) if f.name not in ignore and getattr(a, f.name) != getattr(b, f.name)]


def resolve(model: Model, tokenizer_size: int = 0) -> ModelConfig:
    """The architecture that a recipe describes.

    `tokenizer_size` is the number of ids of the tokenizer. It sets vocab_size where neither the recipe nor the preset
    does, and must not be larger where they do. Raises SftError with both values.
    """
    base = PRESETS[model.preset]
    values = {name: getattr(model, field) for name, field in _RECIPE_FIELDS.items()}
    config = replace(base, **{name: value for name, value in values.items() if value is not None})
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
