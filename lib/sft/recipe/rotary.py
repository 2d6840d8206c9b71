"""Rotary settings of a Hugging Face config.json: old and new forms to ModelConfig's fields. Standard library only.

Old form: `rope_theta` and `rope_scaling` at the top level, with `type` or `rope_type`. New form: `rope_parameters`, flat or
one table for each type of layer. Values that transformers would ignore or replace are refused, as the base's own class would
then compute something else than its config says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sft.common.errors import SftError
from sft.recipe.architecture import DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, Yarn, yarn_attention
from sft.recipe.config_reader import ConfigReader
from sft.recipe.families import Family

LAYER_TYPES = ("full_attention", "sliding_attention")
CORRECT = "correct the base's config"
_UNUSED_THETA = 500_000.0  # ModelConfig's default, where no layer has positions


@dataclass(frozen=True)
class Rotary:
    """Base, scaling and rotated share of a head. `scale_windowed`: windowed layers have the scaling, too. `positions`:
    layers rotate at all. `unsaid`: the config does not say it."""

    theta: float
    scaling: RopeScaling | None
    partial: float
    scale_windowed: bool
    positions: bool = True
    unsaid: bool = False


def read_rotary(config: ConfigReader, family: Family, max_positions: int) -> Rotary:
    """The rotary settings of a config. Raises SftError for what is not supported."""
    if family.linear and config.data.get("rope_parameters", "") is None and not _given(config):
        # Ai2 has published such hybrids, which were trained without positions. transformers rotates with its default base.
        return Rotary(family.rope_theta, None, 1.0, False, unsaid=True)
    if family.linear and _no_positions(config):
        return Rotary(_UNUSED_THETA, None, 1.0, False, positions=False)
    if "rope_theta" in config.data and config.data["rope_theta"] is None and not config.data.get("rope_parameters"):
        config.refuse("rope_theta", None, "a number above 0", "choose a base whose layers have positions")
    old, new = config.table("rope_scaling"), config.table("rope_parameters")
    nested = new is not None and any(name in LAYER_TYPES for name in new.data)
    top = None if config.get("rope_theta") is None else config.number("rope_theta")
    partial = config.number("partial_rotary_factor", 1.0)
    if family.model_type == "olmo3":
        return _olmo3(config, new if nested else None, old, top, max_positions)
    if nested:
        config.refuse("rope_parameters", config.data["rope_parameters"], "one table for all layers", CORRECT)
    outer = config.get("original_max_position_embeddings")
    settings = [_one(table, family, max_positions, outer) for table in (old, new) if table is not None]
    if old is not None and new is not None and settings[0][1] != settings[1][1]:
        config.refuse("rope_scaling", old.data, f"the same as rope_parameters, {new.data!r}", "remove one of them")
    thetas = {theta for theta in (*(s[0] for s in settings), top) if theta is not None}
    if len(thetas) > 1:
        config.refuse("rope_theta", top, f"one value, not {sorted(thetas)}", CORRECT)
    partials = {s[2] for s in settings if s[2] is not None} | {partial}
    if partial == 1.0 and len(partials) > 1:
        partials.discard(1.0)
    if len(partials) > 1:
        config.refuse("partial_rotary_factor", partial, f"one value, not {sorted(partials)}", CORRECT)
    scaling = settings[0][1] if settings else None
    return Rotary(thetas.pop() if thetas else family.rope_theta, scaling, partials.pop(), True)


def _given(config: ConfigReader) -> bool:
    """Whether the old form of the rotary settings says something."""
    return any(config.get(name) is not None for name in ("rope_theta", "rope_scaling"))


def _no_positions(config: ConfigReader) -> bool:
    """Whether a hybrid's rope_theta is null, in the new form or in the old one."""
    named = config.table("rope_parameters")
    found = config.data if named is None else named.data
    if found.get("rope_theta", "") is not None:
        return False
    config.get("rope_theta")
    for table in filter(None, (named, config.table("rope_scaling"))):
        if table.data.get("rope_type") not in (None, "default") or set(table.data) - {"rope_theta", "rope_type"}:
            table.refuse("rope_theta", None, "a number above 0, as there is a scaling", CORRECT)
    return True


