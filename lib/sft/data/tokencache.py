"""The token cache: one file for each job (a chunk, or several small files), written once and shared between runs.

    tokens <u4[tokens] | INDEX[documents] | JSON footer | footer's length <u8 | MAGIC

A token is its id; the highest bit (`sft.data.compiled.TRAINED`) is set when it is trained.

In:  encoded documents of a chunk, batch by batch.
Out: a file that gets its final name when it is complete. Its footer has the counts, the rejects and checksums, so that a
     damaged file is detected and encoded again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.sources.blocks import Reject

MAGIC = b"sft-tok5"
INDEX = np.dtype(
    [
        ("length", "<u4"),
        ("labels", "<u4"),
        ("row", "<u4"),
        ("digest", "<u8", (2,)),
        ("conversation", "<u8"),
        ("group", "<u8"),
    ]
)
TEMPORARY = ".tmp-"
NEEDED_S = 6 * 3600.0  # a running stage may still need files that it used this long ago


@dataclass
class Summary:
    """The footer of a job's file."""

    documents: int = 0
    tokens: int = 0
    labels: int = 0
    rows: int = 0
    lines: int = 0
    """Rows and blank lines of the job: the numbers of later rows count them all."""
    chunk_lines: list[int] = field(default_factory=list)
    """The same for each of its chunks."""
    rejected: int = 0
    """Rows that make no document."""
    rejects: list[Reject] = field(default_factory=list)
    """`row` counts from 0 inside the job."""
    notes: dict[str, int] = field(default_factory=dict)
    """The encoder's counts, e.g. of documents compared with another tokenizer."""
    fields: dict[str, int] = field(default_factory=dict)
    """In how many rows each field held something: see `sft.chat.fields.FieldCounts`."""
    unread: dict[str, str] = field(default_factory=dict)
    """An example of each field that nothing reads."""
    quoted: dict[str, tuple[int, str]] = field(default_factory=dict)
    """See `sft.chat.fields.FieldCounts`."""
    crc: int = 0
    """crc32c of the index. The digests in the index protect the tokens."""


class ChunkWriter:
    """Writes one file. Use it as a context manager, and set the fields of `summary` before it ends."""

    def __init__(self, path: Path):
        self.path = path
        self.summary = Summary()
        self._index: list[NDArray[Any]] = []

    def __enter__(self) -> ChunkWriter:
        name = f"{TEMPORARY}{self.path.name}-{socket.gethostname()}-{os.getpid()}"
        self._temporary = self.path.with_name(name)
        self._file = self._temporary.open("wb")
        return self

    def add(
        self,
        tokens: NDArray[np.uint32],
        lengths: NDArray[np.int64],
        labels: NDArray[np.int64],
        rows: NDArray[np.int64],
        conversations: NDArray[np.uint64],
        groups: NDArray[np.uint64],
    ) -> None:
        """Appends documents. `tokens` holds one after another; `labels` counts their trained tokens; `rows` are their row
        numbers inside the job; `conversations` are hashes of roles and contents; `groups` say which stay together."""
        if not len(lengths):
            return
        ends = np.cumsum(lengths)
        assert int(ends[-1]) == len(tokens), (int(ends[-1]), len(tokens))
        index = np.zeros(len(lengths), dtype=INDEX)
        index["length"], index["row"], index["conversation"] = lengths, rows, conversations
        index["labels"], index["group"] = labels, groups
        raw = tokens.data.cast("B")
        index["digest"] = _digests(raw, ends)
        self._index.append(index)
        self._file.write(raw)
        self.summary.documents += len(lengths)
        self.summary.tokens += len(tokens)
        self.summary.labels += int(index["labels"].sum(dtype=np.int64))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                index = np.concatenate(self._index) if self._index else np.empty(0, dtype=INDEX)
                self._file.write(index.tobytes())
                self.summary.crc = google_crc32c.value(index.tobytes())
                footer = json.dumps(vars(self.summary)).encode()
                self._file.write(footer + len(footer).to_bytes(8, "little") + MAGIC)
                self._file.close()  # no fsync: every later reader verifies the checksums
                os.replace(self._temporary, self.path)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def read_summary(path: Path) -> Summary | None:
    """The footer of a complete file; None for a missing or incomplete one."""
    try:
        with path.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 16))
            tail = f.read(16)
            if tail[8:] != MAGIC:
                return None
            length = int.from_bytes(tail[:8], "little")
            f.seek(size - 16 - length)
            summary = Summary(**json.loads(f.read(length)))
        summary.rejects = [Reject(*r) for r in summary.rejects]
        complete = summary.tokens * 4 + summary.documents * INDEX.itemsize + length + 16
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return summary if complete == size else None


class TokenFile:
    """Reads ranges of a chunk's file. Raises SftError for a file that is missing or too short."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as e:
            raise SftError(f"{path}: missing in the token cache ({e}); next: run it again") from None

    def tokens(self, first: int, stop: int, buffer: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Tokens [first, stop), which are ids with the bit TRAINED, as a view of `buffer`."""
        tokens = buffer[: stop - first]
        self.read(4 * first, tokens)
        return tokens

    def read(self, start: int, into: NDArray[Any]) -> None:
        """Fills an array from byte `start` of the file on."""
        raw, have = into.view(np.uint8), 0
        while more := os.preadv(self._file.fileno(), [raw[have:].data], start + have) if have < len(raw) else 0:
            have += more
        if have < len(raw):
            raise SftError(f"{self._file.name}: this file of the token cache ends too soon; next: run it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_index(path: Path, summary: Summary) -> NDArray[Any]:
    """The INDEX records of a file."""
    index = np.empty(summary.documents, dtype=INDEX)
    with TokenFile(path) as file:
        file.read(4 * summary.tokens, index)
    return index


def is_intact(path: Path, summary: Summary) -> bool:
    """Reads the file and checks the index by its crc32c, and the tokens by the digests in the index."""
    index = read_index(path, summary)
    if google_crc32c.value(index.tobytes()) != summary.crc:
        return False
    ends = np.cumsum(index["length"], dtype=np.int64)
    with TokenFile(path) as file:
        tokens = file.tokens(0, summary.tokens, np.empty(summary.tokens, dtype=np.uint32))
    return np.array_equal(_digests(tokens.data.cast("B"), ends), index["digest"])


def use(files: Iterable[Path]) -> None:
    """Marks the files as used now, for `trim`."""
    for file in files:
        with contextlib.suppress(OSError):  # another user's file keeps its time
            os.utime(file)


def trim(root: Path, most: int, now: float) -> tuple[int, int]:
    """Deletes the files under `root` that were unused for longest, until at most `most` bytes are left.

    Files that were used in the last NEEDED_S seconds stay. Returns the number of deleted files, and their bytes.
    """
    found = []
    for file in root.glob("*/*.tok"):
        with contextlib.suppress(FileNotFoundError):
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    beyond = sum(size for _, size, _ in found) - most
    removed = freed = 0
    for used, size, file in sorted(found):
        if freed >= beyond or now - used < NEEDED_S:
            break
        file.unlink(missing_ok=True)
        removed, freed = removed + 1, freed + size
    return removed, freed


def _digests(tokens: memoryview, ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """128-bit hashes of ids and loss masks, [documents, 2]. They find duplicates and damage.

    XXH3 is no defence against documents made to collide, but such documents could only remove each other from the mix.
    """
    stops = (4 * ends).tolist()
    documents = map(tokens.__getitem__, map(slice, [0, *stops[:-1]], stops))
    return np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, documents)), dtype="<u8").reshape(-1, 2)
