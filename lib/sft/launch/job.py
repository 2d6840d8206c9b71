"""Jobs of a scheduler: one stage of one run, submitted once, followed to its end, found again by the next make.

    env/<launcher>.sh runs/<run> <stage> COMMAND…  ->  main(scheduler) of that launcher; COMMAND names the run's folder
    python -m sft.launch.job jobs RUNS             the records of all runs with the states of their jobs
    python -m sft.launch.job cancel runs/<run>…    ends the jobs of these runs
    python -m sft.launch.job collect runs/<run>…   fetches what their ended jobs made on other disks

`runs/<run>/.jobs/<stage>.json` records the job that makes a stage: id, cluster, command, and the identity (options and
inputs) of what it makes. A call that wants the same thing attaches to that job; one that wants another is refused while
the job lives. How a job ended is told once, with the end of its log; the next call submits again. Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Protocol, TypeVar

from sft import manifest, plan, recipe, schema
from sft.errors import SftError
from sft.launch import doctor
from sft.stage import lock, parse, report_errors

AGAIN = 75
"""Exit status of a stage that saved and asks to be run again (EX_TEMPFAIL)."""
CANCELLED = 130
VISIBLE_S = 10.0
LIVING = ("pending", "running")
STATES = (*LIVING, "done", "failed", "cancelled", "timeout", "gone")
FOLDER = ".jobs"
WATCH = "watch"
"""The job that evaluates the checkpoints of a training that runs: not a stage, and no make waits for it."""
T = TypeVar("T")


class LostConnection(Exception):
    """The scheduler did not answer. The job may well live: ask again."""


@dataclass(frozen=True)
class Status:
    """What a scheduler says about a job: one of STATES, the exit status where there is one, and a reason for people."""

    state: str
    exit_code: int | None = None
    reason: str = ""

    @property
    def living(self) -> bool:
        return self.state in LIVING

    @property
    def code(self) -> int:
        """What the launcher exits with: the stage's own status, or 1 for an end that left none."""
        if self.state == "done":
            return 0
        return CANCELLED if self.state == "cancelled" else self.exit_code or 1

    def __str__(self) -> str:
        code = f", exit status {self.exit_code}" if self.exit_code else ""
        return f"{self.state}{code}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Job:
    """One stage of one run as a scheduler gets it. `command` runs in the repository's root on every node."""

    run: Path  # runs/<run>, as the command names it
    stage: str
    command: list[str]
    place: plan.Place
    cluster: schema.Cluster
    recipe: recipe.Recipe
    identity: str  # sha256 of what the stage will make: its key and its inputs; of the key alone for a stale upstream
    shards: int = 0  # prepare only: an array of this many parts, then their merge
    key: str = ""  # the wanted key, which the finished stage's manifest holds

    @property
    def hardware(self) -> schema.Hardware:
        return self.recipe.hardware(self.place.cluster, "evaluate" if self.stage == WATCH else self.stage)

    @property
    def nodes(self) -> int:
        return self.hardware.nodes

    @property
    def gpus(self) -> int:
        """GPUs on each node: what [on.<cluster>.<stage>] says, else all for training, one for evaluation, none for the rest."""
        if self.stage == WATCH:
            return 0 if self.recipe.evaluate.every_device == "cpu" else max(1, self.hardware.gpus)
        if self.hardware.gpus >= 0:
            return self.hardware.gpus
        return {"train": self.cluster.gpus_per_node, "evaluate": min(1, self.cluster.gpus_per_node)}.get(self.stage, 0)

    @property
    def name(self) -> str:
        return f"{self.run.name}-{self.stage}"

    @property
    def folder(self) -> Path:
        return self.run / FOLDER

    @staticmethod
    def parse(argv: Sequence[str], strict: bool = True) -> Job:
        """The job of `RUN STAGE COMMAND…`. Raises SftError, also for a stale upstream if `strict`."""
        if len(argv) < 3 or argv[0] not in argv[2:]:
            raise SftError("usage: env/<launcher>.sh runs/<run> <stage> COMMAND… (the command names runs/<run>)")
        run, stage, command = argv[0], argv[1], list(argv[2:])
        if stage not in (*schema.STAGES, WATCH):
            raise SftError(f"{stage!r} is no stage that runs as a job; there are: {', '.join(schema.STAGES)}")
        args = parse(stage, command[command.index(run) :])
        place = plan.Place.parse(str(args.run.parent), args.data, args.cluster)
        found = plan.load_run(place, args.run.name, args.overrides)
        shards = _shards(os.environ.get("SHARDS", ""), stage)
        made = "train" if stage == WATCH else stage
        try:
            state, inputs = plan.consumed(place, found, made)
        except SftError:
            if strict:
                raise
            state, inputs = plan.states(place, found)[made], []
        identity = plan.identity(state.key, inputs)
        return Job(args.run, stage, command, place, place.load_cluster(), found, identity, shards, state.key)


