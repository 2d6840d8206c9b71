"""Runs a stage as a job: submits it or finds the one that makes it, follows its log, returns its exit status.

    env/<launcher>.sh runs/<run> <stage> COMMAND…        -> main(launcher, ["runs/<run>", "<stage>", *COMMAND])

DETACH=<anything> returns once the job is submitted. DRY_RUN=<anything> prints what would be submitted.

A make that wants what an active job makes follows that job. One that wants something else is refused while the job is
active. How a job ended is reported once, with the end of its log; the next make submits it again. Where the recipe asks
for evaluations during training, a training job gets a second job that evaluates its checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.locks import lock
from sft.common.paths import BUCKETS
from sft.common.process import AGAIN, report_errors
from sft.formats import manifest
from sft.formats.job import JobRecord
from sft.launch.doctor import doctor
from sft.launch.job import CANCELLED, WATCH, Job, LostConnection, SubmittedJob, retried
from sft.launch.launcher import Scheduler, load_launcher, open_scheduler
from sft.recipe.schema import SKY
from sft.runner import plan
from sft.sync import task_data

Log = Callable[[str], None]
VISIBLE_S = 10.0
"""How long a network disk may take to show the manifest of a job that has ended."""
CANCEL_S = 60.0
"""How long an earlier evaluation job may take to end after it was cancelled."""


def main(launcher: str, argv: Sequence[str] | None = None) -> int:
    """Runs `RUN STAGE COMMAND…` through a launcher. Returns the job's exit status; 0 for a detached job or a dry run."""
    argv = sys.argv[1:] if argv is None else argv
    stage = argv[1] if len(argv) > 1 else "launch"
    log = logger(stage)
    with report_errors(stage):
        dry = bool(os.environ.get("DRY_RUN"))
        job = Job.parse(argv, strict=not dry)
        scheduler = load_launcher(launcher).open_scheduler(job.folder, job.cluster)
        if dry:
            watch = watch_job(job, "ID-OF-THE-TRAINING")
            print("\n".join(scheduler.render(j) for j in (job, watch) if j))
            return 0
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            return run_job(job, scheduler, log)
        except KeyboardInterrupt:
            known = SubmittedJob.load(job.record_file)
            log(f"job {known.id if known else '?'} continues; next: the same make follows it again,"
                f" make cancel RECIPE={job.recipe.name} ends it")  # fmt: skip
            return CANCELLED


def run_job(job: Job, scheduler: Scheduler, log: Log) -> int:
    """Submits or finds the job, follows it unless DETACH is set, and checks its manifest. Returns the exit status."""
    submitted = retried(lambda: find_or_submit(job, scheduler, log), log)
    if submitted is None:
        log("another make has finished it")
        return 0
    evaluate_checkpoints(job, submitted, scheduler, log)
    if os.environ.get("DETACH"):
        log(f"job {submitted.id} on {submitted.cluster} is detached; the same make without DETACH follows it,"
            f" make jobs shows its state, make cancel RECIPE={job.recipe.name} ends it")  # fmt: skip
        return 0
    code = follow(submitted, scheduler, log)
    if code == 0:
        check_made(job)
    return code


def check_made(job: Job) -> None:
    """Raises SftError unless the finished stage is visible here within VISIBLE_S. Network disks show it late."""
    file, began = job.run / job.stage / manifest.NAME, time.monotonic()
    while True:
        with contextlib.suppress(OSError, SftError):
            os.listdir(job.run)  # makes the client of a network disk ask its server again
            if manifest.load(file).key == job.key:
                return
        if time.monotonic() - began > VISIBLE_S:
            raise SftError(
                f"{file}: the job succeeded, but this file is missing or of another recipe; next: read the job's log in"
                f" {job.folder}, and check that its node sees this folder"
            )
        time.sleep(0.5)


def is_made(job: Job) -> bool:
    """Whether the stage is finished and current, and its files are readable from this cluster."""
    state = plan.states(job.place, job.recipe)[job.stage]
    return not state.stale and not state.elsewhere


# --- the stage's job --------------------------------------------------------------------------------------------------


def find_or_submit(job: Job, scheduler: Scheduler, log: Log) -> SubmittedJob | None:
    """The job that makes this stage: an active one, one whose end was not reported yet, or a new one.

    None where another make or the job itself has finished the stage since this one was planned. Raises SftError where an
    active job makes the stage from other options or inputs.
    """
    with lock(job.record_file.with_suffix(".lock"), wait=True):
        known = SubmittedJob.load(job.record_file)
        if known and job.cluster.shared_disk and is_made(job):
            return None
        if known and not known.record.ended and is_current(known, job, scheduler, log):
            return known
        doctor.require(job.place, job.recipe, job.stage)
        if job.stage == "evaluate" or (job.stage == "train" and job.recipe.evaluate.every):
            task_data.send(job.place, job.recipe, job.cluster, log)
        submitted = submit(job, scheduler)
        log(f"job {submitted.id} submitted to {job.place.cluster}: {describe(job)}")
        return submitted


