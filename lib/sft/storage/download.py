"""One object of a bucket into one file, proven by reading the file back.

In:  a Wire, the object's name and what the bucket says of it (bytes, CRC32C, generation), the caller's temporary file.
Out: the sums of the finished file, which are the bucket's; SftError when two fetches brought other bytes.

A large object comes in slices, over a pool that all files share. What an earlier process brought is kept: a line beside the
file names each slice that is there, and the CRC32C of the whole decides.
"""

from __future__ import annotations

import fcntl
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from sft.common.errors import SftError
from sft.storage.attempts import Deadline, PermanentError, attempt
from sft.storage.contract import CHUNK, Checksums, Hasher, Meter
from sft.storage.crc import Object
from sft.storage.local import MORE, PART
from sft.storage.transport import Sink, Wire

SLICE = 8 << 20  # so much in each of SLICES parallel requests
SLICES = 16


class Download:
    def __init__(
        self, wire: Wire, pool: ThreadPoolExecutor, name: str, what: str, found: Object, file: Path, meter: Meter
    ):
        self.wire, self.pool, self.name, self.what = wire, pool, name, what
        self.found, self.file, self.meter = found, file, meter
        self.deadline = Deadline(found.bytes, meter.stop)

    def run(self, large: bool, sha256: bool) -> Checksums:
        """Fetches until the file's CRC32C is the bucket's, at most twice."""
        with self.file.open("a+b", buffering=0) as f:
            if large:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise SftError(f"{self.file}: another process is fetching this file; next: wait for it") from None
            for _ in range(2):
                hasher = Hasher(crc=True, sha=sha256)
                try:
                    (self._slices if large else self._whole)(f, hasher)
                except PermanentError as e:
                    raise e.error(self.what) from None
                sums = hasher.sums()
                if (sums.bytes, sums.crc32c) == (self.found.bytes, self.found.crc32c):
                    os.fsync(f.fileno())
                    if large:
                        record(self.file).unlink(missing_ok=True)
                    return sums
                f.truncate(0)
                record(self.file).unlink(missing_ok=True)
            self.file.unlink()
        raise SftError(
            f"{self.what}: fetched twice with crc32c {sums.crc32c:08x}, the bucket says {self.found.crc32c or 0:08x};"
            " next: check the network, run it again"
        )

    def _whole(self, f: IO[bytes], hasher: Hasher) -> None:
        f.truncate(0)
        self._range(f, 0, self.found.bytes)
        read_back(f, hasher, self.found.bytes)

    def _slices(self, f: IO[bytes], hasher: Hasher) -> None:
        """Reads back in order while later slices are on their way."""
        f.truncate(self.found.bytes)
        done = Slices(self.file, self.found)
        lock = threading.Lock()

        def one(index: int, start: int, end: int) -> None:
            if index in done.finished:
                self.meter.add(end - start)
                return
            with self.file.open("r+b", buffering=0) as own:
                self._range(own, start, end)
            with lock:
                done.add(index)

        starts = range(0, self.found.bytes, SLICE)
        ends = [min(start + SLICE, self.found.bytes) for start in starts]
        futures: list[Future[None]] = [
            self.pool.submit(one, i, s, e) for i, (s, e) in enumerate(zip(starts, ends, strict=True))
        ]
        try:
            for future, end in zip(futures, ends, strict=True):
                future.result()
                read_back(f, hasher, end)
                if hasattr(os, "posix_fadvise"):  # begins to write it to the disk, so that fsync has less to wait for
                    os.posix_fadvise(f.fileno(), end - SLICE, SLICE, os.POSIX_FADV_DONTNEED)
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _range(self, f: IO[bytes], start: int, end: int) -> None:
        sink = Sink(f, start, end, self.deadline, self.meter)

        def once() -> None:
            sink.begin()
            self.wire.fetch(self.name, self.found.generation, sink)
            if sink.at != end:
                raise ConnectionError(f"the answer ended {end - sink.at} bytes early")

        if start < end:
            attempt(self.what, once, self.deadline, lambda: sink.at)


def read_back(f: IO[bytes], hasher: Hasher, end: int) -> None:
    while hasher.count < end and (data := os.pread(f.fileno(), min(end - hasher.count, CHUNK), hasher.count)):
        hasher.update(data)


class Slices:
    """Beside a large download: a line for each slice that is there. It saves fetching them again; the CRC32C decides."""

    def __init__(self, file: Path, found: Object):
        self.record = record(file)
        head = f"{found.generation} {SLICE}"
        first, *rest = self.record.read_text().split("\n") if self.record.is_file() else [""]
        # The last piece is empty, or a line that a kill cut off.
        self.finished = {int(line) for line in rest[:-1]} if first == head else set()
        if not self.finished:
            self.record.write_text(head + "\n")

    def add(self, index: int) -> None:
        with self.record.open("a") as f:
            f.write(f"{index}\n")


def record(file: Path) -> Path:
    return file.with_name(file.name.removesuffix(PART).removesuffix(".more") + ".slices" + MORE)
