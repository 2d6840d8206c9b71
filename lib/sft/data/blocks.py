"""The rows of a chunk, a piece at a time: lines of JSON or columns of Arrow, which compiled code takes as they are, or Python objects.

In: a chunk of a source's file (sft.data.sources). Out: `pieces`, of bounded size, and their rows as `Batch`es: what is a row, and with its reason what
is none. Numbers of rows count from 0 inside the chunk.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.data import unpack
from sft.data.batch import Reject
from sft.data.compiled import WORD
from sft.data.sources import Chunk, InputFile, arrow_batches, cut, reading

try:  # three times faster than json, and optional: what it refuses, json decides
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

BATCH_BYTES = 4 << 20
"""Input bytes that a worker has as Python objects at a time. What a batch costs however small it is weighs more than caches:
4 MiB take a tenth less time than 1 MiB."""
BATCH_ROWS = 4096
TAIL_BYTES = 256 << 10
"""Read behind a chunk, for the end of its last line: a piece costs a millisecond however small it is."""
LOOK_BYTES = 64 << 10
EXAMPLE_CHARS = 200
NEWLINE = 10
_LONG_NUMBER = re.compile(rb"[0-9]{19}")


@dataclass
class Batch:
    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    bad: list[Reject] = field(default_factory=list)
    count: int = 0
    """Rows read so far in the chunk, blank lines of a JSONL file included: the number of the next one."""


@dataclass(frozen=True)
class Block:
    """Lines of a chunk, each with its newline; `first` is the number of the first one."""

    padded: NDArray[np.uint8]
    """The lines, and WORD bytes behind them that may be read and mean nothing."""
    first: int
    too_long: bool = False
    """It stands for one line of more than MAX_ROW_BYTES, which is not read."""

    @classmethod
    def of(cls, lines: bytes, first: int = 0, too_long: bool = False) -> Block:
        return cls(
            np.frombuffer(bytearray(lines) + bytes(WORD), dtype=np.uint8), first, too_long
        )  # writable, as a chunk is

    @property
    def lines(self) -> bytes:
        return self.padded[:-WORD].tobytes()

    @functools.cached_property
    def ends(self) -> NDArray[np.int64]:
        """Where the newline of each line is."""
        return np.flatnonzero(self.padded[:-WORD] == NEWLINE)

    @property
    def count(self) -> int:
        return 1 if self.too_long else len(self.ends)

    def batch(self, wanted: Sequence[int] | None = None) -> Batch:
        """The rows of all lines, or of those that are wanted, by their numbers in the block."""
        made = Batch(count=self.first + self.count)
        if self.too_long:
            made.bad.append(Reject(self.first, "row_too_long", f"more than {unpack.MAX_ROW_BYTES} bytes", ""))
        if self.too_long or (wanted is not None and not wanted):
            return made
        data = self.lines
        lines = data.split(b"\n")[:-1]
        numbers = list(range(len(lines))) if wanted is None else list(wanted)
        if wanted is not None:
            lines = [lines[i] for i in numbers]
        long_numbers = _has_long_number(data)
        rows = None if long_numbers else _parse_plain(lines)
        if rows is not None:
            made.rows, made.numbers = rows, [self.first + n for n in numbers]
            return made
        for number, line in zip(numbers, lines, strict=True):
            _read_line(line, self.first + number, made, long_numbers)
        return made


@dataclass(frozen=True)
class Columns:
    """Rows of a record batch; `first` is the number of the first one."""

    arrow: Any
    """A pyarrow.RecordBatch."""
    first: int

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]], first: int = 0) -> Columns:
        import pyarrow as pa

        return cls(pa.RecordBatch.from_pylist(list(rows)), first)

    @property
    def count(self) -> int:
        return int(self.arrow.num_rows)

    def batch(self, wanted: Sequence[int] | None = None) -> Batch:
        """All rows, or those that are wanted, by their numbers in the piece."""
        import pyarrow as pa

        made = Batch(count=self.first + self.count)
        if wanted is not None and not wanted:
            return made
        arrow = self.arrow if wanted is None else self.arrow.take(pa.array(wanted, type=pa.int64()))
        numbers = [self.first + n for n in (range(self.count) if wanted is None else wanted)]
        nested = [field.name for field in arrow.schema if pa.types.is_nested(field.type)]
        try:
            made.rows, made.numbers = arrow.to_pylist(), numbers
        except (UnicodeDecodeError, ValueError):  # one bad string must not take its neighbours with it
            for i, number in enumerate(numbers):
                try:
                    made.rows.append(arrow.slice(i, 1).to_pylist()[0])
                    made.numbers.append(number)
                except (UnicodeDecodeError, ValueError) as e:
                    made.bad.append(Reject(number, "unreadable_value", str(e)[:EXAMPLE_CHARS], ""))
        for row in made.rows:
            for name in nested:
                row[name] = without_nulls(row[name])
        return made


def without_nulls(value: Any) -> Any:
    """A columnar file gives every object every field of any object, filled with nulls: here a null is an absent field."""
    if type(value) is dict:
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if type(value) is list else value


Piece = Block | Columns


def read(chunk: Chunk) -> Iterator[Batch]:
    """The rows of a chunk in batches of bounded size; the last batch may be empty."""
    return (piece.batch() for piece in pieces(chunk))


def pieces(chunk: Chunk) -> Iterator[Piece]:
    """The same, before any row is a Python object."""
    return _blocks(chunk) if chunk.file.kind == "jsonl" else _columns(chunk)


def _columns(chunk: Chunk) -> Iterator[Columns]:
    with reading(chunk.file):
        if chunk.file.kind == "parquet":
            batches = _parquet_batches(chunk)
        else:
            batches = (b for i, b in enumerate(arrow_batches(chunk.file)) if chunk.start <= i < chunk.stop)
        first = 0
        for arrow in batches:
            step = max(1, min(BATCH_ROWS, BATCH_BYTES * arrow.num_rows // max(1, arrow.nbytes)))
            for start in range(0, arrow.num_rows, step):
                piece = Columns(arrow.slice(start, step), first)
                yield piece
                first += piece.count


def _parquet_batches(chunk: Chunk) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(chunk.file.path, pre_buffer=False) as f:
        for group in range(chunk.start, chunk.stop):
            meta = f.metadata.row_group(group)
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size)))
            yield from f.iter_batches(batch_size=rows, row_groups=[group], use_threads=False)


def _parse_plain(lines: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """Rows when every line is one, and no number needs more than 64 bits, which orjson would round; else None."""
    if orjson is None:
        return None
    try:
        rows = list(map(orjson.loads, lines))
    except ValueError:
        return None
    return rows if set(map(type, rows)) <= {dict} else None


def _read_line(line: bytes, number: int, batch: Batch, long_numbers: bool) -> None:
    try:
        row = parse(line, long_numbers)
    except ValueError as e:
        reason, _, detail = str(e).partition(": ")
        example = line[:EXAMPLE_CHARS].decode("utf-8", "replace")
        batch.bad.append(Reject(number, reason, detail[:EXAMPLE_CHARS], example))
        return
    if row is not None:
        batch.rows.append(row)
        batch.numbers.append(number)


def parse(line: bytes, long_numbers: bool = True) -> dict[str, Any] | None:
    """One row; None for a blank line; ValueError("reason: detail") for anything else.

    `long_numbers`: the line may hold integers that need more than 64 bits. orjson would round them, json does not.
    """
    if orjson is not None and not (long_numbers and _LONG_NUMBER.search(line)):
        try:
            value = orjson.loads(line)
            if isinstance(value, dict):
                return value
        except ValueError:
            pass
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"not_utf8: {e.reason} at byte {e.start}") from None
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("not_json: nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"not_json: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"not_an_object: the line holds a {type(value).__name__}")
    return value


def _has_long_number(data: bytes) -> bool:
    """Whether 19 digits stand in a row somewhere, at a fraction of a nanosecond a byte.

    Such a number covers 8 bytes at a multiple of 8, all of them digits; only where that is so does a search look closer.
    """
    words = np.frombuffer(data, dtype="<u8", count=len(data) // 8)
    high, digits = np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(0x3030303030303030)
    found = ((words & high) == digits) & (((words + np.uint64(0x0606060606060606)) & high) == digits)
    return any(_LONG_NUMBER.search(data, max(0, 8 * i - 18), 8 * i + 26) for i in np.flatnonzero(found).tolist())


def _blocks(chunk: Chunk) -> Iterator[Block]:
    """Lines that begin inside the chunk, about BATCH_BYTES at a time; the last may end beyond it."""
    number = 0
    for block in _unnumbered(chunk):
        numbered = dataclasses.replace(block, first=number)
        number += numbered.count
        yield numbered
    if not number:
        yield Block.of(b"")


def _unnumbered(chunk: Chunk) -> Iterator[Block]:
    """Blocks that lie in one copy of the chunk, with the line that it begins and does not end. A long one is a block of its own."""
    with open(chunk.file.path, "rb") as f:
        at = f.seek(max(0, chunk.start - 1))
        padded = np.empty(chunk.stop - at + TAIL_BYTES + WORD, dtype=np.uint8)
        size = f.readinto(padded[:-WORD].data)
        own = min(size, chunk.stop - at)  # the rest is other chunks', but for what ends the last line
        if chunk.start == 0:
            bom = np.frombuffer(codecs.BOM_UTF8, dtype=np.uint8)
            first = len(bom) if np.array_equal(padded[: min(size, len(bom))], bom) else 0
        else:
            first = _after_newline(padded, 0, own)
            if first in (0, own):
                return  # one long line of an earlier chunk fills this one
        whole = max(first, _after_last_newline(padded, own))
        if whole < own:
            whole = _after_newline(padded, own, size) or whole
        count = max(1, round((whole - first) / BATCH_BYTES))
        cuts = [_after_newline(padded, first + i * (whole - first) // count, whole) for i in range(1, count)]
        for begin, end in itertools.pairwise([first, *cuts, whole]):
            if begin < end:
                yield Block(padded[begin : end + WORD], 0)
        if whole >= own:
            return
        last = padded[whole:size].tobytes()
        while b"\n" not in (more := f.read(1 << 20)):
            if not more:
                break
            last += more
            if len(last) > unpack.MAX_ROW_BYTES:
                yield Block.of(b"", too_long=True)
                return
        last += more[: more.find(b"\n")] if more else b""
        too_long = len(last) > unpack.MAX_ROW_BYTES
        yield Block.of(b"" if too_long else last + b"\n", too_long=too_long)


def _after_newline(data: NDArray[np.uint8], begin: int, end: int) -> int:
    """Where the line behind the first newline in data[begin:end] begins; 0 when there is none."""
    while begin < end:
        stop = min(begin + LOOK_BYTES, end)
        found = data[begin:stop].tobytes().find(b"\n")
        if found >= 0:
            return begin + found + 1
        begin = stop
    return 0


def _after_last_newline(data: NDArray[np.uint8], end: int) -> int:
    while end > 0:
        begin = max(0, end - LOOK_BYTES)
        found = data[begin:end].tobytes().rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def read_row(files: Sequence[InputFile], row: int) -> tuple[str, int, dict[str, Any]]:
    """Row number `row` (from 1), counted on through the files: (file name, row in that file, row). Used by previews."""
    passed = 0
    for file in files:
        before = 0
        for chunk in cut(file):
            count = 0
            for batch in read(chunk):
                count = batch.count
                for number, value in zip(batch.numbers, batch.rows, strict=True):
                    if passed + before + number + 1 == row:
                        return file.name, row - passed, value
                for bad in batch.bad:
                    if passed + before + bad.row + 1 == row:
                        raise SftError(f"{file.name}: row {row - passed}: {bad.reason}: {bad.detail}")
            before += count
        passed += before
    raise SftError(f"{', '.join(f.name for f in files[:8])}: no row {row}; there are {passed}")
