"""TODO sft.launch.commands"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from sft.common.errors import SftError
from sft.common.locks import lock
from sft.common.process import report_errors
from sft.formats import manifest
from sft.launch.doctor import doctor
from sft.launch.job import AGAIN, CANCELLED, FOLDER, WATCH, Job, LostConnection, Record, Scheduler, T, records, retried
from sft.recipe import schema
from sft.runner import plan

VISIBLE_S = 10.0


def open_scheduler(launcher: str, folder: Path, cluster: schema.Cluster) -> Scheduler:
    return importlib.import_module(f"sft.launch.{launcher}").open_scheduler(folder, cluster)


def main(launcher: str, argv: Sequence[str] | None = None) -> int:
    """Submits the stage's job or attaches to the one that runs, follows it and returns its exit status.

    DETACH=<anything> returns once it is submitted; DRY_RUN=<anything> prints what would be.
    """
    argv = sys.argv[1:] if argv is None else argv
    stage = argv[1] if len(argv) > 1 else "launch"
    log = _speaker(stage)
    with report_errors(stage):
        dry = bool(os.environ.get("DRY_RUN"))
        job = Job.parse(argv, strict=not dry)
        backend = open_scheduler(launcher, job.folder, job.cluster)
        if dry:
            print("\n".join(backend.render(j) for j in (job, *watcher(job, "ID-OF-THE-TRAINING"))))
            return 0
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            record = retried(lambda: find_or_submit(job, backend, log), log)
            if record is None:
                log("made meanwhile")
                return 0
            accompany(job, record, backend, log)
            if os.environ.get("DETACH"):
                log(f"job {record.job} on {record.cluster} is left to itself; the same make without DETACH follows it,"
                    f" make jobs tells its state, make cancel RECIPE={job.recipe.name} ends it")  # fmt: skip
                return 0
            code = follow(record, backend, log)
            if code == 0:
                check_made(job)
            return code
        except KeyboardInterrupt:
            known = Record.load(job.folder / f"{stage}.json")
            log(f"job {known.job if known else '?'} goes on without you; next: the same make follows it again,"
                f" make cancel RECIPE={job.recipe.name} ends it")  # fmt: skip
            return CANCELLED


def check_made(job: Job, patience_s: float = VISIBLE_S) -> None:
    """Raises SftError unless the finished stage is seen from here; a network's disk may take a moment to show it."""
    file, began = job.run / job.stage / manifest.NAME, time.monotonic()
    while True:
        with contextlib.suppress(OSError, SftError):
            os.listdir(job.run)  # asks the file server again
            if manifest.load(file).key == job.key:
                return
        if time.monotonic() - began > patience_s:
            raise SftError(
                f"{file}: the job ended well, but this is not there or not what was asked for; next: look at the job's log in"
                f" {job.folder}, and whether its node sees this folder"
            )
        time.sleep(0.5)


def is_made(job: Job) -> bool:
    state = plan.states(job.place, job.recipe)[job.stage]
    return not state.stale and not state.elsewhere


def find_or_submit(job: Job, backend: Scheduler, log: Callable[[str], None]) -> Record | None:
    """The record of the job that makes this stage: the living one, the ended one nobody was told of, or a new one. None when
    another make that followed the same job, or the job itself, has finished the stage since this one was planned."""
    file = job.folder / f"{job.stage}.json"
    with lock(file.with_suffix(".lock"), wait=True):
        record = Record.load(file)
        if record and job.cluster.shared_disk and is_made(job):
            return None
        if record and not record.ended:
            owner = _backend_of(record, job, backend)
            status = owner.status(record.job)
            same = record.identity == job.identity and record.cluster == job.place.cluster
            if status.living and not same:
                raise SftError(
                    f"{file}: job {record.job} on {record.cluster} is {status} and makes {job.stage} from other options or"
                    f" inputs; next: wait for it, or make cancel RECIPE={job.recipe.name} CLUSTER={record.cluster}"
                )
            if same:
                log(f"job {record.job} on {record.cluster}, submitted {record.submitted}, is {status}")
                if status.state != "done" or not job.cluster.shared_disk:
                    return record  # what a job made on other disks is fetched by following it
                log(f"it left no finished {job.stage}: submitting again")
        doctor.require(job.place, job.recipe, job.stage)
        backend.check(job)
        identifier = backend.submit(job)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(file, identifier, job.identity, job.place.cluster, job.command, now)
        record.save()
        log(f"job {identifier} submitted to {job.place.cluster}: {describe(job)}")
        return record


