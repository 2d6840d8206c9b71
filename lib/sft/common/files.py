"""Atomic writes of small files, canonical JSON and hashes of files. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from sft.common.errors import SftError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the file begins that git-lfs leaves where it has not fetched the content."""
UNFINISHED = ".unfinished"
"""The end of the names of the temporary files that `write_atomic` renames."""


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, for digests. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def read_file(file: Path) -> bytes:
    """The bytes of a file. Raises OSError for a pipe, a socket or a device, which may never end."""
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
        if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
            raise OSError(errno.ENXIO, "not a file, but a pipe or a device", str(file))
        return f.read()


def write_atomic(file: Path, data: bytes) -> None:
    """Writes a temporary file, flushes it and renames it. After a crash the file has the old bytes or the new ones."""
    fd, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=UNFINISHED)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files of `write_atomic` that a kill left in a folder and below it. Nobody may write there."""
    for file in folder.rglob(f".*{UNFINISHED}"):
        file.unlink(missing_ok=True)


def check_pointer(file: Path, what: str) -> None:
    """Raises SftError for a git-lfs pointer in the place of the file. `what` names the file."""
    if file.stat().st_size < 1024:
        with file.open("rb") as f:
            if f.read(len(LFS_POINTER)) == LFS_POINTER:
                raise SftError(f"{what}: a git-lfs pointer, not the file; next: git lfs pull")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object that another program defines (config.json, tokenizer.json). Raises SftError that names the file.

    Files of our own are read through `sft.formats`.
    """
    try:
        check_pointer(file, str(file))
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SftError(f"{file}: no such file") from None
    except OSError as error:
        raise SftError(f"{file}: not readable: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SftError(f"{file}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise SftError(f"{file}: expected an object, found {type(data).__name__}")
    return data


def write_json(file: Path, value: Any) -> None:
    """Writes JSON with an indentation of 2, atomically. Raises ValueError for NaN and infinity."""
    write_atomic(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def sync_folder(folder: Path) -> None:
    """Flushes the folder, so that renames in it survive a crash."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hash_file(file: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
