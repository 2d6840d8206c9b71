"""Reads the rows of a chunk in blocks of bounded size.

In:  a chunk of a source's file (sft.sources.input_files).
Out: `read_blocks` yields lines of JSON or columns of Arrow, which compiled code takes as they are. `Block.batch` makes
     Python objects of them: a `RowBatch` with the rows, and a reject with its reason for everything that is no row.
     Row numbers count from 0 inside the chunk.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.chat.values import Repeating, keep_repeats, may_repeat, refuse_constant
from sft.common.errors import SftError
from sft.sources import unpack
from sft.sources.input_files import Chunk, InputFile, arrow_batches, cut, reading
from sft.sources.json_columns import row_parser

try:  # optional, and three times faster than json; json decides about everything that it refuses
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

BATCH_BYTES = 4 << 20
"""Input bytes that a worker holds as Python objects at a time. The fixed cost of a batch matters more than CPU caches: with
4 MiB encoding takes a tenth less time than with 1 MiB."""
BATCH_ROWS = 4096
TAIL_BYTES = 256 << 10
"""Bytes read after the end of a chunk, for the rest of its last line. A second read would cost a millisecond."""
EXAMPLE_CHARS = 200
NEWLINE = 10
PADDING = 8
"""Bytes without a meaning after the lines of a block: compiled code reads words of so many."""
_LONG_NUMBER = re.compile(rb"[0-9]{19}")


class Reject(NamedTuple):
    """A row that was not used: its number in what was read, a reason that is counted, what was found, and the start of the row."""

    row: int
    reason: str
    detail: str
    example: str


@dataclass
class RowBatch:
    """Rows as Python objects, their numbers, and the rejects among them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    count: int = 0
    """The number of the next row: rows read so far in the chunk, blank lines of a JSONL file included."""


@dataclass(frozen=True)
class LineBlock:
    """Lines of a chunk, each with its newline. `first` is the number of the first one."""

    padded: NDArray[np.uint8]
    """The lines, followed by PADDING bytes without a meaning, so that compiled code can read words."""
    ends: NDArray[np.int64]
    """The position of each line's newline."""
    first: int
    too_long: bool = False
    """The block stands for one line of more than MAX_ROW_BYTES, which is not read."""

    @classmethod
    def of(cls, lines: bytes, first: int = 0, too_long: bool = False) -> LineBlock:
        # A bytearray, so that the array is writable like that of a chunk.
        padded = np.frombuffer(bytearray(lines) + bytes(PADDING), dtype=np.uint8)
        return cls(padded, np.flatnonzero(padded[:-PADDING] == NEWLINE), first, too_long)

    @property
    def lines(self) -> bytes:
        return self.padded[:-PADDING].tobytes()

    @property
    def count(self) -> int:
        return 1 if self.too_long else len(self.ends)

    def first_row(self) -> Any:
        """The first row. Callers read its names. Returns None if the line is not JSON."""
        end = self.ends[0] if len(self.ends) else 0
        try:
            return json.loads(self.padded[:end].tobytes())
        except (ValueError, RecursionError):
            return None

    def _line(self, number: int) -> bytes:
        """A line without its newline."""
        start = int(self.ends[number - 1]) + 1 if number else 0
        return self.padded[start : self.ends[number]].tobytes()

    def batch(self, wanted: Sequence[int] | None = None) -> RowBatch:
        """The rows of all lines, or of the wanted ones. `wanted` counts from 0 inside the block."""
        batch = RowBatch(count=self.first + self.count)
        if self.too_long:
            batch.rejects.append(Reject(self.first, "row_too_long", f"more than {unpack.MAX_ROW_BYTES} bytes", ""))
        if self.too_long or (wanted is not None and not wanted):
            return batch
        if wanted is None:
            data = self.lines
            lines = data.split(b"\n")[:-1]
            numbers = list(range(len(lines)))
        else:
            numbers = list(wanted)
            lines = list(map(self._line, numbers))
            data = b"\n".join(lines)
        long_numbers = _has_long_number(data)
        rows = None if long_numbers else _parse_plain(lines)
        if rows is not None:
            batch.rows, batch.numbers = rows, [self.first + n for n in numbers]
            return batch
        for number, line in zip(numbers, lines, strict=True):
            _read_line(line, self.first + number, batch, long_numbers)
        return batch


