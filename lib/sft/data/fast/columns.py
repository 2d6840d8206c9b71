"""Reads rows from Arrow columns, for compiled code: `read_columns`.

In: a pyarrow.RecordBatch. Out: `Messages`, as `json_rows` makes them, and the columns of calls and tools, which are still Arrow. A row is not
plain when something in it could count and compiled code does not know it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft.data.compiled import WORD, compiled, words_of
from sft.data.fast.json_rows import FieldNames, finish_row
from sft.data.fast.json_text import Buffer, find_name
from sft.data.fast.messages import (
    CALLS,
    CONTENT,
    END,
    FLAG,
    HARMLESS,
    LIST,
    MASKED,
    MAX_MESSAGES,
    NONE,
    NUM_TEXTS,
    PASSED,
    ROLE,
    START,
    THINKING,
    TOOL_CALLS,
    TOOLS,
    WEIGHT,
    Messages,
    SourceNames,
    is_utf8,
)
from sft.recipe.row_fields import HARMLESS_CHARACTERS

FORM = np.uint64(0x9E3779B97F4A7C15)
ADDED = 3
"""The most messages that the texts of a row become: a system message, a prompt and an answer."""


class Texts(NamedTuple):
    """The texts of one field."""

    bytes: NDArray[np.uint8]
    """One after another."""
    starts: NDArray[np.int64]
    """[texts + 1] Where each starts, and the last ends."""
    is_null: NDArray[np.bool_]
    """[texts]"""


class NotPlain(Exception):
    """No row of the batch can be read here."""


class TextJoin:
    """Texts of several columns in one buffer."""

    def __init__(self) -> None:
        self.parts: list[NDArray[np.uint8]] = []
        self.end = 0

    def add(self, texts: Texts, spans: NDArray[np.int64]) -> None:
        """Sets the spans [texts, 2] of those that are not null."""
        found = ~texts.is_null
        spans[found, START] = self.end + texts.starts[:-1][found]
        spans[found, END] = self.end + texts.starts[1:][found]
        self.parts.append(texts.bytes)
        self.end += len(texts.bytes)

    def buffer(self) -> NDArray[np.uint8]:
        """All texts, with room for as many: an instruction and its input are joined behind them."""
        made = np.empty(2 * self.end + 2 * WORD, dtype=np.uint8)
        if self.parts:
            np.concatenate(self.parts, out=made[: self.end])
        return made


class StructFields:
    """What the fields of an array of messages hold. Raises NotPlain."""

    def __init__(self, structs: Any, names: SourceNames, field_names: FieldNames, texts: TextJoin) -> None:
        present = [field.name for field in structs.type]
        if len(set(present)) < len(present):
            raise NotPlain
        count = len(structs)
        self.is_odd = ~_valid(structs)
        self.held, self.forms = np.zeros((2, count), dtype=np.uint64)
        self.spans = np.full((count, TOOL_CALLS + 1, 2), NONE, dtype=np.int64)
        self.roles, self.flags = np.full((2, count), NONE, dtype=np.int64)
        self.calls: Any = None
        self.found: set[int] = set()
        self.field_names, self.texts = field_names, texts
        for bit, (name, kind) in enumerate(names.fields.items()):
            if name in present:
                field = structs.field(name)
                if kind < NUM_TEXTS or kind == ROLE:
                    field = _decoded(field)
                holds = self._read(field, kind)
                self.held |= holds.astype(np.uint64) << np.uint64(bit)
                self.forms = (self.forms ^ (2 * _valid(field) + holds + 1).astype(np.uint64)) * FORM
        for name in set(present).difference(names.fields):
            self.is_odd |= holds_something(structs.field(name))
        no_content = self.spans[:, CONTENT, START] == NONE
        no_calls = (self.spans[:, CALLS, START] == NONE) & (self.spans[:, TOOL_CALLS, START] == NONE)
        both = (self.spans[:, CALLS, START] != NONE) & (self.spans[:, TOOL_CALLS, START] != NONE)
        self.is_odd |= (self.roles == NONE) | (no_content & no_calls) | both
        self.spans[no_content, CONTENT] = 0

    def _read(self, field: Any, kind: int) -> NDArray[np.bool_]:
        """Which values of a field hold something."""
        if _is_text(field) and (kind < NUM_TEXTS or kind == ROLE) and kind not in self.found:
            self.found.add(kind)
            return self._read_texts(_texts(field), kind)
        holds = holds_something(field)
        if kind == TOOL_CALLS and self.calls is None:
            self.calls = field
            places = np.flatnonzero(holds)
            self.spans[places, TOOL_CALLS] = np.stack([places, places + 1], axis=1)
        elif FLAG <= kind <= MASKED:
            self._read_flags(field, kind, holds)
        elif kind == HARMLESS:
            self.is_odd |= holds & ~is_short(field)
        elif kind != PASSED:
            self.is_odd |= holds
        return holds

    def _read_texts(self, texts: Texts, kind: int) -> NDArray[np.bool_]:
        holds: NDArray[np.bool_] = ~texts.is_null & (np.diff(texts.starts) > 0)
        if kind == ROLE:
            speakers = np.empty(len(holds), dtype=np.int64)
            find_roles(_padded(texts.bytes), texts.starts, self.field_names.roles, speakers)
            speakers[texts.is_null] = NONE
            self.roles = np.where(speakers == NONE, NONE, self.field_names.role_of[speakers])
            self.forms = (self.forms ^ (speakers + 1).astype(np.uint64)) * FORM
        else:
            is_null = ~holds if kind == THINKING else texts.is_null
            self.texts.add(texts._replace(is_null=is_null), self.spans[:, kind])
        return holds

    def _read_flags(self, field: Any, kind: int, holds: NDArray[np.bool_]) -> None:
        is_bool, is_number = pa.types.is_boolean(field.type), _is_number(field.type)
        if not (is_number or (is_bool and kind != WEIGHT)):
            self.is_odd |= holds
            return
        values = field.cast(pa.float64()).fill_null(NONE).to_numpy(zero_copy_only=False)
        known = (values == 0) | (values == 1)
        self.is_odd |= holds & (~known | (self.flags != NONE))
        flags = np.where(known, values, 0).astype(np.int64)
        self.flags = np.where(holds & known, 1 - flags if kind == MASKED else flags, self.flags)


class ColumnRows(NamedTuple):
    """The rows of a batch, and what is left for Python to read."""

    messages: Messages
    buffer: NDArray[np.uint8]
    """The bytes of the texts."""
    calls: Any
    """An Arrow array: the calls of all messages; None without a field of calls."""
    tools: dict[str, Any]
    """The columns of tools."""


def read_columns(arrow: Any, names: SourceNames, field_names: FieldNames) -> ColumnRows | None:
    """The rows of a record batch. None when no row of it is plain."""
    if len(set(arrow.schema.names)) < len(arrow.schema.names):
        return None
    texts = TextJoin()
    count = arrow.num_rows
    try:
        is_odd, first, structs = _listed(arrow, names)
        row_spans = np.full((count, TOOLS + 1, 2), NONE, dtype=np.int64)
        columns_held, tools = _read_columns(arrow, names, texts, row_spans, is_odd)
        fields = StructFields(structs, names, field_names, texts)
    except NotPlain:
        return None
    counts, fields_held = np.diff(first), np.zeros(count, dtype=np.uint64)
    total = int(first[-1])
    num_odd = np.cumsum([0, *fields.is_odd])
    is_odd |= num_odd[first[1:]] > num_odd[first[:-1]]
    or_over_rows(fields.held, first, fields_held)
    is_odd |= counts > MAX_MESSAGES
    buffer = texts.buffer()
    messages = Messages.empty(count, total + ADDED * count, words_of(buffer))._replace(
        is_plain=~is_odd, row_spans=row_spans, columns_held=columns_held, fields_held=fields_held
    )
    read = ReadFields(fields.roles, fields.flags, fields.forms, fields.spans)
    finish_rows(field_names, Buffer.of(buffer), texts.end, first, read, messages)
    return ColumnRows(messages, buffer, fields.calls, tools)


def _listed(arrow: Any, names: SourceNames) -> tuple[NDArray[np.bool_], NDArray[np.int64], Any]:
    """Which rows have a list of messages that is none, the first message of each row, and the messages; none without the column."""
    if names.list_column not in arrow.schema.names:
        no_messages = pa.array([], type=pa.struct([]))
        return np.zeros(arrow.num_rows, dtype=np.bool_), np.zeros(arrow.num_rows + 1, dtype=np.int64), no_messages
    listed = arrow.column(names.list_column)
    if not (pa.types.is_list(listed.type) or pa.types.is_large_list(listed.type)):
        raise NotPlain
    if not pa.types.is_struct(listed.type.value_type):
        raise NotPlain
    offsets = listed.offsets.to_numpy().astype(np.int64)
    structs = listed.values.slice(offsets[0], offsets[-1] - offsets[0])
    return ~_valid(listed), offsets - offsets[0], structs


def _read_columns(
    arrow: Any, names: SourceNames, texts: TextJoin, row_spans: NDArray[np.int64], is_odd: NDArray[np.bool_]
) -> tuple[NDArray[np.uint64], dict[str, Any]]:
    """Reads the columns that are not the messages. Returns which of them hold something, and the columns of tools."""
    columns_held, tools = np.zeros(arrow.num_rows, dtype=np.uint64), {}
    places = {name: np.uint64(bit) for bit, name in enumerate(names.columns)}
    has_tools = np.zeros(arrow.num_rows, dtype=np.bool_)
    found: set[int] = set()
    for name in arrow.schema.names:
        kind, column = names.columns.get(name), arrow.column(name)
        if kind is not None and kind < TOOLS:
            column = _decoded(column)
        if kind is not None and kind < TOOLS and _is_text(column) and kind not in found:
            found.add(kind)
            read = _texts(column)
            texts.add(read, row_spans[:, kind])
            holds = ~read.is_null & (np.diff(read.starts) > 0)
        else:
            holds = holds_something(column)
            if kind == TOOLS:
                is_odd |= holds & has_tools
                has_tools |= holds
                tools[name] = column
                places_of = np.flatnonzero(holds)
                row_spans[places_of, TOOLS] = np.stack([places_of, places_of + 1], axis=1)
            elif kind is not None and kind < TOOLS:
                is_odd |= _valid(column)  # a second text, or a list of messages
            elif kind == HARMLESS:
                is_odd |= holds & ~is_short(column)
            elif kind not in (PASSED, LIST):
                is_odd |= holds
        if kind is not None:
            columns_held |= holds.astype(np.uint64) << places[name]
    return columns_held, tools


class ReadFields(NamedTuple):
    """Roles, flags, forms and spans of the messages of all rows, see `Messages`."""

    roles: NDArray[np.int64]
    flags: NDArray[np.int64]
    forms: NDArray[np.uint64]
    spans: NDArray[np.int64]


@compiled
def finish_rows(names: Any, target: Any, to: int, first: Any, read: Any, messages: Any) -> None:
    """Copies the messages of plain rows into `messages`, with those that are made of the row's texts. `first`: the first message of each
    row in `read`."""
    message = 0
    for row in range(len(messages.is_plain)):
        messages.first[row] = message
        if not messages.is_plain[row]:
            continue
        count = first[row + 1] - first[row]
        for i in range(count):
            source, place = first[row] + i, message + i
            messages.roles[place], messages.flags[place] = read.roles[source], read.flags[source]
            messages.forms[place] = read.forms[source]
            for kind in range(TOOL_CALLS + 1):
                messages.spans[place, kind, START] = read.spans[source, kind, START]
                messages.spans[place, kind, END] = read.spans[source, kind, END]
        count, end = finish_row(names, target, to, messages, message, count, row)
        if count == NONE:
            messages.is_plain[row] = False
        else:
            message += count
            to = end
    messages.first[len(messages.is_plain)] = np.int64(message)


def holds_something(array: Any) -> NDArray[np.bool_]:
    """[values] Which values hold something: see `sft.chat.fields.is_empty`."""
    valid, kind = _valid(array), array.type
    if not valid.any():
        return valid
    if pa.types.is_dictionary(kind):
        valid &= _looked_up(array, holds_something(array.dictionary))
    elif _is_text(array):
        valid &= np.diff(_offsets(array)) > 0
    elif pa.types.is_struct(kind):
        held = [holds_something(child) for child in array.flatten()]
        valid &= np.logical_or.reduce(held) if held else False
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        valid &= np.diff(array.offsets.to_numpy()) > 0
    return valid


def is_short(array: Any) -> NDArray[np.bool_]:
    """[values] Which values a harmless field may hold: numbers, dates, and texts of so many bytes. Python decides about all others."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _looked_up(array, is_short(array.dictionary))
    if _is_text(array):
        return np.asarray(np.diff(_offsets(array)) <= HARMLESS_CHARACTERS, dtype=np.bool_)
    is_number = pa.types.is_boolean(kind) or _is_number(kind)
    return np.full(len(array), is_number or pa.types.is_temporal(kind) or pa.types.is_decimal(kind))