def is_current(known: SubmittedJob, job: Job, scheduler: Scheduler, log: Log) -> bool:
    """Whether to follow this job, whose end was not reported yet, instead of submitting a new one. Raises SftError."""
    owner = scheduler if known.cluster == job.place.cluster else scheduler_of(known, job.place)
    status = owner.status(known.id)
    same = known.record.identity == job.identity and known.cluster == job.place.cluster
    if status.active and not same:
        raise SftError(
            f"{known.file}: job {known.id} on {known.cluster} is {status} and makes {job.stage} from other options or"
            f" inputs; next: wait for it, or make cancel RECIPE={job.recipe.name} CLUSTER={known.cluster}"
        )
    if not same:
        return False
    log(f"job {known.id} on {known.cluster}, submitted {known.record.submitted}, is {status}")
    if status.state != "done" or not job.cluster.shared_disk:
        return True  # following a finished job fetches what it made on other disks
    log(f"it left no finished {job.stage}: submitting it again")
    return False


def submit(job: Job, scheduler: Scheduler) -> SubmittedJob:
    """Submits the job and records it. Raises SftError or LostConnection."""
    scheduler.check(job)
    id = scheduler.submit(job)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    submitted = SubmittedJob(job.record_file, JobRecord(id, job.identity, job.place.cluster, tuple(job.command), now))
    submitted.save()
    return submitted


def scheduler_of(job: SubmittedJob, place: plan.Place) -> Scheduler:
    """The scheduler of the cluster that a job was submitted to. Raises SftError."""
    cluster = plan.Place(place.runs, place.data, job.cluster).load_cluster()
    return open_scheduler(cluster, job.file.parent)


def describe(job: Job) -> str:
    """The job's size for people: "2 nodes, 8 GPUs each"."""
    parts = [f"{job.nodes} node{'s' * (job.nodes > 1)}", f"{job.gpus or 'no'} GPU{'s' * (job.gpus != 1)} each"]
    parts += [f"{job.shards} parts and their merge"] * bool(job.shards)
    return ", ".join(parts)


def follow(job: SubmittedJob, scheduler: Scheduler, log: Log) -> int:
    """Prints the log until the job ends, records and reports the end. Returns the exit status (75 = run it again)."""
    code = retried(lambda: scheduler.follow(job.id, sys.stdout), log)
    status = retried(lambda: scheduler.status(job.id), log)
    attempts = 0
    with contextlib.suppress(SftError, LostConnection):
        attempts = scheduler.attempts(job.id)
    if code == 0 and status.state in ("done", "gone"):
        job.end("done", attempts)
        log(f"job {job.id} is done")
        return 0
    job.end(str(status), attempts)
    if code == AGAIN:
        log(f"job {job.id} saved its state and asks to be run again; next: run the same make again")
        return AGAIN
    try:
        tail = scheduler.tail(job.id)
    except (SftError, LostConnection) as e:
        tail = f"cannot read its log: {e}"
    log(f"error: job {job.id} on {job.cluster}: {status}\n{tail}")
    return code or status.code or 1


# --- evaluations during training --------------------------------------------------------------------------------------


def watch_job(job: Job, training: str) -> Job | None:
    """The job that evaluates the checkpoints of the training job with the id `training`, where the recipe asks for one.

    Where no disk outlives a job (`runs` in a bucket), or jobs cannot ask the scheduler (SkyPilot's), training starts it as a
    process of its own job.
    """
    if job.stage != "train" or not job.recipe.evaluate.every:
        return None
    if job.cluster.runs.startswith(BUCKETS) or job.cluster.launcher in SKY:
        return None
    words = job.command[job.command.index(str(job.run)) :]
    return replace(job, stage=WATCH, command=[".venv/bin/python", "stages/watch.py", "--beside", training, *words])


def evaluate_checkpoints(job: Job, training: SubmittedJob, scheduler: Scheduler, log: Log) -> None:
    """Submits the job that evaluates the checkpoints of an active training job, or finds it. Errors become a warning."""
    watch = watch_job(job, training.id)
    if watch is None:
        return
    try:
        with lock(watch.record_file.with_suffix(".lock"), wait=True):
            if not is_active(training, scheduler, log):
                return
            known = SubmittedJob.load(watch.record_file)
            if known and known.cluster == training.cluster and is_active(known, scheduler, log):
                if list(known.record.command) == watch.command:
                    log(f"job {known.id} evaluates the checkpoints")
                    return
                end_job(known, scheduler, log)  # of an earlier training job; its scores stay
            submitted = submit(watch, scheduler)
            log(f"job {submitted.id} submitted to {submitted.cluster}, to evaluate checkpoints: {describe(watch)}")
    except SftError as e:
        log(f"warning: the checkpoints are not evaluated: {e}; next: run the same make again, or make watch")


def is_active(job: SubmittedJob, scheduler: Scheduler, log: Log) -> bool:
    """Whether the job waits or runs. Raises SftError when the scheduler does not answer for an hour."""
    return retried(lambda: scheduler.status(job.id), log).active


def end_job(job: SubmittedJob, scheduler: Scheduler, log: Log) -> None:
    """Cancels a job and waits up to CANCEL_S until it has ended."""
    retried(lambda: scheduler.cancel(job.id), log)
    until = time.monotonic() + CANCEL_S
    while is_active(job, scheduler, log) and time.monotonic() < until:
        time.sleep(0.5)


def logger(stage: str) -> Log:
    """A function that prints a line with the stage's name in front."""
    return lambda text: say(f"[{stage}] {text}")
