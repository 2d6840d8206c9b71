"""Tells the job that evaluates checkpoints whether the job that trains has ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from sft.launch.job import LostConnection
from sft.launch.launcher import open_scheduler
from sft.recipe.schema import Cluster

EVERY_S = 30.0


def job_ended(cluster: Cluster, jobs: Path, training: str) -> Callable[[], bool]:
    """A function that returns whether the job `training` has ended, with or without success.

    It asks the scheduler at most every EVERY_S seconds. `jobs` is the folder with the records of jobs.
    """
    scheduler = open_scheduler(cluster, jobs)
    last, over = -EVERY_S, False

    def ended() -> bool:
        nonlocal last, over
        if not over and time.monotonic() - last >= EVERY_S:
            last = time.monotonic()
            with contextlib.suppress(LostConnection):
                over = not scheduler.status(training).active
        return over

    return ended
