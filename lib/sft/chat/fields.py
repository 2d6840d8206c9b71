"""Which fields of the rows were read, and which hold something that nothing reads: `FieldCounts`.

In: rows, with the columns and the messages that made their conversations. Out: in how many of the rows that make documents each field
held something, and an example of each field that is neither read, nor ignored by name, nor known to carry no training content. A field of
a message has the name <column>.<field>, one of a tool call <column>.tool_calls.<field>. Nulls, "", [], {} and objects of nothing else hold
nothing.

A column of JSON strings was probably meant as the texts that these stand for: `Quoted` counts them.

Templates need not write `name`, `tool_call_id` and the ids of calls, so these are read only where the template writes them. Elsewhere ids
carry no content, and a name is passed over where it repeats the role, or where a result follows a call; any other name would be lost.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sft.chat.values import is_empty, parse_literal
from sft.recipe.row_fields import (
    CALL_FIELDS,
    DETAIL_FIELDS,
    FUNCTION_FIELDS,
    MESSAGE_FIELDS,
    PART_FIELDS,
    THINKING,
    is_harmless,
    is_short,
)

EXAMPLE_CHARACTERS = 80
JSON_SPACE = " \t\r\n"
QUOTES_OR_SPACE = frozenset("\"'" + JSON_SPACE)
RESULT_ROLES = ("tool", "function", "ipython", "environment")


def example_of(value: Any) -> str:
    """The start of a value, as JSON where it is some."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]}…"


def is_quoted(text: str) -> bool:
    """Whether a text is a JSON string in quotes, or what Python prints for a text or for bytes."""
    text = text.strip(JSON_SPACE)
    start = text.startswith("b")
    if len(text) < start + 2 or text[start] not in "\"'" or text[-1] != text[start]:
        return False
    try:
        value = json.loads(text) if text[0] == '"' else parse_literal(text)
    except ValueError:
        return False
    return isinstance(value, (str, bytes))


