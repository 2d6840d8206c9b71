"""Reads rows of messages from Arrow columns, for compiled code: `read_columns`.

In: a pyarrow.RecordBatch whose column of messages is a list of structs. Out: `Messages`. A row is not plain when something in it could
count and compiled code does not know it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.compiled import WORD, compiled, words_of
from sft.data.fast.json_text import find_name
from sft.data.fast.messages import (
    CALLS,
    CONTENT,
    END,
    FUNCTIONS,
    HARMLESS,
    MAX_MESSAGES,
    NONE,
    NUM_TEXTS,
    PASSED,
    QUIET,
    ROLE,
    ROLE_NAMES,
    START,
    THINKING,
    TOOL_CALLS,
    TOOLS,
    Messages,
    Names,
    SourceNames,
)
from sft.recipe.row_fields import HARMLESS_CHARACTERS

ROLES = Names.of(ROLE_NAMES)
TEXT_KINDS = (CONTENT, FUNCTIONS, CALLS, THINKING, ROLE)


class Texts(NamedTuple):
    """The texts of one field."""

    bytes: NDArray[np.uint8]
    """One after another, with WORD bytes or more after the last."""
    starts: NDArray[np.int64]
    """[texts + 1] Where each starts, and the last ends."""
    is_null: NDArray[np.bool_]
    """[texts]"""


class NotPlain(Exception):
    """No row of the batch can be read here."""


def read_columns(arrow: Any, names: SourceNames) -> Messages | None:
    """The messages of a record batch. None when no row of it is plain."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    listed = _column(arrow, names.list_column)
    if listed is None or not (pa.types.is_list(listed.type) or pa.types.is_large_list(listed.type)):
        return None
    if not pa.types.is_struct(listed.type.value_type) or len(set(arrow.schema.names)) < len(arrow.schema.names):
        return None
    is_odd = ~_valid(listed)
    places = {name: np.uint64(bit) for bit, name in enumerate(names.columns)}
    columns_held = (~is_odd).astype(np.uint64) << places[names.list_column]
    for name in arrow.schema.names:
        if name == names.list_column:
            continue
        held = holds_something(arrow.column(name))
        kind = names.columns.get(name)
        if kind in (PASSED, HARMLESS):
            columns_held |= held.astype(np.uint64) << places[name]
        if kind != PASSED:
            is_odd |= held & ~is_short(arrow.column(name)) if kind == HARMLESS else held
    offsets = listed.offsets.to_numpy().astype(np.int64)
    first, structs = offsets - offsets[0], listed.values.slice(offsets[0], offsets[-1] - offsets[0])
    try:
        fields, odd_messages, held_messages = _read_structs(structs, names)
    except NotPlain:
        return None
    num_odd, counts = np.cumsum([0, *odd_messages]), np.diff(first)
    is_odd |= (num_odd[first[1:]] > num_odd[first[:-1]]) | (counts == 0) | (counts > MAX_MESSAGES)
    fields_held = np.zeros(len(is_odd), dtype=np.uint64)
    or_over_rows(held_messages, first, fields_held)
    spans = np.full((len(structs), TOOL_CALLS + 1, 2), NONE, dtype=np.int64)
    for text in range(NUM_TEXTS):
        found = ~fields[text].is_null
        if text == THINKING:
            found &= np.diff(fields[text].starts) > 0
        spans[found, text, START] = fields[text].starts[:-1][found]
        spans[found, text, END] = fields[text].starts[1:][found]
    spans[fields[CONTENT].is_null, CONTENT] = 0
    *texts, role = fields
    roles, flags = np.empty((2, len(structs)), dtype=np.int64)
    find_roles(role.bytes, role.starts, ROLES, roles)
    flags[:] = NONE
    content, functions, calls, thinking = (words_of(text.bytes) for text in texts)
    row_spans = np.full((len(is_odd), TOOLS + 1, 2), NONE, dtype=np.int64)
    return Messages(
        first,
        ~is_odd,
        roles,
        flags,
        spans,
        row_spans,
        columns_held,
        fields_held,
        (content, functions, calls, thinking, content),
    )


