"""Where the texts of messages are: what the readers of JSON (`json_rows`) and Arrow (`columns`) hand to `turns`.

Only plain rows are read so. A row is plain when its messages have a known role, a text as content and perhaps texts as functions
and function_calls, and when everything else that could count is absent or null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.compiled import WORD, words_of
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
NULL_FIELDS = ("tool_calls", "reasoning_content", "thinking", "train", "weight", "from", "value")
"""Fields that must be absent or null in a plain row. Other fields of a message are ignored."""
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
    texts: tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]
    """The bytes of each text field, as `words_of` returns them."""
