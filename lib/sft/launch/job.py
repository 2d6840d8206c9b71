"""A job: one stage of one run, submitted once to a scheduler, followed to its end and found again by the next make.

    job = Job.parse(["runs/<run>", "<stage>", *command])      what a launcher submits; the command names the run's folder
    submitted_jobs(Path("runs"))                              the recorded jobs of all runs

`runs/<run>/.jobs/<stage>.json` (sft.formats.job) records the job that makes a stage. Standard library only.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sft.common.errors import SftError
from sft.common.process import INTERRUPTED
from sft.formats.job import FOLDER, JobRecord
from sft.recipe import recipe, schema
from sft.runner import plan
from sft.runner.processes import requested_gpus

CANCELLED = INTERRUPTED
"""The launcher's exit status for a cancelled job."""
ACTIVE = ("pending", "running")
STATES = (*ACTIVE, "done", "failed", "cancelled", "timeout", "gone")
WATCH = "watch"
"""The job that evaluates the checkpoints of a running training job. It is not a stage, and no make waits for it."""
TOOLS = ("to-hf", "to-core")
"""Programs that run as a job of their own, which belongs to no run; see sft.launch.tools."""
TOOL_RUNS = ".tools"
"""The folder beside the runs in which each job of a tool has one of its own."""
T = TypeVar("T")


class LostConnection(Exception):
    """The scheduler did not answer. The job may still run: ask again."""


@dataclass(frozen=True)
class Status:
    """A job's state according to its scheduler: one of STATES, the exit status where there is one, and a reason."""

    state: str
    exit_code: int | None = None
    reason: str = ""

    @property
    def active(self) -> bool:
        """Whether the job waits or runs."""
        return self.state in ACTIVE

    @property
    def code(self) -> int:
        """The launcher's exit status: the stage's own, or 1 where the job left none."""
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
        """GPUs on each node."""
        if self.stage == WATCH:
            return 0 if self.recipe.evaluate.every_device == "cpu" else max(1, self.hardware.gpus)
        return requested_gpus(self.stage, self.hardware, self.cluster)

    @property
    def name(self) -> str:
        return f"{self.run.name}-{self.stage}"

    @property
    def folder(self) -> Path:
        """runs/<run>/.jobs."""
        return self.run / FOLDER

    @property
    def earlier(self) -> tuple[str, ...]:
        """The stages before this one. A tool has none; an evaluation of checkpoints has those of training."""
        made = "train" if self.stage == WATCH else self.stage
        return schema.STAGES[: schema.STAGES.index(made)] if made in schema.STAGES else ()

    @property
    def record_file(self) -> Path:
        """The file of the record of the submitted job, runs/<run>/.jobs/<stage>.json."""
        return self.folder / f"{self.stage}.json"

    @property
    def training(self) -> str:
        """The id of the training job whose checkpoints this job evaluates; empty for a stage's job."""
        return self.command[self.command.index("--beside") + 1] if self.stage == WATCH else ""

    @staticmethod
    def parse(argv: Sequence[str], strict: bool = True) -> Job:
        """The job of `RUN STAGE COMMAND…`. Raises SftError, also for a stale upstream if `strict`."""
        if len(argv) < 3 or argv[0] not in argv[2:]:
            raise SftError("usage: env/<launcher>.sh runs/<run> <stage> COMMAND… (the command names runs/<run>)")
        run, stage, command = argv[0], argv[1], list(argv[2:])
        if stage not in (*schema.STAGES, WATCH):
            raise SftError(f"{stage!r} is not a stage that runs as a job; next: one of {', '.join(schema.STAGES)}")
        from sft.runner.cli import parse_run  # start-up: click is not there yet when the doctor loads a launcher

        options = parse_run(stage, command[command.index(run) :])
        place, found = options.place, options.load_recipe()
        shards = _shards(os.environ.get("SHARDS", ""), stage)
        made = "train" if stage == WATCH else stage
        try:
            state, inputs = plan.consumed(place, found, made)
        except SftError:
            if strict:
                raise
            state, inputs = plan.states(place, found)[made], []
        identity = plan.identity(state.key, inputs)
        return Job(options.run, stage, command, place, place.load_cluster(), found, identity, shards, state.key)


def _shards(text: str, stage: str) -> int:
    if not text or stage != "prepare":
        return 0
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise SftError(f"SHARDS={text!r}: a number of parts from 1 to 9999 is expected; next: SHARDS=8 make prepare …")
    return int(text)


@dataclass(frozen=True)
class SubmittedJob:
    """The record of a job and its file, runs/<run>/.jobs/<stage>.json."""

    file: Path
    record: JobRecord

    @property
    def id(self) -> str:
        return self.record.job

    @property
    def cluster(self) -> str:
        return self.record.cluster

    @property
    def stage(self) -> str:
        return self.file.stem

    @property
    def run(self) -> Path:
        return self.file.parents[1]

    @staticmethod
    def load(file: Path) -> SubmittedJob | None:
        """None where there is no record, or one that cannot be read. The stage is then submitted again."""
        try:
            return SubmittedJob(file, JobRecord.read(file))
        except (OSError, SftError):
            return None

    def save(self) -> None:
        self.record.write(self.file)

    def end(self, status: str, attempts: int) -> None:
        """Records how the job ended and how many times it had started."""
        dataclasses.replace(self.record, ended=status, attempts=attempts).write(self.file)


def submitted_jobs(runs: Path) -> list[SubmittedJob]:
    """The recorded jobs of every run, sorted by run and stage."""
    files = [*sorted(runs.glob(f"[a-z0-9]*/{FOLDER}/*.json")), *sorted(runs.glob(f"{TOOL_RUNS}/*/{FOLDER}/*.json"))]
    found = [SubmittedJob.load(file) for file in files]
    return [job for job in found if job is not None]


def retried(action: Callable[[], T], log: Callable[[str], None], patience_s: float = 3600.0) -> T:
    """`action()`, repeated while the scheduler does not answer. Raises SftError after `patience_s` without an answer."""
    began, wait = time.monotonic(), 1.0
    while True:
        try:
            return action()
        except LostConnection as e:
            if time.monotonic() - began > patience_s:
                raise SftError(
                    f"no answer for {patience_s:.0f} s: {e}; the job continues; next: run the same make again"
                ) from None
            log(f"no answer: {e}; trying again in {wait:.0f} s, the job continues")
            time.sleep(wait)
            wait = min(2 * wait, 60.0)
