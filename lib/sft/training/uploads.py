"""Kept checkpoints to the cluster's bucket, beside training, and back where no disk outlives a job.

In:  whole step folders, on rank 0. Out: <storage>/checkpoints/<run>-<identity>/stepN/, its manifest last, every file verified.
`bring` is the way back: a step that rank 0 chooses, on the disk of every machine.

A bucket that fails stops nothing: sft.storage retries by itself, the step is tried again after every later one and at the end, and
what is still missing then is told with the command that copies it. Steps that an earlier attempt left behind are sent first.

Each step is sent by a process of its own (sft.sync.send): hashing and sending take no time of this one's interpreter, and a
training that a signal ends kills it, whatever it waits for. What it had not finished the next attempt continues.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sft.checkpoint import step_folder
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats import metrics as metrics_format
from sft.formats.elsewhere import UNLISTED
from sft.formats.metrics import UploadSummary, read_attempts
from sft.formats.steps import BEST, Best, is_ephemeral
from sft.model.parallel import World
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage
from sft.sync import fetch


class Uploads:
    def __init__(self, out: Path, where: str, cache: Path, log: Callable[[str], None]) -> None:
        """`where`: the folder of this run's steps, gs://bucket/…"""
        self.out, self.where, self.cache, self.log = out, where, cache, log
        self._queue: queue.Queue[Path] = queue.Queue()
        self._lock = threading.Lock()
        self._closed = False
        self._sending: subprocess.Popen[str] | None = None
        self._waiting: set[Path] = set()
        self._missing: dict[Path, str] = {}
        self._there: list[str] = []
        for _, step in step_folder.steps(out):
            if (step / manifest.NAME).is_file() and not is_ephemeral(step):
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
            self.log(f"warning: {step.name} is not in {self.where} yet, training goes on: {self._missing[step]}")
        else:
            self._there.append(step.name)
            if said:
                self.log(said)
        self._waiting.discard(step)

    def _run(self, step: Path) -> tuple[int, str]:
        """(exit status, what was said) of the process that sends a step."""
        command = [sys.executable, "-m", "sft.sync.send", str(step), self.where, str(self.cache), *UNLISTED]
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

    def finish(self) -> UploadSummary:
        """Waits for uploads under way and retries failed ones once."""
        self._queue.join()
        for step in list(self._missing):
            del self._missing[step]
            self._queue.put(step)
        self._queue.join()
        for step, why in self._missing.items():
            self.log(
                f"warning: {step.name} could not be sent to {self.where}: {why};"
                f" next: make cp SRC={step} DST={self.where}/{step.name}"
            )
        return UploadSummary(self.where, tuple(self._there), tuple(step.name for step in self._missing))

    def close(self) -> None:
        """Begins no further upload and ends the one under way."""
        with self._lock:
            self._closed = True
            if self._sending is not None:
                self._sending.kill()


def destination(storage: str, run: str, identity: str) -> str:
    """Where the steps of a run go, or "" where training writes to the storage itself (a folder). A job whose disk ends with it
    says so itself (SFT_STAGE_ADDRESS)."""
    if kept := os.environ.get("SFT_STAGE_ADDRESS"):
        return kept
    if not storage.startswith("gs://"):
        return ""
    return f"{storage.rstrip('/')}/checkpoints/{run}-{identity[:16]}"


# --- back -------------------------------------------------------------------------------------------------------------

PATIENCE_S = 4 * 3600  # 400 GB of a 32B step over a slow network


def bring_checkpoint(out: Path, where: str, cache: Path, world: World, log: Callable[[str], None]) -> None:
    """Puts the newest step that is whole in the bucket on every machine's disk, and on rank 0's the step that BEST names and the
    records of earlier attempts. Nothing where none is. Every rank calls this; `say` is asked on each. Raises SharedError.

    Rank 0 chooses, as the bucket may change while machines look: an attempt that was told to end may still send its last step."""
    world = world.with_own_group(PATIENCE_S)

    def here(number: int) -> str:
        return "" if world.local_rank else _bring_step(number, out, where, cache, log)

    numbers = world.on_rank0(lambda: _whole_steps(where, cache))
    for number in numbers:
        wrong = next(filter(None, world.on_all_ranks(partial(here, number))), "")
        if not wrong:
            break
        log(f"warning: {where}/step{number} is passed over: {wrong}")
    else:
        return
    world.on_rank0(lambda: _bring_records(numbers, number, out, where, cache, log))
    log(f"going on from step {number} of {where}")


def _whole_steps(where: str, cache: Path) -> list[int]:
    """Newest first."""
    found = (fetch.STEP_MANIFEST.fullmatch(name) for name in open_storage(where, cache).list())
    return sorted((int(m[1]) for m in found if m), reverse=True)


def _bring_step(number: int, out: Path, where: str, cache: Path, log: Callable[[str], None]) -> str:
    """What is wrong with the step there, or "" once it is here."""
    try:
        step = fetch.copy_stage(open_storage(f"{where}/step{number}", cache), LocalStorage(out / f"step{number}"), log)
    except SftError as error:
        return str(error)
    return "" if step else "its manifest is gone"


def _bring_records(
    numbers: Sequence[int], newest: int, out: Path, where: str, cache: Path, log: Callable[[str], None]
) -> None:
    """BEST with its step, the evaluations, the metrics, and a word for each attempt in logs/, so that this one gets the next number."""
    bucket, target = open_storage(where, cache), LocalStorage(out)
    data = bucket.read(BEST) or b""
    if best := Best.from_bytes(data):
        here = best.step == newest or (best.step in numbers and not _bring_step(best.step, out, where, cache, log))
        if here:
            target.write(BEST, data)
    for name in ("evaluations.jsonl", metrics_format.NAME):
        if (text := bucket.read(name)) is not None:
            target.write(name, text)
    for header in read_attempts(out / metrics_format.NAME):
        name = f"logs/attempt-{header.attempt:03}-rank0.log"
        target.write(name, b"This attempt ran as a job of its own, which has its log.\n")
