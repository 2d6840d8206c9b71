"""What a copy is made of: jobs, what is known of a file's bytes, the contract of a storage, and a meter of progress.

A folder here (`sft.storage.local`) and `sft.storage.gcs` for gs:// keep to one contract: `put` and `get` return only when the
finished bytes are proven, under a temporary name until then; the same content is recognised and not copied again; no time stamps.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sft.common.errors import SftError

CHUNK = 4 << 20
CONTINUED = 8 << 20  # bytes from which an interrupted download is continued


@dataclass(frozen=True)
class Checksums:
    """What a file's bytes are. sha256 is "" and crc32c 0 where nobody asked for it."""

    bytes: int
    sha256: str
    crc32c: int = 0


@dataclass(frozen=True)
class FileCopy:
    """One file to bring from `source` to `target` (names in their storages), and what is known of its content."""

    source: str
    target: str
    bytes: int
    sha256: str = ""  # of a manifest; "" = not known
    crc32c: int | None = None  # of a bucket's listing; None = not known


@dataclass(frozen=True)
class FileInfo:
    """A file in a listing."""

    bytes: int
    crc32c: int | None = None  # where the storage says so without reading
    generation: int | None = field(default=None, compare=False)  # a bucket's number of this writing of the object


@dataclass(frozen=True)
class CopyResult:
    job: FileCopy
    sums: Checksums
    copied: bool


class Meter:
    """Counts bytes from many threads; one line says bytes, files, rate and the time that is left."""

    def __init__(self, files: int, total: int, log: Callable[[str], None], every_s: float = 2.0):
        self.files, self.total, self.log, self.every_s = files, total, log, every_s
        self.done_files = self.seen = 0
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._began = self._shown = time.monotonic()

    @classmethod
    def silent(cls) -> Meter:
        return cls(1, 0, lambda _: None)

    def add(self, count: int) -> None:
        """Called after every chunk; ends a thread whose run was cancelled."""
        if self.stop.is_set():
            raise SftError("cancelled")
        with self._lock:
            self.seen += count

    def line(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-6)
        rate = self.seen / seconds
        left = max(self.total - self.seen, 0) / rate if rate else 0
        return (
            f"{self.done_files}/{self.files} files, {size(self.seen)} of {size(max(self.total, self.seen))},"
            f" {size(rate)}/s, {left:.0f} s left"
        )

    def show(self) -> None:
        if time.monotonic() - self._shown >= self.every_s:
            self._shown = time.monotonic()
            self.log(self.line())


class Storage(Protocol):
    """A root and names under it. Every failure is an SftError or an OSError that names the file."""

    where: str
    threads: int

    def list(self) -> dict[str, FileInfo]:
        """All files under the root by name, unfinished ones left out; refuses unsafe names and links."""
        ...

    def check_access(self, write: bool, needed: int = 0) -> None:
        """Says that the root cannot be used before a byte is copied."""
        ...

    def same(self, name: str, sums: Callable[[], Checksums], expected: FileCopy) -> bool:
        """Whether `name` holds just these bytes. `sums` reads the source and is called only where it must be."""
        ...

    def put(self, file: Path, name: str, expected: FileCopy, meter: Meter, soon: bool = False) -> Checksums:
        """Writes the local `file` under `name`, whole and verified, or not at all. soon: `settle` may verify it."""
        ...

    def settle(self) -> dict[str, str]:
        """Verifies what `put` left for later. Returns the names that are wrong, with why; "" = removed, put it again."""
        ...

    def get(self, name: str, file: Path, expected: FileCopy, meter: Meter) -> Checksums:
        """Writes `name` into the local `file` (the caller's temporary name) and verifies it."""
        ...

    def find(self, name: str) -> FileInfo | None: ...

    def read(self, name: str) -> bytes | None:
        """A small file, or None."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """A small file, whole or not at all."""
        ...

    def remove(self, name: str) -> None: ...


class Hasher:
    """Takes a file's bytes in order."""

    def __init__(self, crc: bool = False, sha: bool = True):
        self.count = self.crc = 0
        self._sha = hashlib.sha256() if sha else None
        self._extend = None
        if crc:
            import google_crc32c

            self._extend = google_crc32c.extend

    def update(self, data: bytes) -> None:
        self.count += len(data)
        if self._sha:
            self._sha.update(data)
        if self._extend:
            self.crc = self._extend(self.crc, data)

    def sums(self) -> Checksums:
        return Checksums(self.count, self._sha.hexdigest() if self._sha else "", self.crc)


def check(found: Checksums, expected: FileCopy, what: str) -> None:
    """Raises SftError with both values where a file is not what its manifest says."""
    if found.bytes != expected.bytes:
        raise SftError(f"{what} has {found.bytes:,} bytes, its manifest says {expected.bytes:,}")
    if expected.sha256 and found.sha256 != expected.sha256:
        raise SftError(f"{what} has sha256 {found.sha256[:16]}…, its manifest says {expected.sha256[:16]}…")
    if expected.crc32c is not None and found.crc32c and found.crc32c != expected.crc32c:
        raise SftError(f"{what} has crc32c {found.crc32c:08x}, the bucket says {expected.crc32c:08x}")


def hash_file(file: Path, crc: bool = False, sha: bool = True) -> Checksums:
    """Reads a file once. crc=True also gives the CRC32C that gs:// speaks."""
    hasher = Hasher(crc, sha)
    with file.open("rb") as f:
        while chunk := f.read(CHUNK):
            hasher.update(chunk)
    return hasher.sums()


def size(count: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
