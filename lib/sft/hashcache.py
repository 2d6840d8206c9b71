"""sha256 of input files, remembered by their stat signature so that planning stays fast. Standard library only.

The signature (size, mtime, ctime, inode) only saves reading a file again; what decides is the content: touching a file
changes its signature, the file is read again, the hash is the same and nothing is stale.
"""

from __future__ import annotations

import json
from pathlib import Path

from sft import manifest


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
        name = str(file.resolve())
        s = file.stat()
        signature = [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
        entry = self.known.get(name)
        if not (isinstance(entry, list) and entry[:-1] == signature and isinstance(entry[-1], str)):
            entry = [*signature, manifest.hash_file(file)]
            self.known[name] = entry
        return str(entry[-1])

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_atomic(self.file, json.dumps(self.known).encode())
