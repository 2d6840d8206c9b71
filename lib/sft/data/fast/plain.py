"""Rows that are as most rows are, from lines of JSON or columns of Arrow to rendered text without a Python object for each: `PlainRows.read`.

In: a piece of a file. Out: the text of its conversations as the named template writes it, with the ends of its runs, and the
rows that are not plain, which sft.chat.rows and sft.chat.named read instead. A row is plain when it is an object whose
messages have a known role, a text as content and perhaps texts as functions and function_calls, when all else that could
count (tools, train, tool_calls, …) is absent or null, and when no oddity of JSON is in it: a field twice, an escaped name, half of a
surrogate pair. tests/test_plain.py and test_columns.py prove that both ways write the same. What is compiled: sft.data.fast.lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.chat.named import NamedTemplate
from sft.data.blocks import Block, ColumnBlock, LineBlock
from sft.data.compiled import WORD, words_of
from sft.data.fast.columns import messages as messages_of
from sft.data.fast.lines import (
    BARRED,
    FIELDS,
    MESSAGES,
    PARTS,
    ROLE,
    SHORTEST,
    SPEAKERS,
    Layout,
    Names,
    read_columns,
    read_lines,
)

if TYPE_CHECKING:
    from sft.chat.rows import RowReader


@dataclass(frozen=True)
class Written:
    """Documents as text: what `sft.data.batch.Batch` holds after `lay_out`, and the digest of what each conversation says."""

    data: bytes
    padded: NDArray[np.uint8]  # the same, with WORD bytes behind it
    rows: NDArray[np.int64]  # the line of each document
    first_run: NDArray[np.int64]  # the first run of each, and the number of all
    run_ends: NDArray[np.int64]  # where each run ends in `data`
    num_specials: NDArray[np.int64]  # special tokens that the template wrote in each
    hashes: NDArray[np.uint64]
    answers_without_prefix: NDArray[np.int64]  # trained answers of each that do not begin with the generation prefix


class PlainRows:
    """Reads the plain rows of a source by the rules of its `RowReader`, as its template writes them."""

    def __init__(self, template: NamedTemplate, reader: RowReader) -> None:
        self.columns = columns = [reader.columns[name] for name in ("messages", "tools", "system")]
        self.names = Names(
            *packed(columns), *packed([*FIELDS, *BARRED]), *packed(SPEAKERS), words_of(packed(SPEAKERS)[0])
        )
        turns = [template.turns.get(role) for role in SPEAKERS]
        texts = [
            part
            for turn in turns
            for part in ((turn.head, turn.stop, turn.gap, turn.last_stop, turn.last_gap) if turn else [""] * PARTS)
        ]
        system = template.turns.get("system")
        texts += [
            template.default_without_tools,
            template.generation_prefix,
            " <functions>",
            "\n<functions>",
            "</functions>",
        ]
        texts += ["<function_calls>", "</function_calls>", "<|im_end|>" if system else ""]
        joined, where = packed(texts)
        self.layout = Layout(
            words_of(joined),
            where,
            np.array([turn is not None for turn in turns], dtype=np.uint8),
            np.array([role in reader.train_roles for role in SPEAKERS], dtype=np.uint8),
            np.array(
                [
                    [turn.specials if turn else 0 for turn in turns],
                    [turn.last_specials if turn else 0 for turn in turns],
                    [template.default_specials] * len(turns),
                ]
            ),
            template.has_calls,
            reader.last_only,
        )
        sizes = [len(text.encode()) for text in texts]
        # The most that a line, and a message in it, is given by the template: head, stop and gap, and all that belongs to no role.
        self.default, self.turn = sizes[-8], 3 * max(sizes[:-8]) + sum(sizes[-7:])
        self.roles = np.empty(MESSAGES, dtype=np.int64)
        self.spans = np.empty((MESSAGES, 2 * ROLE), dtype=np.int64)
        self.text = self.out = self.said = np.empty(0, dtype=np.uint8)
        self.edges = self.odd = np.empty(0, dtype=np.int64)

    @staticmethod
    def of(template: Any, reader: RowReader) -> PlainRows | None:
        """None where rows or template ask for more than plain rows can be."""
        plain = (
            isinstance(template, NamedTemplate)
            and not template.joins
            and not template.strips_history
            and reader.layouts[0] == "messages"
            and len({reader.columns[name] for name in ("messages", "tools", "system")}) == 3
            and not reader.system
            and not reader.strip
        )
        return PlainRows(template, reader) if plain else None

    def read(self, piece: Block) -> tuple[Written, list[int]]:
        """The documents of the plain rows, valid until the next call, and the numbers of the other rows in the piece."""
        found = self._lines(piece) if isinstance(piece, LineBlock) else self._columns(piece)
        if found is None:
            return NOTHING, list(range(piece.count))
        documents, odds, runs, size = found
        stops = self.said_ends[:documents].tolist()
        spoken = map(self.said.data.__getitem__, map(slice, [0, *stops[:-1]], stops))
        written = Written(
            self.out[:size].tobytes(),
            self.out[: size + WORD],
            self.rows[:documents],
            self.first[: documents + 1],
            self.edges[:runs],
            self.specials[:documents],
            np.fromiter(map(xxhash.xxh3_64_intdigest, spoken), dtype=np.uint64, count=documents),
            self.lacking[:documents],
        )
        return written, self.odd[:odds].tolist()

    def _lines(self, block: LineBlock) -> tuple[int, int, int, int] | None:
        data, ends = block.padded, block.ends
        size = len(data) - WORD
        if not size or not (int(data[:size].max()) < 128 or is_utf8(block.lines)):
            return None
        self._reserve(size, size // SHORTEST + 1, len(ends))
        self.text = room(self.text, len(data))
        return read_lines(
            data, words_of(data), ends, self.names, self.layout, self.text, words_of(self.text), self.roles, self.spans, *self._made()
        )  # fmt: skip

    def _columns(self, columns: ColumnBlock) -> tuple[int, int, int, int] | None:
        found = messages_of(columns.arrow, self.columns[0], self.columns[1:])
        if found is None:
            return None
        self._reserve(sum(map(len, found.texts)), len(found.absent[0]), columns.count)
        texts = tuple(words_of(text) for text in found.texts[:ROLE])
        return read_columns(
            found.begins, found.skipped, found.texts[ROLE], texts, found.where, found.absent, self.names, self.layout, self.roles, self.spans,
            *self._made(),
        )  # fmt: skip

    def _made(self) -> tuple[NDArray[Any], ...]:
        """Where compiled code puts what it makes."""
        return (
            words_of(self.out), words_of(self.said), self.odd, self.rows, self.first, self.edges, self.specials, self.lacking, self.said_ends
        )  # fmt: skip

    def _reserve(self, size: int, messages: int, rows: int) -> None:
        """Room for what so many bytes of texts in so many messages and rows can become. Pages that are not written to cost nothing."""
        self.out = room(self.out, size + messages * self.turn + rows * self.default + WORD)
        self.said = room(self.said, size + messages * (max(map(len, SPEAKERS)) + 2) + 2 * WORD)
        self.edges = room(self.edges, 2 * messages + rows + 1)
        if len(self.odd) < rows:
            self.odd, self.rows, self.specials, self.lacking, self.said_ends = np.empty((5, rows), dtype=np.int64)
            self.first = np.empty(rows + 1, dtype=np.int64)


def room(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array, or a larger one of its kind: what stood in it is needed no more."""
    return array if len(array) >= size else np.empty(size, dtype=array.dtype)


NONE = np.zeros(0, dtype=np.int64)
NOTHING = Written(
    b"", np.zeros(WORD, dtype=np.uint8), NONE, np.zeros(1, dtype=np.int64), NONE, NONE, NONE.astype(np.uint64), NONE
)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def packed(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Texts one after another, room behind them, and where each begins and the last ends."""
    pieces = [text.encode() for text in texts]
    return np.frombuffer(b"".join(pieces) + bytes(WORD), dtype=np.uint8), np.cumsum([0, *map(len, pieces)])
