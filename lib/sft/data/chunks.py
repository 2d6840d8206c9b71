"""The work of prepare's worker processes on one job: encode its rows, or search them for evaluation texts.

In:  a `ChunkJob`.
Out: a file in the token cache (`EncodeChunk`) or in the cache of screens (`ScreenChunk`), and a short summary for the parent
     process. A file gets its final name when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.chat.rows import BadRow, Conversation, RowReader
from sft.common.errors import SftError
from sft.data.batch import group_key
from sft.data.decontaminate import Screen
from sft.data.tokencache import ChunkWriter, Summary
from sft.data.tokenize import Encoded, Encoder
from sft.formats.chunks import ScreenHits
from sft.sources import input_files
from sft.sources.blocks import Reject, RowBatch
from sft.sources.small_files import read_job


@dataclass(frozen=True)
class ChunkJob:
    """Chunks to encode: one, or several small files. `number` counts over the mix, `source` is the source's number, `name` its
    file in the caches."""

    number: int
    source: int
    chunks: tuple[input_files.Chunk, ...]
    name: str

    @property
    def bytes(self) -> int:
        return sum(chunk.bytes for chunk in self.chunks)


class WorkDone(NamedTuple):
    """The process that did a job, its start (monotonic clock of the machine), and the CPU seconds that it took."""

    worker: int
    began: float
    cpu: float


class EncodeChunk:
    """Reads the rows of a job, encodes them and writes their file into the token cache. Returns the summary with at most one
    reject."""

    def __init__(self, encoder: Encoder, cache: Path, kinds: Container[str]):
        self.encoder, self.cache = encoder, cache
        self.sources = encoder.prepare.sources
        encoder.compile(kinds)  # the parent has compiled it; this loads it before the first job

    def __call__(self, job: ChunkJob) -> tuple[Summary, WorkDone]:
        began, cpu = time.monotonic(), time.process_time()
        source = self.sources[job.source]
        path = self.cache / job.name
        with naming(path, job.bytes), without_gc(), ChunkWriter(path) as writer:
            summary = writer.summary
            self.encoder.take_counts(source)  # forgets what an interrupted job has left
            for block in read_job(job.chunks, summary.chunk_lines):
                parts = []
                # Compiled code does not read the column of the groups.
                plain, others = (None, None) if source.validation_group else self.encoder.encode_plain(block, source)
                if plain is not None:
                    parts.append((plain, plain.rows + block.first))
                    summary.rows += len(plain.rows)
                batch = block.batch(others)
                groups = set_groups(batch, source.validation_group) if source.validation_group else None
                summary.rejects += batch.rejects
                summary.rows += len(batch.rows) + len(batch.rejects)
                summary.lines = batch.count
                if batch.rows:
                    encoded = self.encoder.encode(batch.rows, source)
                    if groups is not None:
                        encoded.groups = groups[encoded.rows]
                    numbers = np.array(batch.numbers, dtype=np.int64)
                    parts.append((encoded, numbers[encoded.rows]))
                    summary.rejects += [r._replace(row=int(numbers[r.row])) for r in encoded.rejects]
                for made, _ in parts:
                    add_counts(summary.notes, made.engine, made.proof)
                if parts:
                    writer.add(*in_order(parts))
            summary.rejects.sort()
            summary.rejected = len(summary.rejects)
            counts = self.encoder.take_counts(source)
            summary.fields, summary.unread = dict(sorted(counts.rows.items())), dict(sorted(counts.unread.items()))
            summary.quoted = dict(sorted(counts.quoted.items()))
        short = dataclasses.replace(summary, lines=0, rejects=summary.rejects[:1], notes={})
        return short, WorkDone(os.getpid(), began, time.process_time() - cpu)


@contextlib.contextmanager
def naming(path: Path, needed: int) -> Iterator[None]:
    """Turns the error of a full or failing disk into one that names the file and about how many bytes it needs."""
    try:
        yield
    except OSError as e:
        if e.filename is not None:
            raise
        reason = e.strerror or f"a short write ({e})"
        raise SftError(
            f"{path}: {reason}; it needs about {needed:,} bytes, {shutil.disk_usage(path.parent).free:,} are free;"
            " next: free space and run it again; finished chunks are reused"
        ) from None


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Switches the garbage collector off. Rows have no reference cycles, and searching their objects takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def in_order(parts: Sequence[tuple[Encoded, NDArray[np.int64]]]) -> tuple[NDArray[Any], ...]:
    """Tokens, lengths, target counts, rows, conversations and groups of the documents of all parts, in the order of their rows."""
    columns = [
        (made.tokens, made.lengths, made.num_targets, rows, made.conversations, made.groups) for made, rows in parts
    ]
    if len(columns) == 1:
        return columns[0]
    tokens, lengths, num_targets, rows, conversations, groups = map(np.concatenate, zip(*columns, strict=True))
    order, ends = np.argsort(rows), np.cumsum(lengths)
    spans = zip((ends - lengths)[order].tolist(), ends[order].tolist(), strict=True)
    tokens = np.concatenate([tokens[:0], *(tokens[a:b] for a, b in spans)])
    return tokens, lengths[order], num_targets[order], rows[order], conversations[order], groups[order]


def set_groups(batch: RowBatch, column: str) -> NDArray[np.uint64]:
    """[rows] The hash of each row's value in the column, see `group_text`. Rows without a value become rejects."""
    values = [group_text(group_value(row, column)) for row in batch.rows]
    missing = [i for i, value in enumerate(values) if not value]
    batch.rejects += [
        Reject(
            batch.numbers[i],
            "no_group",
            f"validation_group: the row has no value in {column!r}",
            str(batch.rows[i])[:200],
        )
        for i in missing
    ]
    batch.rejects.sort()
    for i in reversed(missing):
        del batch.rows[i], batch.numbers[i], values[i]
    texts = [group_key(value.encode(errors="surrogatepass")) for value in values]
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), dtype=np.uint64, count=len(texts))


