"""Advisory locks on files: one process at a time writes a stage, a cache or an upload. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from sft.common.errors import SftError


@contextlib.contextmanager
def lock(file: Path, wait: bool = False) -> Iterator[None]:
    """Holds an advisory lock, which ends with the process. The file names the holder.

    wait: wait for another holder, after printing its pid and host. Otherwise another holder raises SftError.
    """
    with file.open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            holder = f.read().strip() or "another process"
            if not wait:
                raise SftError(f"{file}: busy, held by {holder}; next: wait for it or stop it") from None
            print(f"waiting for {holder} to release {file}", flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        f.truncate()
        f.write(f"pid {os.getpid()} on {socket.gethostname()}")
        f.flush()
        yield
