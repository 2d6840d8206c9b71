"""Bounds on the time and memory of a template: Jinja text is a program, which may loop for hours or double a string for ever.

    with bounded():
        render()            raises OutOfTime after SECONDS of processor time, MemoryError beyond ROOM more bytes

Outside of a process's main thread there is no bound on time, because Python runs signal handlers there alone.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

SECONDS = 5.0
"""Processor time for one rendering, which takes milliseconds."""
ROOM = 1 << 30
"""Bytes that one rendering may take beside what the process has."""
FRESH = 256
"""Renderings for which the size of the process is taken as known."""


class OutOfTime(Exception):
    """A rendering takes too long."""


class _Known:
    """The size of this process in bytes of address space, when it was last looked at."""

    size = 0
    uses = FRESH


def _size() -> int:
    _Known.uses += 1
    if _Known.uses > FRESH:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _Known.size, _Known.uses = pages * resource.getpagesize(), 0
    return _Known.size


def _end(*_: object) -> None:
    raise OutOfTime(f"it takes more than {SECONDS:.0f} s for one conversation")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raises OutOfTime or MemoryError inside its body where that takes too much."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # a system without /proc or without this limit
        room = _size() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (room if soft == resource.RLIM_INFINITY else min(soft, room), hard))
    timed = threading.current_thread() is threading.main_thread()
    if timed:
        former = signal.signal(signal.SIGPROF, _end)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except MemoryError:
        _Known.uses = FRESH  # the process may have grown by itself
        raise
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, former)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
