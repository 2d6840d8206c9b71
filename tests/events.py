"""The order of writes of a program, and faults at the n-th of them: a shim before libc (events.c), built with cc.

events = Events(tmp_path, root)                      only calls below `root` count
subprocess.run(command, env={**os.environ, **events.environment})
events.calls()                                       [Call(1, pid, "open", ".../x", ""), …] over all processes
disorder(events.calls())                             what was renamed before it was flushed, and what was not flushed at all
events.arm(12, "kill")                               the next program is killed at its 12th call; "EIO", "ENOSPC", "EFBIG", "short"
"""

from __future__ import annotations

import errno
import functools
import mmap
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).with_name("events.c")
STATE = struct.Struct("=qqqq1024s1024s")
FAULTS = {"kill": -1, "short": -2, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EFBIG": errno.EFBIG}
MARK = ".partial"


class Call(NamedTuple):
    """A call: its number over all processes, what it does, its file, and the new name of a rename."""

    number: int
    pid: int
    what: str
    path: str
    to: str


@functools.cache
def library() -> Path:
    """The built shim."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    built = Path(tempfile.mkdtemp(prefix="events-")) / "events.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, SOURCE, "-ldl"], check=True)
    return built


class Events:
    """The calls of the programs that get `environment`."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.file, self.log, self.root = folder / "events.state", folder / "events.log", root
        self.file.write_bytes(bytes(STATE.size))
        self.arm(0, "kill")
        self.environment = {"LD_PRELOAD": str(library()), "EVENTS_STATE": str(self.file)}

    def arm(self, at: int, fault: str, group: bool = False) -> None:
        """Counts from 1 again. `at`: the call where the fault comes, 0 for none. `group`: a kill ends the whole process group."""
        self.log.unlink(missing_ok=True)
        values = STATE.pack(0, at, FAULTS[fault], group, str(self.root).encode(), str(self.log).encode())
        with self.file.open("r+b") as file, mmap.mmap(file.fileno(), STATE.size) as state:
            state[:] = values  # one file for all: processes that run have it mapped

    def calls(self) -> list[Call]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        found = []
        for line in lines:
            number, pid, what, rest = line.split(" ", 3)
            path, _, to = rest.partition(" -> ")
            found.append(Call(int(number), int(pid), what, path, to))
        return sorted(found)


def disorder(calls: Iterable[Call], leave: Iterable[str] = ()) -> list[str]:
    """What a power failure could lose although a later call relies on it. `leave`: parts of paths that need not last.

    A file is flushed before it gets another name. All in a folder is, before the folder gets another name, and before a manifest appears in
    it or above it. At the end everything is.
    """
    dirty: set[str] = set()  # files with bytes that were not flushed
    new: dict[str, set[str]] = {}  # folder -> names in it that were not flushed
    problems = []

    def unflushed(top: str, when: str) -> list[str]:
        files = [f"{path} was not flushed {when}" for path in sorted(dirty) if _within(path, top)]
        return files + [
            f"{n}: its folder was not flushed {when}" for f, ns in new.items() for n in sorted(ns) if _within(f, top)
        ]

    for call in calls:
        if any(part in call.path or part in call.to for part in leave):
            continue
        folder = str(Path(call.to or call.path).parent)
        if call.what in ("open", "create", "write"):
            dirty.add(call.path)
        if call.what == "fsync":
            dirty.discard(call.path)
            new.pop(call.path, None)
        elif call.what in ("create", "link"):
            new.setdefault(str(Path(call.path).parent), set()).add(call.path)
        elif call.what == "unlink":
            dirty = {p for p in dirty if not _within(p, call.path)}
            new = {f: {n for n in ns if n != call.path} for f, ns in new.items() if not _within(f, call.path)}
        elif call.what == "rename":
            new.get(str(Path(call.path).parent), set()).discard(call.path)
            problems += unflushed(call.path, f"before {call.path} became {call.to}")
            if call.to.endswith("manifest.json"):
                problems += unflushed(folder, "before the manifest")
            dirty = {p for p in dirty if not _within(p, call.path)}
            new = {f: ns for f, ns in new.items() if not _within(f, call.path)}
            new.setdefault(folder, set()).add(call.to)
    return problems + unflushed("/", "at all")


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top.rstrip('/')}/")
