"""OLMo-core's description of a model, config.json of a step folder, as a ModelConfig. Standard library only.

A model that OLMo-core cannot describe has the key `architecture` instead of `model`, with ModelConfig's own fields.
Every key of a description is used, known to be irrelevant, or refused with its value.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sft.common.errors import SftError
from sft.recipe.architecture import (
    EVERY_FOURTH_FULL,
    THREE_OF_FOUR,
    GatedDelta,
    LinearRope,
    Llama3Rope,
    ModelConfig,
    RopeScaling,
    Yarn,
    shortest_pattern,
)
from sft.recipe.config_reader import ConfigReader

OURS = "architecture"
_NEXT = "convert it with OLMo-core, or choose another base"
# Implementations of the same computation, dtypes, random initialisation and class names.
_ANY = frozenset({
    "_CLASS_", "dtype", "backend", "use_flash", "use_recompute_qkv_prep", "loss_implementation", "init_method", "init_seed",
    "embedding_init_std", "freeze_params", "float8_config", "ac_config", "compile", "dp_config", "tp_config", "cp_config",
    "pp_config", "elementwise_affine", "full_precision", "fused_linear_cross_entropy",
})  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_residual_alpha": (1,),
    "attention_sinks": (False,),
    "bias": (False,),
    "clip_qkv": (),
    "dropout": (0,),
    "embed_scale": (1,),
    "embedding_norm": (),
    "feed_forward_moe": (),
    "feed_forward_residual_alpha": (1,),
    "gate": (),
    "no_global_rope": (False,),
    "partial_rotary_factor": (1,),
    "qk_norm_per_head_gains": (False,),
    "scalable_softmax": (False,),
    "softmax_scale": (),
}
_RMS = ("rms", "fused_rms", "cute_rms", "qwen_rms")  # qwen_rms differs in the order of a cast only


@dataclass(frozen=True)
class _Layer:
    """What one layer does. `window`: 0 = full attention. `mixer`: of a layer with a Gated DeltaNet, whose fields of attention
    say nothing."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    window: int
    theta: float
    has_positions: bool
    scaling: RopeScaling | None
    norm_eps: float
    prenorm: bool
    qk_norm: str
    bias: bool
    mlp_bias: bool
    mixer: GatedDelta | None = None


@dataclass(frozen=True)
class NamedTokens:
    """dataset.tokenizer of a step's config.json. A value is None where it does not say it."""

    vocab_size: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    bos_id: int | None = None
    identifier: str | None = None


def named_tokens(data: Mapping[str, Any], where: str) -> NamedTokens:
    """The tokenizer that a step's config.json names. Raises SftError for a value of another type."""
    dataset = ConfigReader(data, where).table("dataset")
    tokenizer = dataset.table("tokenizer") if dataset else None
    if tokenizer is None:
        return NamedTokens()

    identifier = tokenizer.get("identifier")
    if not isinstance(identifier, str | None):
        tokenizer.refuse("identifier", identifier, "a string", "bring the step's own config.json")
    names = ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")
    size, eos, pad, bos = (
        None if tokenizer.get(name) is None else tokenizer.whole(name, least=int(name == "vocab_size"))
        for name in names
    )
    return NamedTokens(size, eos, pad, bos, identifier)


def read(data: Mapping[str, Any], where: str, ignore: Collection[str] = ()) -> ModelConfig:
    """The architecture that a step's config.json describes. `ignore`: keys that the recipe declares irrelevant. Raises SftError for one that ModelConfig cannot express."""
    if OURS in data:
        try:
            return ModelConfig.from_value(data[OURS])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SftError(
                f"{where}: {OURS}: not a model: {error!r}; next: bring the step's own config.json"
            ) from error
    try:
        return _read_model(ConfigReader(data, where, ignore).nested("model"))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise SftError(
            f"{where}: not the description of an OLMo-core model: {error!r}; next: bring the step's own config.json"
        ) from error


def _read_model(model: ConfigReader) -> ModelConfig:
    count, d_model = model.whole("n_layers"), model.whole("d_model")
    if model.get("name") not in (None, "default"):
        model.refuse("name", model.data["name"], "'default'", _NEXT)
    blocks = _blocks(model, count)
    layers = [_layer(block, d_model, i, count) for i, block in enumerate(blocks)]
    head = model.nested("lm_head")
    if head.get("name") not in (None, "default"):
        head.refuse("name", head.data["name"], "'default'", _NEXT)
    eps = _norm_eps(head, "layer_norm")
    head.refuse_rest(_ANY, _NEUTRAL)
    tied, vocab = model.flag("tie_word_embeddings", False), model.whole("vocab_size")
    std = model.number("init_std", 0.02)
    model.refuse_rest(_ANY, _NEUTRAL)
    return _one_model(model, layers, d_model, vocab, eps, tied, std)


