"""OLMo-core's description of a model, config.json of a step folder, and the ModelConfig of the same model.

In:  a ModelConfig and the tokenizer's ids, or the config.json of a step. Out: the other of the two. `check_same_layers`
     refuses a description that tensor shapes alone would not distinguish from the recipe's model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.common.files import read_json
from sft.formats.dataset import TokenIds
from sft.model import hf
from sft.recipe.presets import Llama3Rope, ModelConfig, Yarn


@dataclass(frozen=True)
class LayerFacts:
    """What a layer does beyond its tensor shapes."""

    n_heads: int
    n_kv_heads: int
    rope_theta: float
    window: int  # -1 = full attention
    rope_scaling_factor: float  # 0 = none
    block: str  # OLMo-core's name of the kind of block


def layer_facts(model: Mapping[str, Any]) -> list[LayerFacts]:
    """The layers of an OLMo-core model description. Raises KeyError, TypeError or ValueError for a damaged one."""
    layers = []
    count = int(model["n_layers"])
    for i in range(count):
        block = (model.get("block_overrides") or {}).get(str(i)) or model["block"]
        mixer = block.get("sequence_mixer") or block["attention"]
        rope = mixer.get("rope") or {}
        layers.append(
            LayerFacts(
                n_heads=int(mixer["n_heads"]),
                n_kv_heads=int(mixer.get("n_kv_heads") or mixer["n_heads"]),
                rope_theta=float(rope.get("theta", 500_000)),
                window=_layer_window(mixer.get("sliding_window"), i, count),
                rope_scaling_factor=float((rope.get("scaling") or {}).get("factor", 0)),
                block=str(block.get("name", "default")),
            )
        )
    return layers


def _layer_window(sliding: Mapping[str, Any] | None, layer: int, layers: int) -> int:
    """The window of a layer by OLMo-core's rules, -1 = full attention. The pattern starts after a first layer that is
    forced to be full."""
    if not sliding:
        return -1
    first = bool(sliding.get("force_full_attention_on_first_layer", True))
    last = bool(sliding.get("force_full_attention_on_last_layer", True))
    if (first and layer == 0) or (last and layer == layers - 1):
        return -1
    pattern = sliding["pattern"]
    return int(pattern[(layer - first) % len(pattern)])


def differing_layer(found: Sequence[LayerFacts], wanted: Sequence[LayerFacts]) -> tuple[int, str, Any, Any] | None:
    """The first difference of two models with equally many layers: (layer, field, found, wanted)."""
    for layer, (theirs, ours) in enumerate(zip(found, wanted, strict=True)):
        for f in fields(LayerFacts):
            if getattr(theirs, f.name) != getattr(ours, f.name):
                return layer, f.name, getattr(theirs, f.name), getattr(ours, f.name)
    return None


def check_same_layers(file: Path, config: ModelConfig) -> None:
    """Raises SftError unless the config.json of a step describes the layers of this architecture: heads, rotary base
    and scaling, windows, kind of block."""
    try:
        found = layer_facts(read_json(file)["model"])
        wanted = layer_facts(step_config(config, TokenIds())["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise SftError(f"{file}: not the description of an OLMo-core model: {error!r}") from error
    if len(found) != len(wanted):
        raise SftError(f"{file}: {len(found)} layers, [model] has {len(wanted)}; correct [model] n_layers")
    if difference := differing_layer(found, wanted):
        layer, field, theirs, ours = difference
        raise SftError(f"{file}: layer {layer}: {field} is {theirs}, [model] says {ours}; correct [model]")


def step_config(config: ModelConfig, tokens: TokenIds) -> dict[str, Any]:
    """config.json of a step folder: what OLMo-core needs to build the model, and what its converter needs to find the
    tokenizer."""
    model: dict[str, Any] = {
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "n_layers": config.n_layers,
        "block": _block(config, yarn=False),
        "lm_head": {"name": "default", "layer_norm": _norm(config), "bias": False, "dtype": "float32"},
        "name": "default",
        "dtype": "float32",
        "init_method": "normal",
        "init_std": config.init_std,
    }
    if config.tied:
        model["tie_word_embeddings"] = True
    if config.yarn:
        full = [i for i, window in enumerate(config.windows) if not window]
        model["block_overrides"] = {str(i): _block(config, yarn=True) for i in full}
    tokenizer = {
        "vocab_size": tokens.vocab_size,
        "eos_token_id": tokens.eos_id,
        "pad_token_id": tokens.pad_id,
        "identifier": None,
    }
    return {"model": model, "dataset": {"tokenizer": tokenizer}}


def _norm(config: ModelConfig) -> dict[str, Any]:
    return {"name": "rms", "eps": config.norm_eps, "bias": False, "dtype": "float32"}


def _block(config: ModelConfig, yarn: bool) -> dict[str, Any]:
    """The description of a layer. `yarn`: of a full-attention layer of a model with YaRN."""
    mixer: dict[str, Any] = {
        "type": "attention",
        "name": "default",
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "bias": False,
        "rope": _rope(config, yarn),
        "dtype": "float32",
    }
    if config.qk_norm:
        mixer["qk_norm"] = _norm(config)
    if config.qk_norm == "head":
        mixer["use_head_qk_norm"] = True
    if config.head_dim * config.n_heads != config.d_model:
        mixer["head_dim"] = config.head_dim
    if config.window:
        mixer["sliding_window"] = {
            "pattern": [window or -1 for window in config.windows[:4]],
            "force_full_attention_on_first_layer": False,
            "force_full_attention_on_last_layer": False,
        }
    return {
        "name": "default" if config.prenorm else "reordered_norm",
        "sequence_mixer": mixer,
        "layer_norm": _norm(config),
        "feed_forward": {
            "name": "default",
            "hidden_size": config.intermediate_size,
            "bias": False,
            "dtype": "float32",
        },
    }


def _rope(config: ModelConfig, yarn: bool) -> dict[str, Any]:
    rope: dict[str, Any] = {"name": "default", "theta": _integer(config.rope_theta), "full_precision": True}
    if config.llama3_rope:
        rope["scaling"] = {
            "_CLASS_": "olmo_core.nn.rope.StepwiseRoPEScalingConfig",
            "factor": config.llama3_rope.factor,
            "low_freq_proportion": 1 - 1 / config.llama3_rope.low,
            "high_freq_proportion": 1 / config.llama3_rope.high,
            "old_context_len": config.llama3_rope.old_context,
        }
    if config.yarn and yarn:
        rope["scaling"] = {
            "_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig",
            "factor": config.yarn.factor,
            "beta_fast": _integer(config.yarn.beta_fast),
            "beta_slow": _integer(config.yarn.beta_slow),
            "old_context_len": config.yarn.old_context,
        }
    return rope


def _integer(value: float) -> float | int:
    """OLMo-core declares these numbers as integers."""
    return int(value) if float(value).is_integer() else value


def model_config(file: Path) -> ModelConfig:
    """The architecture that a step's config.json describes. Raises SftError for one that ModelConfig cannot express."""
    data = read_json(file)
    try:
        model = data["model"]
        layers, block = layer_facts(model), model["block"]
        last = (model.get("block_overrides") or {}).get(str(int(model["n_layers"]) - 1)) or block
        mixer = last.get("sequence_mixer") or last["attention"]
        rope, heads = mixer.get("rope") or {}, int(mixer["n_heads"])
        yarn, llama3_rope = _scaling(rope.get("scaling"))
        prenorm = str(block.get("name", "default")) == "default"
        qk_norm = ("head" if mixer.get("use_head_qk_norm") else "full") if mixer.get("qk_norm") else ""
        config = ModelConfig(
            n_layers=int(model["n_layers"]),
            d_model=int(model["d_model"]),
            n_heads=heads,
            n_kv_heads=int(mixer.get("n_kv_heads") or heads),
            head_dim=int(mixer.get("head_dim") or int(model["d_model"]) // heads),
            intermediate_size=int(block["feed_forward"]["hidden_size"]),
            vocab_size=int(model["vocab_size"]),
            window=max(0, *(layer.window for layer in layers)),
            rope_theta=float(rope.get("theta", 500_000)),
            yarn=yarn,
            llama3_rope=llama3_rope,
            prenorm=prenorm,
            qk_norm=qk_norm,
            tied=bool(model.get("tie_word_embeddings", False)),
            init_std=float(model.get("init_std", 0.02)),
            norm_eps=float(block["layer_norm"].get("eps", 1e-5)),
        )
        ours = layer_facts(step_config(config, TokenIds())["model"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SftError(
            f"{file}: not the description of an OLMo-core model: {error!r}; next: bring the step's own config.json"
        ) from error
    if (prenorm, qk_norm) not in ((False, "full"), (True, "head"), (True, "")):
        raise SftError(
            f"{file}: model.block: {block.get('name', 'default')!r} with qk_norm {qk_norm or 'none'!r}:"
            f" no family here has this block ({', '.join(hf.FAMILIES)}); next: convert it with OLMo-core"
        )
    if difference := differing_layer(layers, ours):
        layer, field, theirs, wanted = difference
        raise SftError(
            f"{file}: layer {layer}: {field} is {theirs}, a model of this kind has {wanted} there; next: convert it"
            " with OLMo-core"
        )
    return config


def _scaling(scaling: Mapping[str, Any] | None) -> tuple[Yarn | None, Llama3Rope | None]:
    """The rotary scaling of a description. Raises ValueError for an unknown kind."""
    if not scaling:
        return None, None
    factor, old = float(scaling["factor"]), int(scaling["old_context_len"])
    if "beta_fast" in scaling:
        return Yarn(factor, float(scaling["beta_fast"]), float(scaling["beta_slow"]), old), None
    if "low_freq_proportion" in scaling:
        low, high = 1 / (1 - float(scaling["low_freq_proportion"])), 1 / float(scaling["high_freq_proportion"])
        return None, Llama3Rope(factor, round(low, 9), round(high, 9), old)
    raise ValueError(f"rope scaling {scaling.get('_CLASS_')!r} is neither YaRN nor Llama 3's")
