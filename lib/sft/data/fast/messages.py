"""Where the texts of messages are: what the readers of JSON (`json_rows`) and Arrow (`columns`) hand to `turns`.

Only plain rows are read so. A row is plain when its messages have a known role, a text as content and perhaps texts as functions
and function_calls, and when every other field holds nothing or is passed over (ignored by name, or known to carry no training content).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.compiled import WORD, words_of
from sft.recipe.row_fields import MESSAGE_FIELDS
from sft.recipe.schema import ROLES

MAX_MESSAGES = 1 << 12
"""A row with more messages is not plain."""
SYSTEM, USER, ASSISTANT = range(3)
ROLE_NAMES = ("system", "user", "assistant", *(role for role in ROLES if role not in ("system", "user", "assistant")))
"""A role is its index in this list."""
CONTENT, FUNCTIONS, CALLS = TEXTS = range(3)
"""The text fields of a message, in the order of TEXT_FIELDS."""
TEXT_FIELDS = ("content", "functions", "function_calls")
ROLE = len(TEXT_FIELDS)
"""The number of the field that holds the role."""
QUIET_FIELDS = ("name", "tool_call_id")
"""Fields that named templates do not write. They must be texts, or hold nothing."""
EMPTY_FIELDS = tuple(sorted(MESSAGE_FIELDS.difference((*TEXT_FIELDS, "role", *QUIET_FIELDS))))
"""Fields that hold nothing in a plain row."""
MAX_NAMES = 62
"""Fields, and columns, whose rows can be counted."""
START, END = range(2)
NONE = -1
"""No such name, no such text, or not plain."""
U = np.uint64
"""Type of an index: a signed index could count from the end, which costs every access a comparison."""


class Names(NamedTuple):
    """Names as bytes, one after another, and where each starts and the last ends."""

    bytes: NDArray[np.uint8]
    starts: NDArray[np.int64]
    words: NDArray[np.uint64]
    """The bytes as `words_of` returns them."""

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        encoded = [name.encode() for name in names]
        joined = np.frombuffer(b"".join(encoded) + bytes(WORD), dtype=np.uint8)
        return cls(joined, np.cumsum([0, *map(len, encoded)]), words_of(joined))


class RowNames:
    """The names of a source's columns and message fields. The place of a name in `columns` and in `fields` is its bit in `Messages`.

    In: the column of messages and columns that must hold nothing, and the columns and fields that are passed over. Those for which there is no
    bit are not passed over here: a row that holds something there is not plain.
    """

    def __init__(self, columns: Sequence[str], passed_columns: Sequence[str], passed_fields: Sequence[str]) -> None:
        empty = [name for name in EMPTY_FIELDS if name not in passed_fields]
        known = [*TEXT_FIELDS, "role", *QUIET_FIELDS, *empty]
        self.first_passed = len(columns), len(known)
        self.columns, self.fields = [*columns, *passed_columns][:MAX_NAMES], [*known, *passed_fields][:MAX_NAMES]

    @property
    def passed_columns(self) -> list[str]:
        return self.columns[self.first_passed[0] :]

    @property
    def passed_fields(self) -> list[str]:
        return self.fields[self.first_passed[1] :]


class Messages(NamedTuple):
    """The messages of rows."""

    first: NDArray[np.int64]
    """[rows + 1] The first message of each row, then the number of all messages."""
    is_plain: NDArray[np.bool_]
    """[rows]"""
    roles: NDArray[np.int64]
    """[messages] Index in ROLE_NAMES, or NONE."""
    spans: NDArray[np.int64]
    """[messages, TEXTS, 2] Where each text starts and ends in the bytes of its field; NONE for an absent text."""
    columns_held: NDArray[np.uint64]
    """[rows] One bit for each named column: whether it holds something in the row."""
    fields_held: NDArray[np.uint64]
    """[rows] One bit for each named field: whether it holds something in a message of the row."""
    texts: tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]
    """The bytes of each text field, as `words_of` returns them."""