def watcher(job: Job, training: str) -> list[Job]:
    """The job that evaluates the checkpoints of a training job, where the recipe asks for one. Where no disk outlives a job
    (`runs` in a bucket), training starts it as a process in its own."""
    if job.stage != "train" or not job.recipe.evaluate.every or job.cluster.runs.startswith("gs://"):
        return []
    words = job.command[job.command.index(str(job.run)) :]
    command = [".venv/bin/python", "stages/watch.py", "--beside", training, *words]
    return [replace(job, stage=WATCH, command=command)]


def accompany(job: Job, training: Record, backend: Scheduler, log: Callable[[str], None]) -> None:
    """Submits the evaluation of checkpoints beside a training that lives, or finds it. Training goes on without it."""
    file = job.folder / f"{WATCH}.json"
    for watch in watcher(job, training.job):
        try:
            with lock(file.with_suffix(".lock"), wait=True):
                if not retried(lambda: backend.status(training.job), log).living:
                    return
                known = Record.load(file)
                if (
                    known
                    and known.cluster == training.cluster
                    and retried(partial(backend.status, known.job), log).living
                ):
                    if known.command == watch.command:
                        log(f"checkpoints are evaluated by job {known.job}")
                        return
                    retried(partial(backend.cancel, known.job), log)  # of an earlier training; what it did is kept
                    until = time.monotonic() + 60
                    while retried(partial(backend.status, known.job), log).living and time.monotonic() < until:
                        time.sleep(0.5)
                backend.check(watch)
                now = datetime.now(UTC).isoformat(timespec="seconds")
                found = Record(file, backend.submit(watch), watch.identity, training.cluster, watch.command, now)
                found.save()
                log(f"job {found.job} submitted to {found.cluster}, to evaluate checkpoints: {describe(watch)}")
        except SftError as e:
            log(f"warning: nobody evaluates checkpoints: {e}; next: the same make again, or make watch")


def _backend_of(record: Record, job: Job, backend: Scheduler) -> Scheduler:
    if record.cluster == job.place.cluster:
        return backend
    return _scheduler_of(record, job.place)


def _scheduler_of(record: Record, place: plan.Place) -> Scheduler:
    cluster = plan.Place(place.runs, place.data, record.cluster).load_cluster()
    return open_scheduler(cluster.launcher, record.file.parent, cluster)


def describe(job: Job) -> str:
    parts = [f"{job.nodes} node{'s' * (job.nodes > 1)}", f"{job.gpus or 'no'} GPU{'s' * (job.gpus != 1)} each"]
    parts += [f"{job.shards} parts and their merge"] * bool(job.shards)
    return ", ".join(parts)


def follow(record: Record, backend: Scheduler, log: Callable[[str], None]) -> int:
    """Streams the log until the job ends, records and tells how, and returns its exit status (75 = run again)."""
    code = retried(lambda: backend.follow(record.job, sys.stdout), log)
    status = retried(lambda: backend.status(record.job), log)
    attempts = 0
    with contextlib.suppress(SftError, LostConnection):
        attempts = backend.attempts(record.job)
    if code == 0 and status.state in ("done", "gone"):
        record.end("done", attempts)
        log(f"job {record.job} is done")
        return 0
    record.end(str(status), attempts)
    if code == AGAIN:
        log(f"job {record.job} saved and asks to be run again; next: the same make continues")
        return AGAIN
    try:
        tail = backend.tail(record.job)
    except (SftError, LostConnection) as e:
        tail = f"its log cannot be read now: {e}"
    log(f"error: job {record.job} on {record.cluster}: {status}\n{tail}")
    return code or status.code or 1


