"""Plain rows, from lines of JSON or columns of Arrow to rendered text, without a Python object for each row: `PlainRows.read`.

In: a block of a file. Out: `PlainDocuments`, the text of the conversations as the named template writes it with the ends of its runs,
and the numbers of the rows that are not plain (see `sft.data.fast.messages`), which sft.chat.rows and sft.chat.named read instead.
tests/test_plain.py and test_columns.py prove that both ways write the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from sft.data.fast.columns import ROLES, read_columns
from sft.data.fast.json_rows import SHORTEST_MESSAGE, FieldNames, read_rows
from sft.data.fast.json_text import Buffer
from sft.data.fast.messages import (
    COMPLETION,
    END,
    FIELD_KINDS,
    HARMLESS,
    INPUT,
    INSTRUCTION,
    LIST,
    NUM_TEXTS,
    OUTPUT,
    PASSED,
    PROMPT,
    RESPONSE,
    ROLE_NAMES,
    START,
    SYSTEM_TEXT,
    TOOL_CALLS,
    TOOLS,
    Messages,
    SourceNames,
)
from sft.data.fast.turns import DocumentArrays, TurnLayout, Written, find_groups, write_documents
from sft.data.fast.values import Values


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
        self.reader, self.learnt = reader, (-1, "")
        self.layout = TurnLayout.of(template, reader)
        self.values = Values(reader)
        self._learn_names(None)
        # Memory that is used again for every block.
        self.columns_held = self.fields_held = np.empty(0, dtype=np.uint64)
        self.text = self.out = self.hashed = np.empty(0, dtype=np.uint8)
        self.roles = self.flags = self.run_ends = np.empty(0, dtype=np.int64)
        self.spans = np.empty((0, TOOL_CALLS + 1, 2), dtype=np.int64)
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
            and template.generation_prefix in ("", "<think>")
            and columns_of(reader, "messages") is not None
            and reader.ignore.isdisjoint((reader.columns["messages"], reader.columns["conversations"]))
            and not reader.ignores_fields(FIELD_KINDS)
            and not reader.system
            and not reader.strip
        )
        return PlainRows(template, reader) if plain else None

    def _learn_names(self, row: Any) -> None:
        """Takes the names that the reader passes over into the compiled reader's tables. `row` shows which column has the messages."""
        self.reader.learn(row)
        layout = "messages"
        if isinstance(row, Mapping) and not row.get(self.reader.columns["messages"]):
            layout = "conversations" if row.get(self.reader.columns["conversations"]) else "messages"
        known = self.reader.counter.passed_over
        if (len(known), layout) == self.learnt:
            return
        self.learnt = len(known), layout
        columns = columns_of(self.reader, layout) or {}
        inside = f"{self.reader.columns[layout]}."
        ignore = self.reader.ignore
        passed = {name: PASSED if name in ignore else HARMLESS for name, is_passed in known.items() if is_passed}
        fields = {name.removeprefix(inside): kind for name, kind in passed.items() if name.startswith(inside)}
        passed_columns = {n: kind for n, kind in passed.items() if not n.startswith(inside) and n not in columns}
        self.names = SourceNames({**columns, **dict.fromkeys(ignore & columns.keys(), PASSED)}, passed_columns, fields)
        self.field_names = FieldNames.of(self.names, self.reader.last_only)

    def count(self, rows: NDArray[np.int64]) -> None:
        """Counts the fields of these rows of the block that was read last in the reader's counter."""
        counts = self.reader.counter.counts.rows
        fields = [f"{self.names.list_column}.{name}" for name in self.names.fields]
        for names, held in ((list(self.names.columns), self.columns_held[rows]), (fields, self.fields_held[rows])):
            any_held = int(np.bitwise_or.reduce(held)) if len(held) else 0
            for bit, name in enumerate(names):
                if any_held >> bit & 1:
                    counts[name] += int((held >> np.uint64(bit) & np.uint64(1)).sum())
        self.values.count(rows, counts)

    def read(self, block: Block) -> tuple[PlainDocuments, list[int]]:
        """The documents of the plain rows, valid until the next call, and the numbers of the other rows in the block."""
        self._learn_names(block.first_row())
        messages = self._read_lines(block) if isinstance(block, LineBlock) else self._read_columns(block)
        if messages is None:
            return NO_DOCUMENTS, list(range(block.count))
        size = text_bytes(messages)
        self.columns_held, self.fields_held = messages.columns_held, messages.fields_held
        out = self._reserve(size, int(messages.first[-1]), len(messages.is_plain))
        written: Written = write_documents(self.layout, ROLES, messages, out)
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
        most = size // SHORTEST_MESSAGE + 3
        self.text = room(self.text, 2 * len(data))  # an instruction and its input are written twice
        self.roles, self.flags, self.spans = room(self.roles, most), room(self.flags, most), room(self.spans, most)
        texts, rows = words_of(self.text), len(block.ends)
        messages = Messages(
            np.empty(rows + 1, dtype=np.int64),
            np.empty(rows, dtype=np.bool_),
            self.roles,
            self.flags,
            self.spans,
            np.empty((rows, TOOLS + 1, 2), dtype=np.int64),
            np.empty(rows, dtype=np.uint64),
            np.empty(rows, dtype=np.uint64),
            (texts, texts, texts, texts, texts),
        )
        read_rows(Buffer.of(data), block.ends, self.field_names, Buffer(self.text, texts), messages)
        return self.values.read(data, messages, self.names, self.text)

    def _read_columns(self, columns: ColumnBlock) -> Messages | None:
        """The messages of a record batch; None when no row is plain."""
        self.values.seen = {}
        return read_columns(columns.arrow, self.names)

    def _reserve(self, size: int, messages: int, rows: int) -> DocumentArrays:
        """Room for the documents of so many bytes of texts, messages and rows. Pages that are never written cost nothing."""
        layout = self.layout
        self.out = room(self.out, size + messages * layout.most_in_message + rows * layout.most_in_row + WORD)
        self.hashed = room(self.hashed, size + messages * (max(map(len, ROLE_NAMES)) + 2) + 2 * WORD)
        self.run_ends = room(self.run_ends, 2 * messages + rows + 1)
        if len(self.odd) < rows:
            arrays = np.empty((6, rows), dtype=np.int64)
            self.hashed_ends, self.rows, self.odd, self.num_specials, self.answers, self.empty = arrays
            self.first_run = np.empty(rows + 1, dtype=np.int64)
        return DocumentArrays(
            words_of(self.out), words_of(self.hashed), self.hashed_ends, self.rows, self.odd, self.first_run, self.run_ends,
            self.num_specials, self.answers, self.empty,
        )  # fmt: skip


