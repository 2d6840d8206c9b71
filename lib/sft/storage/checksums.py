"""Checksums of files: size, SHA-256 and CRC32C, from one read; CRC32C in the encoding of Google Cloud Storage."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

CHUNK = 4 << 20
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class Checksums:
    """Size and checksums of a file. `sha256` is hex, or "" if it was not computed; `crc32c` is 0 if it was not computed."""

    bytes: int
    sha256: str
    crc32c: int = 0


class Hasher:
    """Computes the checksums of bytes that arrive in order."""

    def __init__(self, crc: bool = False, sha: bool = True):
        self.count = self.crc = 0
        self._sha = hashlib.sha256() if sha else None
        self._extend = google_crc32c.extend if crc else None

    def update(self, data: bytes) -> None:
        self.count += len(data)
        if self._sha:
            self._sha.update(data)
        if self._extend:
            self.crc = self._extend(self.crc, data)

    def sums(self) -> Checksums:
        return Checksums(self.count, self._sha.hexdigest() if self._sha else "", self.crc)


def checksums_of(file: Path, crc: bool = False, sha: bool = True) -> Checksums:
    """Reads a file once. crc=True adds CRC32C, the checksum that gs:// reports; sha=False leaves out SHA-256."""
    hasher = Hasher(crc, sha)
    with file.open("rb") as f:
        while chunk := f.read(CHUNK):
            hasher.update(chunk)
    return hasher.sums()


def encode_crc32c(crc32c: int) -> str:
    """Base64 of the four big-endian bytes, as Google Cloud Storage writes it."""
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


def decode_crc32c(text: str | None) -> int | None:
    """The number of a base64 CRC32C; None for None or ""."""
    return int.from_bytes(base64.b64decode(text), "big") if text else None
