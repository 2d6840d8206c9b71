"""The calls about experiments and their jobs' logs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc
import yaml
from beaker import BeakerExperimentSpec
from beaker import beaker_pb2 as pb2

from beaker_server.jobs import Jobs
from beaker_server.state import BUDGET, USER, Experiment, Task, now


class ExperimentCalls(Jobs):
    def refusal(self, body: dict[str, Any], name: str) -> tuple[int, str] | None:
        """What the API answers to a spec it does not take."""
        if name in self.experiments:
            return 400, f"the name {name} is already in use"
        if body["budget"] != BUDGET:
            return 400, f"budget {body['budget']} not found"
        for task in body["tasks"]:
            for variable in task.get("envVars", []):
                if "secret" in variable and variable["secret"] not in self.secrets:
                    return 400, f"secret {variable['secret']} not found"
            if unknown := set(task.get("constraints", {}).get("cluster", [])) - set(self.clusters):
                return 400, f"cluster {unknown.pop()} not found"
            if task.get("leaderSelection") and not (task["hostNetworking"] and task.get("replicas", 0) > 1):
                return 400, "leaderSelection needs hostNetworking and replicas"
            if "preemptible" in task["context"] and "minRuntime" in task["context"]:
                return 400, "preemptible and minRuntime exclude each other"
            for mount in task.get("datasets", []):
                if (found := mount["source"].get("beaker")) and self.find_dataset(found) is None:
                    return 400, f"dataset {found} not found"
        return None

    def create(self, body: dict[str, Any], name: str) -> Experiment:
        key = self._name("experiment")
        message = pb2.Experiment(id=key, name=name, description=body.get("description", ""), created=now())
        made = Experiment(message, body, BeakerExperimentSpec.from_json(body))
        for spec in made.spec.tasks:
            for rank in range(spec.replicas or 1):
                task = pb2.Task(id=self._name("task"), experiment_id=key, name=spec.name)
                task.system_details.replica_group_details.rank = rank
                made.tasks.append(Task(task, made, spec, rank))
        message.tasks.extend(t.message for t in made.tasks)
        self.experiments[name or key] = made
        for t in made.tasks:
            self._launch(t)
        return made

    def _find(self, key: str, context: grpc.ServicerContext) -> Experiment:
        for e in self.experiments.values():
            if e.message.id == key:
                return e
        context.abort(grpc.StatusCode.NOT_FOUND, "no such workload")
        raise AssertionError

    def ResolveWorkloadName(self, request, context):
        self._begin("ResolveWorkloadName", context)
        found = self.experiments.get(request.workload_name)
        if found is None or request.author_name != USER:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such workload")
        return pb2.ResolveWorkloadNameResponse(workload_id=found.message.id)

    def GetWorkload(self, request, context):
        self._begin("GetWorkload", context)
        found = self._find(request.workload_id, context)
        states = [self._state(t) for t in found.tasks]
        order = [
            pb2.WorkloadStatus.Value(n) for n in ("STATUS_RUNNING", "STATUS_QUEUED", "STATUS_FAILED", "STATUS_CANCELED")
        ]
        status = next((s for s in order if s in states), pb2.WorkloadStatus.STATUS_SUCCEEDED)
        return pb2.GetWorkloadResponse(workload=pb2.Workload(experiment=found.message, status=status))

    def _state(self, task: Task) -> Any:
        """A task is not at its end while its job is not, or while it waits for another."""
        run = task.runs[-1]
        if not run.message.status.HasField("finalized"):
            return pb2.WorkloadStatus.Value("STATUS_RUNNING" if run.process else "STATUS_QUEUED")
        if task.experiment.cancelled:
            return pb2.WorkloadStatus.STATUS_CANCELED
        if self.stranded and run.message.status.canceled_code == pb2.CancelationCode.CANCELATION_CODE_SYSTEM_PREEMPTION:
            return pb2.WorkloadStatus.STATUS_QUEUED
        return run.message.status.status

    def GetExperimentYamlSpec(self, request, context):
        self._begin("GetExperimentYamlSpec", context)
        text = yaml.safe_dump(self._find(request.experiment_id, context).body)
        return pb2.GetExperimentYamlSpecResponse(experiment_spec=text)

    def ListJobs(self, request, context):
        self._begin("ListJobs", context)
        asked = request.options
        jobs = [
            r
            for r in self.runs.values()
            if asked.task_id in ("", r.task.message.id)
            and asked.scheduled_on_node_id in ("", r.message.assignment_details.node_id)
            and not (asked.HasField("finalized") and asked.finalized != r.message.status.HasField("finalized"))
        ]  # newest first, as asked
        return pb2.ListJobsResponse(jobs=[r.message for r in reversed(jobs)][: request.options.page_size or 50])

    def GetJob(self, request, context):
        self._begin("GetJob", context)
        if request.job_id not in self.runs:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such job")
        return pb2.GetJobResponse(job=self.runs[request.job_id].message)

    def StreamJobLogs(self, request, context) -> Iterator[pb2.JobLog]:
        run = self.runs[request.job_id]
        fault = self._take("StreamJobLogs")
        since = (request.since.seconds, request.since.nanos)
        at, sent = 0, 0
        while context.is_active():
            finished = run.message.status.HasField("finalized") or not request.follow
            while at < len(run.lines):
                stamp, text = run.lines[at]
                at += 1
                if (stamp.seconds, stamp.nanos) < since:
                    continue
                if fault and fault.kind == "break" and sent >= fault.after:
                    context.abort(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 0")
                if fault and fault.kind == "unavailable":
                    context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset by the test")
                yield pb2.JobLog(timestamp=stamp, message=text)
                sent += 1
            if finished:
                return
            time.sleep(0.02)

    def CancelWorkloads(self, request, context):
        self._begin("CancelWorkloads", context)
        for key in request.workload_ids:
            experiment = self._find(key, context)
            experiment.cancelled = True
            for task in experiment.tasks:
                self._stop(task.runs[-1], "stopped by ann", pb2.CancelationCode.CANCELATION_CODE_MANUAL)
        return pb2.CancelWorkloadsResponse(workload_ids=request.workload_ids)
