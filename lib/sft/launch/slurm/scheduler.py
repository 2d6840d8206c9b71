"""Slurm's jobs: submitted with sbatch, found again by their comment, followed through their log files.

    env/slurm.sh runs/<run> <stage> COMMAND…      submits or finds the job, follows its log, returns its exit status

An id is a Slurm job id, or `array+merge` of a prepare with SHARDS=n: an array of n parts, and a job that merges them.
Standard library only.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from pathlib import Path
from typing import IO

from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.launch.job import Job, LostConnection, Status, retried
from sft.launch.launcher import TAIL_LINES
from sft.launch.slurm import client, logs
from sft.launch.slurm.logs import LogFollower
from sft.launch.slurm.script import check_site, comment, job_script
from sft.recipe import schema

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")
SHORTEST_POLL_S, LONGEST_POLL_S = 0.25, 10.0
READ_S = 0.2  # between two looks at the log files
SETTLING_S = 10.0
"""How long Slurm is asked often after a script has ended: it knows the end soon, unless it runs the job again."""


class Slurm:
    """The jobs of one run; see sft.launch.launcher.Scheduler."""

    def __init__(self, folder: Path, cluster: schema.Cluster):
        self.folder, self.cluster = folder.absolute(), cluster

    def check(self, job: Job) -> None:
        for command in COMMANDS:
            if not shutil.which(command):
                raise SftError(f"{command}: not found; next: run this on a login node of the cluster")
        self.render(job)

    def render(self, job: Job) -> str:
        try:
            check_site(self.cluster, job.hardware, job.gpus)
        except SftError as e:
            name = job.place.cluster
            raise SftError(f"env/{name}.toml, or [on.{name}.{job.stage}] of the recipe: {e}") from None
        names = [f"{job.stage}-part", job.stage] if job.shards else [job.stage]
        return "\n".join(job_script(job, name, self.folder) for name in names)

    # --- submission -----------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> str:
        """Submits the stage, or takes over a queued job that makes the same: one that was submitted by hand, or whose answer was lost."""
        if known := self._queued(job, job.stage):
            return known
        if not job.shards:
            # An evaluation of checkpoints starts after the training job has.
            return self._sbatch(job, job.stage, *[f"--dependency=after:{job.training}"] * bool(job.training))
        part = f"{job.stage}-part"
        array = self._queued(job, part) or self._sbatch(job, part)
        return f"{array}+{self._sbatch(job, job.stage, f'--dependency=afterok:{array}', '--kill-on-invalid-dep=yes')}"

    def _sbatch(self, job: Job, name: str, *options: str) -> str:
        """Writes the script of the stage or part and submits it. Returns the job id."""
        script = self.folder / f"{name}.sbatch"
        write_atomic(script, job_script(job, name, self.folder).encode())
        # The address of a webhook is a secret: it is in the job's environment and not in its script.
        variables = {"SFT_ON_EVENT": self.cluster.on_event} if self.cluster.on_event else None
        answer = client.run("sbatch", "--parsable", *options, str(script), variables=variables)
        if not (match := re.match(r"(\d+)", answer)):
            raise SftError(f"sbatch answered {answer!r}, which is not a job id; next: squeue --me, and {script}")
        return match[1]

    def _queued(self, job: Job, name: str) -> str:
        """The id of a queued job that makes the same in the same folder, or "". Raises SftError for one from other options."""
        called = f"--name={job.run.name}-{name}"
        answer = client.run("squeue", "--me", "-h", "-t", "PENDING,RUNNING,SUSPENDED", called, "-o", "%F|%k")
        mine = comment(job, name)
        for line in answer.splitlines():
            id, _, found = line.partition("|")
            if found.strip() == mine:
                return id
            if found.startswith(mine.rpartition("#")[0] + "#"):
                raise SftError(f"job {id} named {job.run.name}-{name} is in the queue already, from other options or inputs;"
                               f" next: wait for it, or scancel {id}")  # fmt: skip
        return ""

    # --- a submitted job ------------------------------------------------------------------------------------------

    def status(self, id: str) -> Status:
        *array, last = id.split("+")
        if array:
            parts = self._status(array[0])
            if parts.state not in ("done", "gone"):
                return parts
        return self._status(last)

    def _status(self, id: str) -> Status:
        try:
            answer = client.run("scontrol", "show", "job", "--oneliner", id)
        except client.UnknownJob:
            return self._forgotten(id)
        found = [client.parse_status(line) for line in answer.splitlines() if "JobState=" in line]
        if not found:
            return self._forgotten(id)
        return found[0] if len(found) == 1 else client.status_of_array(found)

    def _forgotten(self, id: str) -> Status:
        """The status of a job that the controller no longer knows: from its script's exit status, else from the accounting."""
        files = [file for name in (f"*-{id}.exit", f"*-{id}_*.exit") for file in self.folder.glob(name)]
        codes = [int(text) for file in files if (text := logs.read(file).strip()).isdigit()]
        if codes:
            return Status("failed" if max(codes) else "done", max(codes))
        if shutil.which("sacct"):
            try:
                answer = client.run("sacct", "-X", "-n", "-P", "-j", id, "-o", "State,ExitCode")
            except (SftError, LostConnection):
                answer = ""
            if match := re.match(r"(\w+)[^|]*\|(\d+:\d+)", answer):
                return client.status_of(match[1], client.exit_code(match[2]), "")
        return Status("gone", None, "Slurm no longer knows it, and it left no exit status: killed or cancelled")

    def follow(self, id: str, out: IO[str]) -> int:
        follower, printed, pause = LogFollower(id.split("+"), self.folder), "", SHORTEST_POLL_S
        while True:
            status = retried(lambda: self.status(id), lambda text: say(text, out))
            if str(status) != printed and status.active:
                printed = str(status)
                say(f"job {id}: {printed}", out)
            wake = time.monotonic() + pause
            while True:  # the log is read more often than Slurm is asked
                follower.print_new(out)
                if not status.active or time.monotonic() >= wake or self._just_ended(id):
                    break
                time.sleep(READ_S)
            if not status.active:
                return status.code
            time.sleep(READ_S)
            pause = SHORTEST_POLL_S if self._just_ended(id) else min(1.3 * pause, LONGEST_POLL_S)

    def _just_ended(self, id: str) -> bool:
        """Whether the job's script has ended within the last SETTLING_S."""
        for file in self.folder.glob(f"*-{id.split('+')[-1]}.exit"):
            with contextlib.suppress(OSError):  # the next attempt removes it
                if abs(time.time() - file.stat().st_mtime) < SETTLING_S:
                    return True
        return False

    def cancel(self, id: str) -> None:
        client.run("scancel", *id.split("+"))

    def tail(self, id: str) -> str:
        return logs.last_lines(id.split("+"), self.folder, TAIL_LINES)

    def attempts(self, id: str) -> int:
        return logs.attempts(id.split("+"), self.folder)


def open_scheduler(folder: Path, cluster: schema.Cluster) -> Slurm:
    return Slurm(folder, cluster)
