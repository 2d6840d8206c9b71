"""Reads rows of messages from Arrow columns, for compiled code: `read_columns`.

In: a pyarrow.RecordBatch whose column of messages is a list of structs. Out: `Messages`. A row is not plain when something in it could
count and compiled code does not know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.compiled import WORD, compiled, words_of
from sft.data.fast.json_text import find_name
from sft.data.fast.messages import (
    CONTENT,
    END,
    MAX_MESSAGES,
    NONE,
    NULL_FIELDS,
    ROLE_NAMES,
    START,
    TEXT_FIELDS,
    TEXTS,
    Messages,
    Names,
)

ROLES = Names.of(ROLE_NAMES)


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


def read_columns(arrow: Any, column: str, null_columns: Sequence[str]) -> Messages | None:
    """The messages in `column`. The columns `null_columns` must be null in a plain row. None when no row of the batch is plain."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    listed = _column(arrow, column)
    if listed is None or not (pa.types.is_list(listed.type) or pa.types.is_large_list(listed.type)):
        return None
    if not pa.types.is_struct(listed.type.value_type):
        return None
    is_odd = ~_valid(listed)
    for name in null_columns:
        if name in arrow.schema.names:
            other = _column(arrow, name)
            if other is None:
                return None
            is_odd |= _valid(other)
    offsets = listed.offsets.to_numpy().astype(np.int64)
    first, structs = offsets - offsets[0], listed.values.slice(offsets[0], offsets[-1] - offsets[0])
    try:
        fields, odd_messages = _read_structs(structs)
    except NotPlain:
        return None
    num_odd, counts = np.cumsum([0, *odd_messages]), np.diff(first)
    is_odd |= (num_odd[first[1:]] > num_odd[first[:-1]]) | (counts == 0) | (counts > MAX_MESSAGES)
    spans = np.full((len(structs), len(TEXT_FIELDS), 2), NONE, dtype=np.int64)
    for text in TEXTS:
        found = ~fields[text].is_null
        spans[found, text, START] = fields[text].starts[:-1][found]
        spans[found, text, END] = fields[text].starts[1:][found]
    content, functions, calls, role = fields
    roles = np.empty(len(structs), dtype=np.int64)
    find_roles(role.bytes, role.starts, ROLES, roles)
    texts = words_of(content.bytes), words_of(functions.bytes), words_of(calls.bytes)
    return Messages(first, ~is_odd, roles, spans, texts)


def _read_structs(structs: Any) -> tuple[list[Texts], NDArray[np.bool_]]:
    """The text fields and the roles of an array of structs, and which structs are odd. Raises NotPlain."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    names = [field.name for field in structs.type]
    if len(set(names)) < len(names):
        raise NotPlain
    is_odd = ~_valid(structs)
    for name in {*names} & {*NULL_FIELDS}:
        is_odd |= _valid(structs.field(name))
    fields: list[Texts] = []
    for name in (*TEXT_FIELDS, "role"):
        field = structs.field(name) if name in names else None
        if field is not None and pa.types.is_dictionary(field.type):
            try:
                field = field.dictionary_decode()
            except pa.ArrowException:  # what is under a null may point nowhere
                raise NotPlain from None
        if field is None or not (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)):
            if field is not None:
                is_odd |= _valid(field)
            nothing = np.zeros(len(structs) + 1, dtype=np.int64)
            fields.append(Texts(_padded(b""), nothing, np.ones(len(structs), dtype=np.bool_)))
            continue
        fields.append(_texts(field))
    content, role = fields[CONTENT], fields[-1]
    return fields, is_odd | role.is_null | content.is_null


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
    """With WORD bytes after the end; one more for no text, because numba takes an array of a single word for another kind of array,
    and would compile again."""
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
