"""Hugging Face names, shapes and configurations of a model.

In:  a ModelConfig (sft.recipe.architecture), or the config.json of a Hugging Face folder. Out: the same facts in the other
     form.

A family (sft.recipe.families) is a table of names. Tensors only change their names, never their layout; Phi 3 stores
several of ours as the rows of one. sft.checkpoint.hf_folder reads the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sft.common.errors import SftError
from sft.recipe.architecture import DynamicRope, GatedDelta, ModelConfig
from sft.recipe.base_config import find_family
from sft.recipe.differences import Difference, mismatch
from sft.recipe.families import FAMILIES, Family, family
from sft.recipe.rotary import rope_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FAMILIES", "Family", "family", "find_family"]
# Fields that transformers writes into every config.json and that do not describe the model.
_NOT_ABOUT_THE_MODEL = {
    "_name_or_path", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "problem_type", "return_dict",
    "output_attentions", "output_hidden_states",
}  # fmt: skip
DECAYS = (".A_log", ".dt_bias")  # a Gated DeltaNet's vectors: fp32, whole on every rank, without weight decay
VOCAB_ROWS = ("embeddings.weight", "lm_head.w_out.weight")  # the two tensors with one row per token id


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
    return dict(_shapes(config, vocab_size or config.vocab_size))  # one of the caller's own


@lru_cache(maxsize=16)  # a plan asks for it a dozen times, and a choice of hardware numbers makes many plans
def _shapes(config: ModelConfig, vocab: int) -> dict[str, tuple[int, ...]]:
    d = config.d_model
    result: dict[str, tuple[int, ...]] = {"embeddings.weight": (vocab, d)}
    for layer, mixer in enumerate(config.mixers):
        inner = _gated_delta_shapes(mixer, d) if mixer else _attention_shapes(config)
        inner = inner | _feed_forward_shapes(config)
        result |= {f"blocks.{layer}.{name}": shape for name, shape in inner.items()}
    result["lm_head.norm.weight"] = (d,)
    result[head_name(config)] = (vocab, d)
    return result


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, q, kv = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    matrices = {"w_q": (q, d), "w_k": (kv, d), "w_v": (kv, d), "w_out": (d, q)}
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in matrices.items():
        found |= _matrix(f"attention.{name}", shape, config.out_bias if name == "w_out" else config.qkv_bias)
    if config.qk_norm:
        full = config.qk_norm == "full"
        found["attention.q_norm.weight"] = (q if full else config.head_dim,)
        found["attention.k_norm.weight"] = (kv if full else config.head_dim,)
    return found | {"attention_norm.weight": (d,)}


def _gated_delta_shapes(mixer: GatedDelta, d: int) -> dict[str, tuple[int, ...]]:
    rows = {"w_q": mixer.keys, "w_k": mixer.keys, "w_v": mixer.values, "w_a": mixer.value_heads,
            "w_b": mixer.value_heads, "w_g": mixer.values}  # fmt: skip
    channels = {"q_conv1d": mixer.keys, "k_conv1d": mixer.keys, "v_conv1d": mixer.values}
    return {
        "attention.A_log": (mixer.value_heads,),
        "attention.dt_bias": (mixer.value_heads,),
        **{f"attention.{name}.weight": (size, d) for name, size in rows.items()},
        **{f"attention.{name}.weight": (size, 1, mixer.conv_width) for name, size in channels.items()},
        "attention.o_norm.weight": (mixer.value_dim,),
        "attention.w_out.weight": (d, mixer.values),
        "attention_norm.weight": (d,),
    }


def _feed_forward_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, size = config.d_model, config.intermediate_size
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in {"w1": (size, d), "w2": (d, size), "w3": (size, d)}.items():
        found |= _matrix(f"feed_forward.{name}", shape, config.mlp_bias)
    return found | {"feed_forward_norm.weight": (d,)}


def _matrix(name: str, shape: tuple[int, ...], biased: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if biased else {})


def exported_parts(config: ModelConfig, vocab_size: int) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """transformers' tensors by name, each with (our name, shape) of the tensors that are its rows."""
    kind = family(config)
    ours = shapes(config, vocab_size)
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name in ours:
        theirs = kind.theirs(name)
        found.setdefault(theirs, [(part, ours[part]) for part in kind.parts(theirs)])
    return found


