"""Stages as Beaker experiments, through Beaker's own client: submitted once, followed, and their small files fetched.

    env/beaker.sh runs/<run> <stage> COMMAND…     submits or finds the experiment, follows its log, returns its status

The experiment's specification is made by sft.launch.beaker.specification. Workspace, budget, image, clusters and secrets
are checked before anything is uploaded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import IO

from beaker import Beaker
from beaker import beaker_pb2 as pb2
from beaker.exceptions import BeakerWorkloadNotFound
from google.protobuf.timestamp_pb2 import Timestamp

from sft.common import paths
from sft.common.columns import say
from sft.common.errors import SftError
from sft.launch import code, failed, far
from sft.launch.beaker import connection, harnesses, hosts, requirements, returned, specification, states, submission
from sft.launch.beaker.connection import client_errors
from sft.launch.beaker.datasets import DatasetUploads
from sft.launch.beaker.requirements import NodeGpus
from sft.launch.job import TOOL_RUNS, Job, Status
from sft.launch.launcher import TAIL_LINES
from sft.recipe.schema import Cluster
from sft.runner import plan

SHORTEST_POLL_S, POLL_S = 0.2, 10.0


class BeakerScheduler:
    """The experiments of one run; see sft.launch.launcher.Scheduler. An id is that of an experiment."""

    def __init__(self, folder: Path, cluster: Cluster):
        self.folder, self.cluster = folder, cluster
        self._allowed: dict[str, int] = {}  # by experiment: how often Beaker starts a failed task again
        self._printed: dict[str, Timestamp] = {}  # by job: the time just after that of its last printed line

    @cached_property
    def client(self) -> Beaker:
        return connection.connect(self.cluster.workspace)

    @cached_property
    def uploads(self) -> DatasetUploads:
        return DatasetUploads(self.client)

    # --- before submission ----------------------------------------------------------------------------------------

    def check(self, job: Job) -> None:
        file = f"env/{job.place.cluster}.toml"
        specification.check_cluster(job.place.cluster, self.cluster)
        code.describe(plan.REPO, self.cluster.code)
        if problems := self.missing(file, harnesses.is_harness(job)):
            raise SftError("\n".join(problems) + f"\nnext: correct {file}, or what it names on Beaker")

    def missing(self, file: str, harness: bool) -> list[str]:
        """What the cluster's file names and Beaker does not have, one line each. Raises SftError or LostConnection."""
        with client_errors():
            return list(requirements.missing(self.client, self.cluster, file, harness))

    def absent_keys(self, keys: Mapping[str, str]) -> list[tuple[str, str]]:
        """The (field, variable) of `keys` for which the job would have no secret. Raises SftError or LostConnection."""
        named = {**self.cluster.optional_secrets, **self.cluster.secrets}
        with client_errors():
            workspace = self.client.workspace.get(self.cluster.workspace)
            return [
                (field, key)
                for field, key in keys.items()
                if key not in named
                or requirements.secret_name(self.client, paths.for_user(named[key]), workspace) is None
            ]

    def gpus(self) -> dict[str, NodeGpus]:
        """The GPUs of a node of each of the file's clusters, where Beaker knows them. Raises SftError or LostConnection."""
        with client_errors():
            known = requirements.node_gpus(self.client)
        return {name: known[name] for name in self.cluster.clusters if name in known and all(known[name])}

    def render(self, job: Job) -> str:
        user = specification.user()
        spec = harnesses.harness_experiment(job, user) or specification.experiment(
            job, code.describe(plan.REPO, self.cluster.code, strict=False), user
        )
        head = f"# beaker experiment create --workspace {self.cluster.workspace} --name {specification.name_of(job)} FILE\n"
        if optional := ", ".join(self.cluster.optional_secrets):
            head += f"# left out where the workspace has no such secret: {optional}\n"
        if hosts.are_chosen(job):
            head += "# constraints: hosts take the place of clusters; they are chosen at submission\n"
        return head + specification.text(spec)

    def submit(self, job: Job) -> str:
        with client_errors():
            return submission.submit(self.client, job, self.uploads)

    # --- a submitted experiment -----------------------------------------------------------------------------------

    def status(self, id: str) -> Status:
        with client_errors():
            try:
                workload = self.client.workload.get(id)
                jobs = self._latest_jobs(workload)
            except BeakerWorkloadNotFound:
                return Status("gone", None, "Beaker does not know this experiment")
            return states.experiment_status(workload, jobs, [self._job_status(workload, job) for job in jobs])

    def follow(self, id: str, out: IO[str]) -> int:
        printed, pause = "", SHORTEST_POLL_S
        while True:
            with client_errors():
                leader = self._leader(id)
                if leader is not None and leader.status.HasField("started"):
                    self._print_log(leader, out)
            status = self.status(id)
            if not status.active:
                break
            if str(status) != printed:
                say(f"[beaker] {self._address(id)} is {status}", out)
                printed = str(status)
                with client_errors():
                    self._note_failures(id)
            time.sleep(pause)
            pause = min(1.5 * pause, POLL_S)
        with client_errors():
            self._note_failures(id)
            workload = self.client.workload.get(id)
            if status.state == "failed" and self._restarts(workload) and not states.has_ended(workload):
                say("[beaker] another attempt would fail in the same way: the experiment is stopped", out)
                self.client.workload.cancel(workload)
        if status.state != "done" or self.folder.parent.parent.name == TOOL_RUNS:
            return status.code  # a tool leaves its result where it was told to
        with client_errors():
            job = far.submitted_job(self.folder, id, self._address(id))
            return returned.fetch(self.client, self.client.workload.get(id), job, out)

    def cancel(self, id: str) -> None:
        with client_errors():
            self.client.workload.cancel(self.client.workload.get(id))

    def attempts(self, id: str) -> int:
        """How many jobs the leader's task has had."""
        with client_errors():
            leader = self._leader(id)
            return len(list(self.client.job.list(task=pb2.Task(id=leader.task_id)))) if leader else 0

    def tail(self, id: str) -> str:
        with client_errors():
            jobs = [job for job in self._latest_jobs(self.client.workload.get(id)) if job is not None]
            jobs = [job for job in jobs if states.has_failed(job)] or self._failed_jobs(id)[-1:] or jobs
            log = self.client.job.logs(jobs[0], tail_lines=TAIL_LINES) if jobs else ()
            text = [line.message.decode(errors="replace").rstrip() for line in log]
            return "\n".join([*text[-TAIL_LINES:], f"the complete log: {self._address(id)}"])

    def _address(self, id: str) -> str:
        return f"{self.client.config.agent_address}/ex/{id}"

    def _latest_jobs(self, workload: pb2.Workload) -> list[pb2.Job | None]:
        """The latest job of every replica, the leader's first; None for a replica that has none yet."""
        tasks = sorted(workload.experiment.tasks, key=lambda t: t.system_details.replica_group_details.rank)
        return [self.client.workload.get_latest_job(workload, task=task) for task in tasks]

    def _leader(self, id: str) -> pb2.Job | None:
        return self._latest_jobs(self.client.workload.get(id))[0]

    def _job_status(self, workload: pb2.Workload, job: pb2.Job | None) -> Status:
        """The status of a task by its latest job. Where only some ends are tried again, an earlier one may be final."""
        if (
            job
            and self._restarts(workload)
            and (end := states.final_failure(self._attempts(job), self.cluster.retries))
        ):
            return end
        return states.job_status(job, self.cluster, self._retries(workload), self._failures)

    def _retries(self, workload: pb2.Workload) -> int:
        """How often Beaker starts a failed task of the experiment again."""
        id = workload.experiment.id
        if id not in self._allowed:
            spec = self.client.experiment.get_spec(workload.experiment)
            self._allowed[id] = (spec.retry and spec.retry.allowed_task_retries) or 0
        return self._allowed[id]

    def _restarts(self, workload: pb2.Workload) -> int:
        """How many of these are only for ends that ask for another attempt: a training's `max_restarts`."""
        training = any(task.name == "train" for task in workload.experiment.tasks)
        return max(0, self._retries(workload) - self.cluster.retries) if training else 0

    def _attempts(self, job: pb2.Job) -> list[pb2.Job]:
        """All jobs of the job's task."""
        return list(self.client.job.list(task=pb2.Task(id=job.task_id)))

    def _failures(self, job: pb2.Job) -> int:
        """How many times the job's task has failed."""
        return sum(map(states.has_failed, self._attempts(job)))

    def _failed_jobs(self, id: str) -> list[pb2.Job]:
        """The failed jobs of an experiment, of all its attempts, the earliest first."""
        tasks = self.client.workload.get(id).experiment.tasks
        jobs = [job for task in tasks for job in self.client.job.list(task=task) if states.has_failed(job)]
        return sorted(jobs, key=lambda job: (job.status.exited.seconds, job.status.exited.nanos))

    def _note_failures(self, id: str) -> None:
        """Counts failures of the hardware for their nodes, which later jobs of the run avoid after two."""
        for job in self._failed_jobs(id):
            if (
                job.assignment_details.node_id
                and states.asks_for_another(job)
                and hosts.is_nodes_fault(self.client, job)
            ):
                host = self.client.node.get(job.assignment_details.node_id).hostname
                failed.add(self.folder, host, job.id, f"exit {job.status.exit_code}")

    def _print_log(self, job: pb2.Job, out: IO[str]) -> None:
        """Prints a job's log until the job ends, from the first line that was not printed yet."""
        for line in self.client.job.logs(job, follow=True, since=self._printed.get(job.id)):
            say(line.message.decode(errors="replace").rstrip("\n"), out)
            after = line.timestamp.ToNanoseconds() + 1  # the client, too, resumes a broken stream from here
            self._printed[job.id] = Timestamp(seconds=after // 10**9, nanos=after % 10**9)
