"""Where the texts of messages are: what the readers of JSON (`json_rows`) and Arrow (`columns`) hand to `turns`.

Only plain rows are read so. A row is plain when its messages, or its prompt and answer, are texts, when nothing in it has two names that
hold something, and when every other field holds nothing or is passed over (ignored by name, or known to carry no training content).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.compiled import WORD, words_of
from sft.recipe.row_fields import FLAGS, MESSAGE_FIELDS
from sft.recipe.schema import ROLES

MAX_MESSAGES = 1 << 12
"""A row with more messages is not plain."""
SYSTEM, USER, ASSISTANT = range(3)
ROLE_NAMES = ("system", "user", "assistant", *(role for role in ROLES if role not in ("system", "user", "assistant")))
"""A role is its index in this list."""
FIRST_RESULT = 4
"""The roles from here on are those of results."""
CONTENT, FUNCTIONS, CALLS, THINKING, NAME, CALL_ID, TOOL_CALLS = range(7)
"""What a message may hold. All but the last are texts. `TOOL_CALLS` is a value that Python turns into texts. Named templates do not write
`NAME` and `CALL_ID`; templates need not write names, so that only a result after a call may have one."""
NUM_TEXTS = 6
ROLE, FLAG, WEIGHT, MASKED, EMPTY, PASSED, HARMLESS = range(7, 14)
"""Other kinds of fields: the role; flags; fields that must hold nothing; fields that are passed over, and those that are passed over where
they hold a number or a short text."""
FIELD_KINDS = {
    "role": ROLE, "content": CONTENT, "from": ROLE, "value": CONTENT, "functions": FUNCTIONS, "function_calls": CALLS, "tool_calls": TOOL_CALLS,
    "reasoning_content": THINKING, "thinking": THINKING, "reasoning": THINKING, "name": NAME, "tool_call_id": CALL_ID,
    **dict.fromkeys(FLAGS, FLAG), "weight": WEIGHT, "masked": MASKED,
}  # fmt: skip
"""The kind of each field of a message that is read. The others must hold nothing in a plain row."""
PROMPT, COMPLETION, INSTRUCTION, INPUT, OUTPUT, RESPONSE, SYSTEM_TEXT, TOOLS = range(8)
"""What a row may hold beside messages. All but `TOOLS` are texts; `TOOLS` is a value that Python turns into a text."""
LIST = 8
"""The kind of the column of messages. Columns can also be `EMPTY`, `PASSED` or `HARMLESS`."""
MAX_NAMES = 62
"""Fields, and columns, whose rows can be counted."""
START, END = range(2)
NEVER = 2
"""The flag of a message that is a prompt: the recipe's rules do not train it."""
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
        joined = np.frombuffer(b"".join(encoded) + bytes(WORD + 1), dtype=np.uint8)  # two words or more: see `columns`
        return cls(joined, np.cumsum([0, *map(len, encoded)]), words_of(joined))


class SourceNames:
    """The names of a source's columns and message fields, and their kinds. The place of a name is its bit in `Messages`.

    In: the kinds of the columns that are read, and the columns and fields that are passed over, with their kinds. Those for which there is no
    bit are unknown here: a row that holds something there is not plain.
    """

    def __init__(
        self, columns: Mapping[str, int], passed_columns: Mapping[str, int], passed_fields: Mapping[str, int]
    ) -> None:
        read = {name: FIELD_KINDS.get(name, EMPTY) for name in (*FIELD_KINDS, *sorted(MESSAGE_FIELDS))}
        self.columns = {**columns, **passed_columns}
        self.fields = {**read, **passed_fields}
        self.columns = dict(list(self.columns.items())[:MAX_NAMES])
        self.fields = dict(list(self.fields.items())[:MAX_NAMES])

    @property
    def list_column(self) -> str:
        """The column of messages; "" where the source's columns name another layout."""
        return next((name for name, kind in self.columns.items() if kind == LIST), "")


class Messages(NamedTuple):
    """The messages of rows."""

    first: NDArray[np.int64]
    """[rows + 1] The first message of each row, then the number of all messages."""
    is_plain: NDArray[np.bool_]
    """[rows]"""
    roles: NDArray[np.int64]
    """[messages] Index in ROLE_NAMES, or NONE."""
    flags: NDArray[np.int64]
    """[messages] Whether the row itself says that the message is trained, 0 or 1; NONE when it does not; or NEVER."""
    spans: NDArray[np.int64]
    """[messages, texts and TOOL_CALLS, 2] Where each text starts and ends in `text`; NONE for an absent text. TOOL_CALLS: where the value
    is in the lines of JSON."""
    row_spans: NDArray[np.int64]
    """[rows, PROMPT … TOOLS, 2] Likewise the texts of columns."""
    columns_held: NDArray[np.uint64]
    """[rows] One bit for each named column: whether it holds something in the row."""
    fields_held: NDArray[np.uint64]
    """[rows] One bit for each named field: whether it holds something in a message of the row."""
    forms: NDArray[np.uint64]
    """[messages] The same for two messages whose fields have the same names and order, and hold texts, something, or nothing."""
    text: NDArray[np.uint64]
    """The bytes of all texts, as `words_of` returns them."""
    call_spans: NDArray[np.int64]
    """[messages, 2] The calls of each message: the first of them, and the one after the last."""
    calls: NDArray[np.int64]
    """[calls, 3, 2] Where the name, the arguments and the id of each call are in `text`; NONE for an absent one. Only for Jinja templates."""
    tool_spans: NDArray[np.int64]
    """[rows, 2] Likewise the tools of each row."""
    tools: NDArray[np.int64]
    """[tools, 2] Where the JSON of each tool is in `text`. Only for Jinja templates."""

    @classmethod
    def empty(cls, rows: int, messages: int, text: NDArray[np.uint64]) -> Messages:
        """Room for so many rows and messages, without calls and tools. Pages that are never written cost nothing."""
        return cls(
            np.empty(rows + 1, dtype=np.int64),
            np.empty(rows, dtype=np.bool_),
            np.empty(messages, dtype=np.int64),
            np.empty(messages, dtype=np.int64),
            np.empty((messages, TOOL_CALLS + 1, 2), dtype=np.int64),
            np.empty((rows, TOOLS + 1, 2), dtype=np.int64),
            np.empty(rows, dtype=np.uint64),
            np.empty(rows, dtype=np.uint64),
            np.empty(messages, dtype=np.uint64),
            text,
            np.empty((messages, 2), dtype=np.int64),
            np.empty((0, 3, 2), dtype=np.int64),
            np.zeros((rows, 2), dtype=np.int64),
            np.empty((0, 2), dtype=np.int64),
        )


def is_utf8(data: NDArray[np.uint8]) -> bool:
    if not len(data) or int(data.max()) < 128:
        return True
    try:
        data.tobytes().decode()
    except UnicodeDecodeError:
        return False
    return True
