"""The architecture of a run: from its base, or from a preset for random weights. Standard library only.

    config = resolve(recipe.model, tokenizer_size, base)
    lines = named_changes(recipe.model, base)                # what the recipe changes about the base

With a base, its config.json says what the model is. What the recipe says as well must agree: a preset and every field of
[model]. Only `rope_scaling` and `yarn_factor` may differ, because a finetuning may extend the context; training logs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from sft.common.errors import SftError
from sft.recipe import families, rotary
from sft.recipe.architecture import LinearRope, Llama3Rope, ModelConfig, RopeScaling, Yarn
from sft.recipe.base_config import Base, BaseFacts
from sft.recipe.differences import Difference, mismatch
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Model

VOCABULARY_MULTIPLE = 128
"""The rows of the embedding are a multiple of this, which is fast on a GPU."""
DEFAULT_LENGTH = 65536
"""max_position_embeddings of an export that neither the recipe nor a base determines."""
_OTHER_NAMES = {"intermediate_size": "hidden"}
_RECIPE_FIELDS = {
    f.name: _OTHER_NAMES.get(f.name, f.name)
    for f in fields(ModelConfig)
    if _OTHER_NAMES.get(f.name, f.name) in {field.name for field in fields(Model)} and f.name != "rope_scaling"
}
"""The recipe's field for every number of ModelConfig that has one."""
_NOT_COMPARED = ("init_std", "vocab_size", "family", "rope_scaling", "scale_windowed")


def recipe_field(name: str) -> str:
    """The field of the recipe's [model] that sets this field of ModelConfig: "preset" where no other field does."""
    return "rope_scaling" if name == "rope_scaling" else _RECIPE_FIELDS.get(name, "preset")


def padded(rows: int) -> int:
    """The rows of the embedding in training."""
    return -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def resolve(model: Model, tokenizer_size: int = 0, base: Base | None = None) -> ModelConfig:
    """The architecture that a recipe and its base describe.

    `tokenizer_size` is the number of ids of the tokenizer, 0 before it is known. The embedding has at least a row for each
    id and each row of the base; vocab_size is 0 where nothing says it. Raises SftError with a table of the fields in which
    recipe and base differ.
    """
    if base is None:
        config = _from_preset(model)
        if not config.vocab_size and tokenizer_size:
            config = replace(config, vocab_size=padded(tokenizer_size))
    else:
        config = _from_base(model, base, tokenizer_size)
    if tokenizer_size > config.vocab_size > 0:
        raise SftError(
            f"[model] vocab_size {config.vocab_size} is smaller than the tokenizer's {tokenizer_size} ids; raise it"
        )
    if config.n_heads % config.n_kv_heads:
        raise SftError(f"[model] n_heads {config.n_heads} is not a multiple of n_kv_heads {config.n_kv_heads}")
    return config


def _from_preset(model: Model) -> ModelConfig:
    if not model.preset:
        raise SftError(
            f"[model] base {model.base}: its config.json is not here yet, and there is no preset; next: make sync"
        )
    config = replace(PRESETS[model.preset], **_given(model))
    if not any(config.rope_layers):
        given = [name for name in ("rope_theta", "yarn_factor", "rope_scaling") if getattr(model, name) is not None]
        if given:
            raise SftError(f"[model] {given[0]}: no layer of {model.preset} has positions; next: remove it")
    config = _with_scaling(config, _scaling(model, config, 0))
    if config.window and "sliding_window" not in families.family(config).keys:
        kind = families.family(config).model_type
        raise SftError(f"[model] window = {config.window}: models of the family {kind} have no windows; remove it")
    return config


def _given(model: Model) -> dict[str, Any]:
    """The numbers that the recipe gives, by ModelConfig's names."""
    values = {name: getattr(model, field) for name, field in _RECIPE_FIELDS.items()}
    return {name: value for name, value in values.items() if value is not None}


def _scaling(model: Model, config: ModelConfig, max_positions: int) -> RopeScaling | None:
    """The rotary scaling: the recipe's where it names one, else the config's. Raises SftError for two of them."""
    if model.rope_scaling is not None and model.yarn_factor is not None:
        raise SftError("[model] rope_scaling and yarn_factor: both say how positions are scaled; remove yarn_factor")
    if model.rope_scaling is not None:
        return rotary.from_recipe(model.rope_scaling, max_positions)
    if model.yarn_factor is None:
        return config.rope_scaling
    if not model.yarn_factor:
        return None
    yarn = config.rope_scaling if isinstance(config.rope_scaling, Yarn) else Yarn()
    return replace(yarn, factor=model.yarn_factor, attention=None)


