"""What training reports: metrics.jsonl for programs, one aligned line per step for people, trackers on request.

In:  one dict per step, from rank 0.
Out: <out>/metrics.jsonl, one JSON object per line; lines on the terminal; what sft.training.trackers sends on.

A resume cuts metrics.jsonl back to the step it continues from, so that its steps read like an uninterrupted run's. Between
them every attempt has a header, without "step": {"attempt", "from_step", "ranks", "device", "peak_tflops", "mfu"}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sft.common.files import write_atomic
from sft.common.jsonl import json_lines
from sft.training.trackers import Trackers


def read(file: Path) -> list[dict[str, Any]]:
    """The steps of a metrics file."""
    return [r for r in json_lines(file) if isinstance(r.get("step"), int)]


class Metrics:
    def __init__(
        self,
        out: Path,
        start: int,
        steps: int,
        log: Callable[[str], None],
        header: Mapping[str, Any] | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        """`start` = the last finished step: later records are dropped from the file, headers of attempts stay."""
        self.file = out / "metrics.jsonl"
        self.steps, self.log = steps, log
        kept = [r for r in json_lines(self.file) if "attempt" in r or r.get("step", start + 1) <= start]
        kept += [dict(header)] if header else []
        write_atomic(self.file, b"".join(json.dumps(r).encode() + b"\n" for r in kept))
        self._stream = self.file.open("a", buffering=1)
        self._trackers = trackers or Trackers(log)
        self._seconds = 0.0
        self._timed = 0

    def write(self, record: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(record) + "\n")
        self._trackers.record(record)

    def count(self, seconds: float) -> None:
        """Adds a step's time to the estimate of what remains. The first step pays for start-up and is left out."""
        self._timed += 1
        if self._timed > 1:
            self._seconds += seconds

    def show(self, record: Mapping[str, Any]) -> None:
        self.log(progress_line(record, self.steps, self._seconds / max(1, self._timed - 1)))

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._trackers.close()


def progress_line(record: Mapping[str, Any], steps: int, seconds_per_step: float) -> str:
    width = len(str(steps))
    parts = [
        f"step {record['step']:>{width}}/{steps}",
        f"loss {record['loss']:7.4f}",
        f"lr {record['lr']:.2e}",
        f"grad {record['grad_norm']:6.3f}",
        f"{record['tokens_per_s']:>9,.0f} tok/s",
        f"padding {record['padding']:5.1%}",
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    if "validation_loss" in record:
        parts.append(f"validation {record['validation_loss']:.4f}")
    if record.get("skipped"):
        parts.append("SKIPPED")
    if seconds_per_step:
        parts.append(f"ETA {clock((steps - record['step']) * seconds_per_step)}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"
