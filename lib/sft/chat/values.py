"""Values of rows: their errors, JSON text, and the nulls that columnar files add."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn


class BadRow(Exception):
    """A row that cannot be used. `reason` is one of a few words that are counted; `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def kind(value: Any) -> str:
    """A value's type, for messages."""
    return "nothing" if value is None else type(value).__name__


def refuse_constant(name: str) -> NoReturn:
    """For json.loads: NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is not JSON")


def parse(text: str, reason: str, detail: str) -> Any:
    """JSON text as a value. Raises BadRow(reason, detail)."""
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRow(reason, f"{detail}: {error}") from None


def to_json(value: Any, where: str) -> str:
    """A value as JSON text. Raises BadRow: columnar files can hold values that JSON cannot express, such as dates, bytes and NaN."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("bad_value", f"{where}: {error}") from None


def drop_nulls(value: Any, schema: Any = None) -> Any:
    """The value without null properties, except for those that the JSON schema requires."""
    schema = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, Mapping):
        properties, required = schema.get("properties"), schema.get("required")
        properties = properties if isinstance(properties, Mapping) else {}
        required = required if isinstance(required, (list, tuple)) else ()
        return {k: drop_nulls(v, properties.get(k)) for k, v in value.items() if v is not None or k in required}
    return [drop_nulls(item, schema.get("items")) for item in value] if isinstance(value, (list, tuple)) else value


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing: a null, "", an empty list, and an object of nothing else."""
    kind = type(value)
    if kind is str or value is None:
        return not value
    if kind is bool or kind is int or kind is float:
        return False
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return isinstance(value, (list, tuple)) and not value
