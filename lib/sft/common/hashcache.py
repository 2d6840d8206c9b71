"""A cache of the sha256 of input files, by their stat signature, so that planning is fast. Standard library only.

The signature (size, mtime, ctime, inode) only saves reading a file again. The content decides: a touched file has a new
signature, is hashed again, has the same hash, and nothing becomes stale. An entry has a CRC-32 of itself: one that is damaged is
not believed, and its file is read again.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from sft.common.files import canonical, hash_file, read_file, write_atomic


class HashCache:
    """The hashes in `<cache>/hashes.json`. Stages save it; the planner only reads it."""

    def __init__(self, cache: Path):
        self.file = cache / "hashes.json"
        try:
            data = json.loads(read_file(self.file))
            self.known: dict[str, list[object]] = data if isinstance(data, dict) else {}
        except (OSError, ValueError, RecursionError):
            self.known = {}

    def sha256(self, file: Path) -> str:
        """sha256 (hex) of a file. Reads it only if its signature is not in the cache."""
        name = str(file.resolve())
        entry = self.known.get(name)
        if isinstance(entry, list) and entry[:-2] == _signature(file) and entry == _sealed(name, entry[:-1]):
            return str(entry[-2])
        return self.note(file, hash_file(file))

    def note(self, file: Path, sha256: str) -> str:
        """Adds a hash that the caller has computed. Returns it."""
        name = str(file.resolve())
        self.known[name] = _sealed(name, [*_signature(file), sha256])
        return sha256

    def save(self) -> None:
        """Writes the cache to its file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.file, json.dumps(self.known).encode())


def _signature(file: Path) -> list[object]:
    s = file.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def _sealed(name: str, entry: list[object]) -> list[object]:
    """The entry of a file with its CRC-32."""
    return [*entry, f"{zlib.crc32(canonical([name, *entry])):08x}"]
