"""JSON Schemas of recipes and of cluster files, made from sft.recipe.schema, for editors. Standard library only.

    files()     ->  {"recipes/recipe.schema.json": text, "env/cluster.schema.json": text}

Editors that check TOML (Even Better TOML and taplo, tombi) read `#:schema ./recipe.schema.json` in the first comment. `make schema`
writes the files, and a test compares them with what this module makes.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any

from sft.recipe import schema
from sft.recipe.options import name_of

RECIPE, CLUSTER = "recipes/recipe.schema.json", "env/cluster.schema.json"
_KINDS = {int: "integer", float: "number", str: "string", bool: "boolean"}


def files() -> dict[str, str]:
    """{path in the repository: text} of both schemas."""
    return {RECIPE: _text(recipe_schema()), CLUSTER: _text(cluster_schema())}


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def recipe_schema() -> dict[str, Any]:
    """Of recipes/<name>.toml."""
    stages = {stage: _object(schema.Hardware, stage=stage) for stage in schema.STAGES}
    on = {
        "type": "object",
        "description": "[on.<cluster>.<stage>]: numbers that depend on the cluster and change no result",
        "additionalProperties": {"type": "object", "properties": stages, "additionalProperties": False},
    }
    tables = {name: _object(cls) for name, cls in schema.TABLES.items()}
    required = [name for name, table in tables.items() if table.get("required")]
    tables["evaluate"].pop("required")
    per_task = {name: tables["evaluate"]["properties"][name] for name in schema.PER_TASK}
    tables["evaluate"]["properties"]["by_task"]["additionalProperties"] = {
        "type": "object",
        "properties": {name: {k: v for k, v in field.items() if k != "default"} for name, field in per_task.items()},
        "additionalProperties": False,
    }
    tables["evaluate"]["anyOf"] = [{"required": ["tasks"]}, {"required": ["suite"]}]  # a suite names its tasks
    return _root("a recipe", {"type": "object", "properties": {**tables, "on": on}, "required": required})


def cluster_schema() -> dict[str, Any]:
    """Of env/<cluster>.toml."""
    made = _object(schema.Cluster)
    stages = {stage: _object(schema.Hardware, stage=stage) for stage in schema.STAGES}
    made["properties"]["on"] |= {"properties": stages, "additionalProperties": False}
    return _root("a cluster's file", made)


def _root(title: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": title, **body, "additionalProperties": False}


def _object(cls: type, stage: str = "") -> dict[str, Any]:
    """A table. stage: only the fields of [on.<cluster>.<stage>] that this stage reads."""
    hints = typing.get_type_hints(cls)
    fields = [
        f for f in dataclasses.fields(cls) if not (stage and f.metadata["stages"] and stage not in f.metadata["stages"])
    ]
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name_of(f): _field(f, hints[f.name]) for f in fields},
        "additionalProperties": False,
    }
    if required := [f.name for f in fields if f.metadata.get("required")]:
        made["required"] = required
    return made


def _field(f: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    made = {"description": f.metadata["doc"], **_type(hint, f.metadata)}
    if f.metadata.get("required") and made["type"] == "array":
        made["minItems"] = 1
    default = f.default if f.default is not dataclasses.MISSING else {}
    if default is not None and not f.metadata.get("required"):
        made["default"] = list(default) if isinstance(default, tuple) else default
    return made


def _type(hint: Any, rule: typing.Mapping[str, Any]) -> dict[str, Any]:
    """The type of a value with its bounds and choices, which are those of the items of a list and of the keys of a table."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        if all(k in _KINDS for k in kinds) and len(kinds) > 1:
            names = sorted({_KINDS[k] for k in kinds} - ({"integer"} if float in kinds else set()))
            return {"type": names[0] if len(names) == 1 else names, **_bounds(rule)}
        return _type(kinds[0], rule)
    if origin is tuple:
        made: dict[str, Any] = {"type": "array", "items": _type(args[0], rule)}
        return made if args[-1] is Ellipsis else {**made, "minItems": len(args), "maxItems": len(args)}
    if origin is dict:
        made = {"type": "object"} if args[1] is Any else {"type": "object", "additionalProperties": _type(args[1], {})}
        return {**made, "propertyNames": {"enum": list(rule["choices"])}} if rule.get("choices") else made
    if dataclasses.is_dataclass(hint):
        return _object(typing.cast(type, hint))
    return {"type": _KINDS[hint], **_bounds(rule)}


def _bounds(rule: typing.Mapping[str, Any]) -> dict[str, Any]:
    names = {"min": "minimum", "max": "maximum", "above": "exclusiveMinimum"}
    made: dict[str, Any] = {to: rule[name] for name, to in names.items() if rule.get(name) is not None}
    return {**made, "enum": list(rule["choices"])} if rule.get("choices") else made
