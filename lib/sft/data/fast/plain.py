"""Plain rows, from lines of JSON or columns of Arrow to rendered text, without a Python object for each row: `PlainRows.read`.

In: a block of a file. Out: `PlainDocuments`, the text of the conversations as the named template writes it with the ends of its runs,
and the numbers of the rows that are not plain (see `sft.data.fast.messages`), which sft.chat.rows and sft.chat.named read instead.
tests/test_plain.py and test_columns.py prove that both ways write the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.chat.named import NamedTemplate
from sft.chat.rows import RowReader
from sft.chat.template import JinjaTemplate
from sft.data.compiled import WORD, words_of
from sft.data.fast.documents import NO_DOCUMENTS, Memory, PlainDocuments, room
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
    START,
    SYSTEM_TEXT,
    TOOLS,
    Messages,
    SourceNames,
    is_utf8,
)
from sft.data.fast.plans import ROLES, FormWriter
from sft.data.fast.turns import TurnLayout, Written, write_documents
from sft.data.fast.values import JsonValues, Values
from sft.sources.blocks import Block, ColumnBlock, LineBlock


class TurnWriter:
    """Writes plain rows as a named template does."""

    def __init__(self, template: NamedTemplate, reader: RowReader) -> None:
        self.layout = TurnLayout.of(template, reader)

    def write(self, block: Block, messages: Messages, memory: Memory) -> Written:
        layout, rows, count = self.layout, len(messages.is_plain), int(messages.first[-1])
        spans, tools = messages.spans[:count, :NUM_TEXTS], messages.row_spans[:, TOOLS]
        size = int((spans[..., END] - spans[..., START]).sum() + (tools[:, END] - tools[:, START]).sum())
        size += count * layout.most_in_message + rows * layout.most_in_row
        written: Written = write_documents(
            layout, ROLES, messages, memory.reserve(size, 2 * count + rows + 1, messages)
        )
        return written

    def check(self, block: Block, made: PlainDocuments) -> None:
        """Named templates are proven by tests."""


class PlainRows:
    """Reads the plain rows of a source by the rules of its `RowReader`, as its template writes them."""

    def __init__(self, template: NamedTemplate | JinjaTemplate, reader: RowReader) -> None:
        self.reader, self.learnt = reader, (-1, "")
        self.writer: TurnWriter | FormWriter
        if isinstance(template, NamedTemplate):
            self.writer = TurnWriter(template, reader)
        else:
            self.writer = FormWriter(template, reader)
        self.values = Values(reader, as_objects=isinstance(template, JinjaTemplate))
        self._learn_names(None)
        # Memory that is used again for every block.
        self.memory = Memory()
        self.columns_held = self.fields_held = np.empty(0, dtype=np.uint64)
        self.text = np.empty(0, dtype=np.uint8)

    @staticmethod
    def of(template: Any, reader: RowReader) -> PlainRows | None:
        """None where the rows or the template need more than plain rows can have."""
        if isinstance(template, NamedTemplate):
            usable = (
                not template.joins and not template.strips_history and template.generation_prefix in ("", "<think>")
            )
        else:
            usable = isinstance(template, JinjaTemplate)
        plain = (
            usable
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
        self.columns_held, self.fields_held = messages.columns_held, messages.fields_held
        written = self.writer.write(block, messages, self.memory)
        made = self.memory.documents(written)
        self.writer.check(block, made)
        odd: list[int] = self.memory.arrays.odd[: written.odd].tolist()
        return made, odd

    def _read_lines(self, block: LineBlock) -> Messages | None:
        """The messages of a block of lines; None when it is empty or not UTF-8."""
        data, size = block.padded, len(block.padded) - WORD
        if not size or not is_utf8(data[:size]):
            return None
        most = size // SHORTEST_MESSAGE + 3
        # An instruction and its input are written twice; JSON gets a space after each comma and colon.
        self.text = room(self.text, 5 * len(data))
        messages = Messages.empty(len(block.ends), most, words_of(self.text))
        read_rows(Buffer.of(data), block.ends, self.field_names, Buffer(self.text, messages.text), messages)
        return self.values.read(JsonValues(data, self.names), messages, self.names.list_column, self.text)

    def _read_columns(self, columns: ColumnBlock) -> Messages | None:
        """The messages of a record batch; None when no row is plain."""
        from sft.data.fast.columns import read_columns  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

        read = read_columns(columns.arrow, self.names, self.field_names)
        if read is None:
            return None
        values = JsonValues.of_columns(read.calls, read.tools, self.names, read.messages)
        messages, text = read.messages, read.buffer
        if size := len(values.data) - WORD - 1:
            text = np.concatenate([text, np.empty(5 * size, dtype=np.uint8)])  # see `_read_lines`
            messages = messages._replace(text=words_of(text))
        return self.values.read(values, messages, self.names.list_column, text)


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