def _blocks(model: ConfigReader, count: int) -> list[ConfigReader]:
    """The description of every layer: `block` alone, with `block_overrides`, or by name in a `block_pattern`."""
    pattern, shared, overrides = model.get("block_pattern"), model.nested("block"), model.table("block_overrides")
    found = []
    for i in range(count):
        where = f"{model.where}: layer {i}"
        if overrides is not None and overrides.get(str(i)) is not None:
            found.append(ConfigReader(overrides.data[str(i)], where, model.ignore))
        elif pattern:
            found.append(ConfigReader(shared.nested(str(pattern[i % len(pattern)])).data, where, model.ignore))
        else:
            found.append(ConfigReader(shared.data, where, model.ignore))
    if overrides is not None:
        overrides.refuse_rest()
    return found


def _layer(block: ConfigReader, d_model: int, layer: int, count: int) -> _Layer:
    kind = block.get("name") or "default"
    if kind not in ("default", "reordered_norm"):
        block.refuse("name", kind, "'default' or 'reordered_norm'", _NEXT)
    mixer = block.table("sequence_mixer") or block.nested("attention")
    if mixer.get("type") == "gated_delta_net":
        return _recurrent_layer(block, mixer, d_model, prenorm=kind == "default")
    if mixer.get("type") not in (None, "attention"):
        mixer.refuse("type", mixer.data["type"], "'attention' or 'gated_delta_net'", _NEXT)
    if mixer.get("name") not in (None, "default", "fused"):
        mixer.refuse("name", mixer.data["name"], "'default'", _NEXT)
    heads = mixer.whole("n_heads")
    eps = _norm_eps(block, "layer_norm")
    qk_norm = ""
    if mixer.get("qk_norm"):
        qk_norm = "head" if mixer.flag("use_head_qk_norm", False) else "full"
        if _norm_eps(mixer, "qk_norm") != eps:
            mixer.refuse("qk_norm: eps", mixer.data["qk_norm"], f"the eps of layer_norm, {eps}", _NEXT)
    mixer.get("use_head_qk_norm")
    rope = mixer.table("rope")
    theta, scaling, no_global = (500_000.0, None, False) if rope is None else _rope(rope)
    window = _layer_window(mixer.table("sliding_window"), layer, count)
    if (bias := mixer.get("bias")) is None:
        mixer.refuse("bias", None, "true or false", _NEXT)
    intermediate_size, mlp_bias = _feed_forward(block)
    made = _Layer(
        n_heads=heads,
        n_kv_heads=mixer.whole("n_kv_heads", heads),
        head_dim=mixer.whole("head_dim", d_model // heads),
        intermediate_size=intermediate_size,
        window=window,
        theta=theta,
        has_positions=rope is not None and not (no_global and not window),
        scaling=scaling,
        norm_eps=eps,
        prenorm=kind == "default",
        qk_norm=qk_norm,
        bias=bool(bias),
        mlp_bias=mlp_bias,
    )
    mixer.refuse_rest(_ANY, _NEUTRAL)
    block.refuse_rest(_ANY, _NEUTRAL)
    return made


def _feed_forward(block: ConfigReader) -> tuple[int, bool]:
    """Intermediate size of a SwiGLU, and whether it has biases."""
    feed = block.nested("feed_forward")
    if feed.get("name") not in (None, "default") or feed.get("activation") not in (None, "silu"):
        feed.refuse("name, activation", (feed.data.get("name"), feed.data.get("activation")), "SwiGLU", _NEXT)
    found = feed.whole("hidden_size"), feed.flag("bias")
    feed.refuse_rest(_ANY)
    return found


def _recurrent_layer(block: ConfigReader, mixer: ConfigReader, d_model: int, prenorm: bool) -> _Layer:
    """A layer with a Gated DeltaNet, with OLMo-core's defaults."""
    if not prenorm:
        block.refuse("name", block.data["name"], "'default': a Gated DeltaNet's norms come before it", _NEXT)
    heads = mixer.whole("n_heads", 16)
    value_heads, dim = mixer.whole("n_v_heads", heads), mixer.whole("head_dim", d_model // heads)
    made = GatedDelta(
        heads,
        value_heads,
        dim,
        round(dim * mixer.number("expand_v", 2.0)),
        mixer.whole("conv_size", 4),
        mixer.flag("allow_neg_eigval", True),
    )
    if (eps := mixer.number("norm_eps", 1e-5)) != made.norm_eps:
        mixer.refuse("norm_eps", eps, f"{made.norm_eps}, as transformers' class has it", _NEXT)
    if value_heads % heads:
        mixer.refuse("n_v_heads", value_heads, f"a multiple of n_heads, {heads}", _NEXT)
    block_eps = _norm_eps(block, "layer_norm")
    size, mlp_bias = _feed_forward(block)
    mixer.refuse_rest(_ANY, _NEUTRAL | {"conv_bias": (False,)})
    block.refuse_rest(_ANY, _NEUTRAL)
    return _Layer(0, 0, 0, size, 0, 0.0, False, None, block_eps, True, "", False, mlp_bias, made)


def _norm_eps(at: ConfigReader, name: str) -> float:
    """The eps of an RMS norm without bias. OLMo-core's default is 1e-5."""
    norm = at.nested(name)
    if norm.get("name") not in _RMS:
        norm.refuse("name", norm.data.get("name"), "'rms'", _NEXT)
    if norm.get("elementwise_affine") not in (None, True):
        norm.refuse("elementwise_affine", norm.data["elementwise_affine"], "true", _NEXT)
    if norm.get("bias") is not False:
        norm.refuse("bias", norm.data.get("bias"), "false", _NEXT)
    eps = norm.number("eps", 1e-5)
    norm.refuse_rest(_ANY)
    return eps


def _rope(rope: ConfigReader) -> tuple[float, RopeScaling | None, bool]:
    """(theta, scaling, no positions in layers with full attention)."""
    if rope.get("name") not in (None, "default", "fused", "complex"):
        rope.refuse("name", rope.data["name"], "'default'", _NEXT)
    if rope.data.get("name") == "complex":
        rope.refuse("name", "complex", "'default': it rotates neighbours of a head", _NEXT)
    theta, no_global = rope.number("theta", 500_000.0), rope.flag("no_global_rope", False)
    scaling = rope.table("scaling")
    rope.refuse_rest(_ANY, _NEUTRAL)
    if scaling is None:
        return theta, None, no_global
    kind = str(scaling.data.get("_CLASS_", "")).rsplit(".", 1)[-1]
    if not kind:
        fields = set(scaling.data)
        kind = next((k for k, own in _OWN_FIELDS.items() if own & fields), "PIRoPEScalingConfig")
    rescale = scaling.number("attention_rescale_factor", 1.0)
    made: RopeScaling | None = None
    if kind == "ABFRoPEScalingConfig":
        theta = scaling.number("new_theta", 8_000_000.0)
    elif kind == "PIRoPEScalingConfig":
        made = LinearRope(scaling.number("factor", 2.0))
    elif kind == "StepwiseRoPEScalingConfig":
        low = 1 / (1 - (scaling.number("low_freq_proportion") if scaling.data.get("low_freq_proportion") else 0.0))
        scaling.get("low_freq_proportion")
        high = 1 / scaling.number("high_freq_proportion", 0.25)
        old = scaling.whole("old_context_len", 8192)
        made = Llama3Rope(scaling.number("factor", 32.0), round(low, 9), round(high, 9), old)
    elif kind == "YaRNRoPEScalingConfig":
        made = Yarn(
            scaling.number("factor", 8.0),
            scaling.number("beta_fast", 32.0),
            scaling.number("beta_slow", 1.0),
            scaling.whole("old_context_len", 8192),
        )
    else:
        scaling.refuse("_CLASS_", scaling.data.get("_CLASS_"), "a scaling of OLMo-core", _NEXT)
    if not math.isclose(rescale, 1.0) and kind != "YaRNRoPEScalingConfig":
        scaling.refuse("attention_rescale_factor", rescale, "1.0", _NEXT)
    scaling.refuse_rest({"_CLASS_"})
    return theta, made, no_global


_OWN_FIELDS = {
    "ABFRoPEScalingConfig": {"new_theta"},
    "StepwiseRoPEScalingConfig": {"low_freq_proportion", "high_freq_proportion"},
    "YaRNRoPEScalingConfig": {"beta_fast", "beta_slow"},
}


def _layer_window(sliding: ConfigReader | None, layer: int, layers: int) -> int:
    """The window of a layer by OLMo-core's rules, 0 = full attention. The pattern starts after a first layer that is
    forced to be full."""
    if sliding is None:
        return 0
    first = sliding.flag("force_full_attention_on_first_layer", True)
    last = sliding.flag("force_full_attention_on_last_layer", True)
    pattern = sliding.get("pattern")
    sliding.refuse_rest(_ANY)
    if (first and layer == 0) or (last and layer == layers - 1):
        return 0
    return max(0, int(pattern[(layer - first) % len(pattern)]))


_SAME = (
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "intermediate_size",
    "norm_eps",
    "prenorm",
    "qk_norm",
    "bias",
    "mlp_bias",
)


def _one_model(
    model: ConfigReader, layers: list[_Layer], d_model: int, vocab: int, eps: float, tied: bool, std: float
) -> ModelConfig:
    """One ModelConfig for all layers. Raises SftError for layers that differ in more than windows, scaling and positions."""
    everything, layers = layers, [layer for layer in layers if layer.mixer is None]
    mixers = {layer.mixer for layer in everything} - {None}
    if not layers or len(mixers) > 1:
        raise SftError(
            f"{model.where}: {'no layer has attention' if not layers else 'the Gated DeltaNets differ'}; next: {_NEXT}"
        )
    first, last = layers[0], layers[-1]

    def refuse(layer: int, name: str, found: object, expected: str) -> None:
        raise SftError(f"{model.where}: layer {layer}: {name} is {found}, expected {expected}; next: {_NEXT}")

    for i, layer in enumerate(layers):
        for name in _SAME:
            if getattr(layer, name) != getattr(first, name):
                refuse(i, name, getattr(layer, name), f"{getattr(first, name)}, as in layer 0")
        if layer.has_positions and layer.theta != next(r.theta for r in layers if r.has_positions):
            refuse(i, "rope_theta", layer.theta, f"{next(r.theta for r in layers if r.has_positions)}, as in others")
    for i, layer in enumerate(everything):
        for name in ("intermediate_size", "norm_eps", "mlp_bias"):
            if getattr(layer, name) != getattr(first, name):
                refuse(i, name, getattr(layer, name), f"{getattr(first, name)}, as in the layers with attention")
    if mixers and first.prenorm:
        refuse(everything.index(first), "name of the block", "'default'", "'reordered_norm', as in Olmo Hybrid")
    if eps != first.norm_eps:
        refuse(-1, "eps of the last norm", eps, f"{first.norm_eps}, as in the layers")
    windows = {layer.window for layer in layers} - {0}
    if len(windows) > 1:
        refuse(0, "sliding_window", sorted(windows), "one size")
    if (first.prenorm, first.qk_norm) not in ((False, "full"), (True, "head"), (True, "")):
        refuse(0, "block", f"{'default' if first.prenorm else 'reordered_norm'} with qk_norm {first.qk_norm or 'none'!r}",
               "a block of one of the families")  # fmt: skip
    windowed = {layer.scaling for layer in layers if layer.window and layer.has_positions}
    scaling = next((layer.scaling for layer in reversed(layers) if not layer.window and layer.has_positions), None)
    scaling = scaling or next(iter(windowed), None)
    for i, layer in enumerate(layers):
        if (
            layer.has_positions
            and layer.scaling != scaling
            and (not layer.window or layer.scaling or len(windowed) > 1)
        ):
            refuse(i, "rope scaling", layer.scaling, f"{scaling}, as in the last layer")
    mixer = mixers.pop() if mixers else None
    if mixer is not None:
        pattern = shortest_pattern([layer.mixer is not None for layer in everything], THREE_OF_FOUR)
        mixer = replace(mixer, layers=pattern)
    return ModelConfig(
        n_layers=len(everything),
        d_model=d_model,
        n_heads=last.n_heads,
        n_kv_heads=last.n_kv_heads,
        head_dim=last.head_dim,
        intermediate_size=last.intermediate_size,
        vocab_size=vocab,
        window=max((layer.window for layer in layers), default=0),
        rope_theta=next((layer.theta for layer in layers if layer.has_positions), first.theta),
        rope_scaling=scaling,
        init_std=std,
        norm_eps=first.norm_eps,
        prenorm=first.prenorm,
        qk_norm=first.qk_norm,
        tied=tied,
        window_layers=shortest_pattern([bool(layer.window) for layer in layers], EVERY_FOURTH_FULL)
        if windows
        else EVERY_FOURTH_FULL,
        scale_windowed=bool(windows and windowed - {None}),
        rope_layers=shortest_pattern([layer.has_positions for layer in layers], (True,)),
        qkv_bias=first.bias,
        out_bias=first.bias,
        mlp_bias=first.mlp_bias,
        gated_delta=mixer,
    )
