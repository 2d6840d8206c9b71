"""What the processes of training said, kept over resumes: train/logs/attempt-NNN-rankR.log.

In:  the training folder. Out: everything written to this process's standard output and error goes to its file too.

`tee` does the copying, so that the last words before a kill -9, and those of C++ libraries, are kept as well.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path


def next_attempt(out: Path) -> int:
    """1 for a first attempt, else one more than the highest that left a log."""
    found = (re.match(r"attempt-(\d+)-rank\d+\.log$", p.name) for p in (out / "logs").glob("attempt-*.log"))
    return 1 + max((int(m[1]) for m in found if m), default=0)


def record(out: Path, attempt: int, rank: int) -> Path:
    """Copies standard output and error into this rank's log until the process ends; both still go where they went."""
    file = out / "logs" / f"attempt-{attempt:03}-rank{rank}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        number = stream.fileno()
        before = os.dup(number)
        # A signal to the terminal's group, or as Slurm does to every process, must not end the copying before the last words.
        deaf = ["sh", "-c", "trap '' TERM INT HUP QUIT USR1; exec tee -a \"$1\"", "tee", str(file)]
        tee = subprocess.Popen(deaf, stdin=subprocess.PIPE, stdout=before, start_new_session=True)
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), number)
        tee.stdin.close()
        atexit.register(_end, number, before, tee)
    return file


def _end(number: int, before: int, tee: subprocess.Popen[bytes]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(before, number)  # the pipe ends here, and tee with it
    with contextlib.suppress(subprocess.TimeoutExpired):  # a tracker's process may still hold the pipe
        tee.wait(timeout=5)
