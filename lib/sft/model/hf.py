"""Hugging Face names and configurations by model family.

In:  a ModelConfig (sft.recipe.presets), or the config.json of a Hugging Face folder. Out: the same facts in the other
     form.

Tensors only change their names, never their layout. A family is a row of FAMILIES. sft.checkpoint.hf_folder reads the
tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sft.common.errors import SftError
from sft.recipe.presets import Llama3Rope, ModelConfig, Yarn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Parameter names outside the blocks, ours first. They are the same in every family.
_OUTER = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
}
_OUTER_OURS = {theirs: ours for ours, theirs in _OUTER.items()}
_PROJECTIONS = {
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_out": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_QK_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
_POST_NORMS = {"attention_norm": "post_attention_layernorm", "feed_forward_norm": "post_feedforward_layernorm"}
_PRE_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Family:
    """The names that transformers uses for a kind of model. Sizes, windows and rotary scaling are in ModelConfig."""

    model_type: str
    architecture: str
    block: Mapping[str, str]  # parameter names inside a layer, ours first; only those that the family has
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields of config.json with their only supported value
    rope_theta: float = 500_000.0  # the default where config.json has no value
    does: Mapping[str, Any] = field(default_factory=dict)  # fields of ModelConfig that all models of the family share

    def theirs(self, name: str) -> str:
        """transformers' name of our parameter. Raises KeyError for a name that is not ours."""
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name):
            return f"model.layers.{match[1]}.{self.block[match[2]]}.weight"
        return _OUTER[name]

    def ours(self, name: str) -> str:
        """Our name of transformers' parameter. Raises KeyError for a name that is not theirs."""
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
            inner = next((ours for ours, theirs in self.block.items() if theirs == match[2]), None)
            if inner is None:
                raise KeyError(name)
            return f"blocks.{match[1]}.{inner}.weight"
        return _OUTER_OURS[name]


_PLAIN = {"attention_bias": False, "hidden_act": "silu"}
_OLMO = {**_PLAIN, "tie_word_embeddings": False}
FAMILIES = {
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", {**_PROJECTIONS, **_QK_NORMS, **_POST_NORMS}, _OLMO),
    "olmo3": Family("olmo3", "Olmo3ForCausalLM", {**_PROJECTIONS, **_QK_NORMS, **_POST_NORMS}, _OLMO),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", {**_PROJECTIONS, **_QK_NORMS, **_PRE_NORMS},
                    {**_PLAIN, "use_sliding_window": False}, 10_000.0, {"prenorm": True, "qk_norm": "head"}),
    "llama": Family("llama", "LlamaForCausalLM", {**_PROJECTIONS, **_PRE_NORMS},
                    {**_PLAIN, "mlp_bias": False}, 10_000.0, {"prenorm": True, "qk_norm": ""}),
}  # fmt: skip
# Fields that transformers writes into every config.json and that do not describe the model.
_NOT_ABOUT_THE_MODEL = {
    "_name_or_path", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "problem_type", "return_dict",
    "output_attentions", "output_hidden_states",
}  # fmt: skip
VOCAB_ROWS = ("embeddings.weight", "lm_head.w_out.weight")  # the two tensors with one row per token id


def family(config: ModelConfig) -> Family:
    """The family of an architecture. OLMo models with sliding windows are OLMo 3."""
    if config.prenorm:
        return FAMILIES["qwen3" if config.qk_norm else "llama"]
    return FAMILIES["olmo3" if config.window else "olmo2"]


def head_name(config: ModelConfig) -> str:
    """The name of the output matrix, which turns hidden states into logits: the embedding where both are tied."""
    return "embeddings.weight" if config.tied else "lm_head.w_out.weight"


def without_tied_head(names: Iterable[str], config: ModelConfig) -> list[str]:
    """The names without the output matrix of a tied model, which OLMo-core's steps and some files store a second
    time."""
    return [name for name in names if not (config.tied and name == "lm_head.w_out.weight")]


def shapes(config: ModelConfig, vocab_size: int = 0) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by our name, in the order of the forward pass. `vocab_size` replaces the padded
    number of rows."""
    d, q, kv = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    vocab = vocab_size or config.vocab_size
    block = {
        "attention.w_q": (q, d),
        "attention.w_k": (kv, d),
        "attention.w_v": (kv, d),
        "attention.w_out": (d, q),
        "attention.q_norm": (q if config.qk_norm == "full" else config.head_dim,),
        "attention.k_norm": (kv if config.qk_norm == "full" else config.head_dim,),
        "attention_norm": (d,),
        "feed_forward.w1": (config.intermediate_size, d),
        "feed_forward.w2": (d, config.intermediate_size),
        "feed_forward.w3": (config.intermediate_size, d),
        "feed_forward_norm": (d,),
    }
    there = family(config).block
    result: dict[str, tuple[int, ...]] = {"embeddings.weight": (vocab, d)}
    for layer in range(config.n_layers):
        result.update({f"blocks.{layer}.{name}.weight": shape for name, shape in block.items() if name in there})
    result["lm_head.norm.weight"] = (d,)
    result[head_name(config)] = (vocab, d)
    return result


def layer_types(config: ModelConfig) -> list[str]:
    return ["sliding_attention" if window else "full_attention" for window in config.windows]


def hf_config(
    config: ModelConfig,
    *,
    vocab_size: int,
    max_position_embeddings: int,
    dtype: str,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> PretrainedConfig:
    """transformers' configuration of the same model. YaRN applies to the full-attention layers only."""
    from transformers import AutoConfig  # start-up: transformers takes a second

    kind = family(config)
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    full = dict(plain)
    if config.yarn:
        full |= {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "original_max_position_embeddings": config.yarn.old_context,
            "attention_factor": config.yarn.attention_factor,
        }
    elif config.llama3_rope:
        full |= {
            "rope_type": "llama3",
            "factor": config.llama3_rope.factor,
            "low_freq_factor": config.llama3_rope.low,
            "high_freq_factor": config.llama3_rope.high,
            "original_max_position_embeddings": config.llama3_rope.old_context,
        }
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **kind.fixed,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": dtype,
    }
    if config.head_dim * config.n_heads != config.d_model or kind.model_type == "qwen3":  # Qwen 3's default is 128
        common["head_dim"] = config.head_dim
    if config.window:
        common |= {
            "rope_parameters": {"full_attention": full, "sliding_attention": plain},
            "sliding_window": config.window,
            "layer_types": layer_types(config),
        }
    else:
        common["rope_parameters"] = full
    return AutoConfig.for_model(kind.model_type, **common, architectures=[kind.architecture])


