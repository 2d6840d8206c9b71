"""Which fields of the rows were read, and which hold something that nothing reads: `FieldCounts`.

In: rows, with the columns and the messages that made their conversations. Out: in how many rows each field held something, and an
example of each field that is neither read, nor ignored by name, nor known to carry no training content. A field of a message has the
name <column>.<field>, one of a tool call <column>.tool_calls.<field>. Nulls, "", [], {} and objects of nothing else hold nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.chat.values import is_empty
from sft.recipe.row_fields import (
    CALL_FIELDS,
    DETAIL_FIELDS,
    FUNCTION_FIELDS,
    MESSAGE_FIELDS,
    PART_FIELDS,
    is_harmless,
    is_short,
)

EXAMPLE_CHARACTERS = 80


def example_of(value: Any) -> str:
    """The start of a value, as JSON where it is some."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]}…"


@dataclass
class FieldCounts:
    """`rows`: in how many rows each field held something. `unread`: an example of each field that nothing reads."""

    rows: Counter[str] = field(default_factory=Counter)
    unread: dict[str, str] = field(default_factory=dict)

    def add(self, other: FieldCounts) -> None:
        self.rows.update(other.rows)
        self.unread = other.unread | self.unread


class FieldCounter:
    """Counts the fields of a source's rows. `ignore` are the source's ignored names."""

    def __init__(self, ignore: Collection[str]) -> None:
        self.ignore = frozenset(ignore)
        self.passed_over: dict[str, bool] = {}  # by name: ignored or harmless
        self.names: dict[str, dict[str, str]] = {}  # by prefix and field
        self.counts = FieldCounts()

    def is_passed_over(self, name: str) -> bool:
        """Whether the recipe ignores this field, or a short value in it carries no training content."""
        known = self.passed_over.get(name)
        if known is None:
            known = self.passed_over[name] = name in self.ignore or is_harmless(name)
        return known

    def passes(self, name: str, value: Any) -> bool:
        """Whether nothing needs to read this value of a field."""
        return self.is_passed_over(name) and (name in self.ignore or is_short(value))

    def count(
        self,
        row: Mapping[str, Any],
        used: Collection[str],
        items: Iterable[tuple[str, Any]],
        messages: Sequence[Mapping[str, Any]],
    ) -> None:
        """Counts a row. `used`: the columns that were read; `items`: its messages as the row has them, each with its column; `messages`:
        the conversation's. A column that only repeats the content of a message is read."""
        seen: set[str] = set()
        for name, value in row.items():
            if is_empty(value):
                continue
            seen.add(name)
            if name in used or self.passes(name, value):
                continue
            if not (isinstance(value, str) and any(value == message["content"] for message in messages)):
                self.counts.unread.setdefault(name, example_of(value))
        for column, item in items:
            if column and isinstance(item, Mapping):
                self._count_message(column, item, seen)
        self.counts.rows.update(seen)

    def _count_message(self, column: str, item: Mapping[str, Any], seen: set[str]) -> None:
        self._count_object(column, item, MESSAGE_FIELDS, seen)
        for detail in item.get("reasoning_details") or ():
            self._count_object(f"{column}.reasoning_details", detail, DETAIL_FIELDS, seen)
        if type(item.get("content")) is str and "tool_calls" not in item and "function_call" not in item:
            return
        if isinstance(content := item.get("content"), (list, tuple)):
            for part in content:
                self._count_object(f"{column}.content", part, PART_FIELDS, seen)
        for name in ("tool_calls", "function_call"):
            calls = item.get(name)
            if isinstance(calls, str) and calls:
                calls = json.loads(calls)  # the reader has parsed it before
            for call in calls if isinstance(calls, (list, tuple)) else (calls,):
                if isinstance(call, Mapping):
                    self._count_object(f"{column}.{name}", call, CALL_FIELDS, seen)
                    self._count_object(f"{column}.{name}.function", call.get("function"), FUNCTION_FIELDS, seen)

    def _count_object(self, prefix: str, value: Any, read: Collection[str], seen: set[str]) -> None:
        if type(value) is not dict and not isinstance(value, Mapping):
            return
        names = self.names.setdefault(prefix, {})
        for key, held in value.items():
            if is_empty(held):
                continue
            name = names.get(key) or names.setdefault(key, f"{prefix}.{key}")
            seen.add(name)
            if key not in read and not self.passes(name, held):
                self.counts.unread.setdefault(name, example_of(held))
