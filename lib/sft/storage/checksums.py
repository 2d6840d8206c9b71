"""Checksums of files: size, SHA-256, CRC32C and S3's ETag, from one read; CRC32C in the encoding that buckets use."""

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
    etag: str = ""  # S3's, without quotes; "" if it was not computed


class Hasher:
    """Computes the checksums of bytes that arrive in order. `etag_part`: see `Etag`; 0 = no ETag."""

    def __init__(self, crc: bool = False, sha: bool = True, etag_part: int = 0):
        self.count = self.crc = 0
        self._sha = hashlib.sha256() if sha else None
        self._extend = google_crc32c.extend if crc else None
        self._etag = Etag(etag_part) if etag_part else None

    def update(self, data: bytes) -> None:
        self.count += len(data)
        if self._sha:
            self._sha.update(data)
        if self._extend:
            self.crc = self._extend(self.crc, data)
        if self._etag:
            self._etag.update(data)

    def sums(self) -> Checksums:
        sha256, etag = self._sha.hexdigest() if self._sha else "", self._etag.text() if self._etag else ""
        return Checksums(self.count, sha256, self.crc, etag)


class Etag:
    """The ETag that S3 gives an object which it does not encrypt with a customer's key: the MD5 of its bytes in hex, or, of an object
    that was uploaded in parts, the MD5 of the MD5s of its parts, "-" and their number. `part`: bytes of a part; -1 = no parts."""

    def __init__(self, part: int):
        self.part, self._digests, self._room = part, list[bytes](), part
        self._md5 = hashlib.md5(usedforsecurity=False)

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while self.part > 0 and len(view) >= self._room:
            self._md5.update(view[: self._room])
            self._digests.append(self._md5.digest())
            view, self._room = view[self._room :], self.part
            self._md5 = hashlib.md5(usedforsecurity=False)
        self._md5.update(view)
        self._room -= len(view)

    def text(self) -> str:
        if self.part < 0:
            return self._md5.hexdigest()
        digests = [*self._digests, self._md5.digest()] if self._room < self.part or not self._digests else self._digests
        return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def checksums_of(file: Path, crc: bool = False, sha: bool = True) -> Checksums:
    """Reads a file once. crc=True adds CRC32C, the checksum that buckets report; sha=False leaves out SHA-256."""
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
