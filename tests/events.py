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

    A file is renamed after it was flushed. A folder is renamed after all files in it were. The folder of a rename is flushed before
    a manifest appears in it or above it, and before the end.
    """
    dirty: set[str] = set()
    renamed: dict[str, str] = {}  # the folder that must be flushed -> a new name in it
    problems = []
    for call in calls:
        if any(part in call.path or part in call.to for part in leave):
            continue
        if call.what in ("open", "write"):
            dirty.add(call.path)
        elif call.what == "fsync":
            dirty.discard(call.path)
            renamed.pop(call.path, None)
        elif call.what == "unlink":
            dirty = {p for p in dirty if not _within(p, call.path)}
        elif call.what == "rename":
            lost = sorted(p for p in dirty if _within(p, call.path))
            problems += [f"{p} was not flushed before {call.path} became {call.to}" for p in lost]
            dirty = {p for p in dirty if p not in lost}
            if call.to.endswith("manifest.json"):
                top = str(Path(call.to).parent)
                problems += [f"{p} was not flushed before the manifest" for p in sorted(dirty) if _within(p, top)]
                problems += [
                    f"{n}: its folder was not flushed before the manifest"
                    for f, n in renamed.items()
                    if _within(f, top)
                ]
            problems += [
                f"{n}: its folder was not flushed before {call.to}" for f, n in renamed.items() if _within(f, call.path)
            ]
            renamed = {f.replace(call.path, call.to, 1) if _within(f, call.path) else f: n for f, n in renamed.items()}
            renamed[str(Path(call.to).parent)] = call.to
    problems += [f"{name}: its folder was never flushed" for name in renamed.values()]
    return problems + [f"{path} was never flushed" for path in sorted(dirty)]


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")
