"""What the worker processes of prepare do with one chunk of a source: encode it, or look for evaluation texts in it.

In: a `Job`. Out: a file in the token cache (`EncodeChunk`) or in the cache of screens (`ScreenChunk`), under its final name
only when whole, and a short summary for the parent.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.chat.rows import BadRow, Conversation, RowReader
from sft.common.errors import SftError
from sft.data import blocks, sources
from sft.data.decontaminate import Screen
from sft.data.tokencache import ChunkWriter, Summary
from sft.formats.chunks import ScreenHits

if TYPE_CHECKING:
    from sft.data.tokenize import Encoded, Encoder


@dataclass(frozen=True)
class Job:
    """One chunk to encode: `number` counts over the whole mix, `name` is its file in the caches."""

    number: int
    source: int
    chunk: sources.Chunk
    name: str


class Work(NamedTuple):
    """Who did a job, when it was begun (monotonic, of the machine), and the CPU seconds it took."""

    worker: int
    began: float
    cpu: float


class EncodeChunk:
    """What a worker does: reads a chunk, encodes it, writes its file into the token cache."""

    def __init__(self, encoder: Encoder, cache: Path, kinds: Container[str]):
        self.encoder, self.cache = encoder, cache
        self.sources = encoder.prepare.sources
        encoder.compile(kinds)  # here it is only loaded, before the first job asks for it

    def __call__(self, job: Job) -> tuple[Summary, Work]:
        began, cpu = time.monotonic(), time.process_time()
        source = self.sources[job.source]
        path = self.cache / job.name
        with naming(path, job.chunk.bytes), without_gc(), ChunkWriter(path) as writer:
            summary = writer.summary
            for piece in blocks.pieces(job.chunk):
                parts = []
                plain, odd = self.encoder.encode_plain(piece, source)
                if plain is not None:
                    parts.append((plain, plain.rows + piece.first))
                    summary.rows += len(plain.rows)
                batch = piece.batch(odd)
                summary.rejects += batch.bad
                summary.rows += len(batch.rows) + len(batch.bad)
                summary.lines = batch.count
                if batch.rows:
                    encoded = self.encoder.encode(batch.rows, source)
                    numbers = np.array(batch.numbers, dtype=np.int64)
                    parts.append((encoded, numbers[encoded.rows]))
                    summary.rejects += [r._replace(row=int(numbers[r.row])) for r in encoded.rejects]
                for made, _ in parts:
                    note(summary.notes, made.engine, made.proof)
                if parts:
                    writer.add(*in_order(parts))
            summary.rejects.sort()
        told = Summary(summary.documents, summary.tokens, summary.labels, summary.rows, rejects=summary.rejects[:1])
        return told, Work(os.getpid(), began, time.process_time() - cpu)


@contextlib.contextmanager
def naming(path: Path, needed: int) -> Iterator[None]:
    """A full or failing disk becomes an error that names the file and about how many bytes it needs."""
    try:
        yield
    except OSError as e:
        if e.filename is not None:
            raise
        reason = e.strerror or f"the disk took less than it was given ({e})"
        raise SftError(
            f"{path}: {reason}; it needs about {needed:,} bytes, {shutil.disk_usage(path.parent).free:,} are free;"
            " next: free space and run it again, what is done is kept"
        ) from None


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Rows are trees: looking for cycles in millions of their objects takes a tenth of the time and finds none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def in_order(parts: Sequence[tuple[Encoded, NDArray[np.int64]]]) -> tuple[NDArray[Any], ...]:
    """Tokens, lengths, labels, rows and conversations of the documents of one part or several by the numbers of their rows."""
    columns = [(made.tokens, made.lengths, made.num_targets, rows, made.conversations) for made, rows in parts]
    if len(columns) == 1:
        return columns[0]
    tokens, lengths, labels, rows, conversations = map(np.concatenate, zip(*columns, strict=True))
    order, ends = np.argsort(rows), np.cumsum(lengths)
    spans = zip((ends - lengths)[order].tolist(), ends[order].tolist(), strict=True)
    tokens = np.concatenate([tokens[:0], *(tokens[a:b] for a, b in spans)])
    return tokens, lengths[order], labels[order], rows[order], conversations[order]


def note(notes: dict[str, int], engine: str, proof: dict[str, int]) -> None:
    """Adds what the encoder says of one batch: its proof's counts, and the documents that each engine encoded."""
    for name, count in [*proof.items(), (f"documents_by_{engine}", proof["documents"])]:
        notes[name] = notes.get(name, 0) + count


def said(read: Callable[[Any], Conversation], row: Any) -> list[Any]:
    """What stands in the messages of a row, whatever other columns it has; nothing where it makes no document."""
    try:
        messages = read(row).messages
    except (BadRow, RecursionError):
        return []
    return [value for message in messages for name, value in message.items() if name != "role"]


class ScreenChunk:
    """What a worker does to find evaluation texts: writes {"hits": [[row, text], …]} of a chunk."""

    def __init__(self, screen: Screen, cache: Path, readers: Sequence[RowReader]):
        self.screen, self.cache, self.readers = screen, cache, readers

    def __call__(self, job: Job) -> int:
        hits: list[tuple[int, int]] = []
        read = self.readers[job.source].read
        for batch in blocks.read(job.chunk):
            found = self.screen.hits([said(read, row) for row in batch.rows])
            hits += [(batch.numbers[i], int(found[i])) for i in np.flatnonzero(found >= 0)]
        ScreenHits(tuple(hits)).write(self.cache / f"{job.name}.json")
        return len(hits)


class Progress:
    """A line every few seconds: share done, tokens, tokens/s, time left."""

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
