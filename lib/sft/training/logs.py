"""Logs of training's processes, one per attempt and rank: train/logs/attempt-NNN-rankR.log.

In:  the training folder. Out: everything that a process writes to its standard output and error is also in its file;
warnings of libraries are only there.

`tee` copies the output, so that the last lines before a kill -9, and those of C++ libraries, are kept too.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

from sft.common.library_logs import quiet_libraries

_printed_on = {"terminal": False}
"""Whether the standard output that `record` copies is a terminal."""


def colour() -> bool:
    """Whether lines may have colours: where a terminal shows them, and NO_COLOR is not set."""
    return (_printed_on["terminal"] or sys.stdout.isatty()) and not os.environ.get("NO_COLOR")


def next_attempt(out: Path) -> int:
    """1 for a first attempt, else one more than the highest number of a log."""
    found = (re.match(r"attempt-(\d+)-rank\d+\.log$", p.name) for p in (out / "logs").glob("attempt-*.log"))
    return 1 + max((int(m[1]) for m in found if m), default=0)


def record(out: Path, attempt: int, rank: int) -> Path:
    """Copies standard output and error into this rank's log until the process ends. Returns the log. Both are still
    printed. Each line is one write, so that lines of the two streams do not mix in the log."""
    file = out / "logs" / f"attempt-{attempt:03}-rank{rank}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    _printed_on["terminal"] = sys.stdout.isatty()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        if isinstance(stream, io.TextIOWrapper):  # with PYTHONUNBUFFERED a print is several writes
            stream.reconfigure(line_buffering=True, write_through=False)
        number = stream.fileno()
        before = os.dup(number)
        # A signal to the terminal's group, or by Slurm to every process, must not end tee before the last lines. With PIPE ignored, tee
        # goes on with the file where whoever reads the output has ended.
        command = ["sh", "-c", "trap '' TERM INT HUP QUIT USR1 PIPE; exec tee -a \"$1\"", "tee", str(file)]
        tee = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=before, start_new_session=True)
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), number)
        tee.stdin.close()
        atexit.register(_end, number, before, tee)
    quiet_libraries(file)
    return file


def _end(number: int, before: int, tee: subprocess.Popen[bytes]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(before, number)  # closes the pipe, and tee ends
    with contextlib.suppress(subprocess.TimeoutExpired):  # a tracker's process may still have the pipe open
        tee.wait(timeout=5)
