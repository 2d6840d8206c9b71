"""What a model is: `ModelConfig`, and the kinds of rotary scaling. Standard library only.

Every family of models is a decoder with RMS norms, grouped-query attention, SwiGLU, and rotary embedding or no positions.
A hybrid has a Gated DeltaNet in place of attention in some layers.
A family's own features are fields of `ModelConfig`, which the model (sft.model.model) reads. Presets
(sft.recipe.presets) and configurations of bases (sft.recipe.base_config) are two ways to make one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LinearRope:
    """Position interpolation (arXiv 2306.15595): every angle is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DynamicRope:
    """Dynamic NTK scaling: for a document longer than `old_context`, the base of the rotary embedding grows with its
    length. Shorter documents have no scaling."""

    factor: float
    old_context: int


@dataclass(frozen=True)
class Yarn:
    """YaRN rotary scaling (arXiv 2309.00071).

    `attention` is the factor on sin and cos; None = the paper's, from `factor`. `truncate` rounds the two limits of the
    ramp to whole dimensions.
    """

    factor: float = 8.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    old_context: int = 8192
    attention: float | None = None
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        """The factor on sin and cos (section 3.4 of the paper); 1.2079 for a factor of 8."""
        return yarn_attention(self.factor) if self.attention is None else self.attention


