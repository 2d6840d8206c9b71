"""Kept checkpoints to the cluster's bucket, beside training.

In:  whole step folders, on rank 0. Out: <storage>/checkpoints/<run>-<identity>/stepN/, its manifest last, every file verified.

A bucket that fails stops nothing: sft.storage retries by itself, the step is tried again after every later one and at the end, and
what is still missing then is told with the command that copies it. Steps that an earlier attempt left behind are sent first.

Each step is sent by a process of its own (sft.storage.send): hashing and sending take no time of this one's interpreter, and a
training that a signal ends kills it, whatever it waits for. What it had not finished the next attempt continues.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft import manifest
from sft.launch.handback import BESIDE
from sft.training import checkpoint


class Uploads:
    def __init__(self, out: Path, where: str, cache: Path, say: Callable[[str], None]) -> None:
        """`where`: the folder of this run's steps, gs://bucket/…"""
        self.out, self.where, self.cache, self.say = out, where, cache, say
        self._queue: queue.Queue[Path] = queue.Queue()
        self._lock = threading.Lock()
        self._closed = False
        self._sending: subprocess.Popen[str] | None = None
        self._waiting: set[Path] = set()
        self._missing: dict[Path, str] = {}
        self._there: list[str] = []
        for _, step in checkpoint.steps(out):
            if (step / manifest.NAME).is_file() and not checkpoint.is_ephemeral(step):
                self.add(step)
        threading.Thread(target=self._work, name="uploading", daemon=True).start()

    def _work(self) -> None:
        while not self._closed:
            self._send(self._queue.get())
            self._queue.task_done()

    def add(self, step: Path) -> None:
        """Sends a whole step, and first those that failed before it."""
        for again in [*self._missing, step]:
            self._missing.pop(again, None)
            self._waiting.add(again)
            self._queue.put(again)

    @property
    def busy(self) -> set[Path]:
        """Steps that must stay until they are sent."""
        return {*self._waiting, *self._missing}

    def _send(self, step: Path) -> None:
        try:
            status, said = self._run(step)
        except OSError as error:  # no process could be started
            status, said = 1, str(error)
        if self._closed:
            return
        if status:
            self._missing[step] = said or f"exit status {status}"
            self.say(f"warning: {step.name} is not in {self.where} yet, training goes on: {self._missing[step]}")
        else:
            self._there.append(step.name)
            if said:
                self.say(said)
        self._waiting.discard(step)

    def _run(self, step: Path) -> tuple[int, str]:
        """(exit status, what was said) of the process that sends a step."""
        command = [sys.executable, "-m", "sft.storage.send", str(step), self.where, str(self.cache), *BESIDE]
        with self._lock:
            if self._closed:
                return 1, ""
            self._sending = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        with self._sending as process:  # its standard input stays open until it is done: it ends with this process
            assert process.stdout is not None
            said = process.stdout.read().strip()
        return process.returncode, said

    def finish(self) -> dict[str, Any]:
        """Waits for what is under way and tries once more what failed. Returns {"where", "steps", "missing"}."""
        self._queue.join()
        for step in list(self._missing):
            del self._missing[step]
            self._queue.put(step)
        self._queue.join()
        for step, why in self._missing.items():
            self.say(
                f"warning: {step.name} could not be sent to {self.where}: {why};"
                f" next: make cp SRC={step} DST={self.where}/{step.name}"
            )
        return {"where": self.where, "steps": self._there, "missing": [s.name for s in self._missing]}

    def close(self) -> None:
        """Begins no further upload and ends the one under way."""
        with self._lock:
            self._closed = True
            if self._sending is not None:
                self._sending.kill()


def destination(storage: str, run: str, identity: str) -> str:
    """Where the steps of a run go, or "" where training writes to the storage itself (a folder). A job whose disk ends with it
    says so itself (SFT_KEPT)."""
    if kept := os.environ.get("SFT_KEPT"):
        return kept
    if not storage.startswith("gs://"):
        return ""
    return f"{storage.rstrip('/')}/checkpoints/{run}-{identity[:16]}"
