"""train/.identity: what train's folder was made from, so that only the same training continues in it.

    <identity, 64 hex digits> <CRC-32 of it, 8 hex digits>

The CRC tells a damaged file from one of other inputs. Files without a CRC, which older versions wrote, are read.
Standard library only.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import read_file, write_atomic

NAME = ".identity"


def write_identity(train: Path, identity: str) -> None:
    """Marks train's folder as made from the inputs with this identity."""
    write_atomic(train / NAME, f"{identity} {_crc(identity)}\n".encode())


def read_identity(train: Path) -> str | None:
    """The identity of train's folder, or None where it has no mark. Raises SftError for a damaged mark."""
    file = train / NAME
    try:
        words = read_file(file).decode("latin-1").split()
    except FileNotFoundError:
        return None
    sound = len(words) == 1 or (len(words) == 2 and words[1] == _crc(words[0]))
    if not sound or not re.fullmatch(r"[0-9a-f]{64}", words[0]):
        raise damaged(file)
    return words[0]


def damaged(file: Path) -> SftError:
    """The error for a mark that is damaged, or missing beside finished steps."""
    return SftError(
        f"{file}: missing or damaged: it says which recipe and inputs the steps in {file.parent} are from; nothing was"
        f" changed; next: restore the file from a backup, or mv {file.parent} elsewhere, which trains from the first step"
    )


def _crc(identity: str) -> str:
    return f"{zlib.crc32(identity.encode()):08x}"