def _shards(text: str, stage: str) -> int:
    if not text or stage != "prepare":
        return 0
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise SftError(f"SHARDS={text!r}: a number of parts from 1 to 9999 is expected; next: SHARDS=8 make prepare …")
    return int(text)


class Scheduler(Protocol):
    """What a launcher's module offers as `scheduler(folder, cluster)`; `folder` is the run's .jobs. Every method raises
    SftError for what a person can mend and LostConnection for what is worth another try."""

    def check(self, job: Job) -> None: ...  # before anything is submitted: what would fail later
    def submit(self, job: Job) -> str: ...
    def status(self, id: str) -> Status: ...
    def follow(self, id: str, out: IO[str]) -> int: ...  # the log, until the job ends: its exit status
    def cancel(self, id: str) -> None: ...
    def render(self, job: Job) -> str: ...  # what would be submitted, for people
    def tail(self, id: str, lines: int = 20) -> str: ...  # the end of the log, and where it is
    def attempts(self, id: str) -> int: ...  # how often it has begun: each attempt has a log of its own


def scheduler(launcher: str, folder: Path, cluster: schema.Cluster) -> Scheduler:
    return importlib.import_module(f"sft.launch.{launcher}").scheduler(folder, cluster)


# --- the record -----------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """runs/<run>/.jobs/<stage>.json."""

    file: Path
    job: str
    identity: str
    cluster: str
    command: list[str]
    submitted: str
    ended: str = ""  # what was told of its end; empty while nobody was told
    attempts: int = 0  # how often it had begun by then

    @staticmethod
    def load(file: Path) -> Record | None:
        """None when there is none, or one that cannot be read: then nobody knows of a job."""
        try:
            data = json.loads(file.read_bytes())
            record = Record(file, **data)
        except (OSError, ValueError, TypeError):
            return None
        texts = (record.job, record.identity, record.cluster, record.submitted, record.ended)
        whole = all(isinstance(text, str) for text in texts) and isinstance(record.attempts, int) and record.job
        return record if whole else None

    def save(self) -> None:
        data = {k: v for k, v in vars(self).items() if k != "file"}
        manifest.write_atomic(self.file, json.dumps(data, indent=1).encode() + b"\n")

    def end(self, status: str, attempts: int) -> None:
        self.ended, self.attempts = status, attempts
        self.save()


def records(runs: Path) -> list[Record]:
    """The records of every run, in the order of their names."""
    found = [Record.load(file) for file in sorted(runs.glob(f"[a-z0-9]*/{FOLDER}/*.json"))]
    return [record for record in found if record is not None]


# --- one stage through a scheduler ----------------------------------------------------------------------------------


def retried(action: Callable[[], T], say: Callable[[str], None], patience_s: float = 3600.0) -> T:
    """`action()`, asked again while the scheduler does not answer. Raises SftError after `patience_s` of silence."""
    began, wait = time.monotonic(), 1.0
    while True:
        try:
            return action()
        except LostConnection as e:
            if time.monotonic() - began > patience_s:
                raise SftError(
                    f"no answer for {patience_s:.0f} s: {e}; the job goes on; next: the same make again"
                ) from None
            say(f"no answer: {e}; asking again in {wait:.0f} s, the job goes on")
            time.sleep(wait)
            wait = min(2 * wait, 60.0)