def config_json(config: PretrainedConfig) -> dict[str, Any]:
    """The content of config.json: the keys of transformers 5, and the rope keys that transformers 4 and vLLM read.

    transformers 4 reads `rope_theta` and `rope_scaling` at the top level only, and silently uses defaults without them.
    Version 5 reads `rope_parameters` first. With both, all versions load the same model.
    """
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    data = {name: value for name, value in data.items() if name not in _NOT_ABOUT_THE_MODEL}
    rope = data["rope_parameters"].get("full_attention", data["rope_parameters"])
    data["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        data["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return data


def find_family(data: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that a config.json names. Raises SftError for an unsupported one."""
    kind = data.get("model_type")
    if kind not in FAMILIES:
        raise SftError(f"{where}: model_type: {kind!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def model_config(data: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig that a Hugging Face config.json describes. Raises SftError for an architecture that it cannot
    express."""
    kind = find_family(data, where)
    for name, wanted in kind.fixed.items():
        if data.get(name, wanted) != wanted:
            raise SftError(f"{where}: {name}: {data[name]!r}, expected {wanted!r}")
    try:
        heads, d_model = int(data["num_attention_heads"]), int(data["hidden_size"])
        rope = data.get("rope_parameters") or {}
        rope = rope.get("full_attention") or rope
        yarn, llama3_rope = _rotary_scaling(data.get("rope_scaling") or rope, where)
        config = ModelConfig(
            n_layers=int(data["num_hidden_layers"]),
            d_model=d_model,
            n_heads=heads,
            n_kv_heads=int(data.get("num_key_value_heads") or heads),
            head_dim=int(data.get("head_dim") or d_model // heads),
            intermediate_size=int(data["intermediate_size"]),
            vocab_size=int(data["vocab_size"]),
            window=int(data["sliding_window"]) if kind.model_type == "olmo3" else 0,
            rope_theta=float(data.get("rope_theta") or rope.get("rope_theta") or kind.rope_theta),
            yarn=yarn,
            llama3_rope=llama3_rope,
            init_std=float(data.get("initializer_range", 0.02)),
            norm_eps=float(data.get("rms_norm_eps", 1e-5)),
            tied=bool(data.get("tie_word_embeddings", False)),
            **kind.does,
        )
    except KeyError as error:
        raise SftError(f"{where}: no field {error.args[0]!r}") from error
    types = data.get("layer_types")
    if config.window and types is not None and list(types) != layer_types(config):
        raise SftError(f"{where}: layer_types: {types}, expected every fourth layer full: {layer_types(config)}")
    return config


def _rotary_scaling(scaling: Mapping[str, Any], where: str) -> tuple[Yarn | None, Llama3Rope | None]:
    """The rotary scaling of a config.json. Raises KeyError for a missing field and SftError for an unsupported kind."""
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return None, None
    if kind == "yarn":
        return Yarn(
            factor=float(scaling["factor"]),
            beta_fast=float(scaling.get("beta_fast") or 32),
            beta_slow=float(scaling.get("beta_slow") or 1),
            old_context=int(scaling["original_max_position_embeddings"]),
        ), None
    if kind == "llama3":
        return None, Llama3Rope(
            factor=float(scaling["factor"]),
            low=float(scaling["low_freq_factor"]),
            high=float(scaling["high_freq_factor"]),
            old_context=int(scaling["original_max_position_embeddings"]),
        )
    raise SftError(f"{where}: rope_type: {kind!r}, expected 'default', 'yarn' or 'llama3'")


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Raises SftError unless both name the same tensors with the same shapes."""
    after = "next: fetch all of it again, or correct the description of the model (config.json, the recipe's [model])"
    if missing := [name for name in wanted if name not in found]:
        raise SftError(f"{where}: {len(missing)} of {len(wanted)} tensors missing, the first is {missing[0]}; {after}")
    if extra := [name for name in found if name not in wanted]:
        raise SftError(f"{where}: {len(extra)} tensors that the model does not have, the first is {extra[0]}; {after}")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise SftError(f"{where}: {name}: shape {tuple(found[name])}, expected {tuple(shape)}; {after}")