def _olmo3(
    config: ConfigReader, nested: ConfigReader | None, old: ConfigReader | None, top: float | None, max_positions: int
) -> Rotary:
    """OLMo 3's settings: scaling on full-attention layers only."""
    if nested is None:
        flat = config.data.get("rope_parameters")
        if flat:
            config.refuse("rope_parameters", flat, f"a table for each of {', '.join(LAYER_TYPES)}", CORRECT)
        theta = 500_000.0 if top is None else top
        if theta != 500_000.0:
            config.refuse(
                "rope_theta",
                theta,
                "500000.0, which transformers gives to sliding layers in this form",
                "write rope_parameters with a table for each type of layer",
            )
        scaling = None if old is None else _one(old, None, max_positions, None)[1]
        return Rotary(theta, scaling, 1.0, False)
    found: dict[str, tuple[float | None, RopeScaling | None, float | None]] = {}
    for name in LAYER_TYPES:
        table = nested.table(name)
        found[name] = (None, None, None) if table is None else _one(table, None, max_positions, None)
        if table is not None and table.data.get("truncate") is not None and table.data["truncate"] is not True:
            table.refuse("truncate", table.data["truncate"], "true: transformers does not read it here", CORRECT)
    nested.refuse_rest()
    scaling, windowed = (found[name][1] for name in LAYER_TYPES)
    thetas = [500_000.0 if (t := found[name][0]) is None else t for name in LAYER_TYPES]
    if len({*thetas, *([] if top is None else [top])}) > 1:
        config.refuse("rope_theta", top if top is not None else thetas, "the same value for all layers", CORRECT)
    if windowed is not None and windowed != scaling:
        config.refuse("rope_parameters: sliding_attention", nested.data["sliding_attention"], "no scaling", CORRECT)
    if old is not None and _one(old, None, max_positions, None)[1] != scaling:
        config.refuse("rope_scaling", old.data, "the same as rope_parameters: full_attention", "remove one of them")
    return Rotary(thetas[0], scaling, 1.0, windowed is not None)


def _one(
    table: ConfigReader, family: Family | None, max_positions: int, outer: int | None
) -> tuple[float | None, RopeScaling | None, float | None]:
    """(theta, scaling, partial rotary factor) of one table."""
    if "rope_theta" in table.data and table.data["rope_theta"] is None:
        table.refuse("rope_theta", None, "a number above 0", "choose a base whose layers have positions")
    theta = None if table.get("rope_theta") is None else table.number("rope_theta")
    partial = None if table.get("partial_rotary_factor") is None else table.number("partial_rotary_factor")
    kind, older = table.get("rope_type"), table.get("type")
    if kind is not None and older is not None and kind != older:
        table.refuse("type", older, f"the same as rope_type, {kind!r}", CORRECT)
    kind = kind or older or "default"
    if family is not None and family.model_type == "phi3" and kind in ("su", "yarn"):
        if "original_max_position_embeddings" not in table.data:
            table.refuse(
                "type", kind, "'longrope': transformers refuses this older name here", "write longrope in its place"
            )
        kind = "longrope"
    scaling = read_scaling(table, kind, max_positions, outer)
    return theta, scaling, partial


def read_scaling(table: ConfigReader, kind: str, max_positions: int, outer: int | None = None) -> RopeScaling | None:
    """The scaling that a table describes. `outer`: the config's own original_max_position_embeddings, which has priority.

    Raises SftError for another kind, and for fields that the kind does not have.
    """
    scaling: RopeScaling | None
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearRope(table.number("factor"))
    elif kind == "dynamic":
        scaling = DynamicRope(table.number("factor"), max_positions)
    elif kind in ("yarn", "longrope", "llama3"):
        old = table.whole("original_max_position_embeddings", max_positions if outer is None else outer)
        if outer is not None:
            old = outer
        if kind == "longrope":
            scaling = _longrope(table, old, max_positions)
        else:
            scaling = _yarn(table, old) if kind == "yarn" else _llama3(table, old)
    else:
        table.refuse("rope_type", kind, "default, linear, dynamic, yarn, longrope or llama3")
    table.refuse_rest()
    return scaling