def main(launcher: str, argv: Sequence[str] | None = None) -> int:
    """Submits the stage's job or attaches to the one that runs, follows it and returns its exit status.

    DETACH=<anything> returns once it is submitted; DRY_RUN=<anything> prints what would be.
    """
    argv = sys.argv[1:] if argv is None else argv
    stage = argv[1] if len(argv) > 1 else "launch"
    say = _speaker(stage)
    with report_errors(stage):
        dry = bool(os.environ.get("DRY_RUN"))
        job = Job.parse(argv, strict=not dry)
        backend = scheduler(launcher, job.folder, job.cluster)
        if dry:
            print("\n".join(backend.render(j) for j in (job, *watcher(job, "ID-OF-THE-TRAINING"))))
            return 0
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            record = retried(lambda: find_or_submit(job, backend, say), say)
            if record is None:
                say("made meanwhile")
                return 0
            accompany(job, record, backend, say)
            if os.environ.get("DETACH"):
                say(f"job {record.job} on {record.cluster} is left to itself; the same make without DETACH follows it,"
                    f" make jobs tells its state, make cancel RECIPE={job.recipe.name} ends it")  # fmt: skip
                return 0
            code = follow(record, backend, say)
            if code == 0:
                check_made(job)
            return code
        except KeyboardInterrupt:
            known = Record.load(job.folder / f"{stage}.json")
            say(f"job {known.job if known else '?'} goes on without you; next: the same make follows it again,"
                f" make cancel RECIPE={job.recipe.name} ends it")  # fmt: skip
            return CANCELLED


def check_made(job: Job, patience_s: float = VISIBLE_S) -> None:
    """Raises SftError unless the finished stage is seen from here; a network's disk may take a moment to show it."""
    file, began = job.run / job.stage / manifest.NAME, time.monotonic()
    while True:
        with contextlib.suppress(OSError, SftError):
            os.listdir(job.run)  # asks the file server again
            if manifest.load(file)["key"] == job.key:
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


def find_or_submit(job: Job, backend: Scheduler, say: Callable[[str], None]) -> Record | None:
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
                say(f"job {record.job} on {record.cluster}, submitted {record.submitted}, is {status}")
                if status.state != "done" or not job.cluster.shared_disk:
                    return record  # what a job made on other disks is fetched by following it
                say(f"it left no finished {job.stage}: submitting again")
        doctor.require(job.place, job.recipe, job.stage)
        backend.check(job)
        identifier = backend.submit(job)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(file, identifier, job.identity, job.place.cluster, job.command, now)
        record.save()
        say(f"job {identifier} submitted to {job.place.cluster}: {describe(job)}")
        return record


def watcher(job: Job, training: str) -> list[Job]:
    """The job that evaluates the checkpoints of a training job, where the recipe asks for one. Where no disk outlives a job
    (`runs` in a bucket), training starts it as a process in its own."""
    if job.stage != "train" or not job.recipe.evaluate.every or job.cluster.runs.startswith("gs://"):
        return []
    words = job.command[job.command.index(str(job.run)) :]
    command = [".venv/bin/python", "stages/watch.py", "--beside", training, *words]
    return [replace(job, stage=WATCH, command=command)]


def beside(job: Job) -> str:
    """The id of the training job that this one goes with, or ''."""
    return job.command[job.command.index("--beside") + 1] if job.stage == WATCH else ""


