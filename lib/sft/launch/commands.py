"""Commands over the recorded jobs of runs.

python -m sft.launch.commands jobs RUNS             lists the jobs of all runs with their states
python -m sft.launch.commands cancel runs/<run>…    ends the active jobs of these runs
python -m sft.launch.commands collect runs/<run>…   fetches what their ended jobs made on other disks
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import click

from sft.common import columns
from sft.common.errors import SftError
from sft.common.process import until_reader_stops
from sft.formats.job import FOLDER
from sft.launch.job import LostConnection, SubmittedJob, T, retried, submitted_jobs
from sft.launch.run import follow, logger, scheduler_of
from sft.runner import plan
from sft.runner.cli import program
from sft.runner.listing import span

PATIENCE_S = 60.0


def list_jobs(runs: Path) -> None:
    """Prints a table of the jobs of all runs, the newest first."""
    place = plan.Place(runs)
    rows = [("RUN", "STAGE", "CLUSTER", "JOB", "AGE", "TRIES", "STATE")]
    for job in sorted(submitted_jobs(runs), key=lambda job: job.record.submitted, reverse=True):
        state, attempts = state_of(job, place)
        rows.append((job.run.name, job.stage, job.cluster, job.id, age(job), str(attempts or "-"), state))
    print(columns.table(rows, right=(4, 5)) if len(rows) > 1 else f"no jobs in {runs}")


def age(job: SubmittedJob) -> str:
    """How long ago the job was submitted, for people; "-" where the record holds no time."""
    try:
        submitted = datetime.fromisoformat(job.record.submitted)
    except ValueError:
        return "-"
    return span(max(0.0, (datetime.now(UTC) - submitted).total_seconds())) if submitted.tzinfo else "-"


def state_of(job: SubmittedJob, place: plan.Place) -> tuple[str, int]:
    """(the job's state, how many times it has started): as recorded for a reported end, else as its scheduler says."""
    if job.record.ended:
        return job.record.ended, job.record.attempts
    try:
        scheduler = scheduler_of(job, place)
        return str(scheduler.status(job.id)), scheduler.attempts(job.id)
    except (SftError, LostConnection) as e:
        return f"unknown: {e}", 0


def cancel(run: Path) -> None:
    """Ends the active jobs of a run. Raises SftError when there is none."""
    log, ended = logger("cancel"), []

    def end(job: SubmittedJob) -> None:
        scheduler = scheduler_of(job, plan.Place(run.parent))
        status = retried(lambda: scheduler.status(job.id), log, PATIENCE_S)
        if status.active:
            retried(lambda: scheduler.cancel(job.id), log, PATIENCE_S)
            ended.append(job.id)
            log(f"{job.stage}: job {job.id} on {job.cluster} was {status} and is cancelled")

    for_each(end, unreported_jobs(run))
    if not ended:
        raise SftError(f"{run / FOLDER}: no job of this run is waiting or running; next: make jobs lists all")


def collect(run: Path) -> None:
    """Reports the jobs of a run and fetches the results of those that ended. Raises SftError when one failed."""
    log, failed, found = logger("collect"), [], unreported_jobs(run)

    def fetch(job: SubmittedJob) -> None:
        scheduler = scheduler_of(job, plan.Place(run.parent))
        status = retried(lambda: scheduler.status(job.id), log, PATIENCE_S)
        log(f"{job.stage}: job {job.id} on {job.cluster} is {status}")
        if not status.active and follow(job, scheduler, log):
            failed.append(job.stage)

    for_each(fetch, found)
    if failed:
        raise SftError(f"{run}: {', '.join(failed)} failed; next: run the same make again, which submits a new job")
    if not found:
        raise SftError(f"{run / FOLDER}: no job of this run is waiting to be collected; next: make jobs lists all")


def unreported_jobs(run: Path) -> list[SubmittedJob]:
    """The jobs of a run that are active, or whose end was not reported yet."""
    return [job for job in submitted_jobs(run.parent) if job.run.name == run.name and not job.record.ended]


def for_each(action: Callable[[T], None], items: Iterable[T]) -> None:
    """Applies `action` to every item, also after errors. Raises SftError with all of them."""
    problems = []
    for item in items:
        try:
            action(item)
        except SftError as e:
            problems.append(str(e))
    if problems:
        raise SftError("\n".join(problems))


@click.group(no_args_is_help=False)
def group() -> None:
    """The jobs of runs on a cluster with a scheduler."""


@group.command("jobs")
@click.argument("runs", type=click.Path(path_type=Path))
def _jobs(runs: Path) -> None:
    """Lists the jobs of all runs in the folder RUNS, with their attempts and states."""
    with until_reader_stops():
        list_jobs(runs)


@group.command("cancel")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
def _cancel(runs: tuple[Path, ...]) -> None:
    """Ends the active jobs of these runs."""
    for_each(cancel, runs)


@group.command("collect")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
def _collect(runs: tuple[Path, ...]) -> None:
    """Fetches what the ended jobs of these runs made on other disks."""
    for_each(collect, runs)


if __name__ == "__main__":
    sys.exit(program("launch", "python -m sft.launch.commands")(group)())
