"""SkyPilot's managed jobs: launched once, found again by their name, followed, and their small files fetched from the bucket.

    env/sky.sh runs/<run> <stage> COMMAND…      launches or finds the job, follows its log, returns its exit status

An id is that of a managed job (`sky jobs queue`). SkyPilot itself recovers a job from a lost machine, and starts one again that
has saved and exits with 75 (`job_recovery`). Standard library only, but for the task's YAML and buckets.
"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.launch import code, far
from sft.launch.job import TOOL_RUNS, Job, Status
from sft.launch.launcher import TAIL_LINES
from sft.launch.sky import client, task
from sft.recipe import schema
from sft.runner import plan

POLL_S = 15.0
"""Between two questions about a job: each starts a process of `sky`, which takes seconds of a core."""
PREFIX = re.compile(r"\((?:[^()]*?rank=(\d+), )?(?:[^(),]*,? )?pid=\d+[^()]*\) ?")
"""What SkyPilot writes before each line of a job: (name, pid=123), of several nodes (worker1, rank=1, pid=123, ip=10.0.0.2)."""
OWN_LINE = re.compile(r"\s*(├──|└──|⚙|✓|📋)|Showing the last \d+ lines|Start streaming logs")
"""What SkyPilot says about its progress."""


class Sky:
    """The managed jobs of one run; see sft.launch.launcher.Scheduler."""

    def __init__(self, folder: Path, cluster: schema.Cluster):
        self.folder, self.cluster = folder, cluster

    # --- submission -----------------------------------------------------------------------------------------------

    def check(self, job: Job) -> None:
        client.find()
        task.check_cluster(job.place.cluster, self.cluster)
        if job.shards:
            raise SftError("SHARDS: jobs of SkyPilot have no arrays; next: the same make without SHARDS")
        if missing := missing_secrets(self.cluster):
            raise SftError(
                f"env/{job.place.cluster}.toml: 'secrets': not set here: {', '.join(missing)}; next: export them in the shell"
                " that runs make, or move them to [optional_secrets]"
            )
        self._task(job)

    def render(self, job: Job) -> str:
        return f"# sky jobs launch {' '.join(task.options(self.cluster))} FILE\n" + task.text(
            self._task(job, strict=False)
        )

    def submit(self, job: Job) -> str:
        """Launches the job, or takes over an active one that makes the same in the same place: its answer was lost."""
        name = task.name_of(job)
        if known := self._active(name):
            return known
        made = self._task(job)
        for address, folder in task.uploads(job).values():
            from sft.launch.bucket_runs import send_folder  # start-up: storages, not needed with a shared disk

            send_folder(folder, address, job.place.cache)
        file = self.folder.absolute() / f"{job.stage}.sky.yaml"
        write_atomic(file, task.text(made).encode())
        words = ["jobs", "launch", *task.options(self.cluster), str(file)]
        values = {variable: os.environ[source] for variable, source in task.secrets(self.cluster).items()}
        answer = client.run(*words, variables=values, limit_s=client.LAUNCH_S)
        if match := re.search(r"Job submitted, ID: (\d+)|Job ID: (\d+)", answer):
            return match[1] or match[2]
        if known := self._active(name):
            return known
        raise SftError(f"sky jobs launch named no job:\n{answer.strip()}\nnext: sky jobs queue, and {file}")

    def _task(self, job: Job, strict: bool = True) -> dict[str, Any]:
        """The job's task. With `strict`, its code must be what is committed, and an archive of it is unpacked for SkyPilot."""
        if self.cluster.shared_disk:
            return task.task(job, None, self.folder)
        shipped = code.describe(plan.REPO, self.cluster.code, strict=strict)
        workdir = self.folder.absolute() / f"code-{shipped.commit[:12]}{shipped.edits and '-' + shipped.edits}"
        if strict and shipped.dataset and not workdir.is_dir():
            unpack(shipped, workdir)
        return task.task(job, shipped, workdir)

    @staticmethod
    def _active(name: str) -> str:
        """The id of an active job of this name, or ""."""
        found = [r for r in client.queue("--skip-finished") if r.get("job_name") == name]
        return str(found[0]["job_id"]) if found else ""

    # --- a submitted job ------------------------------------------------------------------------------------------

    @staticmethod
    def _record(id: str) -> dict[str, Any] | None:
        return next((r for r in client.queue() if str(r.get("job_id")) == id), None)

    def status(self, id: str) -> Status:
        record = self._record(id)
        return client.status_of(record) if record else Status("gone", None, "SkyPilot does not know this job")

    def follow(self, id: str, out: IO[str]) -> int:
        printed, streams = "", 0
        while (status := self.status(id)).active:
            if str(status) != printed:
                printed = str(status)
                say(f"[sky] job {id} is {printed}", out)
            if status.state == "running":
                if streams:
                    say(f"[sky] the log of job {id} again, from its last lines", out)
                streams += self._print_log(id, out)
            time.sleep(POLL_S)
        if not streams:
            self._print_log(id, out, follow=False)
        if status.state != "done" or self.cluster.shared_disk or self.folder.parent.parent.name == TOOL_RUNS:
            return status.code
        from sft.launch.sky.returned import fetch  # start-up: storages, not needed with a shared disk

        fetch(far.submitted_job(self.folder, id, f"SkyPilot's job {id}"), out)
        return 0

    @staticmethod
    def _print_log(id: str, out: IO[str], follow: bool = True) -> bool:
        """Prints a job's log, with `follow` until the job ends or the connection is lost. Returns whether it had lines."""
        words = [client.find(), "jobs", "logs", "--follow" if follow else "--no-follow", id]
        seen = False
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              errors="replace", env=client.environment()) as process:  # fmt: skip
            assert process.stdout is not None
            try:
                for line in job_lines(process.stdout):
                    say(line, out)
                    seen = True
            finally:
                process.terminate()
        return seen

    def cancel(self, id: str) -> None:
        client.run("jobs", "cancel", "--yes", id)

    def attempts(self, id: str) -> int:
        record = self._record(id) or {}
        return int(record.get("recovery_count") or 0) + 1 if record.get("start_at") else 0

    def tail(self, id: str) -> str:
        words = ("jobs", "logs", "--no-follow", "--tail", str(TAIL_LINES))
        lines = list(job_lines(client.run(*words, id, codes=client.LOG_CODES).splitlines()))
        if not lines:  # it never started: SkyPilot's own log says why
            text = client.run(*words, "--controller", id, codes=client.LOG_CODES)
            lines = text.splitlines()
        return "\n".join([*lines[-TAIL_LINES:], f"the complete log: sky jobs logs --tail 0 {id}"])


def job_lines(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a log without SkyPilot's prefixes and its own lines about progress. Those of later nodes have their number."""
    for raw in lines:
        line = client.plain(raw.rstrip("\r\n").rpartition("\r")[2])
        if match := PREFIX.match(line):
            node = match[1] if match[1] not in (None, "0") else ""
            yield (f"node {node}: " if node else "") + line[match.end() :]
        elif line.strip() and not OWN_LINE.match(line):
            yield line


def missing_secrets(cluster: schema.Cluster) -> list[str]:
    """The variables of this environment that `secrets` names and that are not set."""
    return sorted({source for source in cluster.secrets.values() if not os.environ.get(source)})


def unpack(shipped: code.Code, workdir: Path) -> None:
    """Makes the folder of the code that SkyPilot copies to the machines of a job."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workdir.parent, prefix=".code-") as folder:
        target = Path(folder) / "files"
        with tarfile.open(code.archive(plan.REPO, shipped, Path(folder))) as packed:
            packed.extractall(target, filter="data")
        target.rename(workdir)


def open_scheduler(folder: Path, cluster: schema.Cluster) -> Sky:
    return Sky(folder, cluster)
