"""How a process ends: exit statuses, signals, and errors as one message. Standard library only.

Used by every program in the environment through `sft.runner.cli`, and by the ranks of a training. Status 1 is an error that the
user can fix: `report_errors` prints it with the next command.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from sft.common.columns import for_terminal
from sft.common.errors import SftError

USAGE = 2
"""The words on the command line are wrong."""
OUT_OF_MEMORY = 12
"""ENOMEM: a GPU had too little memory for a step of training; run the same command again, which recomputes more."""
AGAIN = 75
"""EX_TEMPFAIL: the stage saved its work; run the same command again."""
INTERRUPTED = 130
"""Ctrl-C (128 + SIGINT)."""
TERMINATED = 143
"""128 + SIGTERM."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
PATH_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
)


@contextlib.contextmanager
def report_errors(name: str, folder: Path | None = None) -> Iterator[None]:
    """Turns errors that the user can fix into `[name] error: …` and exit status 1. `folder` is where the stage writes."""
    try:
        yield
    except SftError as e:
        sys.exit(for_terminal(f"[{name}] error: {e}"))
    except OSError as e:
        if e.errno in PATH_ERRORS and e.filename:
            sys.exit(
                for_terminal(
                    f"[{name}] error: {e.filename}: {e.strerror}; next: correct that path or its permissions and run it again"
                )
            )
        if e.errno not in DISK_ERRORS:
            raise
        where = Path(e.filename or folder or ".")
        free = shutil.disk_usage(folder or ".").free
        sys.exit(
            for_terminal(
                f"[{name}] error: {where}: {e.strerror} ({free:,} bytes free); next: fix that disk and run it again;"
                " finished work is kept"
            )
        )


def exit_on_signals() -> None:
    """SIGTERM and Ctrl-C end the process with their exit status. `finally` blocks run."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(INTERRUPTED))


@contextlib.contextmanager
def until_reader_stops() -> Iterator[None]:
    """For programs that print a listing: `| head` ends them quietly."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
