"""The log files of Slurm jobs in runs/<run>/.jobs: printed while they grow, and their last lines.

Attempt K of job N writes <stage>-N.attempt-K.log, part P of an array <stage>-part-N_P.attempt-K.log. Slurm itself writes
to <stage>-N.log between the attempts. <stage>-N.exit holds the exit status that the script left. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from sft.common.columns import say

LONG_LOG = 16384  # bytes
JOBS_SHOWN = 3


def pattern(id: str) -> str:
    """A glob for the logs of a job, or of every part of an array."""
    return f"*-{id}[._]*log"


class LogFollower:
    """Prints the complete lines that are added to log files. A line of an array's part has the part's number in front."""

    def __init__(self, ids: Sequence[str], folder: Path):
        self.patterns, self.folder = [pattern(id) for id in ids], folder
        self.offsets: dict[Path, int] = {}

    def print_new(self, out: IO[str]) -> None:
        for glob in self.patterns:
            for file in sorted(self.folder.glob(glob)):
                self._print_new(file, out)
        out.flush()

    def _print_new(self, file: Path, out: IO[str]) -> None:
        with file.open("rb") as f:
            if file not in self.offsets:
                self.offsets[file] = self._start(f, file, out)
            f.seek(self.offsets[file])
            data = f.read()
        lines = data[: data.rfind(b"\n") + 1]
        self.offsets[file] += len(lines)
        part = re.search(r"-\d+_(\d+)\.(?:attempt-\d+\.)?log$", file.name)
        for line in lines.decode(errors="replace").splitlines():
            say(f"part {part[1]}: {line}" if part else line, out)

    @staticmethod
    def _start(f: IO[bytes], file: Path, out: IO[str]) -> int:
        """Where to begin: at the start of a short log, near the end of one that is long already."""
        size = f.seek(0, os.SEEK_END)
        if size <= LONG_LOG:
            return 0
        f.seek(size - LONG_LOG // 4)
        f.readline()
        say(f"… earlier lines are in {file}", out)
        return f.tell()


def last_lines(ids: Sequence[str], folder: Path, lines: int) -> str:
    """The last lines of the logs of jobs that failed, or of the last job, with the names of the files."""
    logs: dict[str, list[Path]] = {}  # of each job or part: the attempts' logs, then Slurm's own if it is not empty
    for file in [file for id in ids for file in sorted(folder.glob(pattern(id)))]:
        if read(file).strip() or not file.name.endswith(f"{_job_of(file)}.log"):
            logs.setdefault(_job_of(file), []).append(file)
    failed = [j for j in logs if read(folder / f"{j}.exit").strip() not in ("", "0")] or [*logs][-1:]
    texts = [
        f"last lines of {f}:\n" + "\n".join(read(f).splitlines()[-lines:])
        for j in failed[:JOBS_SHOWN]
        for f in logs[j][-2:]
    ]
    return "\n".join(texts) or f"no log in {folder}: the job never started"


def attempts(ids: Sequence[str], folder: Path) -> int:
    """How many times the job has started; of an array, its part that started most often."""
    names = [f.name for id in ids for f in folder.glob(pattern(id))]
    return max((int(m[1]) for name in names if (m := re.search(r"\.attempt-(\d+)\.log$", name))), default=0)


def _job_of(log: Path) -> str:
    """`train-12` or `prepare-part-12_3` of a log's name."""
    return re.sub(r"(\.attempt-\d+)?\.log$", "", log.name)


def read(file: Path) -> str:
    """The file's text, or "" where it cannot be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
