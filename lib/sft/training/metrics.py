"""What training reports: metrics.jsonl for programs, one aligned line per step for people, and trackers.

In:  one StepRecord per step, on rank 0.
Out: <out>/metrics.jsonl (sft.formats.metrics), lines on the terminal, and what sft.training.trackers sends.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sft.common.files import write_atomic
from sft.formats import metrics as metrics_format
from sft.formats.metrics import Attempt, StepRecord, read_metrics
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
    ) -> None:
        """`start`: the last finished step. Later steps are removed from the file. `steps`: of the complete run."""
        self.file = out / metrics_format.NAME
        self.steps, self.log = steps, log
        records = [r for r in read_metrics(self.file) if isinstance(r, Attempt) or r.step <= start]
        records += [header] if header else []
        write_atomic(self.file, b"".join(r.to_bytes() for r in records))
        self._stream = self.file.open("ab")
        self._trackers = trackers or Trackers(log)
        self._seconds = 0.0
        self._timed = 0

    def write(self, record: StepRecord) -> None:
        self._stream.write(record.to_bytes())
        self._stream.flush()
        self._trackers.record(record.to_value())

    def count(self, seconds: float) -> None:
        """Adds a step's time to the estimate of the remaining time. The first step includes start-up and is left
        out."""
        self._timed += 1
        if self._timed > 1:
            self._seconds += seconds

    def show(self, record: StepRecord) -> None:
        self.log(progress_line(record, self.steps, self._seconds / max(1, self._timed - 1)))

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._trackers.close()


def progress_line(record: StepRecord, steps: int, seconds_per_step: float) -> str:
    """The line of a step on the terminal. `steps`: of the complete run."""
    width = len(str(steps))
    parts = [
        f"step {record.step:>{width}}/{steps}",
        f"loss {record.loss:7.4f}",
        f"lr {record.lr:.2e}",
        f"grad {record.grad_norm:6.3f}",
        f"{record.tokens_per_s:>9,.0f} tok/s",
        f"padding {record.padding:5.1%}",
    ]
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.1%}")
    if record.validation_loss is not None:
        parts.append(f"validation {record.validation_loss:.4f}")
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
