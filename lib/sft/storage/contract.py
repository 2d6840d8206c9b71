"""The interface of a storage, the files that are copied between storages, and a progress meter.

A storage is a local folder (`sft.storage.local`) or a prefix in a bucket (`sft.storage.bucket`). For both:

* `put` and `get` return only after the finished bytes are verified. Until then the file has a temporary name.
* A file with the same content is recognised and not copied again. Modification times are never compared.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sft.common.errors import SftError
from sft.storage.checksums import Checksums

RESUMABLE = 8 << 20
"""Interrupted downloads of at least this many bytes are resumed."""
Generation = int | str
"""The name of one write of an object: Google's generation, or S3's ETag. 0: there is no object."""
COPY_AGAIN = "next: copy that file again, or make it again"


@dataclass(frozen=True)
class FileCopy:
    """One file to copy from `source` to `target` (names in their storages), and what is known about its content.

    `sha256` comes from a manifest, `crc32c` from the listing of a bucket. "" and None mean unknown.
    """

    source: str
    target: str
    bytes: int
    sha256: str = ""
    crc32c: int | None = None


@dataclass(frozen=True)
class FileInfo:
    """A file in a listing. Only buckets report a CRC32C and a generation."""

    bytes: int
    crc32c: int | None = None
    generation: Generation | None = field(default=None, compare=False)

    @property
    def content(self) -> str:
        """A name of the content in a bucket: the CRC32C in hex, or the ETag of an object that has none."""
        return f"{self.crc32c:08x}" if self.crc32c is not None else str(self.generation).strip('"')


@dataclass(frozen=True)
class CopyResult:
    """A finished copy. `copied` is False if the target already had the same content."""

    copy: FileCopy
    sums: Checksums
    copied: bool


class Meter:
    """Counts the bytes of many threads, and logs one line with bytes, files, rate and remaining time every `every_s` seconds.

    Setting `stop` cancels the threads: their next `add` raises SftError.
    """

    def __init__(self, files: int, total: int, log: Callable[[str], None], every_s: float = 2.0):
        self.files, self.total, self.log, self.every_s = files, total, log, every_s
        self.done_files = self.done_bytes = 0
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._start = self._shown = time.monotonic()

    @classmethod
    def silent(cls) -> Meter:
        return cls(1, 0, lambda _: None)

    def add(self, count: int) -> None:
        """Threads call this after every chunk. Raises SftError after a cancellation."""
        if self.stop.is_set():
            raise SftError("cancelled")
        with self._lock:
            self.done_bytes += count

    def line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-6)
        rate = self.done_bytes / seconds
        left = max(self.total - self.done_bytes, 0) / rate if rate else 0
        return (
            f"{self.done_files}/{self.files} files, {size(self.done_bytes)} of {size(max(self.total, self.done_bytes))},"
            f" {size(rate)}/s, {left:.0f} s left"
        )

    def show(self) -> None:
        """Logs the line, if the last one is `every_s` seconds old."""
        if time.monotonic() - self._shown >= self.every_s:
            self._shown = time.monotonic()
            self.log(self.line())


class Storage(Protocol):
    """A root and the files under it. Every failure is an SftError or an OSError that names the file."""

    where: str
    threads: int

    def list(self) -> dict[str, FileInfo]:
        """All finished files under the root, by name. Raises SftError for links and for names that could leave the root."""
        ...

    def check_access(self, write: bool, needed: int = 0) -> None:
        """Raises SftError if the root cannot be read or written, or has fewer than `needed` free bytes."""
        ...

    def same(self, name: str, sums: Callable[[], Checksums], expected: FileCopy) -> bool:
        """Whether `name` has exactly this content. `sums` reads the source; it is called only if it is needed."""
        ...

    def put(self, file: Path, name: str, expected: FileCopy, meter: Meter, deferred: bool = False) -> Checksums:
        """Writes the local `file` as `name`: complete and verified, or not at all.

        deferred=True lets `finish_deferred` do the last step for many files at once.
        """
        ...

    def finish_deferred(self) -> dict[str, str]:
        """Finishes deferred writes: a bucket verifies them, a folder makes its renames durable.

        Returns the names that failed, each with the reason. "" means: the wrong object was deleted, so put it again.
        """
        ...

    def get(self, name: str, file: Path, expected: FileCopy, meter: Meter) -> Checksums:
        """Writes `name` to the local `file` (a temporary name of the caller) and verifies it."""
        ...

    def find(self, name: str) -> FileInfo | None: ...

    def read(self, name: str) -> bytes | None:
        """The content of a small file, or None if it does not exist."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file, completely or not at all."""
        ...

    def remove(self, name: str) -> None: ...


def check(found: Checksums, expected: FileCopy, what: str) -> None:
    """Raises SftError with both values if a file differs from what its manifest or the bucket's listing says."""
    if found.bytes != expected.bytes:
        raise SftError(f"{what} has {found.bytes:,} bytes, its manifest says {expected.bytes:,}; {COPY_AGAIN}")
    if expected.sha256 and found.sha256 != expected.sha256:
        raise SftError(
            f"{what} has sha256 {found.sha256[:16]}…, its manifest says {expected.sha256[:16]}…; {COPY_AGAIN}"
        )
    if expected.crc32c is not None and found.crc32c and found.crc32c != expected.crc32c:
        raise SftError(f"{what} has crc32c {found.crc32c:08x}, the bucket says {expected.crc32c:08x}; {COPY_AGAIN}")


def size(count: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
