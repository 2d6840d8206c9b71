"""Tells the job that evaluates checkpoints whether the job that trains has ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from sft.launch.job import LostConnection
from sft.launch.launcher import open_scheduler
from sft.recipe.schema import Cluster


def job_ended(cluster: Cluster, jobs: Path, training: str, every_s: float = 30.0) -> Callable[[], bool]:
    """A function that returns whether the job `training` has ended, with or without success.

    It asks the scheduler at most every `every_s` seconds. `jobs` is the folder with the records of jobs.
    """
    scheduler = open_scheduler(cluster, jobs)
    last, over = -every_s, False

    def ended() -> bool:
        nonlocal last, over
        if not over and time.monotonic() - last >= every_s:
            last = time.monotonic()
            with contextlib.suppress(LostConnection):
                over = not scheduler.status(training).active
        return over

    return ended