def holds_something(array: Any) -> NDArray[np.bool_]:
    """[values] Which values hold something: see `sft.chat.fields.is_empty`."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    valid, kind = _valid(array), array.type
    if not valid.any():
        return valid
    if pa.types.is_dictionary(kind):
        table = np.append(holds_something(array.dictionary), False)
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        valid &= table[np.clip(indices, 0, len(table) - 1)]  # what is under a null may point nowhere
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        _, offsets, _ = array.buffers()
        width = np.int64 if pa.types.is_large_string(kind) else np.int32
        valid &= np.diff(np.frombuffer(offsets, dtype=width)[array.offset : array.offset + len(array) + 1]) > 0
    elif pa.types.is_struct(kind):
        held = [holds_something(child) for child in array.flatten()]
        valid &= np.logical_or.reduce(held) if held else False
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        valid &= np.diff(array.offsets.to_numpy()) > 0
    return valid


def is_short(array: Any) -> NDArray[np.bool_]:
    """[values] Which values a harmless field may hold: numbers, dates, and texts of so many bytes. Python decides about all others."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    kind = array.type
    if pa.types.is_dictionary(kind):
        table = np.append(is_short(array.dictionary), False)
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return np.asarray(table[np.clip(indices, 0, len(table) - 1)], dtype=np.bool_)
    if _is_text(array):
        _, offsets, _ = array.buffers()
        width = np.int64 if pa.types.is_large_string(kind) else np.int32
        lengths = np.diff(np.frombuffer(offsets, dtype=width)[array.offset : array.offset + len(array) + 1])
        return np.asarray(lengths <= HARMLESS_CHARACTERS, dtype=np.bool_)
    is_number = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return np.full(len(array), is_number or pa.types.is_temporal(kind) or pa.types.is_decimal(kind))


def _read_structs(structs: Any, names: SourceNames) -> tuple[list[Texts], NDArray[np.bool_], NDArray[np.uint64]]:
    """The text fields and the roles of an array of structs, which structs are odd, and which fields hold something (one bit for each).
    Raises NotPlain."""
    present = [field.name for field in structs.type]
    if len(set(present)) < len(present):
        raise NotPlain
    is_odd, held = ~_valid(structs), np.zeros(len(structs), dtype=np.uint64)
    nothing = np.zeros(len(structs) + 1, dtype=np.int64)
    absent = Texts(_padded(b""), nothing, np.ones(len(structs), dtype=np.bool_))
    found: dict[int, Texts] = {}
    for bit, (name, kind) in enumerate(names.fields.items()):
        if name not in present:
            continue
        field = structs.field(name)
        if kind in TEXT_KINDS and kind not in found:
            field = _decoded(field)
            if not _is_text(field):
                is_odd |= _valid(field)
                continue
            found[kind] = _texts(field)
            holds = ~found[kind].is_null & (np.diff(found[kind].starts) > 0)
        else:
            holds = holds_something(field)
            if kind == HARMLESS:
                is_odd |= holds & ~is_short(field)
            elif kind != PASSED and not (kind == QUIET and _is_text(field)):
                is_odd |= holds
                continue
        held |= holds.astype(np.uint64) << np.uint64(bit)
    for name in set(present).difference(names.fields):
        is_odd |= holds_something(structs.field(name))
    fields = [found.get(kind, absent) for kind in TEXT_KINDS]
    content, _, calls, _, role = fields
    return fields, is_odd | role.is_null | (content.is_null & calls.is_null), held


def _is_text(array: Any) -> bool:
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    return bool(pa.types.is_string(array.type) or pa.types.is_large_string(array.type))


def _decoded(array: Any) -> Any:
    """The array without a dictionary."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

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


def _column(arrow: Any, name: str) -> Any:
    """The column of this name; None when there is none, or more than one."""
    return arrow.column(name) if arrow.schema.names.count(name) == 1 else None


def _valid(array: Any) -> NDArray[np.bool_]:
    """Which values are not null."""
    if not array.null_count:
        return np.ones(len(array), dtype=np.bool_)
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)


def _texts(array: Any) -> Texts:
    """The texts of a string array. Raises NotPlain when they are not UTF-8."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    _, offsets, data = array.buffers()
    if not len(array):
        return Texts(_padded(b""), np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.bool_))
    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    starts = np.frombuffer(offsets, dtype=width)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    first, end = int(starts[0]), int(starts[-1])
    starts -= first
    text = _padded(memoryview(data or b"")[first:end])
    if not _is_utf8(text[: end - first], starts):
        raise NotPlain
    return Texts(text, starts, ~_valid(array))


def _padded(raw: bytes | memoryview) -> NDArray[np.uint8]:
    """The bytes with WORD zero bytes after the end.

    An empty text gets one byte more. Numba has another type for an array of a single word, and would compile again.
    """
    return np.concatenate([np.frombuffer(raw, dtype=np.uint8), np.zeros(WORD + (not len(raw)), dtype=np.uint8)])


def _is_utf8(raw: NDArray[np.uint8], starts: NDArray[np.int64]) -> bool:
    """Whether each text is UTF-8: all together are, and none starts inside a character."""
    if not len(raw) or int(raw.max()) < 128:
        return True
    try:
        raw.tobytes().decode()
    except UnicodeDecodeError:
        return False
    starts = starts[starts < len(raw)]
    return not bool(((raw[starts] & 0xC0) == 0x80).any())