def quoted_texts(
    row: Mapping[str, Any],
    used: Collection[str],
    items: Sequence[tuple[str, Any]],
    messages: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """The columns of a row that are a JSON string in quotes, and the roles and fields of thoughts in a column of messages whose every text
    is one, each with an example. Texts of tools do not count."""
    texts = [(name, row[name]) for name in used if type(row.get(name)) is str]
    if "history" in used:
        texts += [("history", text) for pair in row.get("history") or () for text in pair]
    for (column, item), message in zip(items, messages, strict=True):
        if column and message["role"] not in RESULT_ROLES:
            texts.append((f"{column} ({message['role']})", message["content"]))
            if len(message) > 2:
                texts += [(f"{column}.{name}", item[name]) for name in THINKING if type(item.get(name)) is str]
    found = {name: text for name, text in texts if text[-1:] in QUOTES_OR_SPACE and text and is_quoted(text)}
    if not found:
        return found
    others = {name for name, text in texts if text and not is_quoted(text)}
    return {name: text for name, text in found.items() if name not in others}


def without(value: Any, field: str) -> Any:
    """The value without one of its fields, or a field inside one: thread.id."""
    name, _, rest = field.partition(".")
    if not isinstance(value, Mapping) or name not in value:
        return value
    return {**value, name: without(value[name], rest) if rest else None}


Quoted = dict[str, tuple[int, str]]


@dataclass
class FieldCounts:
    """`rows`: in how many rows each field held something. `unread`: an example of each field that nothing reads. `quoted`: in how many rows
    the texts of a column, or of a role, are JSON strings in quotes, and an example: see `quoted_texts`."""

    rows: Counter[str] = field(default_factory=Counter)
    unread: dict[str, str] = field(default_factory=dict)
    quoted: Quoted = field(default_factory=dict)

    def add(self, held: HeldFields) -> None:
        """Counts a row."""
        self.add_all(dict.fromkeys(held.names, 1), held.unread, held.quoted)

    def add_all(self, rows: Mapping[str, int], unread: Mapping[str, str], quoted: Quoted) -> None:
        """Adds the counts of other rows."""
        self.rows.update(rows)
        self.unread = {**unread, **self.unread}
        for name, (count, example) in quoted.items():
            before, first = self.quoted.get(name, (0, example))
            self.quoted[name] = before + count, first

    @property
    def all_quoted(self) -> dict[str, str]:
        """The columns, and the roles in them, whose texts are JSON strings in every one of several rows, with an example."""
        return {
            name: example
            for name, (count, example) in self.quoted.items()
            if count > 1 and count == (self.rows[name] or self.rows[name.rpartition(" (")[0]])
        }


class HeldFields(NamedTuple):
    """The fields of a row that hold something, an example of each of them that nothing reads, and its `quoted_texts`."""

    names: set[str]
    unread: dict[str, str]
    quoted: Quoted


class FieldCounter:
    """Counts the fields of a source's rows. `ignore` are the source's ignored names; `written`: (field, role) of the `name`, `tool_call_id` and
    `id` of a call that the template writes; `group`: the column of the rows' groups, or a field inside one, which is read."""

    def __init__(self, ignore: Collection[str], written: Collection[tuple[str, str]] = (), group: str = "") -> None:
        self.group_column, _, self.group_field = group.partition(".")
        self.ignore, self.written = frozenset(ignore), frozenset(written)
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

    def held(
        self,
        row: Mapping[str, Any],
        used: Collection[str],
        items: Sequence[tuple[str, Any]],
        messages: Sequence[Mapping[str, Any]],
    ) -> HeldFields:
        """The fields of a row. `used`: the columns that were read; `items`: its messages as the row has them, each with its column;
        `messages`: the conversation's. A column that only repeats the content of a message is read."""
        seen: set[str] = set()
        unread: dict[str, str] = {}
        for name, value in row.items():
            if is_empty(value):
                continue
            seen.add(name)
            is_group = name == self.group_column and self.group_field
            rest = without(value, self.group_field) if is_group else value
            if name in used or is_empty(rest) or self.passes(name, rest):
                continue
            if not (isinstance(value, str) and any(value == message["content"] for message in messages)):
                unread.setdefault(name, example_of(value))
        own = messages[len(messages) - len(items) :]
        quoted = quoted_texts(row, used, items, own)
        held = HeldFields(seen, unread, {name: (1, example_of(text)) for name, text in quoted.items()})
        calls = False
        for (column, item), message in zip(items, own, strict=True):
            if column and isinstance(item, Mapping):
                self._add_message(column, item, held)
                if message.get("name"):
                    self._add_name(column, message, calls, held)
            calls = calls or "tool_calls" in message or "function_calls" in message
        return held

    def _add_name(self, column: str, message: Mapping[str, Any], follows_call: bool, held: HeldFields) -> None:
        """Adds the name of a message to the unread fields if the template does not write it, and nothing else says it."""
        name, role = f"{column}.name", message["role"]
        is_known = message["name"].lower() == role or (follows_call and role in RESULT_ROLES)
        if ("name", role) not in self.written and not is_known and name not in self.ignore:
            held.unread.setdefault(name, example_of(message["name"]))

    def _add_message(self, column: str, item: Mapping[str, Any], held: HeldFields) -> None:
        self._add_object(column, item, MESSAGE_FIELDS, held)
        for detail in item.get("reasoning_details") or ():
            self._add_object(f"{column}.reasoning_details", detail, DETAIL_FIELDS, held)
        if type(item.get("content")) is str and "tool_calls" not in item and "function_call" not in item:
            return
        if isinstance(content := item.get("content"), (list, tuple)):
            for part in content:
                self._add_object(f"{column}.content", part, PART_FIELDS, held)
        for name in ("tool_calls", "function_call"):
            calls = item.get(name)
            if isinstance(calls, str) and calls:
                calls = json.loads(calls)  # the reader has parsed it before
            for call in calls if isinstance(calls, (list, tuple)) else (calls,):
                call = json.loads(call) if isinstance(call, str) and call else call
                if isinstance(call, Mapping):
                    self._add_object(f"{column}.{name}", call, CALL_FIELDS, held)
                    self._add_object(f"{column}.{name}.function", call.get("function"), FUNCTION_FIELDS, held)

    def _add_object(self, prefix: str, value: Any, read: Collection[str], found: HeldFields) -> None:
        if type(value) is not dict and not isinstance(value, Mapping):
            return
        names = self.names.setdefault(prefix, {})
        for key, held in value.items():
            if is_empty(held):
                continue
            name = names.get(key) or names.setdefault(key, f"{prefix}.{key}")
            found.names.add(name)
            if key not in read and not self.passes(name, held):
                found.unread.setdefault(name, example_of(held))
