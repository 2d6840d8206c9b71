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

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeVar

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.recipe import recipe, schema
from sft.runner import plan
from sft.runner.stage import parse

AGAIN = 75
"""Exit status of a stage that saved and asks to be run again (EX_TEMPFAIL)."""
CANCELLED = 130
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
    """What a launcher's module offers as `open_scheduler(folder, cluster)`; `folder` is the run's .jobs. Every method raises
    SftError for what a person can mend and LostConnection for what is worth another try."""

    def check(self, job: Job) -> None: ...  # before anything is submitted: what would fail later
    def submit(self, job: Job) -> str: ...
    def status(self, id: str) -> Status: ...
    def follow(self, id: str, out: IO[str]) -> int: ...  # the log, until the job ends: its exit status
    def cancel(self, id: str) -> None: ...
    def render(self, job: Job) -> str: ...  # what would be submitted, for people
    def tail(self, id: str, lines: int = 20) -> str: ...  # the end of the log, and where it is
    def attempts(self, id: str) -> int: ...  # how often it has begun: each attempt has a log of its own


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
        write_atomic(self.file, json.dumps(data, indent=1).encode() + b"\n")

    def end(self, status: str, attempts: int) -> None:
        self.ended, self.attempts = status, attempts
        self.save()


def records(runs: Path) -> list[Record]:
    """The records of every run, in the order of their names."""
    found = [Record.load(file) for file in sorted(runs.glob(f"[a-z0-9]*/{FOLDER}/*.json"))]
    return [record for record in found if record is not None]


def retried(action: Callable[[], T], log: Callable[[str], None], patience_s: float = 3600.0) -> T:
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
            log(f"no answer: {e}; asking again in {wait:.0f} s, the job goes on")
            time.sleep(wait)
            wait = min(2 * wait, 60.0)


def beside(job: Job) -> str:
    """The id of the training job that this one goes with, or ''."""
    return job.command[job.command.index("--beside") + 1] if job.stage == WATCH else ""
