"""Uploads permanent checkpoints to the cluster's bucket beside training. sft.training.stored_steps is the way back.

In:  complete step folders, on rank 0; where nodes have no common disk, on the first rank of each, with the files of its ranks.
Out: <storage>/checkpoints/<run>-<identity>/stepN/, its manifest last, every file verified.

Upload failures never stop training. sft.storage retries, and the step is retried after every later step and at the end.
Whatever is still missing at the end is logged with the command that copies it. Steps that an earlier attempt did not
upload are sent first.

Each step is sent by a separate process (sft.sync.send), so hashing and sending take no time of this interpreter. On a
signal, training exits without waiting for it. The next attempt resumes the upload.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from sft.checkpoint import step_folder
from sft.common.paths import BUCKETS
from sft.formats import manifest
from sft.formats.elsewhere import UNLISTED
from sft.formats.metrics import UploadSummary
from sft.formats.steps import is_ephemeral
from sft.sync.parts import is_part


class Uploads:
    """A queue of steps, and the thread that uploads them one after the other. One for each disk."""

    def __init__(
        self, out: Path, where: str, cache: Path, log: Callable[[str], None], beside: Sequence[str] = UNLISTED
    ) -> None:
        """`out`: train's folder. `where`: the address of this run's steps in a bucket. `beside`: files of `out` that are
        sent with every step."""
        self.out, self.where, self.cache, self.log, self.beside = out, where, cache, log, beside
        self._queue: queue.Queue[Path] = queue.Queue()
        self._lock = threading.Lock()
        self._closed = False
        self._sending: subprocess.Popen[str] | None = None
        self._waiting: set[Path] = set()
        self._missing: dict[Path, str] = {}
        self._uploaded: list[str] = []
        for _, step in step_folder.steps(out):
            if (step / manifest.NAME).is_file() and not is_ephemeral(step):
                self.add(step)
        threading.Thread(target=self._work, name="uploading", daemon=True).start()

    def _work(self) -> None:
        while not self._closed:
            self._send(self._queue.get())
            self._queue.task_done()

    def add(self, step: Path) -> None:
        """Queues a complete step, and before it the steps that failed."""
        for again in [*self._missing, step]:
            self._missing.pop(again, None)
            self._waiting.add(again)
            self._queue.put(again)

    @property
    def busy(self) -> set[Path]:
        """Steps that must not be removed yet."""
        return {*self._waiting, *self._missing}

    def _send(self, step: Path) -> None:
        try:
            status, output = self._run(step)
        except OSError as error:  # no process could be started
            status, output = 1, str(error)
        if self._closed:
            return
        if status:
            self._missing[step] = output or f"exit status {status}"
            self.log(f"warning: {step.name} is not in {self.where} yet, training continues: {self._missing[step]}")
        else:
            self._uploaded.append(step.name)
            if output:
                self.log(output)
        self._waiting.discard(step)

    def _run(self, step: Path) -> tuple[int, str]:
        """(exit status, output) of the process that sends a step."""
        command = [sys.executable, "-m", "sft.sync.send", str(step), self.where, str(self.cache), *self.beside]
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
        with self._sending as process:  # the open pipe to its standard input makes it end with this process
            assert process.stdout is not None
            output = process.stdout.read().strip()
        return process.returncode, output

    def finish(self) -> UploadSummary:
        """Waits for uploads under way and retries failed ones once."""
        self._queue.join()
        for step in list(self._missing):
            del self._missing[step]
            self._queue.put(step)
        self._queue.join()
        for step, why in self._missing.items():
            copy = (
                "run train again, on all nodes" if is_part(step) else f"make cp SRC={step} DST={self.where}/{step.name}"
            )
            self.log(f"warning: {step.name} could not be sent to {self.where}: {why}; next: {copy}")
        return UploadSummary(self.where, tuple(self._uploaded), tuple(step.name for step in self._missing))

    def close(self) -> None:
        """Starts no further upload and kills the one under way."""
        with self._lock:
            self._closed = True
            if self._sending is not None:
                self._sending.kill()


def destination(storage: str, run: str, identity: str) -> str:
    """The address of a run's steps: SFT_STAGE_ADDRESS in a job whose disk ends with it, a folder of a bucket, or ""
    where the storage is a disk that training writes to itself."""
    if address := os.environ.get("SFT_STAGE_ADDRESS"):
        return address
    if not storage.startswith(BUCKETS):
        return ""
    return f"{storage.rstrip('/')}/checkpoints/{run}-{identity[:16]}"