@dataclass(frozen=True)
class ColumnBlock:
    """Rows of a record batch. `first` is the number of the first one."""

    arrow: Any
    """A pyarrow.RecordBatch."""
    first: int

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]], first: int = 0) -> ColumnBlock:
        import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

        return cls(pa.RecordBatch.from_pylist(list(rows)), first)

    @property
    def count(self) -> int:
        return int(self.arrow.num_rows)

    def first_row(self) -> Any:
        """A row with the names of all columns and message fields."""
        return {field.name: _names_in(field.type) for field in self.arrow.schema}

    def batch(self, wanted: Sequence[int] | None = None) -> RowBatch:
        """All rows, or the wanted ones. `wanted` counts from 0 inside the block."""
        batch = RowBatch(count=self.first + self.count)
        if wanted is not None and not wanted:
            return batch
        arrow = self.arrow if wanted is None else taken(self.arrow, wanted)
        numbers = [self.first + n for n in (range(self.count) if wanted is None else wanted)]
        try:
            batch.rows, batch.numbers = arrow.to_pylist(), numbers
        except (UnicodeDecodeError, ValueError):  # reject the rows with a bad string only
            for i, number in enumerate(numbers):
                try:
                    batch.rows.append(arrow.slice(i, 1).to_pylist()[0])
                    batch.numbers.append(number)
                except (UnicodeDecodeError, ValueError) as e:
                    batch.rejects.append(Reject(number, "unreadable_value", str(e)[:EXAMPLE_CHARS], ""))
        if parse := row_parser(arrow.schema):
            _parse_json_values(batch, parse)
        return batch


def taken(arrow: Any, rows: Sequence[int]) -> Any:
    """These rows of a record batch."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    try:
        return arrow.take(pa.array(rows, type=pa.int64()))
    except pa.ArrowNotImplementedError:  # pyarrow cannot take from columns of some types, such as string_view
        return pa.RecordBatch.from_pylist([arrow.slice(row, 1).to_pylist()[0] for row in rows], schema=arrow.schema)


def _parse_json_values(batch: RowBatch, parse: Callable[[Any], Any]) -> None:
    """Parses the values of type `arrow.json`. A row with a text that is not JSON becomes a reject."""
    rows, numbers = batch.rows, batch.numbers
    batch.rows, batch.numbers = [], []
    for number, row in zip(numbers, rows, strict=True):
        try:
            batch.rows.append(parse(row))
            batch.numbers.append(number)
        except ValueError as e:
            batch.rejects.append(Reject(number, "not_json", str(e)[:EXAMPLE_CHARS], repr(row)[:EXAMPLE_CHARS]))


def _names_in(arrow_type: Any) -> Any:
    """A value with the names of an Arrow type: [{name: None, …}] for a list of structs, else None."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    is_list = pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type)
    if not is_list or not pa.types.is_struct(arrow_type.value_type):
        return None
    return [{field.name: None for field in arrow_type.value_type}]


Block = LineBlock | ColumnBlock


def read(chunk: Chunk) -> Iterator[RowBatch]:
    """The rows of a chunk in batches of bounded size. The last batch may be empty."""
    return (block.batch() for block in read_blocks(chunk))


def read_blocks(chunk: Chunk) -> Iterator[Block]:
    """The rows of a chunk in blocks of bounded size, before they become Python objects."""
    return _line_blocks(chunk) if chunk.file.kind == "jsonl" else _column_blocks(chunk)


