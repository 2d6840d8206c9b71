"""TODO sft.common.process"""

from __future__ import annotations

import contextlib
import errno
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from sft.common.errors import SftError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT, errno.EISDIR)


@contextlib.contextmanager
def report_errors(name: str, folder: Path | None = None) -> Iterator[None]:
    """Turns errors that a person can mend into one message and exit status 1. `folder` is where the stage writes."""
    try:
        yield
    except SftError as e:
        sys.exit(f"[{name}] error: {e}")
    except OSError as e:
        if e.errno in PATH_ERRORS and e.filename:
            sys.exit(
                f"[{name}] error: {e.filename}: {e.strerror}; next: correct that path or its permissions and run it again"
            )
        if e.errno not in DISK_ERRORS:
            raise
        where = Path(e.filename or folder or ".")
        free = shutil.disk_usage(folder or ".").free
        sys.exit(
            f"[{name}] error: {where}: {e.strerror} ({free:,} bytes free); next: mend that disk and run it again, finished work is kept"
        )
