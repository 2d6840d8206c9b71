"""Downloads one object of a bucket to one file, and verifies the file by reading it back.

In:  a Transport, the object's name, what the bucket reports about it (bytes, CRC32C, generation), the caller's temporary file.
Out: the checksums of the finished file, which agree with the bucket's. SftError if two downloads gave other bytes.

A large object is downloaded in slices, by a thread pool that all files share. An interrupted download is resumed, also by
another process: a record beside the file lists the slices that are complete. The CRC32C of the complete file decides.
"""

from __future__ import annotations

import fcntl
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from sft.common.errors import SftError
from sft.storage.checksums import CHUNK, Checksums, Hasher
from sft.storage.contract import Meter
from sft.storage.local import PARTIAL, RESUMABLE_PARTIAL
from sft.storage.retries import Deadline, PermanentError, retry
from sft.storage.transport import ObjectInfo, RangeSink, Transport

SLICE = 8 << 20
"""Bytes of one of the parallel requests for a large object."""
THREADS = 16


class Download:
    """The download of one object."""

    def __init__(
        self,
        transport: Transport,
        pool: ThreadPoolExecutor,
        name: str,
        what: str,
        found: ObjectInfo,
        file: Path,
        meter: Meter,
        deadline: Deadline,
    ):
        self.transport, self.pool, self.name, self.what = transport, pool, name, what
        self.found, self.file, self.meter = found, file, meter
        self.deadline = deadline

    def run(self, large: bool, sha256: bool) -> Checksums:
        """Downloads until the CRC32C of the file is the bucket's, at most twice. large: in slices, and resumable."""
        with self.file.open("a+b", buffering=0) as f:
            if large:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise SftError(f"{self.file}: another process downloads this file; next: wait for it") from None
            for _ in range(2):
                hasher = Hasher(
                    crc=True, sha=sha256, etag_part=0 if self.found.crc32c is not None else self.found.etag_part
                )
                try:
                    (self._in_slices if large else self._in_one_request)(f, hasher)
                except PermanentError as e:
                    raise e.error(self.what) from None
                sums = hasher.sums()
                if self.found.describes(sums):
                    os.fsync(f.fileno())
                    if large:
                        record_file(self.file).unlink(missing_ok=True)
                    return sums
                f.truncate(0)
                record_file(self.file).unlink(missing_ok=True)
            self.file.unlink()
        by_crc = self.found.crc32c is not None
        got = f"crc32c {sums.crc32c:08x}" if by_crc else f"ETag {sums.etag}"
        said = f"{self.found.crc32c:08x}" if by_crc else self.found.generation
        raise SftError(
            f"{self.what}: downloaded twice with {got}, the bucket says {said}; next: check the network, run it again"
        )

    def _in_one_request(self, f: IO[bytes], hasher: Hasher) -> None:
        f.truncate(0)
        self._fetch_range(f, 0, self.found.bytes)
        read_back(f, hasher, self.found.bytes)

    def _in_slices(self, f: IO[bytes], hasher: Hasher) -> None:
        """Reads finished slices back, in order, while later ones are still being downloaded."""
        f.truncate(self.found.bytes)
        record = SliceRecord(self.file, self.found)
        lock = threading.Lock()

        def fetch_slice(index: int, start: int, end: int) -> None:
            if index in record.finished:
                self.meter.add(end - start)
                return
            with self.file.open("r+b", buffering=0) as own:
                self._fetch_range(own, start, end)
            with lock:
                record.add(index)

        starts = range(0, self.found.bytes, SLICE)
        ends = [min(start + SLICE, self.found.bytes) for start in starts]
        futures: list[Future[None]] = [
            self.pool.submit(fetch_slice, i, s, e) for i, (s, e) in enumerate(zip(starts, ends, strict=True))
        ]
        try:
            for future, end in zip(futures, ends, strict=True):
                future.result()
                read_back(f, hasher, end)
                if hasattr(os, "posix_fadvise"):  # starts the write to the disk, so that fsync takes less time
                    os.posix_fadvise(f.fileno(), end - SLICE, SLICE, os.POSIX_FADV_DONTNEED)
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _fetch_range(self, f: IO[bytes], start: int, end: int) -> None:
        sink = RangeSink(f, start, end, self.deadline, self.meter)

        def fetch() -> None:
            sink.seek()
            self.transport.fetch(self.name, self.found.generation, sink)
            if sink.position != end:
                raise ConnectionError(f"the response ended {end - sink.position} bytes early")

        if start < end:
            retry(self.what, fetch, self.deadline, lambda: sink.position)


def read_back(f: IO[bytes], hasher: Hasher, end: int) -> None:
    """Hashes the file up to `end`, from where the hasher is."""
    while hasher.count < end and (data := os.pread(f.fileno(), min(end - hasher.count, CHUNK), hasher.count)):
        hasher.update(data)


class SliceRecord:
    """A text file beside a large download: a header line, then the index of every finished slice, one per line.

    It saves downloading these slices again. The CRC32C of the complete file decides whether it is right.
    """

    def __init__(self, file: Path, found: ObjectInfo):
        self.file = record_file(file)
        header = f"{found.generation} {SLICE}"
        first, *rest = self.file.read_text().split("\n") if self.file.is_file() else [""]
        # The last element is empty, or a line that a kill cut short.
        self.finished = {int(line) for line in rest[:-1]} if first == header else set()
        if not self.finished:
            self.file.write_text(header + "\n")

    def add(self, index: int) -> None:
        with self.file.open("a") as f:
            f.write(f"{index}\n")


def record_file(file: Path) -> Path:
    """The record of a temporary file's slices."""
    name = file.name.removesuffix(RESUMABLE_PARTIAL).removesuffix(PARTIAL)
    return file.with_name(name + ".slices" + RESUMABLE_PARTIAL)
