"""Values of rows: their errors, JSON text, and the nulls that columnar files add."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
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


class Repeating(dict[str, Any]):
    """An object of JSON in which `repeated` names have two different values; or a row with such an object in it. The last value is here."""

    repeated: tuple[str, ...] = ()


def keep_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object, as `Repeating` where a value is lost."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    lost = [name for name, held in pairs if held != value[name] and not (is_empty(held) and is_empty(value[name]))]
    if lost:
        value = Repeating(value)
        value.repeated = tuple(lost)
    return value


def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object. Raises ValueError where it has a name with two different values."""
    value = keep_repeats(pairs)
    if isinstance(value, Repeating):
        raise ValueError(f"the name {value.repeated[0][:40]!r} has two values")
    return value


def may_repeat(text: bytes, value: Any) -> bool:
    """Whether an object in the value, parsed from this JSON text, may have a name twice in the text: each name takes a quote and a colon.

    White space before a colon, a name that ends in a backslash and a text that begins with a colon also make it true.
    """
    colons = text.count(b'":') - text.count(b'\\":')
    if colons != _count_names(value):
        return True
    return any(odd in text for odd in (b" :", b"\t:", b"\r:", b"\n:", b'\\\\":'))


def _count_names(value: Any) -> int:
    if type(value) is dict:
        return len(value) + sum(map(_count_names, value.values()))
    return sum(map(_count_names, value)) if type(value) is list else 0


def first_repeat(value: Any, ignored: Collection[str], name: str = "") -> str | None:
    """The first name that has two values anywhere in a row, as <column>.<field>, but for ignored ones. `name`: the value's own."""
    if isinstance(value, Mapping):
        for field, held in value.items():
            inner = f"{name}.{field}" if name else field
            if inner in ignored:
                continue
            if field in getattr(value, "repeated", ()):
                return inner
            if found := first_repeat(held, ignored, inner):
                return found
    elif isinstance(value, (list, tuple)):
        return next((found for held in value if (found := first_repeat(held, ignored, name))), None)
    return None


def parse(text: str, reason: str, detail: str) -> Any:
    """JSON text as a value. Raises BadRow(reason, detail), also where an object has a name with two different values."""
    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise BadRow(reason, f"{detail}: {error}") from None


def parse_literal(text: str) -> Any:
    """What Python's notation stands for. Raises ValueError for other text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the text
            return ast.literal_eval(text.strip())
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None


def parse_each(values: Sequence[Any], reason: str, where: str) -> list[Any]:
    """A list in which objects may be JSON text. `where` names one by its number. Raises BadRow for other text."""
    return [
        parse(value, reason, f"{where.format(index)} is text that is not JSON") if isinstance(value, str) else value
        for index, value in enumerate(values)
    ]


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


def strict_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for what is no JSON, for NaN and infinities, for a repeated name, and for too deep a text."""
    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_repeats)
    except RecursionError:
        raise ValueError("nested too deeply") from None
