"""A cache of the sha256 of input files, by their stat signature, so that planning is fast. Standard library only.

The signature (size, mtime, ctime, inode) only saves reading a file again. The content decides: a touched file has a new
signature, is hashed again, has the same hash, and nothing becomes stale.
"""

from __future__ import annotations

import json
from pathlib import Path

from sft.common.files import hash_file, write_atomic


class HashCache:
    """The hashes in `<cache>/hashes.json`. Stages save it; the planner only reads it."""

    def __init__(self, cache: Path):
        self.file = cache / "hashes.json"
        try:
            data = json.loads(self.file.read_bytes())
            self.known: dict[str, list[object]] = data if isinstance(data, dict) else {}
        except (OSError, ValueError):
            self.known = {}

    def sha256(self, file: Path) -> str:
        """sha256 (hex) of a file. Reads it only if its signature is not in the cache."""
        entry = self.known.get(str(file.resolve()))
        if not (isinstance(entry, list) and entry[:-1] == _signature(file) and isinstance(entry[-1], str)):
            return self.note(file, hash_file(file))
        return str(entry[-1])

    def note(self, file: Path, sha256: str) -> str:
        """Adds a hash that the caller has computed. Returns it."""
        self.known[str(file.resolve())] = [*_signature(file), sha256]
        return sha256

    def save(self) -> None:
        """Writes the cache to its file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.file, json.dumps(self.known).encode())


def _signature(file: Path) -> list[object]:
    s = file.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
