"""A launcher for tests, as a contributor would add one: lib/sft/launch/flux.py. See tests/test_launcher.py.

Stages are background processes of this machine, started with bash. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sft.common.errors import SftError
from sft.launch.doctor.context import OK, RED, Context, Row, SchedulerAnswer
from sft.launch.job import Job, Status
from sft.launch.launcher import TAIL_LINES
from sft.recipe.schema import Cluster

POLL_S = 0.2


class Flux:
    """The processes of one run. An id is `<stage>-<pid>`; the log and the exit status are files of that name in `folder`."""

    def __init__(self, folder: Path, cluster: Cluster):
        self.folder, self.cluster = folder.absolute(), cluster

    def check(self, job: Job) -> None:
        if not shutil.which("bash"):
            raise SftError("bash: not found; next: install it")

    def render(self, job: Job) -> str:
        return f"bash -c {shlex.quote(shlex.join(job.command))}"

    def submit(self, job: Job) -> str:
        script = f'{shlex.join(job.command)}; echo $? >"$0-$$.part"; mv "$0-$$.part" "$0-$$.exit"'
        environment = {**os.environ, **self.cluster.env, "SFT_JOB": "flux"}
        log = self.folder / f"{job.stage}.log"
        with log.open("w") as out:
            process = subprocess.Popen(["bash", "-c", script, str(self.folder / job.stage)], env=environment,
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)  # fmt: skip
        id = f"{job.stage}-{process.pid}"
        log.rename(self.folder / f"{id}.log")
        return id

    def status(self, id: str) -> Status:
        with contextlib.suppress(FileNotFoundError):
            code = int((self.folder / f"{id}.exit").read_text())
            return Status("failed" if code else "done", code)
        if (self.folder / f"{id}.cancelled").exists():
            return Status("cancelled")
        return Status("running" if Path(f"/proc/{id.rpartition('-')[2]}").exists() else "gone")

    def follow(self, id: str, out: IO[str]) -> int:
        with (self.folder / f"{id}.log").open() as log:
            while True:
                status = self.status(id)
                out.write(log.read())
                out.flush()
                if not status.active:
                    return status.code
                time.sleep(POLL_S)

    def cancel(self, id: str) -> None:
        (self.folder / f"{id}.cancelled").touch()
        os.killpg(int(id.rpartition("-")[2]), signal.SIGTERM)

    def tail(self, id: str) -> str:
        file = self.folder / f"{id}.log"
        return f"last lines of {file}:\n" + "\n".join(file.read_text().splitlines()[-TAIL_LINES:])

    def attempts(self, id: str) -> int:
        return 1


def open_scheduler(folder: Path, cluster: Cluster) -> Flux:
    return Flux(folder, cluster)


def check(context: Context) -> Iterator[Row]:
    yield (
        Row(OK, "scheduler", "flux: bash is here") if shutil.which("bash") else Row(RED, "scheduler", "bash: not found")
    )


def ask(context: Context) -> SchedulerAnswer:
    return SchedulerAnswer("NVIDIA L40S", (Row(OK, "flux", "would accept the job"),))