def group_value(row: Any, column: str) -> Any:
    """The value of a column, or of a field inside one: metadata.conversation_id."""
    if column in row or "." not in column:
        return row.get(column)
    for name in column.split("."):
        row = row.get(name) if isinstance(row, Mapping) else None
    return row


def group_text(value: Any) -> str:
    """The value of a group as text; "" for none. A file may have the number 7 as 7, as 7.0 (where the column has nulls) or as "7"."""
    if isinstance(value, (float, Decimal)):
        if math.isnan(value):
            return ""
        value = int(value) if math.isfinite(value) and value == int(value) else value
    if value is None or isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return "" if value is None else str(value).strip()
    return json.dumps(value, sort_keys=True, default=str)


def add_counts(notes: dict[str, int], engine: str, proof: dict[str, int]) -> None:
    """Adds the encoder's counts of one batch: those of its proof, and the documents by engine."""
    for name, count in [*proof.items(), (f"documents_by_{engine}", proof["documents"])]:
        notes[name] = notes.get(name, 0) + count


def message_values(read: Callable[[Any], Conversation], row: Any) -> list[Any]:
    """The values in the messages of a row, without roles and other columns. Empty for a row that makes no document."""
    try:
        messages = read(row).messages
    except (BadRow, RecursionError):
        return []
    return [value for message in messages for name, value in message.items() if name != "role"]


class ScreenChunk:
    """Searches a chunk for evaluation texts and writes its `ScreenHits`. Returns their number."""

    def __init__(self, screen: Screen, cache: Path, readers: Sequence[RowReader]):
        self.screen, self.cache, self.readers = screen, cache, readers

    def __call__(self, job: ChunkJob) -> int:
        hits: list[tuple[int, int]] = []
        read = self.readers[job.source].read
        for batch in (block.batch() for block in read_job(job.chunks, [])):
            found = self.screen.hits([message_values(read, row) for row in batch.rows])
            hits += [(batch.numbers[i], int(found[i])) for i in np.flatnonzero(found >= 0)]
        ScreenHits(tuple(hits)).write(self.cache / f"{job.name}.json")
        return len(hits)


class Progress:
    """Logs a line every few seconds: share done, tokens, tokens/s, time left."""

    def __init__(self, log: Callable[[str], None], what: str, total_bytes: int, every_s: float = 5.0):
        self.log, self.what, self.total, self.every = log, what, max(1, total_bytes), every_s
        self.began = self.last = time.monotonic()
        self.bytes = self.tokens = 0

    def add(self, done_bytes: int, tokens: int = 0) -> None:
        self.bytes += done_bytes
        self.tokens += tokens
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            left = (now - self.began) * (self.total - self.bytes) / max(1, self.bytes)
            self.log(
                f"{self.what} {self.bytes / self.total:4.0%}  {self.rate(now)}  {left // 60:.0f}:{left % 60:02.0f} left"
            )

    def rate(self, now: float | None = None) -> str:
        seconds = max(1e-9, (now or time.monotonic()) - self.began)
        return f"{self.tokens / 1e6:,.1f}M tokens, {self.tokens / seconds:,.0f} tokens/s"
