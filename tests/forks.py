"""A server that forks a process for each piece of work, so that imports of seconds are made once.

    forks.serve(work, patience)                     in the server's process, after its imports: `work` gets what was asked for
    with forks.started(code, folder, environment) as server:
        server.ask({"stage": "train"})              the exit status of the work; None where it hangs

Python's exceptions in the work are exit status 1 and are printed. The work's process group is ended with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn


def serve(work: Callable[[dict[str, Any]], int], patience: float) -> None:
    """Does what standard input asks for, one JSON line each, and answers with exit statuses. `patience`: seconds for each."""
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            _do(work, asked)
        began, status = time.monotonic(), None
        while status is None and time.monotonic() - began < patience:
            pid, ended = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(ended) if pid else None
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what a killed parent left, such as tee, or what hangs
        if status is None:
            os.waitpid(child, 0)
        print(json.dumps(status), flush=True)


def _do(work: Callable[[dict[str, Any]], int], asked: dict[str, Any]) -> NoReturn:
    """The work's process: it has a session of its own, no input, and writes to the file asked["log"]."""
    os.setsid()
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 1
    try:
        status = work(asked)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclasses.dataclass(frozen=True)
class Server:
    """The other end of `serve`."""

    process: subprocess.Popen[str]

    def ask(self, asked: Mapping[str, Any]) -> int | None:
        """The exit status of the work; None where it hangs."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        status = json.loads(self.process.stdout.readline())
        return None if status is None else int(status)


@contextlib.contextmanager
def started(code: str, folder: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """A server that runs `code`, which calls `serve`, in a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Server(process)
    finally:
        assert process.stdin
        process.stdin.close()
        process.wait()