def state_of(record: Record, place: plan.Place) -> tuple[str, int]:
    """(its state, how often it has begun)."""
    if record.ended:
        return record.ended, record.attempts
    try:
        backend = _scheduler_of(record, place)
        return str(backend.status(record.job)), backend.attempts(record.job)
    except (SftError, LostConnection) as e:
        return f"unknown: {e}", 0


def list_jobs(runs: Path) -> None:
    place = plan.Place(runs)
    rows = [("RUN", "STAGE", "CLUSTER", "JOB", "SUBMITTED", "ATTEMPTS", "STATE")]
    for r in records(runs):
        state, attempts = state_of(r, place)
        rows.append((r.file.parents[1].name, r.file.stem, r.cluster, r.job, r.submitted, str(attempts or "-"), state))
    if len(rows) == 1:
        print(f"no jobs in {runs}")
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def each(action: Callable[[T], None], items: Iterable[T]) -> None:
    """`action` of every item, whatever the others do. Raises SftError with all that went wrong."""
    problems = []
    for item in items:
        try:
            action(item)
        except SftError as e:
            problems.append(str(e))
    if problems:
        raise SftError("\n".join(problems))


def open_records(run: Path) -> list[Record]:
    """The records of a run whose end nobody was told of."""
    return [r for r in records(run.parent) if r.file.parents[1].name == run.name and not r.ended]


def cancel(run: Path) -> None:
    """Ends the living jobs of a run. Raises SftError when there is none."""
    log, ended = _speaker("cancel"), 0

    def end(record: Record) -> None:
        nonlocal ended
        backend = _scheduler_of(record, plan.Place(run.parent))
        status = retried(partial(backend.status, record.job), log, 60)
        if status.living:
            retried(partial(backend.cancel, record.job), log, 60)
            ended += 1
            log(f"{record.file.stem}: job {record.job} on {record.cluster} was {status} and is cancelled")

    each(end, open_records(run))
    if not ended:
        raise SftError(f"{run / FOLDER}: no job of this run is waiting or running; next: make jobs lists all")


def collect(run: Path) -> None:
    """Fetches what ended jobs of a run made on other disks, and tells how the others are. Raises SftError when one failed."""
    log, failed, found = _speaker("collect"), [], open_records(run)

    def bring(record: Record) -> None:
        backend = _scheduler_of(record, plan.Place(run.parent))
        status = retried(partial(backend.status, record.job), log, 60)
        log(f"{record.file.stem}: job {record.job} on {record.cluster} is {status}")
        if not status.living and follow(record, backend, log):
            failed.append(record.file.stem)

    each(bring, found)
    if failed:
        raise SftError(f"{run}: {', '.join(failed)} failed; next: the same make again submits a new job")
    if not found:
        raise SftError(f"{run / FOLDER}: no job of this run is waiting to be collected; next: make jobs lists all")


def _speaker(stage: str) -> Callable[[str], None]:
    return lambda text: print(f"[{stage}] {text}", flush=True)


if __name__ == "__main__":
    with report_errors("jobs"), contextlib.suppress(BrokenPipeError):
        match sys.argv[1:]:
            case ["jobs", runs]:
                list_jobs(Path(runs))
            case ["cancel", *folders] if folders:
                each(cancel, map(Path, folders))
            case ["collect", *folders] if folders:
                each(collect, map(Path, folders))
            case _:
                sys.exit("usage: python -m sft.launch.commands jobs RUNS | cancel runs/<run>… | collect runs/<run>…")
