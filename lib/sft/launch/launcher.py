"""What a launcher is: a module `sft.launch.<name>` with three functions, a script `env/<name>.sh`, a name in the schema.

    def open_scheduler(folder: Path, cluster: Cluster) -> Scheduler        the jobs of one run; folder = runs/<run>/.jobs
    def check(context: Context) -> Iterator[Row]                           the doctor's checks that ask no scheduler
    def ask(context: Context) -> SchedulerAnswer                   the doctor's checks that ask the scheduler

`env/<name>.sh` runs `python -m sft.launch <name> runs/<run> <stage> COMMAND…`. The name is one of LAUNCHERS in
sft.recipe.schema, and a cluster's file chooses it with `launcher = "<name>"`. A job has SFT_JOB in its environment.
Standard library only.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Protocol, cast

from sft.launch.doctor.context import LauncherChecks, load_checks
from sft.launch.job import Job, Status
from sft.recipe.schema import Cluster

TAIL_LINES = 20
"""Lines of a log that are printed when its job has failed."""


class Scheduler(Protocol):
    """The jobs of one run. Every method raises SftError for what a person can fix and LostConnection for what may be retried."""

    def check(self, job: Job) -> None:
        """Raises SftError for anything that would make the job fail later. Called before every submission."""

    def submit(self, job: Job) -> str:
        """Submits the job and returns its id. Must not submit it twice where an earlier answer was lost."""

    def status(self, id: str) -> Status:
        """The job's state; `gone` for an id that the scheduler does not know."""

    def follow(self, id: str, out: IO[str]) -> int:
        """Writes the log to `out` until the job ends and fetches its results. Returns the exit status."""

    def cancel(self, id: str) -> None:
        """Ends the job."""

    def render(self, job: Job) -> str:
        """What `submit` would submit, as text for `make dry-run`."""

    def tail(self, id: str) -> str:
        """The last lines of the log, and where all of it is."""

    def attempts(self, id: str) -> int:
        """How many times the job has started."""


class Launcher(LauncherChecks, Protocol):
    """The module of a launcher."""

    def open_scheduler(self, folder: Path, cluster: Cluster) -> Scheduler: ...


def load_launcher(name: str) -> Launcher:
    """The module of a launcher by its name in the schema. Raises ModuleNotFoundError where a package that it needs is missing."""
    return cast(Launcher, load_checks(name))


def open_scheduler(cluster: Cluster, folder: Path) -> Scheduler:
    """The scheduler of a cluster for the jobs in `folder`, runs/<run>/.jobs. Raises SftError."""
    return load_launcher(cluster.launcher).open_scheduler(folder, cluster)