def hashes(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hash of each text in data."""
    texts = map(data.data.__getitem__, map(slice, starts.tolist(), ends.tolist()))
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), dtype=np.uint64, count=len(ends))


def columns_of(reader: RowReader, layout: str) -> dict[str, int] | None:
    """The kinds of the columns that a reader reads, with the messages in the column of `layout`. Returns None if a name has two
    meanings."""
    names = reader.names
    kinds: list[tuple[str, int]] = []
    if layout in reader.layouts:
        kinds.append((reader.columns[layout], LIST))
    is_pair, is_instruction = "prompt" in reader.layouts, "instruction" in reader.layouts
    if is_pair:
        kinds += [(names["prompt"][0], PROMPT), (names["completion"][0], COMPLETION)]
    if is_instruction:
        kinds += [(names["instruction"][0], INSTRUCTION), (names["output"][0], OUTPUT)]
        kinds += [(name, INPUT) for name in names["input"]]
    more = {*(names["completion"][1:] if is_pair else ()), *(names["output"][1:] if is_instruction else ())}
    for name in more:
        if (not is_pair or name in names["completion"]) and (not is_instruction or name in names["output"]):
            kinds.append((name, RESPONSE))
    kinds += [(name, SYSTEM_TEXT) for name in names["system"]] + [(name, TOOLS) for name in names["tools"]]
    return dict(kinds) if len({name for name, _ in kinds}) == len(kinds) else None


def text_bytes(messages: Messages) -> int:
    """The bytes of all texts, with those of tools."""
    spans = messages.spans[: int(messages.first[-1]), :NUM_TEXTS]
    tools = messages.row_spans[:, TOOLS]
    return int((spans[..., END] - spans[..., START]).sum() + (tools[:, END] - tools[:, START]).sum())


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
