"""The messages of a record batch as flat arrays, for compiled code: `messages`.

In: a pyarrow.RecordBatch whose column of messages is a list of structs. Out: where each row's messages and each message's texts lie,
and the rows that compiled code must not read, because something stands in them that could count and that it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.compiled import WORD
from sft.data.fast.lines import BARRED, CONTENT, FIELDS, MESSAGES, ROLE


class Messages(NamedTuple):
    begins: NDArray[np.int64]  # [rows + 1] the first message of each row, and the number of all
    skipped: NDArray[np.bool_]  # [rows]
    texts: list[NDArray[np.uint8]]  # of each of FIELDS, one after another, WORD bytes or more behind them
    where: NDArray[np.int64]  # [FIELDS, messages + 1] where each text begins, and the last ends
    absent: NDArray[np.bool_]  # [FIELDS, messages]


def messages(arrow: Any, column: str, barred: Sequence[str]) -> Messages | None:
    """Of the column so named; in the columns `barred` only nulls may stand. None where the whole batch is no plain one."""
    import pyarrow as pa

    found = _column(arrow, column)
    if found is None or not (pa.types.is_list(found.type) or pa.types.is_large_list(found.type)):
        return None
    if not pa.types.is_struct(found.type.value_type):
        return None
    skipped = ~_valid(found)
    for name in barred:
        if name in arrow.schema.names:
            other = _column(arrow, name)
            if other is None:
                return None
            skipped |= _valid(other)
    offsets = found.offsets.to_numpy().astype(np.int64)
    begins, values = offsets - offsets[0], found.values.slice(offsets[0], offsets[-1] - offsets[0])
    names = [field.name for field in values.type]
    if len(set(names)) < len(names):
        return None
    bad = ~_valid(values)
    for name in {*names} & {*BARRED}:
        bad |= _valid(values.field(name))
    texts, where = [], np.zeros((len(FIELDS), len(values) + 1), dtype=np.int64)
    absent = np.ones((len(FIELDS), len(values)), dtype=np.bool_)
    for number, name in enumerate(FIELDS):
        field = values.field(name) if name in names else None
        if field is not None and pa.types.is_dictionary(field.type):
            try:
                field = field.dictionary_decode()
            except pa.ArrowException:  # what stands under a null may point nowhere
                return None
        if field is None or not (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)):
            if field is not None:
                bad |= _valid(field)
            texts.append(_padded(b""))
            continue
        absent[number] = ~_valid(field)
        where[number], text = _texts(field)
        if not _is_unicode(text[: where[number, -1]], where[number]):
            return None
        texts.append(text)
    bad |= absent[ROLE] | absent[CONTENT]
    bads, counts = np.cumsum([0, *bad]), np.diff(begins)
    skipped |= (bads[begins[1:]] > bads[begins[:-1]]) | (counts == 0) | (counts > MESSAGES)
    return Messages(begins, skipped, texts, where, absent)


def _column(arrow: Any, name: str) -> Any:
    """The column so named; None where there is none, or more than one."""
    return arrow.column(name) if arrow.schema.names.count(name) == 1 else None


def _valid(array: Any) -> NDArray[np.bool_]:
    if not array.null_count:
        return np.ones(len(array), dtype=np.bool_)
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)


def _texts(array: Any) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Where each text of a string array begins, and the last ends, in their bytes, which come second, with room behind them."""
    import pyarrow as pa

    _, offsets, data = array.buffers()
    if not len(array):
        return np.zeros(1, dtype=np.int64), _padded(b"")
    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    where = np.frombuffer(offsets, dtype=width)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    return where - where[0], _padded(memoryview(data or b"")[where[0] : where[-1]])


def _padded(raw: bytes | memoryview) -> NDArray[np.uint8]:
    """With room behind it for a word, and for two where it is empty: numba would take the words of a single one for another kind of array,
    and compile anew."""
    return np.concatenate([np.frombuffer(raw, dtype=np.uint8), np.zeros(WORD + (not len(raw)), dtype=np.uint8)])


def _is_unicode(raw: NDArray[np.uint8], where: NDArray[np.int64]) -> bool:
    """Whether each text is UTF-8: all together are, and none begins inside a character."""
    if not len(raw) or int(raw.max()) < 128:
        return True
    try:
        raw.tobytes().decode()
    except UnicodeDecodeError:
        return False
    begins = where[where < len(raw)]
    return not bool(((raw[begins] & 0xC0) == 0x80).any())
