"""What a base's config.json says. Standard library only: the planner reads local bases before the environment exists.

    base = read_base(folder)        # of a Hugging Face folder or an OLMo-core step; None without config.json
    base.config                     # the architecture
    base.facts                      # what else an export keeps: rows, context length, special tokens

Every key of a config.json is used, listed here as irrelevant, or refused with its value.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.common.files import read_json
from sft.recipe import core_config
from sft.recipe.architecture import EVERY_FOURTH_FULL, THREE_OF_FOUR, GatedDelta, ModelConfig, shortest_pattern
from sft.recipe.config_reader import ConfigReader
from sft.recipe.families import FAMILIES, Family, usual_family
from sft.recipe.quantisation import read_quantisation
from sft.recipe.rotary import CORRECT, LAYER_TYPES, read_rotary

IRRELEVANT = frozenset({
    # transformers writes these into every config.json: names, outputs, caches, and defaults of generate().
    "_name_or_path", "_model_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "architectures", "auto_map", "base_model_tp_plan", "chunk_size_feed_forward",
    "custom_pipelines", "dtype", "finetuning_task", "id2label", "label2id", "initializer_range", "is_decoder",
    "keys_to_ignore_at_inference", "model_type", "output_attentions", "output_hidden_states", "output_scores",
    "prefix", "problem_type", "pruned_heads", "return_dict", "return_dict_in_generate", "task_specific_params",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "tf_legacy_loss", "use_bfloat16", "use_cache",
    "_flash_attn_2_enabled", "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty",
    "cls_token_id", "mask_token_id", "sep_token_id", "unk_token_id", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
    # Of some families and of tools that write their mark; no forward pass of a supported class reads them.
    "is_llama_config", "linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min", "max_window_layers", "pretraining_tp", "transformers.js_config", "unsloth_fixed", "unsloth_version",
})  # fmt: skip
"""Keys that do not change what a model computes here."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embd_pdrop": (0,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "full_attn_mod": (1,),
    "hidden_act": ("silu", "swish"),
    "hidden_dropout": (0,),
    "interpolate_factor": (1,),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "resid_pdrop": (0,),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "sliding_window": (),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
"""Keys that are accepted with these values (and null) only: what they would do otherwise is not implemented."""

_NOT_NULL = frozenset({
    "hidden_act", "initializer_range", "linear_allow_neg_eigval", "linear_conv_kernel_dim", "max_position_embeddings",
    "rms_norm_eps", "tie_word_embeddings", "use_cache",
})  # fmt: skip

STEP_KEY = "base"
"""The key of a step's config.json that has the facts of a Hugging Face base."""


@dataclass(frozen=True)
class BaseFacts:
    """What an export keeps of a base, beside its architecture.

    `rows`: rows of the published embedding. `max_positions`: its max_position_embeddings. None where the base does not say.
    """

    rows: int | None = None
    max_positions: int | None = None
    bos_token_id: int | None = None
    scaled: bool = False  # the base has a rotary scaling of its own
    origin: str = "hf"  # or "olmo-core"
    quantised: str = ""  # the method of its weights, which are dequantised when they are read

    def to_value(self) -> dict[str, Any]:
        """The fields that a step's config.json keeps."""
        value: dict[str, Any] = {
            "rows": self.rows,
            "max_positions": self.max_positions,
            "bos_token_id": self.bos_token_id,
            "scaled": self.scaled,
        }
        return value | ({"quantised": self.quantised} if self.quantised else {})


@dataclass(frozen=True)
class Base:
    """A base's architecture and facts. `where`: its config.json. `positions_unsaid`: a hybrid whose rope_parameters is null,
    of which the recipe must say whether it has positions; `config` has them, as transformers reads it."""

    config: ModelConfig
    facts: BaseFacts
    where: str
    positions_unsaid: bool = False


def read_base(folder: Path, ignore: Collection[str] = ()) -> Base | None:
    """The base in a folder; None if it has no config.json. `ignore`: keys that the recipe declares irrelevant.

    Raises SftError for a config that is not supported, naming every such key with its value.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    data = read_json(file)
    if "model_type" not in data and ("model" in data or core_config.OURS in data):
        config = core_config.read(data, str(file), ignore)
        return Base(config, core_facts(data, str(file)), str(file))
    return read_hf_config(data, str(file), ignore)


def tokenizer_of(base: Path) -> Path | None:
    """The tokenizer.json of a base: in its folder, or in a tokenizer/ inside or beside it. None if there is none."""
    folders = (base, base / "tokenizer", base.parent / "tokenizer")
    return next((file for folder in folders if (file := folder / "tokenizer.json").is_file()), None)


def longest_input(file: Path) -> int:
    """max_position_embeddings of an export's config.json. Raises SftError."""
    value = read_json(file).get("max_position_embeddings")
    if type(value) is not int or value < 1:
        raise SftError(
            f"{file}: max_position_embeddings: {value!r}, expected a whole number of at least 1; next: set [evaluate]"
            " max_length, or make convert again"
        )
    return value


def core_facts(data: dict[str, Any], where: str) -> BaseFacts:
    """What a step of OLMo-core's layout says about the Hugging Face base that its run started from."""
    if (value := data.get(STEP_KEY)) is None:
        return BaseFacts(origin="olmo-core")
    try:
        return BaseFacts(**value)
    except TypeError as error:
        raise SftError(f"{where}: {STEP_KEY}: {error}; next: bring the step's own config.json") from error


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder's config.json is Hugging Face's."""
    file = folder / "config.json"
    return file.is_file() and "model_type" in read_json(file)


def find_family(data: dict[str, Any], where: str) -> Family:
    """The family that a config.json names, with the layers that it lists. Raises SftError for an unsupported one."""
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise SftError(
            f"{where}: model_type: {kind!r}, expected one of {', '.join(FAMILIES)}; next: choose a base of one of these"
            " families"
        )
    family = FAMILIES[kind]
    if not family.linear:
        return family
    return replace(family, linear_layers=_linear_layers(ConfigReader(data, where)))


def read_hf_config(data: dict[str, Any], where: str, ignore: Collection[str] = ()) -> Base:
    """The base that a Hugging Face config.json describes. Raises SftError."""
    family = find_family(data, where)
    config = ConfigReader(data, where, ignore)
    quantised = read_quantisation(config)
    _check_class(config, family)
    for name, value in family.values.items():
        if config.get(name) not in (None, value):
            config.refuse(name, data[name], repr(value))
    heads, d_model = config.whole("num_attention_heads"), config.whole("hidden_size")
    max_positions = config.whole("max_position_embeddings", family.max_positions)
    longest = data.get("max_position_embeddings")
    if isinstance(longest, float):  # OLMo-core's converter writes 1e30 where it does not know
        expected = "a whole number: transformers refuses this one"
        config.refuse("max_position_embeddings", longest, expected, "write the base's longest input")
    rotary = read_rotary(config, family, max_positions)
    for name in _not_null(family):
        if name in data and data[name] is None:
            config.refuse(name, None, "a value: transformers refuses null here", CORRECT)
    head_dim = config.whole("head_dim", family.head_dim or d_model // heads)
    layers = config.whole("num_hidden_layers")
    does = dict(family.does)
    if "attention_bias" in family.keys:
        does |= dict.fromkeys(("qkv_bias", "out_bias"), config.flag("attention_bias", False))
    if "mlp_bias" in family.keys:
        does["mlp_bias"] = config.flag("mlp_bias", False)
    if data.get("initializer_range"):
        does["init_std"] = config.number("initializer_range")
    made = ModelConfig(
        n_layers=layers,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=config.whole("num_key_value_heads", family.n_kv_heads or heads),
        head_dim=head_dim,
        intermediate_size=config.whole("intermediate_size"),
        vocab_size=config.whole("vocab_size"),
        rope_theta=rotary.theta,
        rope_scaling=rotary.scaling,
        rotary_dim=_rotary_dim(config, family, rotary.partial, head_dim),
        norm_eps=config.number("rms_norm_eps", family.norm_eps),
        tied=config.flag("tie_word_embeddings", family.tied),
        gated_delta=_gated_delta(config, family),
        **{**does, **_windows(config, family, layers), "rope_layers": _rope_layers(config, family, layers)},
    )
    if not rotary.positions:
        made = replace(made, rope_layers=(False,))
    if made.window and made.rope_scaling and rotary.scale_windowed and any(made.windows):
        made = replace(made, scale_windowed=True)
    if usual_family(made) != family.model_type:
        made = replace(made, family=family.model_type)
    _check_geometry(config, made)
    bos = config.get("bos_token_id") if "bos_token_id" in data else family.bos_token_id
    if isinstance(bos, bool) or not isinstance(bos, int | None):
        config.refuse("bos_token_id", bos, "one id, or null", CORRECT)
    for name in ("eos_token_id", "pad_token_id", "original_max_position_embeddings"):
        config.get(name)  # the tokenizer's ids are those of the data; the length belongs to the rotary settings
    config.refuse_rest(IRRELEVANT, NEUTRAL)
    scaled = made.rope_scaling is not None
    facts = BaseFacts(made.vocab_size, max_positions, bos, scaled, quantised=quantised.method if quantised else "")
    return Base(made, facts, where, rotary.unsaid)


def _not_null(family: Family) -> frozenset[str]:
    """The keys that transformers' class of a family refuses if they are null."""
    own = {name for name, default in family.keys.items() if default is not None} - {"sliding_window"}
    return _NOT_NULL | own | ({"head_dim"} if family.head_dim else set())


def _check_class(config: ConfigReader, family: Family) -> None:
    named = config.data.get("architectures") or [family.architecture]
    bare = family.architecture.replace("ForCausalLM", "Model")
    if not isinstance(named, list) or not any(name in named for name in (family.architecture, bare)):
        config.refuse(
            "architectures", named, f"a list with {family.architecture}", "choose a base that predicts the next token"
        )


def _check_geometry(config: ConfigReader, made: ModelConfig) -> None:
    if made.n_heads % made.n_kv_heads:
        config.refuse("num_key_value_heads", made.n_kv_heads, f"a divisor of num_attention_heads, {made.n_heads}")
    if made.rotated % 2:
        config.refuse("head_dim", made.head_dim, "an even number of rotated dimensions")
    for name in ("short", "long"):
        factors = getattr(made.rope_scaling, name, None)
        if factors is not None and len(factors) != made.rotated // 2:
            config.refuse(f"rope_scaling: {name}_factor", f"{len(factors)} values", f"{made.rotated // 2} values")


def _gated_delta(config: ConfigReader, family: Family) -> GatedDelta | None:
    """The Gated DeltaNet of a hybrid, with transformers' sizes where the config has none."""
    if not family.linear:
        return None
    config.get("layer_types")  # in `find_family`
    heads = config.whole("num_attention_heads")
    key_heads = config.whole("linear_num_key_heads", heads)
    value_heads = config.whole("linear_num_value_heads", heads)
    key_dim = config.whole("linear_key_head_dim", max(1, int(0.75 * config.whole("hidden_size") / key_heads)))
    if value_heads % key_heads:
        config.refuse("linear_num_value_heads", value_heads, f"a multiple of linear_num_key_heads, {key_heads}")
    return GatedDelta(
        key_heads,
        value_heads,
        key_dim,
        config.whole("linear_value_head_dim", 2 * key_dim),
        config.whole("linear_conv_kernel_dim", 4),
        config.flag("linear_allow_neg_eigval", True),
        family.linear_layers,
    )


def _linear_layers(config: ConfigReader) -> tuple[bool, ...]:
    """Which layers of a hybrid have a Gated DeltaNet."""
    layers, types = config.whole("num_hidden_layers"), config.get("layer_types")
    if types is None:  # transformers' default: at least one layer has attention
        usual = [THREE_OF_FOUR[i % 4] for i in range(layers)]
        return shortest_pattern(usual if not all(usual) else [*usual[:-1], False], THREE_OF_FOUR)
    kinds = ["full_attention", "linear_attention"]
    if not isinstance(types, list) or len(types) != layers or not _are(types, kinds) or types.count(types[0]) == layers:
        config.refuse("layer_types", types, f"{layers} of {' and '.join(kinds)}, each at least once")
    return shortest_pattern([kind == "linear_attention" for kind in types], THREE_OF_FOUR)


def _are(values: list[Any], allowed: Collection[str]) -> bool:
    """Whether every value is one of these. A value of a config can be anything, a list too."""
    return all(value in tuple(allowed) for value in values)


def _rotary_dim(config: ConfigReader, family: Family, partial: float, head_dim: int) -> int:
    if partial == 1.0:
        return 0
    if family.model_type != "phi3":
        config.refuse("partial_rotary_factor", partial, "1.0: transformers' class does not read another one")
    rotated = int(head_dim * partial)
    if not 0 < rotated <= head_dim:
        config.refuse("partial_rotary_factor", partial, f"a share of the {head_dim} dimensions of a head", CORRECT)
    return rotated


def _windows(config: ConfigReader, family: Family, layers: int) -> dict[str, Any]:
    """`window` and `window_layers` of a config."""
    if "sliding_window" not in family.keys:
        return {}
    default = family.keys["sliding_window"]
    window = config.whole("sliding_window", 0 if "sliding_window" in config.data else default or 0, least=0)
    if "use_sliding_window" in family.keys and not config.flag("use_sliding_window", False):
        window = 0
    elif config.data.get("sliding_window") == 0:
        config.refuse("sliding_window", 0, "a number of tokens, or null for none", CORRECT)
    if "layer_types" not in family.keys:  # one rule for all layers
        return {"window": window, "window_layers": (True,)} if window else {}
    types = config.get("layer_types")
    if types is None:
        windowed = _default_windows(config, family, layers, window)
    elif isinstance(types, list) and len(types) == layers and _are(types, LAYER_TYPES):
        windowed = [kind == "sliding_attention" for kind in types]
    else:
        config.refuse("layer_types", types, f"{layers} of full_attention and sliding_attention")
    if not window and (any(windowed) or family.model_type == "olmo3"):
        off = "use_sliding_window" if config.data.get("sliding_window") else "sliding_window"
        config.refuse(off, config.data.get(off), "a window, as some layers are sliding", CORRECT)
    if family.model_type != "olmo3" and not any(windowed):
        return {}
    return {"window": window, "window_layers": shortest_pattern(windowed, EVERY_FOURTH_FULL)}


def _default_windows(config: ConfigReader, family: Family, layers: int, window: int) -> list[bool]:
    """The layers with a window where the config has no layer_types."""
    if family.model_type == "olmo3":
        return [bool(window) and (i + 1) % 4 != 0 for i in range(layers)]
    if "max_window_layers" in family.keys:
        first = config.whole("max_window_layers", family.keys["max_window_layers"], least=0)
        return [bool(window) and i >= first for i in range(layers)]
    if "no_rope_layers" in family.keys:
        return [bool(window) and not has for has in _rope_choices(config, family, layers)]
    return [bool(window)] * layers


def _rope_layers(config: ConfigReader, family: Family, layers: int) -> tuple[bool, ...]:
    return shortest_pattern(_rope_choices(config, family, layers), (True,))


def _rope_choices(config: ConfigReader, family: Family, layers: int) -> list[bool]:
    """Whether each layer has positions."""
    if "no_rope_layers" not in family.keys:
        return [True] * layers
    interval = config.whole("no_rope_layer_interval", family.keys["no_rope_layer_interval"])
    found = config.choices("no_rope_layers", layers)
    return [(i + 1) % interval != 0 for i in range(layers)] if found is None else found