def _column_blocks(chunk: Chunk) -> Iterator[ColumnBlock]:
    with reading(chunk.file):
        if chunk.file.kind == "parquet":
            batches = _parquet_batches(chunk)
        else:
            batches = (_checked(b) for i, b in enumerate(arrow_batches(chunk.file)) if chunk.start <= i < chunk.stop)
        first = 0
        for arrow in batches:
            step = max(1, min(BATCH_ROWS, BATCH_BYTES * arrow.num_rows // max(1, arrow.nbytes)))
            for start in range(0, arrow.num_rows, step):
                block = ColumnBlock(arrow.slice(start, step), first)
                yield block
                first += block.count


def _checked(arrow: Any) -> Any:
    """The record batch, if its offsets stay inside its buffers: pyarrow itself reads past them. Raises pyarrow's error. Texts that are not
    UTF-8 are left to the rows that have them."""
    for column in arrow.columns:
        column.view(_without_texts(column.type)).validate(full=True)
    return arrow


def _without_texts(arrow_type: Any) -> Any:
    """The type with bytes in place of texts."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    if pa.types.is_string(arrow_type):
        return pa.binary()
    if pa.types.is_large_string(arrow_type):
        return pa.large_binary()
    if pa.types.is_struct(arrow_type):
        return pa.struct([field.with_type(_without_texts(field.type)) for field in arrow_type])
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        made = pa.list_ if pa.types.is_list(arrow_type) else pa.large_list
        return made(arrow_type.value_field.with_type(_without_texts(arrow_type.value_type)))
    return arrow_type


def _parquet_batches(chunk: Chunk) -> Iterator[Any]:
    import pyarrow.parquet as pq  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    with pq.ParquetFile(chunk.file.path, pre_buffer=False) as f:
        for group in range(chunk.start, chunk.stop):
            meta = f.metadata.row_group(group)
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size)))
            yield from f.iter_batches(batch_size=rows, row_groups=[group], use_threads=False)


def _parse_plain(lines: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """The rows, or None unless every line is one. No number may need more than 64 bits, because orjson would round it."""
    if orjson is None:
        return None
    try:
        rows = list(map(orjson.loads, lines))
        if any(map(may_repeat, lines, rows)):
            return None
    except (ValueError, RecursionError):
        return None
    return rows if set(map(type, rows)) <= {dict} else None


def _read_line(line: bytes, number: int, batch: RowBatch, long_numbers: bool) -> None:
    try:
        row = parse(line, long_numbers)
    except ValueError as e:
        reason, _, detail = str(e).partition(": ")
        example = line[:EXAMPLE_CHARS].decode("utf-8", "replace")
        batch.rejects.append(Reject(number, reason, detail[:EXAMPLE_CHARS], example))
        return
    if row is not None:
        batch.rows.append(row)
        batch.numbers.append(number)


def parse(line: bytes, long_numbers: bool = True) -> dict[str, Any] | None:
    """One row, or None for a blank line. Raises ValueError("reason: detail") for everything else.

    `long_numbers`: the line may hold integers that need more than 64 bits. orjson would round them; json does not.
    """
    if orjson is not None and not (long_numbers and _LONG_NUMBER.search(line)):
        try:
            value = orjson.loads(line)
            if isinstance(value, dict) and not may_repeat(line, value):
                return value
        except (ValueError, RecursionError):
            pass
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"not_utf8: {e.reason} at byte {e.start}") from None
    if not text.strip():
        return None
    try:
        value, repeats = _loads(text)
    except RecursionError:
        raise ValueError("not_json: nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"not_json: {e}") from None
    if not isinstance(value, dict):
        array = "; a file that is one JSON array is read if its name ends in .json" if isinstance(value, list) else ""
        raise ValueError(f"not_an_object: the line holds a {type(value).__name__}{array}")
    return Repeating(value) if repeats and type(value) is dict else value


def _loads(text: str) -> tuple[Any, bool]:
    """A value, and whether an object in it is `Repeating`."""
    found = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = keep_repeats(pairs)
        if type(value) is not dict:
            found.append(value)
        return value

    return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=keep), bool(found)


def _has_long_number(data: bytes) -> bool:
    """Whether 19 consecutive digits occur in the data. Takes a fraction of a nanosecond per byte.

    Such a number covers an aligned word of 8 bytes that are all digits. Only around such words is a regular expression used.
    """
    words = np.frombuffer(data, dtype="<u8", count=len(data) // 8)
    high, digits = np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(0x3030303030303030)
    found = ((words & high) == digits) & (((words + np.uint64(0x0606060606060606)) & high) == digits)
    return any(_LONG_NUMBER.search(data, max(0, 8 * i - 18), 8 * i + 26) for i in np.flatnonzero(found).tolist())


def _line_blocks(chunk: Chunk) -> Iterator[LineBlock]:
    """The lines that begin inside the chunk, about BATCH_BYTES at a time. The blocks share one copy of the chunk. A last line that ends far
    after the chunk is a block of its own.

    The read starts one byte before the chunk, to see whether the chunk begins with a line.
    """
    with open(chunk.file.path, "rb") as f:
        at = f.seek(max(0, chunk.start - 1))
        padded = np.empty(chunk.stop - at + TAIL_BYTES + PADDING, dtype=np.uint8)
        size = f.readinto(padded[:-PADDING].data)
        own = min(size, chunk.stop - at)  # the bytes after this only matter for the end of the last line
        newlines = np.flatnonzero(padded[:size] == NEWLINE)
        ends = newlines[: np.searchsorted(newlines, own - 1) + 1]
        if not chunk.start:
            first = len(codecs.BOM_UTF8) if padded[:3].tobytes() == codecs.BOM_UTF8 else 0
        else:  # what is before the first newline belongs to an earlier chunk
            first, ends = (int(ends[0]) + 1 if len(ends) else own), ends[1:]
        end = int(ends[-1]) + 1 if len(ends) else first
        count = max(1, round((end - first) / BATCH_BYTES))
        cuts = np.searchsorted(ends, [first + i * (end - first) // count for i in range(1, count)]) + 1
        for begin, stop in itertools.pairwise([0, *cuts.tolist(), len(ends)]):
            if begin < stop:
                start = int(ends[begin - 1]) + 1 if begin else first
                yield LineBlock(padded[start : int(ends[stop - 1]) + 1 + PADDING], ends[begin:stop] - start, begin)
        if end < own:
            yield _last_line(f, padded[end:size].tobytes(), len(ends))
        elif not len(ends):
            yield LineBlock.of(b"")


def _last_line(file: BinaryIO, begin: bytes, number: int) -> LineBlock:
    """The line that begins with these bytes and goes on in the file. The end of the file ends it too."""
    line = begin
    while b"\n" not in (more := file.read(1 << 20)):
        if not more:
            break
        line += more
        if len(line) > unpack.MAX_ROW_BYTES:
            return LineBlock.of(b"", number, too_long=True)
    line += more[: more.find(b"\n")] if more else b""
    too_long = len(line) > unpack.MAX_ROW_BYTES
    return LineBlock.of(b"" if too_long else line + b"\n", number, too_long)


def batches_of(file: InputFile) -> Iterator[tuple[int, RowBatch]]:
    """The batches of a file, each with the number of rows of the file before its chunk."""
    base = count = 0
    for chunk in cut(file):
        base, count = base + count, 0
        for batch in read(chunk):
            count = batch.count
            yield base, batch


def rows_of(file: InputFile) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    """The rows of a file and the rejects among them, with their numbers from 1. The rejects of a batch follow its rows."""
    for base, batch in batches_of(file):
        yield from ((base + n + 1, row) for n, row in zip(batch.numbers, batch.rows, strict=True))
        yield from ((base + reject.row + 1, reject) for reject in batch.rejects)


def read_row(files: Sequence[InputFile], row: int) -> tuple[str, int, dict[str, Any]]:
    """Row `row`, counted from 1 through all files: (file name, row number in that file, row). Used by previews.

    Raises SftError for a row that is rejected or does not exist.
    """
    passed = 0
    for file in files:
        here, rows = row - passed, 0
        for base, batch in batches_of(file):
            rows = base + batch.count
            for number, value in zip(batch.numbers, batch.rows, strict=True):
                if base + number + 1 == here:
                    return file.name, here, value
            for reject in batch.rejects:
                if base + reject.row + 1 == here:
                    raise SftError(f"{file.name}: row {here}: {reject.reason}: {reject.detail}")
        passed += rows
    raise SftError(f"{', '.join(f.name for f in files[:8])}: no row {row}; there are {passed}")
