"""Tool calls and tools of plain rows, as the named templates write them: `Values`.

In: `Messages`, and `JsonValues`, which has their values. Out: the same `Messages`, with the values as texts behind the other texts.
A row whose value has anything unusual is no longer plain, and `sft.chat` reads it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.chat.calls import read_tools
from sft.chat.named import functions
from sft.chat.rows import RowReader
from sft.chat.values import BadRow, may_repeat
from sft.data.compiled import WORD, words_of
from sft.data.fast.json_copy import MOST_NAMES
from sft.data.fast.json_text import MAX_DEPTH, Buffer
from sft.data.fast.json_values import HAS_CALL, HAS_ID, HAS_TYPE, SHORTEST_CALL, ValueTexts, read_values
from sft.data.fast.messages import (
    CALL_ID,
    CALLS,
    END,
    FIRST_RESULT,
    NAME,
    NONE,
    NUM_TEXTS,
    START,
    TOOL_CALLS,
    TOOLS,
    Messages,
    Names,
    SourceNames,
)
from sft.recipe.row_fields import CALL_FIELDS, FUNCTION_FIELDS

try:  # of the extra `fast`; what either of them refuses, `sft.chat` reads
    from orjson import loads
except ImportError:
    from sft.chat.values import strict_json as loads  # type: ignore[assignment]

LONG_NUMBER = re.compile(rb"[0-9]{19}")
MAX_CACHED = 10_000
"""Texts of tools that are kept: many rows offer the same tools."""


ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
Call = tuple[bytes, bytes | None, bytes | None]
"""Name, arguments and id; or with the named templates the whole call in place of the name."""


OF_CALL, OF_FUNCTION = ("id", "type", "function"), ("name", "arguments")
OF_CALL_NAMES, OF_FUNCTION_NAMES = Names.of(OF_CALL), Names.of(OF_FUNCTION)
TAGS = Names.of(functions([]).split("[]"))
HELD = {
    HAS_CALL: ("function", "function.name", "function.arguments"),
    HAS_ID: ("id",),
    HAS_TYPE: ("type",),
}
"""The fields of calls that compiled code reads."""


class Unread(Exception):
    """A value that `sft.chat` must read."""


class TextBuffer:
    """Texts behind those that a buffer holds."""

    def __init__(self, buffer: NDArray[np.uint8], start: int) -> None:
        self.buffer, self.start, self.end = buffer, start, start
        self.texts: list[bytes] = []

    def add(self, text: bytes) -> tuple[int, int]:
        """Where the text will be."""
        self.texts.append(text)
        start, self.end = self.end, self.end + len(text)
        return start, self.end

    def words(self) -> NDArray[np.uint64]:
        """All texts."""
        buffer = self.buffer
        if len(buffer) < self.end + WORD:
            more = np.empty(self.end + WORD - self.start, dtype=np.uint8)
            buffer = np.concatenate([buffer[: self.start], more])
        buffer[self.start : self.end] = np.frombuffer(b"".join(self.texts), dtype=np.uint8)
        return words_of(buffer)


class JsonValues:
    """Calls and tools as JSON: those in the lines of a block, or those of Arrow columns, which `of_columns` writes."""

    def __init__(self, data: NDArray[np.uint8], names: SourceNames) -> None:
        self.data = data
        self.columns = [(bit, name) for bit, (name, kind) in enumerate(names.columns.items()) if kind == TOOLS]
        self.other_columns = np.uint64(sum(1 << bit for bit, name in self.columns if name == "functions"))

    @classmethod
    def of_columns(cls, calls: Any, tools: Mapping[str, Any], names: SourceNames, messages: Messages) -> JsonValues:
        """`calls`: of all messages of a record batch; None without such a field. `tools`: the columns of tools. The spans in `messages` are
        numbers of messages and rows before, and places in the JSON after it. A row is no longer plain where a value is not JSON."""
        made = cls(np.empty(0, dtype=np.uint8), names)
        texts: list[bytes] = []
        spans = messages.spans[: messages.first[-1], TOOL_CALLS]
        found = np.flatnonzero(spans[:, START] != NONE)
        rows = np.searchsorted(messages.first, found, side="right") - 1
        places = [(calls, spans, found, rows, json_of_calls)]
        for bit, name in made.columns:
            held = messages.columns_held >> np.uint64(bit) & np.uint64(1) > 0
            rows = np.flatnonzero(held & messages.is_plain & (messages.row_spans[:, TOOLS, START] != NONE))
            places.append((tools.get(name), messages.row_spans[:, TOOLS], rows, rows, json_of_tools))
        end = 0
        for column, spans, found, rows, write in places:
            for at, row, value in zip(found.tolist(), rows.tolist(), _taken(column, spans[found, START]), strict=True):
                text = write(value)
                messages.is_plain[row] &= text is not None
                spans[at] = (end, end + len(text)) if text is not None else NONE
                texts.append(text or b"")
                end += len(texts[-1])
        made.data = np.frombuffer(b"".join([*texts, bytes(WORD + 1)]), dtype=np.uint8)
        return made

    def calls(self, spans: NDArray[np.int64]) -> list[bytes]:
        return [self.data[start:end].tobytes() for start, end in spans.tolist()]

    def tools(self, row: int, messages: Messages) -> tuple[bytes, str]:
        """The tools of a row, and the name of their column."""
        start, end = messages.row_spans[row, TOOLS].tolist()
        held = int(messages.columns_held[row])
        return self.data[start:end].tobytes(), next(name for bit, name in self.columns if held >> bit & 1)


def _taken(column: Any, places: NDArray[np.int64]) -> list[Any]:
    """Values of an Arrow column; None in place of those of a column that holds text which is not UTF-8."""
    try:
        return list(column.take(places).to_pylist()) if len(places) else []
    except UnicodeDecodeError:
        return [None] * len(places)


def json_of_calls(value: Any) -> bytes | None:
    """Tool calls of a column, which are a list or its JSON, as JSON without the nulls that Arrow adds. None when `sft.chat` must read them."""
    try:
        if type(value) is str:
            raw = value.encode()
            value = loads(raw)
            if LONG_NUMBER.search(raw) or may_repeat(raw, value):
                return None
        if type(value) is not list or not value:
            return None
        text = ENCODER.encode(value)
        if "null" in text:
            value = [{name: without_nulls(held) for name, held in without_nulls(call).items()} for call in value]
            text = ENCODER.encode(value)
        return text.encode()
    except (AttributeError, TypeError, ValueError, RecursionError):
        return None


def without_nulls(value: Any) -> Any:
    """The fields of a call or of its function that are not null: columnar files fill every object with the fields of all others."""
    return {name: held for name, held in value.items() if held is not None} if type(value) is dict else value


def json_of_tools(value: Any) -> bytes | None:
    """The tools of a column as JSON. None when `sft.chat` must read them."""
    try:
        return ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError):
        return None


class Values:
    """Turns the values of one source's rows into texts: those of the named templates, or with `as_objects` JSON for Jinja templates."""

    def __init__(self, reader: RowReader, as_objects: bool) -> None:
        self.counter, self.as_objects, self.checks_results = reader.counter, as_objects, not reader.writes_ids
        self.known_tools: dict[tuple[str, bytes], list[bytes] | None] = {}
        self.shapes: dict[tuple[str | None, ...], tuple[str, ...] | None] = {}
        self.seen: dict[int, set[str]] = {}  # by row: the fields of its calls
        self.held = np.zeros(0, dtype=np.uint8)  # by row: those of calls that compiled code has read
        self.column = ""
        self.spare = np.empty(0, dtype=np.uint8)
        self.names = np.empty((MAX_DEPTH + 1, MOST_NAMES + 1, 2), dtype=np.int64)
        self.found = np.empty((2, len(OF_CALL)), dtype=np.int64)

    def count(self, rows: NDArray[np.int64], counts: Counter[str]) -> None:
        """Counts the fields of the calls in these rows."""
        for bit, names in self._held_names().items():
            for name in names:
                counts[name] += int((self.held[rows] & bit > 0).sum())
        for row in rows.tolist() if self.seen else ():
            if row in self.seen:  # Python has read calls of this row, and compiled code may have read others
                counted = {name for bit, names in self._held_names().items() if self.held[row] & bit for name in names}
                counts.update(self.seen[row] - counted)

    def _held_names(self) -> dict[int, list[str]]:
        """The columns' names of `HELD`."""
        return {bit: [f"{self.column}.{name}" for name in names] for bit, names in HELD.items()}

    def read(self, values: JsonValues, messages: Messages, column: str, buffer: NDArray[np.uint8]) -> Messages:
        """`column` has the messages, `buffer` holds all texts."""
        self.seen, self.column = {}, f"{column}.tool_calls"
        self.held = np.zeros(len(messages.is_plain), dtype=np.uint8)
        count = int(messages.first[-1])
        messages.call_spans[:count] = 0
        is_read = np.zeros(len(messages.is_plain), dtype=np.bool_)
        start = int(max(messages.spans[:count, :NUM_TEXTS, END].max(), 0)) if count else 0
        messages, start = self._read_compiled(values, messages, buffer, start, is_read)
        calls = np.flatnonzero(messages.spans[:count, TOOL_CALLS, START] != NONE)
        tools = np.flatnonzero((messages.row_spans[:, TOOLS, START] != NONE) & messages.is_plain & ~is_read)
        if not len(calls) and not len(tools):
            return messages
        texts = TextBuffer(buffer, start)
        messages = self._add_calls(values, messages, calls, texts)
        messages = self._add_tools(values, messages, tools, texts)
        return messages._replace(text=texts.words())

    def _read_compiled(
        self, values: JsonValues, messages: Messages, buffer: NDArray[np.uint8], start: int, is_read: NDArray[np.bool_]
    ) -> tuple[Messages, int]:
        """Reads what compiled code can read. Returns where its texts end."""
        count, lines = int(messages.first[-1]), len(values.data)
        spans, rows = messages.spans[:count, TOOL_CALLS], messages.row_spans[:, TOOLS]
        most_calls = int((spans[:, END] - spans[:, START]).sum()) // SHORTEST_CALL + count + 1
        most_tools = int((rows[:, END] - rows[:, START]).sum()) // 2 + 1
        room_for = messages._replace(
            calls=np.empty((most_calls, 3, 2), dtype=np.int64), tools=np.empty((most_tools, 2), dtype=np.int64)
        )
        if len(self.spare) < lines + 2 * WORD:
            self.spare = np.empty(lines + 2 * WORD, dtype=np.uint8)
        texts = ValueTexts(
            self.as_objects, self.checks_results, OF_CALL_NAMES, OF_FUNCTION_NAMES, TAGS, self.held, is_read, values.other_columns,
            self.names, self.found,
        )  # fmt: skip
        source, spare, target = Buffer.of(values.data), Buffer.of(self.spare), Buffer.of(buffer)
        end, num_calls, num_tools = read_values(source, spare, target, start, texts, room_for)
        return room_for._replace(calls=room_for.calls[:num_calls], tools=room_for.tools[:num_tools]), end

    def _add_calls(
        self, values: JsonValues, messages: Messages, found: NDArray[np.int64], texts: TextBuffer
    ) -> Messages:
        rows = np.searchsorted(messages.first, found, side="right") - 1
        spans: list[list[tuple[int, int]]] = []
        first = len(messages.calls)
        read = values.calls(messages.spans[found, TOOL_CALLS])
        for message, row, value in zip(found.tolist(), rows.tolist(), read, strict=True):
            calls = self._calls(value, self.seen.setdefault(row, set()))
            if calls is None or (
                self.checks_results and has_order(messages, message, int(messages.first[row + 1]), len(calls))
            ):
                messages.is_plain[row] = False
            elif self.as_objects:
                spans += [[texts.add(text) if text is not None else (NONE, NONE) for text in call] for call in calls]
                messages.call_spans[message] = first + len(spans) - len(calls), first + len(spans)
            else:
                messages.spans[message, CALLS] = texts.add(b"\n".join(name for name, *_ in calls if name is not None))
        if not spans:
            return messages
        return messages._replace(calls=np.concatenate([messages.calls, np.array(spans, dtype=np.int64)]))

    def _add_tools(
        self, values: JsonValues, messages: Messages, found: NDArray[np.int64], texts: TextBuffer
    ) -> Messages:
        spans: list[tuple[int, int]] = []
        first = len(messages.tools)
        for row in found.tolist():
            tools = self._tools(*values.tools(row, messages))
            if tools is None:
                messages.is_plain[row] = False
            elif self.as_objects:
                spans += map(texts.add, tools)
                messages.tool_spans[row] = first + len(spans) - len(tools), first + len(spans)
            else:
                messages.row_spans[row, TOOLS] = texts.add(tools[0]) if tools else NONE
        if not spans:
            return messages
        return messages._replace(tools=np.concatenate([messages.tools, np.array(spans, dtype=np.int64)]))

    def _tools(self, value: bytes, column: str) -> list[bytes] | None:
        """The tools of a column, each as a text or all as one; none when it offers none. None when `sft.chat` must read it."""
        if (column, value) not in self.known_tools:
            if len(self.known_tools) >= MAX_CACHED:
                self.known_tools.clear()
            self.known_tools[column, value] = self._read_tools(value, column)
        return self.known_tools[column, value]

    def _read_tools(self, raw: bytes, column: str) -> list[bytes] | None:
        try:
            value = json.loads(raw) if LONG_NUMBER.search(raw) else loads(raw)
            if may_repeat(raw, value):
                return None
            tools = read_tools(value, column)
            if not self.as_objects:
                return [functions(tools).encode()] if tools else []
            return [ENCODER.encode(tool).encode() for tool in tools or ()]
        except (BadRow, TypeError, ValueError, RecursionError):
            return None

    def _calls(self, raw: bytes, seen: set[str]) -> list[Call] | None:
        """A list of tool calls; None when `sft.chat` must read it."""
        try:
            calls, has_null = loads(raw), b"null" in raw
            if LONG_NUMBER.search(raw) or may_repeat(raw, calls):
                return None
            return [self._call(call, has_null, seen) for call in calls]
        except (Unread, TypeError, KeyError, AttributeError, ValueError, RecursionError):
            return None

    def _call(self, call: Any, has_null: bool, seen: set[str]) -> Call:
        """The texts of a call. Raises Unread, and other errors for what is no call."""
        function, arguments = call["function"], call["function"]["arguments"]
        if has_null:
            call, function = without_nulls(call), without_nulls(function)
            if type(arguments) is not str and holds_null(arguments):
                raise Unread  # the tool's schema decides
        fields = self._fields(call, function)
        if type(arguments) is str:
            raw, arguments = arguments.encode(), loads(arguments)
            if LONG_NUMBER.search(raw) or may_repeat(raw, arguments):
                raise Unread
        if fields is None or type(arguments) is not dict or call.get("type", "function") != "function":
            raise Unread
        seen.update(fields)
        name = function["name"]
        if not self.as_objects:
            written = ", ".join([f"{key}={dump(value)}" for key, value in arguments.items()])
            return f"{name}({written})".encode(), None, None
        number = call.get("id")
        return name.encode(), ENCODER.encode(arguments).encode() if arguments else None, number and number.encode()

    def _fields(self, call: dict[str, Any], function: dict[str, Any]) -> tuple[str, ...] | None:
        """The names of the fields that hold something; None when one holds nothing, or nothing reads it."""
        if not all(call.values()) or not all(function.values()) or type(function["name"]) is not str:
            return None
        if type(call.get("id", "")) is not str:
            return None
        shape = (self.column, *call, None, *function)
        if shape not in self.shapes:
            inner = f"{self.column}.function"
            names = [(f"{self.column}.{name}", name in CALL_FIELDS - FUNCTION_FIELDS) for name in call]
            names += [(f"{inner}.{name}", name in FUNCTION_FIELDS) for name in function]
            known = all(is_read or name in self.counter.ignore for name, is_read in names)
            self.shapes[shape] = tuple(name for name, _ in names) if known else None
        return self.shapes[shape]


def has_order(messages: Messages, message: int, end: int, calls: int) -> bool:
    """Whether the order of the results before `end` may differ from that of the calls of a message: several calls or results, and ids or names."""
    after = itertools.takewhile(lambda at: messages.roles[at] >= FIRST_RESULT, range(message + 1, end))
    results = messages.spans[list(after), :NUM_TEXTS]
    named = results[:, (CALL_ID, NAME)]
    more = message + 1 < end and (
        messages.spans[message + 1, TOOL_CALLS, START] != NONE
        or messages.spans[message + 1, CALLS, START] != NONE
        or messages.call_spans[message + 1, END] > 0
    )
    return bool(more or (calls + len(results) > 2 and (named[..., END] > named[..., START]).any()))


def holds_null(value: Any) -> bool:
    """Whether an object or list holds a null anywhere."""
    if type(value) is dict:
        value = list(value.values())
    return type(value) in (list, tuple) and any(held is None or holds_null(held) for held in value)


def dump(value: Any) -> str:
    """A value as `sft.chat.calls.calls_text` writes it."""
    return encode_basestring(value) if type(value) is str else ENCODER.encode(value)
