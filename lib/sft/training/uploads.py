"""Uploads permanent checkpoints to the cluster's bucket beside training, and fetches them where disks end with the job.

In:  complete step folders, on rank 0; where nodes have no common disk, on the first rank of each, with the files of its ranks.
Out: <storage>/checkpoints/<run>-<identity>/stepN/, its manifest last, every file
verified. `bring_checkpoint` is the way back: it copies a step that rank 0 chooses to the disk of every machine.

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
from functools import partial
from pathlib import Path

from sft.checkpoint import step_folder
from sft.common.errors import SftError
from sft.common.paths import BUCKETS
from sft.formats import evaluations, manifest
from sft.formats import metrics as metrics_format
from sft.formats.elsewhere import UNLISTED
from sft.formats.metrics import UploadSummary, read_attempts
from sft.formats.steps import BEST, Best, is_ephemeral
from sft.model.parallel import World, transfer_s
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage
from sft.sync import fetch
from sft.sync.parts import is_part
from sft.sync.send import send


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


# --- the way back -----------------------------------------------------------------------------------------------------


def bring_checkpoint(out: Path, where: str, cache: Path, world: World, log: Callable[[str], None]) -> None:
    """Copies the newest complete step of the bucket to every machine's disk, and to rank 0's disk also the step of BEST
    and the records of earlier attempts. Does nothing if the bucket has no step. Every rank calls this. Raises
    SharedError.

    Each machine first sends its part of the newest step that an earlier attempt has left on the disks.
    Rank 0 chooses the step, because the bucket may still change: an earlier attempt may still upload its last step.
    """
    left = None if world.local_rank else _newest_left(out)
    size = max(world.gather(sum(p.stat().st_size for p in left.rglob("*")) if left else 0))
    patient = world.with_own_group(transfer_s(size))
    beside = UNLISTED if world.is_rank0 else ()
    for problem in patient.on_all_ranks(lambda: _send_left(left, where, cache, beside) if left else ""):
        if problem:
            log(f"warning: {problem}")

    def bring(number: int) -> str:
        return "" if world.local_rank else _bring_step(number, out, where, cache, log)

    here = world.gather(_newest_whole(out))
    whole = bool(here[0]) and len(set(here)) == 1
    try:
        # What is here can be continued at once, so a bucket that is away is not waited for.
        steps = patient.on_rank0(lambda: _complete_steps(where, cache, wait=not whole))
    except SftError as error:
        if not whole:
            raise
        log(f"warning: the bucket did not answer, training continues from what is on this machine's disk: {error}")
        return
    numbers = sorted(steps, reverse=True)
    world = world.with_own_group(transfer_s(max(steps.values(), default=0)))
    for number in numbers:
        problem = next(filter(None, world.on_all_ranks(partial(bring, number))), "")
        if not problem:
            break
        log(f"warning: {where}/step{number} is skipped: {problem}")
    else:
        return
    world.on_rank0(lambda: _bring_records(numbers, number, out, where, cache, log))
    log(f"continuing from step {number} of {where}")


def _newest_left(out: Path) -> Path | None:
    """The newest finished step on this disk, if other nodes have some of its files; otherwise None."""
    done = [step for _, step in step_folder.steps(out) if (step / manifest.NAME).is_file()] if out.is_dir() else []
    return done[-1] if done and is_part(done[-1]) else None


def _send_left(step: Path, where: str, cache: Path, beside: Sequence[str]) -> str:
    """Sends a step, or the part of it that this disk has. Returns the problem, or ""."""
    try:
        send(step, where, cache, beside)
    except (SftError, OSError) as error:
        return f"{step.name} of an earlier attempt could not be sent: {error}"
    return ""


def _newest_whole(out: Path) -> int:
    """The number of the newest step that this disk has whole, by the names in its manifest; 0 without one."""
    found = step_folder.steps(out) if out.is_dir() else []
    return max((n for n, step in found if (step / manifest.NAME).is_file() and not is_part(step)), default=0)


def _complete_steps(where: str, cache: Path, wait: bool = True) -> dict[int, int]:
    """{number: bytes} of the steps with a manifest."""
    files = open_storage(where, cache, wait).list()
    found = [m for name in files if (m := fetch.STEP_MANIFEST.fullmatch(name))]
    return {int(m[1]): sum(f.bytes for name, f in files.items() if name.startswith(f"step{m[1]}/")) for m in found}


def _bring_step(number: int, out: Path, where: str, cache: Path, log: Callable[[str], None]) -> str:
    """Copies a step to this disk. Returns the problem, or ""."""
    try:
        step = fetch.copy_stage(open_storage(f"{where}/step{number}", cache), LocalStorage(out / f"step{number}"), log)
    except SftError as error:
        return str(error)
    return "" if step else "its manifest was removed"


def _bring_records(
    numbers: Sequence[int], newest: int, out: Path, where: str, cache: Path, log: Callable[[str], None]
) -> None:
    """Copies BEST with its step, the evaluations and the metrics, and writes a log for each earlier attempt, so that
    this attempt gets the next number."""
    bucket, target = open_storage(where, cache), LocalStorage(out)
    data = bucket.read(BEST) or b""
    if best := Best.from_bytes(data):
        present = best.step == newest or (best.step in numbers and not _bring_step(best.step, out, where, cache, log))
        if present:
            target.write(BEST, data)
    for name in (evaluations.NAME, metrics_format.NAME):
        if (text := bucket.read(name)) is not None:
            target.write(name, text)
    for header in read_attempts(out / metrics_format.NAME):
        name = f"logs/attempt-{header.attempt:03}-rank0.log"
        target.write(name, b"This attempt ran as a job of its own, which has its log.\n")
