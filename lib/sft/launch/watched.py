"""TODO sft.launch.watched"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft.recipe.schema import Cluster


def job_ended(cluster: Cluster, jobs: Path, training: str, every_s: float = 30.0) -> Callable[[], bool]:
    """Says whether training's own job has come to its end, well or not. Asks its scheduler now and then."""
    from sft.launch.job import LostConnection
    from sft.launch.launcher import open_scheduler

    scheduler = open_scheduler(cluster, jobs)
    asked, over = -every_s, False

    def ended() -> bool:
        nonlocal asked, over
        if not over and time.monotonic() - asked >= every_s:
            asked = time.monotonic()
            with contextlib.suppress(LostConnection):
                over = not scheduler.status(training).active
        return over

    return ended