def class_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of transformers' class by its name there. It may hold several published tensors as the
    rows of one."""
    kind, found = family(config), dict[str, tuple[int, ...]]()
    whole = {part: theirs for theirs, parts in kind.joined.items() for part in parts}
    for name, parts in exported_parts(config, vocab_size).items():
        rows, rest = sum(shape[0] for _, shape in parts), parts[0][1][1:]
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", parts[0][0])
        if match and match[2] in whole:
            name = f"model.layers.{match[1]}.{whole[match[2]]}.weight"
            rows += found.get(name, (0,))[0]
        found[name] = (rows, *rest)
    return found


def layer_types(config: ModelConfig) -> list[str]:
    """transformers' names of the layers' mixers."""

    def kind(layer: int) -> str:
        if config.layer_mixer(layer):
            return "linear_attention"
        return "sliding_attention" if config.layer_window(layer) else "full_attention"

    return [kind(i) for i in range(config.n_layers)]


def hf_config(
    config: ModelConfig,
    *,
    vocab_size: int,
    max_position_embeddings: int,
    dtype: str,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> PretrainedConfig:
    """transformers' configuration of the same model.

    Raises SftError for a context length that would change the model: dynamic scaling depends on it.
    """
    from transformers import AutoConfig  # start-up: transformers takes a second

    kind = family(config)
    if isinstance(config.rope_scaling, DynamicRope) and max_position_embeddings != config.rope_scaling.old_context:
        raise SftError(
            f"max_position_embeddings: {max_position_embeddings}, expected {config.rope_scaling.old_context}: dynamic rotary"
            " scaling starts there; next: remove [convert] max_position_embeddings"
        )
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
        "hidden_act": "silu",
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": dtype,
        **_of_family(config, kind),
    }
    return AutoConfig.for_model(kind.model_type, **common, architectures=[kind.architecture])


def _of_family(config: ModelConfig, kind: Family) -> dict[str, Any]:
    """The keys of config.json that only some families or models have."""
    partial = config.rotated / config.head_dim
    scaled = rope_parameters(config.rope_scaling, config.rope_theta, partial)
    keys: dict[str, Any] = {"rope_parameters": scaled}
    # Qwen 3's default is 128.
    if config.head_dim * config.n_heads != config.d_model or kind.head_dim:
        keys["head_dim"] = config.head_dim
    if "attention_bias" in kind.keys:
        keys["attention_bias"] = config.out_bias
    if "mlp_bias" in kind.keys:
        keys["mlp_bias"] = config.mlp_bias
    windowed = any(config.windows)
    if "sliding_window" in kind.keys:
        keys["sliding_window"] = config.window or None
    if "use_sliding_window" in kind.keys:
        keys["use_sliding_window"] = windowed
    if "layer_types" in kind.keys and (windowed or kind.model_type in ("olmo3", "olmo_hybrid")):
        keys["layer_types"] = layer_types(config)
    if "no_rope_layers" in kind.keys:
        keys["no_rope_layers"] = [int(config.has_positions(i)) for i in range(config.n_layers)]
    if kind.model_type == "olmo3":
        plain = rope_parameters(config.rope_scaling if config.scale_windowed else None, config.rope_theta)
        keys["rope_parameters"] = {"full_attention": scaled, "sliding_attention": plain}
    if config.gated_delta:
        keys |= _of_hybrid(config, config.gated_delta)
    if "original_max_position_embeddings" in scaled and "original_max_position_embeddings" in kind.keys:
        keys["original_max_position_embeddings"] = scaled["original_max_position_embeddings"]
    if "partial_rotary_factor" in kind.keys and config.rotary_dim:
        keys["partial_rotary_factor"] = partial
    return keys


def _of_hybrid(config: ModelConfig, mixer: GatedDelta) -> dict[str, Any]:
    """The keys of a Gated DeltaNet. A model without positions has no base of the rotary embedding."""
    keys: dict[str, Any] = {
        "linear_num_key_heads": mixer.key_heads,
        "linear_num_value_heads": mixer.value_heads,
        "linear_key_head_dim": mixer.key_dim,
        "linear_value_head_dim": mixer.value_dim,
        "linear_conv_kernel_dim": mixer.conv_width,
        "linear_allow_neg_eigval": mixer.negative_eigenvalues,
    }
    return keys if any(config.rope_layers) else keys | {"rope_parameters": {"rope_theta": None}}


def config_json(config: PretrainedConfig) -> dict[str, Any]:
    """The content of config.json: the keys of transformers 5, and the rope keys that transformers 4 and vLLM read.

    transformers 4 reads `rope_theta` and `rope_scaling` at the top level only, and silently uses defaults without them.
    Version 5 reads `rope_parameters` first. With both, all versions load the same model.
    """
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    data = {name: value for name, value in data.items() if name not in _NOT_ABOUT_THE_MODEL}
    rope = data["rope_parameters"].get("full_attention", data["rope_parameters"])
    if rope["rope_theta"] is None:  # no positions; the published form, without a type of scaling
        return data | {"rope_parameters": {"rope_theta": None}}
    data["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        data["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return data


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Raises SftError unless both name the same tensors with the same shapes."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    other = [name for name in wanted if name in found and tuple(found[name]) != tuple(wanted[name])]
    if missing:
        problem = f"{len(missing)} of {len(wanted)} tensors missing, the first is {missing[0]}"
    elif extra:
        problem = f"{len(extra)} tensors that the model does not have, the first is {extra[0]}"
    elif other:
        problem = f"{other[0]}: shape {tuple(found[other[0]])}, expected {tuple(wanted[other[0]])}"
    else:
        return
    rows = [
        Difference(name, _shape(found.get(name), "missing"), _shape(wanted.get(name), "none"))
        for name in (*missing, *extra, *other)
    ]
    raise SftError(
        mismatch(
            f"{where}: {problem}",
            rows,
            "fetch all of it again, or correct the description of the model (config.json, the recipe's [model])",
            ("tensor", "in the files", "in the model"),
        )
    )


def _shape(shape: tuple[int, ...] | None, otherwise: str) -> str:
    return otherwise if shape is None else " x ".join(map(str, shape))
