"""Plain rows, from lines of JSON or columns of Arrow to rendered text, without a Python object for each row: `PlainRows.read`.

In: a block of a file. Out: `PlainDocuments`, the text of the conversations as the named template writes it with the ends of its runs,
and the numbers of the rows that are not plain (see `sft.data.fast.messages`), which sft.chat.rows and sft.chat.named read instead.
tests/test_plain.py and test_columns.py prove that both ways write the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.chat.named import NamedTemplate
from sft.chat.rows import RowReader
from sft.data.batch import split_documents
from sft.data.blocks import Block, ColumnBlock, LineBlock
from sft.data.compiled import WORD, words_of
from sft.data.fast.columns import read_columns
from sft.data.fast.json_rows import SHORTEST_MESSAGE, FieldNames, read_rows
from sft.data.fast.json_text import Buffer
from sft.data.fast.messages import QUIET_FIELDS, ROLE_NAMES, TEXT_FIELDS, Messages, RowNames
from sft.data.fast.turns import Documents, TurnLayout, Written, find_groups, write_documents


@dataclass(frozen=True)
class PlainDocuments:
    """Documents as text: what `sft.data.batch.RenderedBatch` holds after `lay_out`, and the hash of each conversation."""

    data: bytes
    padded: NDArray[np.uint8]
    """`data`, with WORD bytes after its end."""
    rows: NDArray[np.int64]
    """[documents] The row of each."""
    first_run: NDArray[np.int64]
    """[documents + 1] The first run of each, then the number of all runs."""
    run_ends: NDArray[np.int64]
    """[runs] Where each run ends in `data`."""
    num_specials: NDArray[np.int64]
    """[documents] Special tokens that the template wrote."""
    hashes: NDArray[np.uint64]
    """[documents] The hash of each conversation, see `sft.data.batch.conversation_hashes`."""
    groups: NDArray[np.uint64]
    """[documents] The hash of its group."""
    answers_without_prefix: NDArray[np.int64]
    """[documents] Trained answers that do not begin with the generation prefix."""
    empty_answers: NDArray[np.int64]
    """[documents] Trained answers without text and calls."""

    @property
    def ends(self) -> NDArray[np.int64]:
        """[documents] Where each document ends in `data`."""
        ends: NDArray[np.int64] = self.run_ends[self.first_run[1:] - 1]
        return ends

    def without(self, documents: Sequence[int]) -> PlainDocuments:
        """The other documents."""
        keep = np.ones(len(self.rows), dtype=np.bool_)
        keep[list(documents)] = False
        runs = np.diff(self.first_run)
        lengths = np.diff(self.run_ends, prepend=0)[np.repeat(keep, runs)]
        data = b"".join(
            [text for text, kept in zip(split_documents(self.data, self.ends), keep.tolist(), strict=True) if kept]
        )
        return PlainDocuments(
            data,
            np.frombuffer(bytearray(data) + bytes(WORD), dtype=np.uint8),
            self.rows[keep],
            np.concatenate([[0], np.cumsum(runs[keep])]),
            np.cumsum(lengths),
            self.num_specials[keep],
            self.hashes[keep],
            self.groups[keep],
            self.answers_without_prefix[keep],
            self.empty_answers[keep],
        )


class PlainRows:
    """Reads the plain rows of a source by the rules of its `RowReader`, as its template writes them."""

    def __init__(self, template: NamedTemplate, reader: RowReader) -> None:
        self.reader, self.passed_over = reader, -1
        self.layout = TurnLayout.of(template, reader)
        self._learn_names()
        # Memory that is used again for every block.
        self.columns_held = self.fields_held = np.empty(0, dtype=np.uint64)
        self.text = self.out = self.hashed = np.empty(0, dtype=np.uint8)
        self.roles = self.run_ends = np.empty(0, dtype=np.int64)
        self.spans = np.empty((0, len(TEXT_FIELDS), 2), dtype=np.int64)
        self.first_run = np.empty(1, dtype=np.int64)
        self.hashed_ends, self.rows, self.odd, self.num_specials, self.answers, self.empty = np.empty(
            (6, 0), dtype=np.int64
        )

    @staticmethod
    def of(template: Any, reader: RowReader) -> PlainRows | None:
        """None where the rows or the template need more than plain rows can have."""
        plain = (
            isinstance(template, NamedTemplate)
            and not template.joins
            and not template.strips_history
            and reader.layouts[0] == "messages"
            and not reader.ignores_fields((*TEXT_FIELDS, "role", *QUIET_FIELDS))
            and not reader.system
            and not reader.strip
        )
        return PlainRows(template, reader) if plain else None

    def _learn_names(self) -> None:
        """Takes the names that the reader passes over into the compiled reader's tables."""
        known = self.reader.counter.passed_over
        if len(known) == self.passed_over:
            return
        self.passed_over = len(known)
        column, *others = self.reader.plain_columns
        inside = f"{column}."
        passed = [name for name, is_passed in known.items() if is_passed and name != column]
        fields = [name.removeprefix(inside) for name in passed if name.startswith(inside)]
        columns = [name for name in passed if not name.startswith(inside)]
        self.names = RowNames([column, *(name for name in others if name not in columns)], columns, fields)
        self.field_names = FieldNames.of(self.names)

    def count(self, rows: NDArray[np.int64]) -> None:
        """Counts the fields of these rows of the block that was read last in the reader's counter."""
        column, counts = self.names.columns[0], self.reader.counter.counts.rows
        fields = [f"{column}.{name}" for name in self.names.fields]
        for names, held in ((self.names.columns, self.columns_held[rows]), (fields, self.fields_held[rows])):
            any_held = int(np.bitwise_or.reduce(held)) if len(held) else 0
            for bit, name in enumerate(names):
                if any_held >> bit & 1:
                    counts[name] += int((held >> np.uint64(bit) & np.uint64(1)).sum())

    def read(self, block: Block) -> tuple[PlainDocuments, list[int]]:
        """The documents of the plain rows, valid until the next call, and the numbers of the other rows in the block."""
        self.reader.learn(block.first_row())
        self._learn_names()
        if isinstance(block, LineBlock):
            messages, size = self._read_lines(block), len(block.padded)
        else:
            messages, size = self._read_columns(block)
        if messages is None:
            return NO_DOCUMENTS, list(range(block.count))
        self.columns_held, self.fields_held = messages.columns_held, messages.fields_held
        out = self._reserve(size, int(messages.first[-1]), len(messages.is_plain))
        written: Written = write_documents(self.layout, self.field_names.roles, messages, out)
        documents, odd, runs, size = written
        ends = out.hashed_ends[:documents]
        spans = find_groups(self.hashed, ends, np.empty((2, documents), dtype=np.int64))
        made = PlainDocuments(
            self.out[:size].tobytes(),
            self.out[: size + WORD],
            out.rows[:documents],
            out.first_run[: documents + 1],
            out.run_ends[:runs],
            out.num_specials[:documents],
            hashes(self.hashed, np.concatenate([[0], ends[:-1]]), ends),
            hashes(self.hashed, *spans),
            out.answers_without_prefix[:documents],
            out.empty_answers[:documents],
        )
        odd_rows: list[int] = out.odd[:odd].tolist()
        return made, odd_rows

    def _read_lines(self, block: LineBlock) -> Messages | None:
        """The messages of a block of lines; None when it is empty or not UTF-8."""
        data, size = block.padded, len(block.padded) - WORD
        if not size or not (int(data[:size].max()) < 128 or is_utf8(block.lines)):
            return None
        most = size // SHORTEST_MESSAGE + 2
        self.text, self.roles, self.spans = room(self.text, len(data)), room(self.roles, most), room(self.spans, most)
        texts, rows = words_of(self.text), len(block.ends)
        first, is_plain = np.empty(rows + 1, dtype=np.int64), np.empty(rows, dtype=np.bool_)
        columns_held, fields_held = np.empty((2, rows), dtype=np.uint64)
        messages = Messages(first, is_plain, self.roles, self.spans, columns_held, fields_held, (texts, texts, texts))
        read_rows(Buffer.of(data), block.ends, self.field_names, Buffer(self.text, texts), messages)
        return messages

    def _read_columns(self, columns: ColumnBlock) -> tuple[Messages | None, int]:
        """The messages of a record batch, and the bytes of their texts; None when no row is plain."""
        messages = read_columns(columns.arrow, self.names)
        return messages, 0 if messages is None else sum(map(len, messages.texts))

    def _reserve(self, size: int, messages: int, rows: int) -> Documents:
        """Room for the documents of so many bytes of texts, messages and rows. Pages that are never written cost nothing."""
        layout = self.layout
        self.out = room(self.out, size + messages * layout.most_in_message + rows * layout.most_in_row + WORD)
        self.hashed = room(self.hashed, size + messages * (max(map(len, ROLE_NAMES)) + 2) + 2 * WORD)
        self.run_ends = room(self.run_ends, 2 * messages + rows + 1)
        if len(self.odd) < rows:
            arrays = np.empty((6, rows), dtype=np.int64)
            self.hashed_ends, self.rows, self.odd, self.num_specials, self.answers, self.empty = arrays
            self.first_run = np.empty(rows + 1, dtype=np.int64)
        return Documents(
            words_of(self.out), words_of(self.hashed), self.hashed_ends, self.rows, self.odd, self.first_run, self.run_ends,
            self.num_specials, self.answers, self.empty,
        )  # fmt: skip


def hashes(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hash of each text in data."""
    texts = map(data.data.__getitem__, map(slice, starts.tolist(), ends.tolist()))
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), dtype=np.uint64, count=len(ends))


def room(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array, or a longer one of its kind without its content."""
    return array if len(array) >= size else np.empty((size, *array.shape[1:]), dtype=array.dtype)


NOTHING = np.zeros(0, dtype=np.int64)
NO_DOCUMENTS = PlainDocuments(
    b"",
    np.zeros(WORD, dtype=np.uint8),
    NOTHING,
    np.zeros(1, dtype=np.int64),
    NOTHING,
    NOTHING,
    NOTHING.astype(np.uint64),
    NOTHING.astype(np.uint64),
    NOTHING,
    NOTHING,
)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
