"""How a field of a recipe or of a cluster file is declared: `opt`, with the rules that `sft.recipe.recipe` checks. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any, TypedDict, Unpack, get_type_hints

REQUIRED: Any = object()
"""In place of the default of a field that must be given."""


class Rules(TypedDict, total=False):
    """What a field is checked by, and who reads it. Bounds are inclusive, except `above`."""

    min: float | None
    max: float | None
    above: float | None
    choices: tuple[str, ...] | None
    """Allowed values, or the allowed keys of a table."""
    key: bool
    """Whether the field is in the key of its stage. False: an edit makes nothing stale."""
    late: bool
    """The key leaves the field out while it has its default, so runs from before it existed stay up to date."""
    selects: bool
    """The option chooses documents and does not change their tokens, so the key of the token cache leaves it out."""
    stage: str
    """The later stage whose key has the field, in place of the key of its own table's stage; "" = none."""
    launchers: tuple[str, ...]
    """Those that read the field; empty = all. With any other launcher it is refused."""
    stages: tuple[str, ...]
    """Those that read a field of [on.<cluster>.<stage>]; empty = all. For any other stage it is refused."""
    name: str
    """The field's name in recipes, where that is a keyword of Python."""
    hints: dict[str, str]
    """What the error says for a value that others would write."""


NO_RULES = Rules(
    min=None,
    max=None,
    above=None,
    choices=None,
    key=True,
    late=False,
    selects=False,
    stage="",
    launchers=(),
    stages=(),
    name="",
    hints={},
)


def name_of(f: Field[Any]) -> str:
    """The name of a field in recipes and on the command line."""
    return f.metadata.get("name") or f.name


@cache
def names_of(cls: type) -> Mapping[str, Field[Any]]:
    """{name in recipes: field} of a table."""
    return MappingProxyType({name_of(f): f for f in fields(cls)})


def hint_of(cls: type, name: str) -> Any:
    """The type of the field with this name in recipes."""
    return hints_of(cls)[names_of(cls)[name].name]


@cache
def hints_of(cls: type) -> Mapping[str, Any]:
    """{attribute: type} of a table."""
    return MappingProxyType(get_type_hints(cls))  # compiles every annotation at each call


def opt(default: Any, doc: str, **rules: Unpack[Rules]) -> Any:
    """Declares a field with its default and its meaning."""
    metadata = {"doc": doc, **NO_RULES, **rules}
    if default is REQUIRED:
        return field(metadata={**metadata, "required": True}, default=None)
    if isinstance(default, dict):
        return field(metadata=metadata, default_factory=lambda: dict(default))
    return field(default=default, metadata=metadata)
