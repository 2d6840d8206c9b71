"""make runs: one line for every run, with its stage, step, loss, speed, time left, job, age and size. Standard library only.

    print(listing(Path("runs")))

In:  runs/*/: the manifests of finished stages, train/metrics.jsonl of a training that runs or was stopped, .jobs/*.json.
It asks no scheduler: a job is shown as it was recorded. `make jobs` asks them.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.common import columns
from sft.common.errors import SftError
from sft.formats import job, manifest, metrics
from sft.formats.job import JobRecord
from sft.recipe import schema
from sft.runner import references

TAIL = 1 << 16
"""Bytes at the end of metrics.jsonl that hold the newest steps."""
FRESH_S = 600.0
"""A job's training whose last step is older than this is shown as stopped."""
HEAD = ("RUN", "STAGE", "STEP", "LOSS", "TOKENS/S", "LEFT", "JOB", "AGE", "SIZE")


@dataclass(frozen=True)
class Progress:
    """A training: the steps done and wanted (0 = not known), the newest loss, tokens per second, and seconds left."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    left_s: float | None
    age_s: float

    def line(self, running: bool) -> str:
        """For people: "step 120 of 300, loss 1.234, 5,120 tokens/s, 3 min left"."""
        of = f" of {self.steps}" if self.steps else ""
        left = f", {span(self.left_s)} left" if running and self.left_s else ""
        when = "running" if running else f"stopped {span(self.age_s)} ago"
        return f"{when} at step {self.step}{of}, loss {self.loss:.3f}, {self.tokens_per_s:,.0f} tokens/s{left}"


def progress(train: Path) -> Progress | None:
    """The progress of a training that has not finished, from its metrics; None before its first step."""
    file = train / metrics.NAME
    try:
        found = list(_values(file))
        age = time.time() - file.stat().st_mtime
    except OSError:
        return None
    headers, steps = [v for v in found if "attempt" in v], [v for v in found if "step" in v]
    if not steps:
        return None
    try:
        wanted = next((int(h["steps"]) for h in reversed(headers) if h.get("steps")), 0)
        last, recent = steps[-1], steps[-20:]
        seconds = sorted(float(v.get("seconds", 0)) for v in recent)[len(recent) // 2]
        step = int(last["step"])
        left = (wanted - step) * seconds if wanted > step else None
        return Progress(step, wanted, float(last.get("loss", math.nan)), float(last.get("tokens_per_s", 0)), left, age)
    except (TypeError, ValueError, OverflowError):  # a damaged line: make verify names it
        return None


def _values(file: Path) -> Iterator[dict[str, Any]]:
    """The headers of a metrics file and its newest steps. Lines that a kill cut short are passed over."""
    with file.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
        head = f.readline(TAIL)
        f.seek(max(len(head), size - TAIL))
        for line in (head, *f.read().split(b"\n")):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def is_running(run: Path, stage: str) -> bool:
    """Whether a process on this machine, or one that shares its locks, holds the lock of the stage."""
    try:
        with (run / ".work" / f"{stage}.lock").open("r") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def is_alive(run: Path, going: Progress) -> bool:
    """Whether a training goes on: here, or in a job whose end was not reported and whose last step is recent."""
    if is_running(run, "train"):
        return True
    try:
        ended = JobRecord.read(run / job.FOLDER / "train.json").ended
    except (OSError, SftError):
        return False
    return not ended and going.age_s < FRESH_S


def listing(runs: Path) -> str:
    """The table of all runs, the newest first."""
    found = [(run, _age(run)) for run in references.runs_in(runs) if (run / "run.json").is_file() or _done(run)]
    if not found:
        return f"no runs in {runs}; next: make smoke"
    rows = [_row(run, age) for run, age in sorted(found, key=lambda item: item[1])]
    return columns.table([HEAD, *rows], right=(2, 3, 4, 5, 7, 8))


def _row(run: Path, age: float) -> tuple[str, ...]:
    done = _done(run)
    stage = done[-1] if done else "-"
    running = next((s for s in (*schema.STAGES, "report") if is_running(run, s)), "")
    trained = _trained(run) if "train" in done else None
    going = None if trained else progress(run / "train")
    if trained:
        numbers = (str(trained.step), f"{trained.loss:.3f}", f"{trained.tokens_per_s:,.0f}", "-")
    elif going:
        at = f"{going.step}/{going.steps}" if going.steps else str(going.step)
        alive = is_alive(run, going)
        numbers = (
            at,
            f"{going.loss:.3f}",
            f"{going.tokens_per_s:,.0f}",
            span(going.left_s) if alive and going.left_s else "-",
        )
    else:
        numbers = ("-", "-", "-", "-")
    if running:
        stage = f"{running} …"
    elif going and "train" not in done:
        stage = "train …" if is_alive(run, going) else "train stopped"
    return (run.name, stage, *numbers, _job(run), span(age), size_text(_size(run)))


def _done(run: Path) -> list[str]:
    return [s for s in schema.STAGES if (run / s / manifest.NAME).is_file()]


def _trained(run: Path) -> Progress | None:
    try:
        made = manifest.load(run / "train" / manifest.NAME).metrics
        return Progress(int(made["final_step"]), 0, float(made["loss"]), float(made["tokens_per_s"]), None, 0.0)
    except (OSError, SftError, KeyError, TypeError, ValueError):
        return None


def _job(run: Path) -> str:
    """The newest recorded job: its id where its end was not reported, else how it ended."""
    found: list[JobRecord] = []
    for file in (run / job.FOLDER).glob("*.json"):
        try:
            found.append(JobRecord.read(file))
        except (OSError, SftError):
            continue
    if not found:
        return "-"
    newest = max(found, key=lambda record: record.submitted)
    return columns.cut(f"{newest.job} {newest.ended or newest.cluster}", 20)


def _age(run: Path) -> float:
    """Seconds since a file of the run was last written, of those that every stage writes."""
    files = [
        run / "run.json",
        run / "train" / metrics.NAME,
        *(run / s / manifest.NAME for s in (*schema.STAGES, "report")),
    ]
    times = [f.stat().st_mtime for f in files if f.is_file()]
    return max(0.0, time.time() - max(times, default=run.stat().st_mtime))


def _size(run: Path) -> int:
    """Bytes on this disk: files that are links to others' stages do not count, hard links count once."""
    total, seen = 0, set()
    for folder, _, files in os.walk(run):
        for name in files:
            found = os.lstat(os.path.join(folder, name))
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_size
    return total


def size_text(size: float) -> str:
    """Bytes for people: "1.4 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def span(seconds: float | None) -> str:
    """A duration for people: "45 s", "12 min", "3.5 h", "8 d"."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} d"