def accompany(job: Job, training: Record, backend: Scheduler, say: Callable[[str], None]) -> None:
    """Submits the evaluation of checkpoints beside a training that lives, or finds it. Training goes on without it."""
    file = job.folder / f"{WATCH}.json"
    for watch in watcher(job, training.job):
        try:
            with lock(file.with_suffix(".lock"), wait=True):
                if not retried(lambda: backend.status(training.job), say).living:
                    return
                known = Record.load(file)
                if (
                    known
                    and known.cluster == training.cluster
                    and retried(partial(backend.status, known.job), say).living
                ):
                    if known.command == watch.command:
                        say(f"checkpoints are evaluated by job {known.job}")
                        return
                    retried(partial(backend.cancel, known.job), say)  # of an earlier training; what it did is kept
                    until = time.monotonic() + 60
                    while retried(partial(backend.status, known.job), say).living and time.monotonic() < until:
                        time.sleep(0.5)
                backend.check(watch)
                now = datetime.now(UTC).isoformat(timespec="seconds")
                found = Record(file, backend.submit(watch), watch.identity, training.cluster, watch.command, now)
                found.save()
                say(f"job {found.job} submitted to {found.cluster}, to evaluate checkpoints: {describe(watch)}")
        except SftError as e:
            say(f"warning: nobody evaluates checkpoints: {e}; next: the same make again, or make watch")


def _backend_of(record: Record, job: Job, backend: Scheduler) -> Scheduler:
    if record.cluster == job.place.cluster:
        return backend
    return _scheduler_of(record, job.place)


def _scheduler_of(record: Record, place: plan.Place) -> Scheduler:
    cluster = plan.Place(place.runs, place.data, record.cluster).load_cluster()
    return scheduler(cluster.launcher, record.file.parent, cluster)


def describe(job: Job) -> str:
    parts = [f"{job.nodes} node{'s' * (job.nodes > 1)}", f"{job.gpus or 'no'} GPU{'s' * (job.gpus != 1)} each"]
    parts += [f"{job.shards} parts and their merge"] * bool(job.shards)
    return ", ".join(parts)


def follow(record: Record, backend: Scheduler, say: Callable[[str], None]) -> int:
    """Streams the log until the job ends, records and tells how, and returns its exit status (75 = run again)."""
    code = retried(lambda: backend.follow(record.job, sys.stdout), say)
    status = retried(lambda: backend.status(record.job), say)
    attempts = 0
    with contextlib.suppress(SftError, LostConnection):
        attempts = backend.attempts(record.job)
    if code == 0 and status.state in ("done", "gone"):
        record.end("done", attempts)
        say(f"job {record.job} is done")
        return 0
    record.end(str(status), attempts)
    if code == AGAIN:
        say(f"job {record.job} saved and asks to be run again; next: the same make continues")
        return AGAIN
    try:
        tail = backend.tail(record.job)
    except (SftError, LostConnection) as e:
        tail = f"its log cannot be read now: {e}"
    say(f"error: job {record.job} on {record.cluster}: {status}\n{tail}")
    return code or status.code or 1


# --- make jobs, make cancel -----------------------------------------------------------------------------------------


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
    say, ended = _speaker("cancel"), 0

    def end(record: Record) -> None:
        nonlocal ended
        backend = _scheduler_of(record, plan.Place(run.parent))
        status = retried(partial(backend.status, record.job), say, 60)
        if status.living:
            retried(partial(backend.cancel, record.job), say, 60)
            ended += 1
            say(f"{record.file.stem}: job {record.job} on {record.cluster} was {status} and is cancelled")

    each(end, open_records(run))
    if not ended:
        raise SftError(f"{run / FOLDER}: no job of this run is waiting or running; next: make jobs lists all")


def collect(run: Path) -> None:
    """Fetches what ended jobs of a run made on other disks, and tells how the others are. Raises SftError when one failed."""
    say, failed, found = _speaker("collect"), [], open_records(run)

    def bring(record: Record) -> None:
        backend = _scheduler_of(record, plan.Place(run.parent))
        status = retried(partial(backend.status, record.job), say, 60)
        say(f"{record.file.stem}: job {record.job} on {record.cluster} is {status}")
        if not status.living and follow(record, backend, say):
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
                sys.exit("usage: python -m sft.launch.job jobs RUNS | cancel runs/<run>… | collect runs/<run>…")
