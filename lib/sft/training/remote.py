"""Kept checkpoints to the cluster's bucket, beside training.

In:  whole step folders, on rank 0. Out: <storage>/checkpoints/<run>-<identity>/stepN/, its manifest last, every file verified.

A bucket that fails stops nothing: sft.storage retries by itself, the step is tried again after every later one and at the end, and
what is still missing then is told with the command that copies it. Steps that an earlier attempt left behind are sent first.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft import manifest
from sft.launch.handback import BESIDE
from sft.storage.files import Job
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer
from sft.training import checkpoint


class Uploads:
    def __init__(self, out: Path, where: str, cache: Path, say: Callable[[str], None]) -> None:
        """`where`: the folder of this run's steps, gs://bucket/…"""
        self.out, self.where, self.cache, self.say = out, where, cache, say
        self._queue: queue.Queue[Path] = queue.Queue()
        self._stop = threading.Event()
        self._waiting: set[Path] = set()
        self._missing: dict[Path, str] = {}
        self._there: list[str] = []
        for _, step in checkpoint.steps(out):
            if (step / manifest.NAME).is_file() and not checkpoint.is_ephemeral(step):
                self.add(step)
        # A daemon: a process that a signal ends waits for no bucket.
        threading.Thread(target=self._work, name="uploading", daemon=True).start()

    def _work(self) -> None:
        while not self._stop.is_set():
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
            record = (step / manifest.NAME).read_bytes()
            storage = open_storage(f"{self.where}/{step.name}", self.cache)
            if storage.read(manifest.NAME) != record:
                files = json.loads(record)["outputs"]
                jobs = [Job(f["path"], f["path"], f["bytes"], f["sha256"]) for f in files]
                transfer(jobs, LocalStorage(step), storage, lambda _: None, stop=self._stop)
                top = open_storage(self.where, self.cache)
                for name in BESIDE:  # what a job on another machine goes on with: never older than the step
                    if (self.out / name).is_file():
                        top.write(name, (self.out / name).read_bytes())
                storage.write(manifest.NAME, record)
                self.say(f"uploaded {step.name} to {self.where}")
            self._there.append(step.name)
        except Exception as error:  # whatever a network can do
            if self._stop.is_set():
                return
            self._missing[step] = f"{type(error).__name__}: {error}"
            self.say(f"warning: {step.name} is not in {self.where} yet, training goes on: {error}")
        finally:
            self._waiting.discard(step)

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
        """Begins no further upload, and ends the one under way at its next piece or attempt, without waiting for it."""
        self._stop.set()


def destination(storage: str, run: str, identity: str) -> str:
    """Where the steps of a run go, or "" where training writes to the storage itself (a folder). A job whose disk ends with it
    says so itself (SFT_KEPT)."""
    if kept := os.environ.get("SFT_KEPT"):
        return kept
    if not storage.startswith("gs://"):
        return ""
    return f"{storage.rstrip('/')}/checkpoints/{run}-{identity[:16]}"