def _with_scaling(config: ModelConfig, scaling: RopeScaling | None) -> ModelConfig:
    """The config with another scaling. OLMo 3 scales the layers with full attention only, other families all layers."""
    everywhere = families.family(config).model_type != "olmo3" and any(config.windows)
    return replace(config, rope_scaling=scaling, scale_windowed=bool(scaling and everywhere))


def with_positions(base: Base, model: Model | None = None) -> Base:
    """The base as the recipe says it where its config.json does not say whether a hybrid has positions: with those of the
    preset, or with the base of rotation that the recipe gives. Raises SftError if neither says it."""
    if not base.positions_unsaid:
        return base
    if model is not None and model.preset:
        preset = PRESETS[model.preset]
        return replace(base, config=replace(base.config, rope_layers=preset.rope_layers, rope_theta=preset.rope_theta))
    if model is not None and model.rope_theta is not None:
        return base
    recipe = '[model] preset = "olmo-hybrid-7b" for weights of that size, or ' if model is not None else ""
    raise SftError(
        f"{base.where}: rope_parameters: null: Ai2's hybrids were trained without positions, but transformers rotates queries"
        f" and keys with base {base.config.rope_theta:g}; next: say what it is: {recipe}in the file"
        ' "rope_parameters": {"rope_theta": null}, which means no positions'
    )


def _from_base(model: Model, base: Base, tokenizer_size: int) -> ModelConfig:
    base = with_positions(base, model)
    rows = list(_differences(model, base))
    if rows:
        raise SftError(
            mismatch(
                f"{base.where}: the recipe's [model] is not the base's architecture",
                rows,
                "write what the last column says; the base decides what the model is",
            )
        )
    config = base.config
    if (scaling := _scaling(model, config, base.facts.max_positions or 0)) != config.rope_scaling:
        config = _with_scaling(config, scaling)
    if model.init_std is not None:
        config = replace(config, init_std=model.init_std)
    preset = PRESETS[model.preset].vocab_size if model.preset else 0
    vocab = model.vocab_size or max(padded(max(base.config.vocab_size, tokenizer_size)), preset)
    return replace(config, vocab_size=vocab)


def _differences(model: Model, base: Base) -> Iterator[Difference]:
    """The fields in which the recipe contradicts its base."""
    given = _given(model)
    for name, value in given.items():
        found = getattr(base.config, name)
        if name not in _NOT_COMPARED and found != value:
            field = _RECIPE_FIELDS[name]
            yield Difference(name, repr(found), f"{field} = {value!r}", f"{field} = {found!r}, or remove {field}")
    if model.vocab_size is not None and model.vocab_size < base.config.vocab_size:
        rows = base.config.vocab_size
        yield Difference(
            "vocab_size", repr(rows), f"vocab_size = {model.vocab_size}", f"vocab_size = {rows}, or remove it"
        )
    if not model.preset:
        return
    preset = PRESETS[model.preset]
    for name in (f.name for f in fields(ModelConfig)):
        ours, found = getattr(preset, name), getattr(base.config, name)
        if name not in _NOT_COMPARED and name not in given and ours != found:
            yield Difference(name, repr(found), f"{ours!r} (preset {model.preset})", "remove preset")
    if not model.names_scaling and preset.rope_scaling != base.config.rope_scaling:
        table = rotary.rope_parameters(preset.rope_scaling, preset.rope_theta)
        del table["rope_theta"]
        pairs = ", ".join(f"{k} = {_toml(v)}" for k, v in table.items())
        yield Difference(
            "rope_scaling",
            repr(base.config.rope_scaling),
            f"{preset.rope_scaling!r} (preset {model.preset})",
            f"remove preset; or, to change the base's positions, rope_scaling = {{{pairs}}}",
        )


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)


def supported_length(config: ModelConfig, facts: BaseFacts) -> int | None:
    """The longest input that a base supports with the model's rotary scaling; None if the base does not say."""
    scaling = config.rope_scaling
    if facts.max_positions is None:
        return None
    if isinstance(scaling, LinearRope) and facts.scaled:
        return facts.max_positions
    if isinstance(scaling, LinearRope):
        return int(scaling.factor * facts.max_positions)
    if isinstance(scaling, Yarn | Llama3Rope):
        return max(facts.max_positions, int(scaling.factor * scaling.old_context))
    return facts.max_positions


def named_changes(model: Model, base: Base) -> list[str]:
    """A line for everything that the recipe changes about the base's architecture."""
    config = resolve(model, 0, base)
    lines = []
    if config.rope_scaling != base.config.rope_scaling:
        lines.append(
            f"rotary scaling changed by the recipe: the base has {base.config.rope_scaling or 'none'},"
            f" this model {config.rope_scaling or 'none'}"
        )
    if model.ignore_config:
        lines.append(f"keys of the base's config.json that the recipe ignores: {', '.join(model.ignore_config)}")
    return lines
