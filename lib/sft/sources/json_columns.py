"""Values of Arrow's type `arrow.json`, wherever they are in a column: in lists, structs and maps.

In:  rows of a record batch as Python objects, in which such a value is its JSON text.
Out: the same rows with the values that the texts stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sft.chat.values import strict_json

Parser = Callable[[Any], Any]


def row_parser(schema: Any) -> Parser | None:
    """A function that parses the JSON values of a row in place and returns it; None when the schema has none.

    The function raises ValueError for a text that is not JSON.
    """
    parsers = {field.name: parse for field in schema if (parse := _parser(field.type))}
    return _struct(parsers) if parsers else None


def _parser(kind: Any) -> Parser | None:
    """A function that parses a value of this Arrow type; None for a type without JSON inside."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    if isinstance(kind, pa.BaseExtensionType):
        return strict_json if kind.extension_name == "arrow.json" else _parser(kind.storage_type)
    if pa.types.is_struct(kind):
        parsers = {field.name: parse for field in kind if (parse := _parser(field.type))}
        return _struct(parsers) if parsers else None
    if pa.types.is_map(kind):
        key, item = _parser(kind.key_type), _parser(kind.item_type)
        return (lambda pairs: [(_apply(key, k), _apply(item, v)) for k, v in pairs]) if key or item else None
    if pa.types.is_dictionary(kind):
        return _parser(kind.value_type)
    inner = _parser(kind.value_type) if _is_list(kind) else None
    return (lambda values: [_apply(inner, value) for value in values]) if inner else None


def _is_list(kind: Any) -> bool:
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    checks = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, check)(kind) for check in checks if hasattr(pa.types, check))


def _struct(parsers: dict[str, Parser]) -> Parser:
    def parse(value: dict[str, Any]) -> dict[str, Any]:
        for name, inner in parsers.items():
            if value.get(name) is not None:
                value[name] = inner(value[name])
        return value

    return parse


def _apply(parse: Parser | None, value: Any) -> Any:
    return value if parse is None or value is None else parse(value)
