"""Families of Hugging Face models, one row each: names of parameters, default values, and what only some families have.

A `Family` describes transformers' class of a model_type. Sizes, windows and rotary scaling are in ModelConfig. Standard
library only: the planner reads configurations of bases with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sft.recipe.architecture import ModelConfig

# Parameter names outside the blocks, ours first. They are the same in every family.
_OUTER = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
}
_OUTER_OURS = {theirs: ours for ours, theirs in _OUTER.items()}
PROJECTIONS = {
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
_OLMO_BLOCK = {**PROJECTIONS, **_QK_NORMS, **_POST_NORMS}
_LLAMA_BLOCK = {**PROJECTIONS, **_PRE_NORMS}
_GATED_DELTA = {
    "attention.w_q": "linear_attn.q_proj",
    "attention.w_k": "linear_attn.k_proj",
    "attention.w_v": "linear_attn.v_proj",
    "attention.w_a": "linear_attn.a_proj",
    "attention.w_b": "linear_attn.b_proj",
    "attention.w_g": "linear_attn.g_proj",
    "attention.w_out": "linear_attn.o_proj",
    "attention.q_conv1d": "linear_attn.q_conv1d",
    "attention.k_conv1d": "linear_attn.k_conv1d",
    "attention.v_conv1d": "linear_attn.v_conv1d",
    "attention.o_norm": "linear_attn.o_norm",
    "attention.A_log": "linear_attn.A_log",
    "attention.dt_bias": "linear_attn.dt_bias",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    **_PRE_NORMS,
}
# Names of OLMo-core's converter, and those that transformers' save_pretrained gives to the norms.
_HYBRID_ALIASES = {
    "linear_attn.out_proj": "linear_attn.o_proj",
    "linear_attn.norm": "linear_attn.o_norm",
    "attention_layer_norm": "input_layernorm",
    "feedforward_layer_norm": "post_attention_layernorm",
}
# A parameter of a module has a suffix; the two vectors of a Gated DeltaNet have none.
_SUFFIX = r"(\.weight|\.bias|(?<=\.A_log)|(?<=\.dt_bias))"
_FUSED = {
    "self_attn.qkv_proj": ("attention.w_q", "attention.w_k", "attention.w_v"),
    "mlp.gate_up_proj": ("feed_forward.w1", "feed_forward.w3"),
}


@dataclass(frozen=True)
class Family:
    """transformers' class for a model_type.

    `block`: names of modules inside a layer, ours first. `fused`: modules of theirs that hold several of ours, one after
    the other by rows. `keys`: the keys of config.json that only some families have, with transformers' value where the key
    is missing. `values`: keys with the only value that the class can express. `does`: fields of ModelConfig that all models
    of the family share. `own_tokenizer`: transformers loads every tokenizer of the family with the family's class, whatever
    tokenizer_class says.

    A hybrid also has names in a layer with a Gated DeltaNet (`linear`), modules of the class that published folders store
    as several (`joined`), and other names of modules in a layer (`aliases`). `linear_layers` says for each layer whether it
    has one, and repeats.
    """

    model_type: str
    architecture: str
    block: Mapping[str, str]
    keys: Mapping[str, Any]
    norm_eps: float
    rope_theta: float = 10_000.0
    tied: bool = False
    n_kv_heads: int | None = None  # where config.json has no value; None = n_heads
    head_dim: int | None = None  # where config.json has no value; None = d_model / n_heads
    bos_token_id: int | None = None
    max_positions: int | None = None
    does: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_tokenizer: bool = False
    linear: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    linear_layers: tuple[bool, ...] = ()

    def inner(self, layer: int) -> Mapping[str, str]:
        """The names of modules inside a layer, ours first."""
        linear = self.linear_layers
        return self.linear if linear and linear[layer % len(linear)] else self.block

    def theirs(self, name: str) -> str:
        """transformers' name of our parameter. A part of a fused one has the name of the fused one. Raises KeyError for
        a name that is not ours."""
        if match := re.fullmatch(rf"blocks\.(\d+)\.(.+?){_SUFFIX}", name):
            inner = next((theirs for theirs, parts in self.fused.items() if match[2] in parts), None)
            return f"model.layers.{match[1]}.{inner or self.inner(int(match[1]))[match[2]]}{match[3]}"
        return _OUTER[name]

    def ours(self, name: str) -> str:
        """Our name of transformers' parameter, the first one of a fused parameter. Raises KeyError for a name that is not
        theirs."""
        return self.parts(name)[0]

    def parts(self, name: str) -> tuple[str, ...]:
        """Our names of the parameters in transformers' parameter, in the order of its rows. Raises KeyError for a name
        that is not theirs."""
        if match := re.fullmatch(rf"model\.layers\.(\d+)\.(.+?){_SUFFIX}", name):
            module = self.aliases.get(match[2], match[2])
            if several := self.fused.get(module) or self.joined.get(module):
                return tuple(f"blocks.{match[1]}.{inner}{match[3]}" for inner in several)
            inner = next((ours for ours, theirs in self.inner(int(match[1])).items() if theirs == module), None)
            if inner is None:
                raise KeyError(name)
            return (f"blocks.{match[1]}.{inner}{match[3]}",)
        return (_OUTER_OURS[name],)


_BIASES = {"attention_bias": False, "mlp_bias": False}
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
FAMILIES = {
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", _OLMO_BLOCK, {"attention_bias": False}, 1e-5, max_positions=2048),
    "olmo3": Family(
        "olmo3",
        "Olmo3ForCausalLM",
        _OLMO_BLOCK,
        {"attention_bias": False, "sliding_window": 4096, "layer_types": None},
        1e-5,
        500_000.0,
        max_positions=2048,
    ),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_LLAMA_BLOCK, **_QK_NORMS},
        {"attention_bias": False, **_QWEN_WINDOWS},
        1e-6,
        n_kv_heads=32,
        head_dim=128,
        max_positions=32768,
        does={"prenorm": True, "qk_norm": "head"},
    ),
    "qwen2": Family(
        "qwen2",
        "Qwen2ForCausalLM",
        _LLAMA_BLOCK,
        _QWEN_WINDOWS,
        1e-6,
        n_kv_heads=32,
        max_positions=32768,
        does={"prenorm": True, "qk_norm": "", "qkv_bias": True},
        values={"attention_bias": True},
        own_tokenizer=True,
    ),
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        _LLAMA_BLOCK,
        _BIASES,
        1e-6,
        bos_token_id=1,
        max_positions=2048,
        does={"prenorm": True, "qk_norm": ""},
    ),
    "mistral": Family(
        "mistral",
        "MistralForCausalLM",
        _LLAMA_BLOCK,
        {"sliding_window": 4096},
        1e-6,
        n_kv_heads=8,
        bos_token_id=1,
        max_positions=131072,
        does={"prenorm": True, "qk_norm": ""},
    ),
    "smollm3": Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        _LLAMA_BLOCK,
        {
            **_BIASES,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        1e-6,
        2_000_000.0,
        tied=True,
        n_kv_heads=4,
        bos_token_id=128000,
        max_positions=32768,
        does={"prenorm": True, "qk_norm": ""},
    ),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        _LLAMA_BLOCK,
        {"sliding_window": None, "original_max_position_embeddings": 4096, "partial_rotary_factor": None},
        1e-5,
        bos_token_id=1,
        max_positions=4096,
        does={"prenorm": True, "qk_norm": ""},
        fused=_FUSED,
    ),
    "olmo_hybrid": Family(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        _OLMO_BLOCK,
        {"attention_bias": False, "layer_types": None},
        1e-6,
        max_positions=65536,
        linear=_GATED_DELTA,
        joined={"linear_attn.conv1d": ("attention.q_conv1d", "attention.k_conv1d", "attention.v_conv1d")},
        aliases=_HYBRID_ALIASES,
    ),
}


def usual_family(config: ModelConfig) -> str:
    """The model_type that the fields of an architecture determine where `family` is empty."""
    if config.gated_delta:
        return "olmo_hybrid"
    if not config.prenorm:
        return "olmo3" if config.window else "olmo2"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    if config.rotary_dim:
        return "phi3"
    if len(config.rope_layers) > 1 or not config.rope_layers[0]:
        return "smollm3"
    return "mistral" if config.window else "llama"


def family(config: ModelConfig) -> Family:
    """The family of an architecture."""
    found = FAMILIES[config.family or usual_family(config)]
    return replace(found, linear_layers=config.gated_delta.layers) if config.gated_delta else found
