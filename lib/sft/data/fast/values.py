"""Tool calls and tools of plain rows, as the named templates write them: `Values`.

In: `Messages`, and the lines of JSON in which their values still are. Out: the same `Messages`, with the values as texts behind the other texts.
A row whose value has anything unusual is no longer plain, and `sft.chat` reads it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from json.encoder import encode_basestring
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from sft.chat.calls import read_tools
from sft.chat.named import functions
from sft.chat.rows import RowReader
from sft.chat.values import BadRow, may_repeat
from sft.data.compiled import WORD, words_of
from sft.data.fast.messages import CALLS, END, NONE, NUM_TEXTS, START, TOOL_CALLS, TOOLS, Messages, SourceNames
from sft.recipe.row_fields import CALL_FIELDS, FUNCTION_FIELDS

LONG_NUMBER = re.compile(rb"[0-9]{19}")
MAX_CACHED = 1000
"""Texts of tools that are kept: many rows offer the same tools."""


class Values:
    """Turns the values of one source's rows into texts."""

    def __init__(self, reader: RowReader) -> None:
        self.counter = reader.counter
        self.tools: dict[tuple[str, bytes], bytes | None] = {}
        self.shapes: dict[tuple[str | None, ...], tuple[str, ...] | None] = {}
        self.seen: dict[int, set[str]] = {}  # by row: the fields of its calls

    def count(self, rows: NDArray[np.int64], counts: Counter[str]) -> None:
        """Counts the fields of the calls in these rows."""
        if self.seen:
            for row in rows.tolist():
                if row in self.seen:
                    counts.update(self.seen[row])

    def read(
        self, data: NDArray[np.uint8], messages: Messages, names: SourceNames, buffer: NDArray[np.uint8]
    ) -> Messages:
        """`data` are the lines, `buffer` holds all texts."""
        self.seen = {}
        count = int(messages.first[-1])
        calls = np.flatnonzero(messages.spans[:count, TOOL_CALLS, START] != NONE)
        tools = np.flatnonzero((messages.row_spans[:, TOOLS, START] != NONE) & messages.is_plain)
        if not len(calls) and not len(tools):
            return messages
        raw = data.data
        texts: list[bytes] = []
        at = start = int(max(messages.spans[:count, :NUM_TEXTS, END].max(), 0))
        rows = np.searchsorted(messages.first, calls, side="right") - 1
        spans = messages.spans[calls, TOOL_CALLS]
        for message, row, (begin, end) in zip(calls.tolist(), rows.tolist(), spans.tolist(), strict=True):
            text = self._calls(
                bytes(raw[begin:end]), f"{names.list_column}.tool_calls", self.seen.setdefault(row, set())
            )
            if text is None:
                messages.is_plain[row] = False
                continue
            texts.append(text)
            messages.spans[message, CALLS] = at, at + len(text)
            at += len(text)
        columns = [(bit, name) for bit, (name, kind) in enumerate(names.columns.items()) if kind == TOOLS]
        for row in tools.tolist():
            begin, end = messages.row_spans[row, TOOLS].tolist()
            column = next(name for bit, name in columns if int(messages.columns_held[row]) >> bit & 1)
            text = self._tools(bytes(raw[begin:end]), column)
            if text is None:
                messages.is_plain[row] = False
                continue
            texts.append(text)
            messages.row_spans[row, TOOLS] = (at, at + len(text)) if text else NONE
            at += len(text)
        written = np.frombuffer(b"".join(texts), dtype=np.uint8)
        if len(buffer) < at + WORD:
            buffer = np.concatenate([buffer[:start], np.empty(at + WORD - start, dtype=np.uint8)])
        buffer[start:at] = written
        words = words_of(buffer)
        return messages._replace(texts=(words, words, words, words, words))

    def _tools(self, raw: bytes, column: str) -> bytes | None:
        """The text of a column of tools, "" when it offers none; None when `sft.chat` must read it."""
        if (column, raw) not in self.tools:
            if len(self.tools) >= MAX_CACHED:
                self.tools.clear()
            try:
                value = json.loads(raw) if LONG_NUMBER.search(raw) else orjson.loads(raw)
                tools = read_tools(value, column)
                written = functions(tools).encode() if tools else b""
                self.tools[column, raw] = None if may_repeat(raw, value) else written
            except (BadRow, ValueError, RecursionError):
                self.tools[column, raw] = None
        return self.tools[column, raw]

    def _calls(self, raw: bytes, column: str, seen: set[str]) -> bytes | None:
        """The text of a list of tool calls; None when `sft.chat` must read it."""
        if LONG_NUMBER.search(raw):
            return None
        has_null = b"null" in raw
        lines = []
        try:
            calls = orjson.loads(raw)
            if may_repeat(raw, calls):
                return None
            for call in calls:
                function = call["function"]
                fields = self._fields(call, function, column)
                arguments = function["arguments"]
                if type(arguments) is str:
                    text, arguments = arguments.encode(), orjson.loads(arguments)
                    if may_repeat(text, arguments):
                        return None
                elif has_null:
                    return None
                if fields is None or type(arguments) is not dict or call.get("type", "function") != "function":
                    return None
                seen.update(fields)
                written = ", ".join([f"{name}={dump(value)}" for name, value in arguments.items()])
                lines.append(f"{function['name']}({written})")
            return "\n".join(lines).encode()
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
            return None

    def _fields(self, call: dict[str, Any], function: dict[str, Any], column: str) -> tuple[str, ...] | None:
        """The names of the fields that hold something; None when one holds nothing, or nothing reads it."""
        if not all(call.values()) or not all(function.values()) or type(function["name"]) is not str:
            return None
        if type(call.get("id", "")) is not str:
            return None
        shape = (column, *call, None, *function)
        if shape not in self.shapes:
            inner = f"{column}.function"
            names = [(f"{column}.{name}", name in CALL_FIELDS - FUNCTION_FIELDS) for name in call]
            names += [(f"{inner}.{name}", name in FUNCTION_FIELDS) for name in function]
            known = all(is_read or name in self.counter.ignore for name, is_read in names)
            self.shapes[shape] = tuple(name for name, _ in names) if known else None
        return self.shapes[shape]


def dump(value: Any) -> str:
    """A value as `sft.chat.calls.calls_text` writes it."""
    return encode_basestring(value) if type(value) is str else json.dumps(value, ensure_ascii=False)
