"""sha256 of input files, remembered by their stat signature so that planning stays fast. Standard library only.

The signature (size, mtime, ctime, inode) only saves reading a file again; what decides is the content: touching a file
changes its signature, the file is read again, the hash is the same and nothing is stale.
"""

from __future__ import annotations

import json
from pathlib import Path

from sft.common.files import hash_file, write_atomic


class HashCache:
    """Reads and, for stages, writes `<cache>/hashes.json`. The planner never saves."""

    def __init__(self, cache: Path):
        self.file = cache / "hashes.json"
        try:
            data = json.loads(self.file.read_bytes())
            self.known: dict[str, list[object]] = data if isinstance(data, dict) else {}
        except (OSError, ValueError):
            self.known = {}

    def sha256(self, file: Path) -> str:
        entry = self.known.get(str(file.resolve()))
        if not (isinstance(entry, list) and entry[:-1] == _signature(file) and isinstance(entry[-1], str)):
            return self.note(file, hash_file(file))
        return str(entry[-1])

    def note(self, file: Path, sha256: str) -> str:
        """Remembers what somebody has just computed."""
        self.known[str(file.resolve())] = [*_signature(file), sha256]
        return sha256

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.file, json.dumps(self.known).encode())


def _signature(file: Path) -> list[object]:
    s = file.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