def yarn_attention(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor on sin and cos. `scale` is the `mscale` of a Hugging Face config."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): each angle is divided by its own factor. A document longer than `old_context` has the
    factors `long`, a shorter one the factors `short`; each has half of the rotated dimensions. `attention` is the factor
    on sin and cos."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    old_context: int
    attention: float


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's rotary scaling: long wavelengths are stretched by `factor`, short ones are not, and a ramp connects
    them."""

    factor: float = 8.0
    low: float = 1.0  # wavelengths above old_context / low are stretched
    high: float = 4.0  # wavelengths below old_context / high are not
    old_context: int = 8192


RopeScaling = LinearRope | DynamicRope | Yarn | LongRope | Llama3Rope
KINDS = {"linear": LinearRope, "dynamic": DynamicRope, "yarn": Yarn, "longrope": LongRope, "llama3": Llama3Rope}
"""transformers' names of the kinds of scaling."""
EVERY_FOURTH_FULL = (True, True, True, False)
"""OLMo 3's layers: three with a window, then one with full attention."""
THREE_OF_FOUR = (True, True, True, False)
"""Olmo Hybrid's layers: three with a Gated DeltaNet, then one with attention."""


@dataclass(frozen=True)
class GatedDelta:
    """A Gated DeltaNet in place of attention (arXiv 2412.06464), whose norms come before it and before SwiGLU.

    `layers` says for each layer whether it has one. It repeats from the first layer on. `key_dim` and `value_dim` are
    those of a head.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4  # tokens that the short convolution of queries, keys and values reads
    negative_eigenvalues: bool = True  # beta is between 0 and 2, not between 0 and 1
    layers: tuple[bool, ...] = THREE_OF_FOUR
    norm_eps: float = 1e-5  # of the norm of its output

    @property
    def keys(self) -> int:
        """Channels of queries, and of keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Channels of values, and of the output's gate."""
        return self.value_heads * self.value_dim

    def parameters(self, d_model: int) -> int:
        """Number of trainable values of one mixer."""
        projections = d_model * (2 * self.keys + 3 * self.values + 2 * self.value_heads)
        convolutions = self.conv_width * (2 * self.keys + self.values)
        return projections + convolutions + 2 * self.value_heads + self.value_dim


@dataclass(frozen=True)
class ModelConfig:
    """A resolved architecture. The defaults are those of OLMo.

    `window_layers` and `rope_layers` say for each layer whether it has a window, and whether it has positions. They repeat
    from the first layer on. `family` is transformers' model_type where the other fields do not determine it
    (sft.recipe.families).
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    window: int = 0
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    init_std: float = 0.02
    norm_eps: float = 1e-6
    prenorm: bool = False  # True: the norms come before attention and SwiGLU; False: after them
    qk_norm: str = (
        "full"  # queries and keys are normalised over the 'full' projection, over each 'head', or not at all ('')
    )
    tied: bool = False  # the output matrix is the embedding
    window_layers: tuple[bool, ...] = EVERY_FOURTH_FULL
    scale_windowed: bool = False  # layers with a window have the rotary scaling, too
    rope_layers: tuple[bool, ...] = (True,)
    rotary_dim: int = 0  # dimensions of a head that are rotated; 0 = all
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated_delta: GatedDelta | None = None  # None = all layers have attention
    family: str = ""

    def layer_window(self, layer: int) -> int:
        """Attention window of a layer in tokens, the token itself included; 0 = full attention."""
        return self.window if self.window_layers[layer % len(self.window_layers)] else 0

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows of the layers that have attention."""
        return tuple(self.layer_window(i) for i in range(self.n_layers) if not self.layer_mixer(i))

    def layer_mixer(self, layer: int) -> GatedDelta | None:
        """The Gated DeltaNet of a layer; None for a layer with attention."""
        found = self.gated_delta
        return found if found and found.layers[layer % len(found.layers)] else None

    @property
    def mixers(self) -> tuple[GatedDelta | None, ...]:
        return tuple(self.layer_mixer(i) for i in range(self.n_layers))

    @property
    def shared_heads(self) -> tuple[int, ...]:
        """Numbers of heads that the ranks of a context group share evenly, beside the query heads."""
        return (self.gated_delta.key_heads, self.gated_delta.value_heads) if self.gated_delta else ()

    def is_prenorm(self, layer: int) -> bool:
        """Whether the norms of a layer come before its mixer and SwiGLU."""
        return self.prenorm or self.layer_mixer(layer) is not None

    def has_positions(self, layer: int) -> bool:
        """Whether a layer rotates queries and keys."""
        return self.rope_layers[layer % len(self.rope_layers)] and not self.layer_mixer(layer)

    @property
    def rotated(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.rotary_dim or self.head_dim

    def layer_scaling(self, layer: int) -> RopeScaling | None:
        """The rotary scaling of a layer."""
        return self.rope_scaling if self.scale_windowed or not self.layer_window(layer) else None

    @property
    def parameters(self) -> int:
        """Number of trainable values: embedding, output matrix, mixers, three SwiGLU matrices, norms, biases."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = self.d_model * (2 * q + 2 * kv) + {"full": q + kv, "head": 2 * self.head_dim, "": 0}[self.qk_norm]
        attention += self.qkv_bias * (q + 2 * kv) + self.out_bias * self.d_model
        feed_forward = 3 * self.d_model * self.intermediate_size
        feed_forward += self.mlp_bias * (2 * self.intermediate_size + self.d_model)
        mixers = sum(mixer.parameters(self.d_model) if mixer else attention for mixer in self.mixers)
        layers = mixers + self.n_layers * (feed_forward + 2 * self.d_model)
        return layers + self.d_model * ((2 - self.tied) * self.vocab_size + 1)

    def to_value(self) -> dict[str, Any]:
        """JSON values, without fields that have their default. The kind of scaling is its `rope_type`."""
        value = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        }
        if self.rope_scaling:
            kind = next(name for name, cls in KINDS.items() if isinstance(self.rope_scaling, cls))
            value["rope_scaling"] = {"rope_type": kind, **dataclasses.asdict(self.rope_scaling)}
        if self.gated_delta:
            value["gated_delta"] = dataclasses.asdict(self.gated_delta)
        return value

    @classmethod
    def from_value(cls, value: Any) -> ModelConfig:
        """The config that `to_value` described. Raises KeyError, TypeError or ValueError for anything else."""
        values: dict[str, Any] = dict(value)
        if scaling := values.pop("rope_scaling", None):
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in scaling.items() if k != "rope_type"}
            values["rope_scaling"] = KINDS[scaling["rope_type"]](**fields)
        if mixer := values.pop("gated_delta", None):
            values["gated_delta"] = GatedDelta(**(dict(mixer) | {"layers": tuple(mixer["layers"])}))
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)


def summary(config: ModelConfig) -> str:
    """An architecture in a line."""
    norms = {"full": "QK norm", "head": "QK norm per head", "": "no QK norm"}[config.qk_norm]
    biases = [n for n in ("qkv", "out", "mlp") if getattr(config, f"{n}_bias")]
    rotates = any(map(config.has_positions, range(config.n_layers)))
    parts = [
        f"{config.n_layers} layers x {config.d_model}",
        f"{config.n_heads} heads ({config.n_kv_heads} kv) x {config.head_dim}",
        f"MLP {config.intermediate_size}",
        f"{config.vocab_size:,} rows" if config.vocab_size else "rows of the tokenizer",
        f"norms {'before' if config.prenorm else 'after'}, {norms}, eps {config.norm_eps:g}",
        f"rope {config.rope_theta:g}, {config.rope_scaling or 'not scaled'}" if rotates else "no positions",
        f"window {config.window} on {sum(map(bool, config.windows))} layers" if any(config.windows) else "no window",
    ]
    if linear := sum(mixer is not None for mixer in config.mixers):
        parts.append(f"Gated DeltaNet on {linear} layers, whose norms are before")
    without = [i for i, mixer in enumerate(config.mixers) if not mixer and not config.has_positions(i)]
    if without and rotates:
        parts.append(f"no positions on {len(without)} layers")
    if biases:
        parts.append(f"biases {', '.join(biases)}")
    return "; ".join([*parts, "tied head" if config.tied else "own head"])


def differing_fields(a: ModelConfig, b: ModelConfig, ignore: Sequence[str] = ()) -> list[str]:
    """The names of the fields in which two architectures differ. Fields that a model does not use do not count."""
    return [
        f.name
        for f in dataclasses.fields(ModelConfig)
        if f.name not in ignore and getattr(a, f.name) != getattr(b, f.name)
    ]


def shortest_pattern(layers: Sequence[bool], usual: tuple[bool, ...]) -> tuple[bool, ...]:
    """A pattern that gives these layers when it repeats: `usual` if it does, else the shortest."""
    layers = tuple(layers)
    for pattern in (usual, *(layers[:size] for size in range(1, len(layers) + 1))):
        if all(layer == pattern[i % len(pattern)] for i, layer in enumerate(layers)):
            return pattern
    return usual
