"""Writes large files with direct I/O, past the system's page cache, and hashes them while they are written.

In: bytes, in blocks of any size. Out: the file under its final name once all of it is on disk, and its sha256.

A stage flushes its files before it publishes them, so it waits for the disk in any case. A copy in the page cache would
evict data that is read again, and costs processor time, most of all in virtual machines, which get each new page from their
host. Threads write and hash while the caller makes the next bytes, so no file is read again for its hash. If the file
system or the operating system has no O_DIRECT, the same bytes go through the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUFFER = 4 << 20
BUFFERS = 3  # one being filled, one being written, one queued
BLOCK = 4096  # O_DIRECT needs offsets, lengths and addresses that are multiples of this
DIRECT = getattr(os, "O_DIRECT", 0)

_free: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
"""Buffers of finished files, for the next one: allocating and clearing new memory takes time."""


class DirectFile:
    """Writes `path` under a temporary name until `close`. The next call raises the errors of its threads (a full disk)."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".partial")
        self.temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._file = os.open(self.temporary, flags | DIRECT, 0o644)
        except OSError:  # the file system has no O_DIRECT; any other error occurs again here
            self.temporary.unlink(missing_ok=True)
            self._file = os.open(self.temporary, flags, 0o644)
        self._direct = bool(fcntl.fcntl(self._file, fcntl.F_GETFL) & DIRECT)
        self._sha256 = hashlib.sha256()
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("write", "hash")]
        self._buffers = [_buffer() for _ in range(BUFFERS)]
        self._busy: list[list[Future[None]]] = [[] for _ in range(BUFFERS)]  # the tasks that still read each buffer
        self._now = self._used = 0

    def write(self, data: bytes | NDArray[Any]) -> None:
        """Appends bytes, or the bytes of a contiguous array."""
        raw, at = np.frombuffer(data, dtype=np.uint8), 0
        while at < len(raw):
            take = min(BUFFER - self._used, len(raw) - at)
            self._buffers[self._now][self._used : self._used + take] = raw[at : at + take]
            at, self._used = at + take, self._used + take
            if self._used == BUFFER:
                self._hand_over()

    def _hand_over(self) -> None:
        full = self._buffers[self._now][: self._used]
        writing, hashing = self._threads
        self._busy[self._now] = [writing.submit(self._put, full), hashing.submit(self._sha256.update, full.data)]
        self._now, self._used = (self._now + 1) % BUFFERS, 0
        self._wait(self._now)

    def _wait(self, buffer: int) -> None:
        for done in self._busy[buffer]:
            done.result()

    def _put(self, data: NDArray[np.uint8]) -> None:
        while len(data):
            aligned = len(data) - len(data) % BLOCK if self._direct else len(data)
            if not aligned:  # the last bytes
                self._stop_direct()
                continue
            try:
                data = data[os.write(self._file, data[:aligned].data) :]
            except OSError as error:  # some file systems refuse direct I/O only on the first write
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._stop_direct()

    def _stop_direct(self) -> None:
        fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~DIRECT)
        self._direct = False

    def close(self) -> str:
        """Flushes the file to disk, renames it to its final name and returns its sha256 (hex)."""
        try:
            self._hand_over()
            for buffer in range(BUFFERS):
                self._wait(buffer)
            os.fsync(self._file)
        except BaseException:
            self.abort()
            raise
        self._end()
        self.temporary.replace(self.path)
        return self._sha256.hexdigest()

    def abort(self) -> None:
        """Deletes the temporary file. May be called more than once."""
        self._end()
        self.temporary.unlink(missing_ok=True)

    def _end(self) -> None:
        if self._file < 0:
            return
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        os.close(self._file)
        self._file = -1
        for buffer in self._buffers:
            _free.put(buffer)


def _buffer() -> NDArray[np.uint8]:
    try:
        return _free.get_nowait()
    except Empty:
        return np.frombuffer(mmap.mmap(-1, BUFFER), dtype=np.uint8)
