"""Stages as Beaker experiments. Beaker's client is imported only when a launcher asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sft.launch.doctor.context import Context, Row, SchedulerAnswer
from sft.launch.launcher import Scheduler
from sft.recipe.schema import Cluster


def open_scheduler(folder: Path, cluster: Cluster) -> Scheduler:
    from sft.launch.beaker import scheduler  # start-up: Beaker's client takes a second, and jobs do not need it

    return scheduler.BeakerScheduler(folder, cluster)


def check(context: Context) -> Iterator[Row]:
    from sft.launch.beaker import checks  # start-up: as above

    return checks.check(context)


def ask(context: Context) -> SchedulerAnswer:
    from sft.launch.beaker import checks  # start-up: as above

    return checks.ask(context)