def _looked_up(array: Any, found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[values] What was found of the value that each index of a dictionary array points to. What is under a null may point nowhere."""
    indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
    return np.asarray(np.append(found, False)[np.clip(indices, 0, len(found))], dtype=np.bool_)


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_text(array: Any) -> bool:
    return bool(pa.types.is_string(array.type) or pa.types.is_large_string(array.type))


def _offsets(array: Any) -> NDArray[Any]:
    """[texts + 1] Where each text of a string array starts in its buffer, and the last ends."""
    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    return np.frombuffer(array.buffers()[1], dtype=width)[array.offset : array.offset + len(array) + 1]


def _decoded(array: Any) -> Any:
    """The array without a dictionary."""
    try:
        return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    except pa.ArrowException:  # what is under a null may point nowhere
        raise NotPlain from None


@compiled
def or_over_rows(held: Any, first: Any, rows: Any) -> None:
    """Combines the bits of the messages of each row."""
    for row in range(len(rows)):
        for message in range(first[row], first[row + 1]):
            rows[row] |= held[message]


@compiled
def find_roles(data: Any, starts: Any, names: Any, roles: Any) -> None:
    """The role of each text in data; NONE for an unknown one."""
    for message in range(len(roles)):
        roles[message] = find_name(data, starts[message], starts[message + 1], names)


def _valid(array: Any) -> NDArray[np.bool_]:
    """Which values are not null."""
    if not array.null_count:
        return np.ones(len(array), dtype=np.bool_)
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)


def _texts(array: Any) -> Texts:
    """The texts of a string array. Raises NotPlain when they are not UTF-8."""
    if not len(array):
        return Texts(np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.bool_))
    starts, data = _offsets(array).astype(np.int64), array.buffers()[2]
    first, end = int(starts[0]), int(starts[-1])
    starts -= first
    text = np.frombuffer(memoryview(data or b"")[first:end], dtype=np.uint8)
    inner = starts[starts < len(text)]
    if not is_utf8(text) or ((text[inner] & 0xC0) == 0x80).any():  # a text may start inside a character
        raise NotPlain
    return Texts(text, starts, ~_valid(array))


def _padded(raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The bytes with WORD zero bytes after the end.

    An empty text gets one byte more. Numba has another type for an array of a single word, and would compile again.
    """
    return np.concatenate([raw, np.zeros(WORD + (not len(raw)), dtype=np.uint8)])
