"""config.json of a step folder: OLMo-core's description of the model, where it has one.

In:  a ModelConfig and the tokenizer's ids. Out: the content of config.json. `config_of_step` reads it back
     (sft.recipe.core_config).

What OLMo-core cannot describe (biases of some projections only, dynamic scaling and LongRoPE, partial rotation, other names
than the usual family's) is written in ModelConfig's own fields under `architecture`. What an export keeps of a Hugging
Face base is under `base`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.common.files import read_json
from sft.formats.dataset import TokenIds
from sft.recipe import core_config
from sft.recipe.architecture import GatedDelta, LinearRope, Llama3Rope, ModelConfig, Yarn
from sft.recipe.base_config import STEP_KEY, BaseFacts, core_facts
from sft.recipe.core_config import NamedTokens


def step_config(config: ModelConfig, tokens: TokenIds, base: BaseFacts | None = None) -> dict[str, Any]:
    """config.json of a step folder: what OLMo-core needs to build the model, and what its converter needs to find the
    tokenizer."""
    tokenizer = {
        "vocab_size": tokens.vocab_size,
        "eos_token_id": tokens.eos_id,
        "pad_token_id": tokens.pad_id,
        "identifier": None,
    }
    written: dict[str, Any] = {"model": _model(config), "dataset": {"tokenizer": tokenizer}}
    try:
        described = core_config.read(written, "config.json")
    except SftError:
        described = None
    if described != config:
        if described is None or replace(described, family=config.family) != config:
            del written["model"]  # OLMo-core would compute something else
        written[core_config.OURS] = config.to_value()
    if base is not None and base.origin == "hf":
        written[STEP_KEY] = base.to_value()
    return written


def _model(config: ModelConfig) -> dict[str, Any]:
    """OLMo-core's description of a model. It leaves out what OLMo-core cannot describe."""
    model: dict[str, Any] = {
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "n_layers": config.n_layers,
        "block": _block(config, scaled=config.layer_scaling(0) is not None, positions=config.has_positions(0)),
        "lm_head": {"name": "default", "layer_norm": _norm(config), "bias": False, "dtype": "float32"},
        "name": "default",
        "dtype": "float32",
        "init_method": "normal",
        "init_std": config.init_std,
    }
    if config.tied:
        model["tie_word_embeddings"] = True
    if config.gated_delta:
        return model | _hybrid_blocks(config, config.gated_delta)
    usual = config.layer_scaling(0)
    positions = config.has_positions(0)
    others = [
        i for i in range(config.n_layers) if config.layer_scaling(i) != usual or config.has_positions(i) != positions
    ]
    full = [i for i in range(config.n_layers) if not config.layer_window(i)]
    if isinstance(config.rope_scaling, Yarn) and not config.scale_windowed:
        # As OLMo-core writes it: all layers with full attention are overridden, also where no layer has a window.
        model["block"] = _block(config, scaled=False, positions=positions)
        others = full
    if others:
        model["block_overrides"] = {
            str(i): _block(config, scaled=config.layer_scaling(i) is not None, positions=config.has_positions(i))
            for i in others
        }
    return model


def _hybrid_blocks(config: ModelConfig, mixer: GatedDelta) -> dict[str, Any]:
    """The two kinds of layers, and their pattern."""
    attention = _block(config, scaled=config.rope_scaling is not None, positions=any(config.rope_layers))
    recurrent = {
        "type": "gated_delta_net",
        "n_heads": mixer.key_heads,
        "n_v_heads": mixer.value_heads,
        "head_dim": mixer.key_dim,
        "expand_v": mixer.value_dim / mixer.key_dim,
        "allow_neg_eigval": mixer.negative_eigenvalues,
        "conv_size": mixer.conv_width,
        "conv_bias": False,
        "norm_eps": mixer.norm_eps,
        "dtype": "float32",
    }
    blocks = {"gdn": attention | {"name": "default", "sequence_mixer": recurrent}, "attn": attention}
    return {"block": blocks, "block_pattern": ["gdn" if linear else "attn" for linear in mixer.layers]}


def _norm(config: ModelConfig) -> dict[str, Any]:
    return {"name": "rms", "eps": config.norm_eps, "bias": False, "dtype": "float32"}


def _block(config: ModelConfig, scaled: bool, positions: bool) -> dict[str, Any]:
    """The description of a layer. `scaled`: it has the rotary scaling; `positions`: it has a rotary embedding."""
    mixer: dict[str, Any] = {
        "type": "attention",
        "name": "default",
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "bias": config.out_bias,
        "rope": _rope(config, scaled) if positions else None,
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
            "pattern": [config.layer_window(i) or -1 for i in range(min(config.n_layers, len(config.window_layers)))],
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
            "bias": config.mlp_bias,
            "dtype": "float32",
        },
    }


def _rope(config: ModelConfig, scaled: bool) -> dict[str, Any]:
    rope: dict[str, Any] = {"name": "default", "theta": _integer(config.rope_theta), "full_precision": True}
    scaling = config.rope_scaling if scaled else None
    if isinstance(scaling, Llama3Rope):
        rope["scaling"] = {
            "_CLASS_": "olmo_core.nn.rope.StepwiseRoPEScalingConfig",
            "factor": scaling.factor,
            "low_freq_proportion": 1 - 1 / scaling.low,
            "high_freq_proportion": 1 / scaling.high,
            "old_context_len": scaling.old_context,
        }
    elif isinstance(scaling, LinearRope):
        rope["scaling"] = {"_CLASS_": "olmo_core.nn.rope.PIRoPEScalingConfig", "factor": scaling.factor}
    elif isinstance(scaling, Yarn):
        rope["scaling"] = {
            "_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig",
            "factor": scaling.factor,
            "beta_fast": _integer(scaling.beta_fast),
            "beta_slow": _integer(scaling.beta_slow),
            "old_context_len": scaling.old_context,
        }
    return rope


def _integer(value: float) -> float | int:
    """OLMo-core declares these numbers as integers."""
    return int(value) if float(value).is_integer() else value


@dataclass(frozen=True)
class StepConfig:
    """What a step's config.json says, for a comparison of steps. `described` is the description of the model as it stands,
    also of a model that ModelConfig cannot express."""

    described: dict[str, Any]
    tokens: NamedTokens


def compared_config(file: Path) -> StepConfig:
    """Raises SftError for a file that is missing or damaged."""
    data = read_json(file)
    described = {name: data.get(name) for name in ("model", core_config.OURS, STEP_KEY)}
    return StepConfig(described, core_config.named_tokens(data, str(file)))


def named_tokens(file: Path) -> NamedTokens:
    """The tokenizer that a step's config.json names. Raises SftError."""
    return core_config.named_tokens(read_json(file), str(file))


def config_of_step(file: Path) -> ModelConfig:
    """The architecture that a step's config.json describes. Raises SftError for one that ModelConfig cannot express."""
    return core_config.read(read_json(file), str(file))


def base_facts(file: Path) -> BaseFacts | None:
    """What a step's config.json says about the Hugging Face base of the run; None without one. Raises SftError."""
    facts = core_facts(read_json(file), str(file))
    return facts if facts.origin == "hf" else None
