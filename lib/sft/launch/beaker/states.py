"""Beaker's states of experiments and their jobs, as sft.launch.job.Status.

An experiment has a task for each replica, and a task has a job for each attempt. Beaker starts a preempted task again by
itself, and a failed one as often as its experiment allows; such a job counts as pending. A training's experiment allows
`max_restarts` times more than the cluster's `retries`, for ends that ask for it; Beaker itself does not look at how a job ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from beaker import beaker_pb2 as pb2

from sft.common.process import AGAIN
from sft.launch.job import CANCELLED, Status
from sft.recipe.schema import Cluster

STATES = {
    pb2.WorkloadStatus.STATUS_SUCCEEDED: "done",
    pb2.WorkloadStatus.STATUS_FAILED: "failed",
    pb2.WorkloadStatus.STATUS_CANCELED: "cancelled",
    pb2.WorkloadStatus.STATUS_RUNNING: "running",
    pb2.WorkloadStatus.STATUS_STOPPING: "running",
    pb2.WorkloadStatus.STATUS_UPLOADING_RESULTS: "running",
}
ENDS = ("done", "failed", "cancelled")
TELLING = ("failed", "timeout", "cancelled", "running", "pending")
"""States of replicas, the most telling first: one that failed explains those that were stopped because of it."""
_CODES = pb2.CancelationCode
_PREEMPTED = (
    _CODES.CANCELATION_CODE_SYSTEM_PREEMPTION,
    _CODES.CANCELATION_CODE_USER_PREEMPTION,
    _CODES.CANCELATION_CODE_SIBLING_TASK_PREEMPTION,
)
SIGNALS = 128
"""Exit statuses above it are those of a process that a signal ended."""


def has_ended(workload: pb2.Workload) -> bool:
    """Whether Beaker will start no job of this experiment again."""
    return STATES.get(workload.status, "pending") in ENDS


def experiment_status(workload: pb2.Workload, jobs: Sequence[pb2.Job | None], statuses: Sequence[Status]) -> Status:
    """The status of an experiment from the latest job of each replica and the status of that job."""
    states = list(statuses)
    if has_ended(workload):
        end = STATES[workload.status]
        for at, job in enumerate(jobs):
            if states[at].state == "pending":  # the job alone could be tried again, but its experiment has ended
                failed = (job and job.status.exit_code) or 1
                exit_code = {"done": 0, "cancelled": CANCELLED}.get(end, failed)
                states[at] = Status(end, exit_code, "the experiment has ended")
    for state in TELLING:
        found = [s for s in states if s.state == state]
        if found and not (state == "cancelled" and any(s.active for s in states)):
            return found[0]
    return states[0]


def asks_for_another(job: pb2.Job) -> bool:
    """Whether a failed job ended in a way that another attempt may fix: it saved and stopped, it was killed, or its node was lost."""
    return job.status.exit_code == AGAIN or job.status.exit_code > SIGNALS or not job.status.exit_code


def has_failed(job: pb2.Job) -> bool:
    return job.status.HasField("failed") and not job.status.HasField("canceled")


def final_failure(jobs: Sequence[pb2.Job], retries: int) -> Status | None:
    """The failure after which another attempt would only repeat it. `jobs`: all of a task. `retries`: attempts for any failure."""
    found = [job for job in jobs if has_failed(job) and not asks_for_another(job)]
    if len(found) <= retries:
        return None
    last = max(found, key=lambda job: (job.status.exited.seconds, job.status.exited.nanos))
    return Status("failed", last.status.exit_code, last.status.message)


def job_status(job: pb2.Job | None, cluster: Cluster, allowed: int, failures: Callable[[pb2.Job], int]) -> Status:
    """The status of one job; None is a job that does not exist yet.

    `allowed`: how often Beaker starts a failed task again. `failures(job)`: how many times the job's task has failed.
    """
    if job is None:
        return Status("pending")
    status = job.status
    if not status.HasField("finalized"):
        return Status("running" if status.HasField("started") else "pending", None, status.message)
    if status.HasField("canceled"):
        return _cancelled(status, cluster)
    if status.exit_code or status.HasField("failed"):
        tried = failures(job) if allowed else 1
        if tried <= allowed:
            reason = f"failed with {status.exit_code}, Beaker tries again ({tried} of {allowed})"
            return Status("pending", None, reason)
        return Status("failed", status.exit_code or 1, status.message)
    return Status("done", 0)


def _cancelled(status: pb2.JobStatus, cluster: Cluster) -> Status:
    why = status.canceled_for or _CODES.Name(status.canceled_code).removeprefix("CANCELATION_CODE_").lower()
    if status.canceled_code == _CODES.CANCELATION_CODE_SIBLING_TASK_RETRY:
        return Status("pending", None, "another node failed, Beaker starts all again")
    if status.canceled_code in _PREEMPTED:
        if cluster.preemptible:
            return Status("pending", None, f"preempted ({why}), Beaker starts it again")
        return Status("failed", AGAIN, f"preempted: {why}")
    if status.canceled_code == _CODES.CANCELATION_CODE_TIMEOUT:
        return Status("timeout", 124, why)
    return Status("cancelled", CANCELLED, why)
