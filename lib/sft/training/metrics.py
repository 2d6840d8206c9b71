"""What training reports: metrics.jsonl for programs, one aligned line per step for people, and trackers.

In:  one StepRecord per step, on rank 0.
Out: <out>/metrics.jsonl (sft.formats.metrics), lines on the terminal, and what sft.training.trackers sends.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.formats import metrics as metrics_format
from sft.formats.metrics import Attempt, InitialValidation, MetricsRecord, StepRecord, read_metrics
from sft.training.trackers import Trackers


class MetricsWriter:
    """The metrics of one attempt. A resume keeps the headers of earlier attempts and the steps up to `start`."""

    def __init__(
        self,
        out: Path,
        start: int,
        steps: int,
        log: Callable[[str], None],
        header: Attempt | None = None,
        trackers: Trackers | None = None,
        first: int = 0,
    ) -> None:
        """`start`: the last finished step. Later steps are removed from the file. `steps`: of the complete run. `first`: the
        step at which the run begins, if it continues another one."""
        self.file = out / metrics_format.NAME
        self.steps, self.log = steps, log
        restore_records(out, start if start > first else 0, log)
        records = [r for r in read_metrics(self.file) if _stays(r, start, first)]
        records += [header] if header else []
        write_atomic(self.file, b"".join(r.to_bytes() for r in records))
        self._stream = self.file.open("ab")
        self._trackers = trackers or Trackers(log)
        self._seconds = 0.0
        self._timed = 0
        self._sealed = ""

    def start(self, record: InitialValidation) -> None:
        """Writes the validation of the starting weights, before the first step."""
        self._stream.write(record.to_bytes())
        self._stream.flush()
        self._trackers.record({"step": record.after_step or 0, "validation_loss": record.initial_validation_loss})
        self.log(f"validation loss of the starting weights: {record.initial_validation_loss:.4f}")

    def write(self, record: StepRecord) -> None:
        self._stream.write(record.to_bytes())
        self._stream.flush()
        self._trackers.record(record.to_value())

    def seal(self, step: int) -> None:
        """Flushes the records to the disk and copies them, before the checkpoint of `step` is written."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        folder, records = self.file.parent / metrics_format.COPIES, self.file.read_bytes()
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"step{step}-{_digest(records)}.jsonl", records)
        stay, self._sealed = {f"step{step}", self._sealed}, f"step{step}"  # the save before may not be finished
        for copy in folder.iterdir():  # of steps that retention has deleted
            name = copy.name.partition("-")[0]
            if name not in stay and not (self.file.parent / name).is_dir():
                copy.unlink(missing_ok=True)

    def count(self, seconds: float) -> None:
        """Adds a step's time to the estimate of the remaining time. The first step includes start-up and is left
        out."""
        self._timed += 1
        if self._timed > 1:
            self._seconds += seconds

    def show(self, record: StepRecord) -> None:
        self.log(progress_line(record, self.steps, self._seconds / max(1, self._timed - 1)))
        if record.validation_loss is not None:
            self.log(f"step {record.step}: validation loss {record.validation_loss:.4f}")

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._trackers.close()


def _stays(record: MetricsRecord, start: int, first: int) -> bool:
    """Whether a record of an earlier attempt stays in the file of one that starts after `start` steps, of a run that begins
    after `first`."""
    if isinstance(record, InitialValidation):
        return start > first  # an attempt from the first step measures it again
    return isinstance(record, Attempt) or record.step <= start


def restore_records(out: Path, start: int, log: Callable[[str], None]) -> None:
    """Replaces metrics.jsonl by the copy of the checkpoint that training continues from, where its records differ.

    Raises SftError where the file is missing and no whole copy is there.
    """
    file = out / metrics_format.NAME
    found = file.read_bytes() if file.is_file() else b""
    copies = sorted((out / metrics_format.COPIES).glob(f"step{start}-*.jsonl")) if start else []
    whole = [data for copy in copies if _digest(data := copy.read_bytes()) == copy.stem.partition("-")[2]]
    if any(found.startswith(records) for records in whole):
        return
    if whole:
        log(
            f"warning: {file} had lost or changed records of the first {start} steps; restored from {out / metrics_format.COPIES}"
        )
        write_atomic(file, whole[-1])
    elif start and not found:
        raise SftError(
            f"{file}: missing, and no copy is in {out / metrics_format.COPIES}: the records of the first {start} steps are lost;"
            f" next: restore it from a backup, or mv {out} elsewhere, which trains from the first step"
        )
    elif copies:
        raise SftError(
            f"{copies[-1]}: damaged, so that nothing proves {file}; next: restore it from a backup, or remove it, which"
            " takes the file as it is"
        )


def _digest(records: bytes) -> str:
    return hashlib.sha256(records).hexdigest()[:16]


def progress_line(record: StepRecord, steps: int, seconds_per_step: float) -> str:
    """The line of a step on the terminal, which fits it. `steps`: of the complete run."""
    width = len(str(steps))
    parts = [
        f"step {record.step:>{width}}/{steps}",
        f"loss {record.loss:6.4f}",
        f"lr {record.lr:.1e}",
        f"grad {record.grad_norm:4.2f}",
        f"{record.tokens_per_s:>9,.0f} tok/s",
    ]
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.0%}")
    if record.skipped:
        parts.append("SKIPPED")
    if seconds_per_step:
        parts.append(f"ETA {clock((steps - record.step) * seconds_per_step)}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """H:MM:SS."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"