def _yarn(table: ConfigReader, old: int) -> Yarn:
    factor = table.number("factor")
    # transformers takes 0 for a missing value in these fields.
    fast = table.number("beta_fast", 32.0) if table.data.get("beta_fast") else 32.0
    slow = table.number("beta_slow", 1.0) if table.data.get("beta_slow") else 1.0
    first, second = table.get("mscale"), table.get("mscale_all_dim")
    attention: float | None = None
    if table.get("attention_factor") is not None:
        attention = table.number("attention_factor")
    elif first and second:
        attention = yarn_attention(factor, table.number("mscale")) / yarn_attention(
            factor, table.number("mscale_all_dim")
        )
    table.read |= {"beta_fast", "beta_slow"}
    made = Yarn(factor, fast, slow, old, None, table.flag("truncate", True))
    if attention is None or math.isclose(attention, made.attention_factor, rel_tol=1e-9):
        return made
    return Yarn(factor, fast, slow, old, attention, made.truncate)


def _longrope(table: ConfigReader, old: int, max_positions: int) -> LongRope:
    factor = table.number("factor", max_positions / old)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    if table.get("attention_factor") is not None:
        attention = table.number("attention_factor")
    return LongRope(_factors(table, "short_factor"), _factors(table, "long_factor"), old, attention)


def _factors(table: ConfigReader, name: str) -> tuple[float, ...]:
    values: Any = table.get(name)
    if not isinstance(values, list) or not values:
        table.refuse(name, values, "a list of numbers", CORRECT)
    if any(isinstance(v, bool) or not isinstance(v, int | float) or v <= 0 for v in values):
        table.refuse(name, values, "a list of numbers above 0", CORRECT)
    return tuple(float(v) for v in values)


def _llama3(table: ConfigReader, old: int) -> Llama3Rope:
    low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
    if high <= low:
        table.refuse("high_freq_factor", high, f"more than low_freq_factor, {low}", CORRECT)
    return Llama3Rope(table.number("factor"), low, high, old)


def rope_parameters(scaling: RopeScaling | None, theta: float, partial: float = 1.0) -> dict[str, Any]:
    """transformers' table for a scaling."""
    table: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if isinstance(scaling, LinearRope):
        table |= {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, DynamicRope):
        table |= {"rope_type": "dynamic", "factor": scaling.factor}
    elif isinstance(scaling, Yarn):
        table |= {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "original_max_position_embeddings": scaling.old_context,
            "attention_factor": scaling.attention_factor,
        }
        if not scaling.truncate:
            table["truncate"] = False
    elif isinstance(scaling, LongRope):
        table |= {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "original_max_position_embeddings": scaling.old_context,
            "attention_factor": scaling.attention,
        }
    elif isinstance(scaling, Llama3Rope):
        table |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.old_context,
        }
    if partial != 1.0:
        table["partial_rotary_factor"] = partial
    return table


def from_recipe(table: dict[str, Any], max_positions: int, where: str = "[model] rope_scaling") -> RopeScaling | None:
    """The scaling that a recipe's `rope_scaling` describes, in transformers' words. Raises SftError."""
    reader = ConfigReader(table, where)
    kind = reader.get("rope_type")
    if not isinstance(kind, str):
        raise SftError(
            f'{where} = {table!r}: no rope_type; next: rope_scaling = {{rope_type = "yarn", factor = 4.0,'
            ' original_max_position_embeddings = 8192}, or {rope_type = "default"} for none'
        )
    return read_scaling(reader, kind, max_positions)
