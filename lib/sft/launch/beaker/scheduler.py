"""Stages as Beaker experiments, through Beaker's own client: submitted once, followed, and their small files fetched.

    env/beaker.sh runs/<run> <stage> COMMAND…     see sft.launch.job; the specification is sft.launch.beaker.specification's

The client retries what it can, for ever where a connection is lost; here it says so and hands over to sft.launch.job
after PATIENCE_S, which asks again. Workspace, budget, image, clusters and secrets are checked before anything is uploaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import grpc
from beaker import Beaker
from beaker import beaker_pb2 as pb2
from beaker.config import Config
from beaker.exceptions import (
    BeakerBudgetNotFound,
    BeakerConfigurationError,
    BeakerDatasetConflict,
    BeakerDatasetNotFound,
    BeakerError,
    BeakerExperimentConflict,
    BeakerImageNotFound,
    BeakerSecretNotFound,
    BeakerServerError,
    BeakerWorkloadNotFound,
    BeakerWorkspaceNotFound,
    HTTPError,
    RequestException,
)

from sft.common import paths
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.elsewhere import Elsewhere
from sft.launch.beaker import code, results, specification
from sft.launch.job import AGAIN, CANCELLED, WATCH, Job, LostConnection, Record, Status
from sft.recipe import schema
from sft.runner import plan

PATIENCE_S = 20.0
POLL_S = 10.0
UPLOAD_S = 3600.0  # an upload of a dataset that has not ended by then was killed
UPLOAD_WAIT_S = 1800.0  # how long another's upload of it is waited for
ATTEMPTS = 20  # names tried for what has failed before
INPUT_BYTES = 32 << 30  # an earlier stage larger than this is not uploaded with a job

_STATES = {
    pb2.WorkloadStatus.STATUS_SUCCEEDED: "done",
    pb2.WorkloadStatus.STATUS_FAILED: "failed",
    pb2.WorkloadStatus.STATUS_CANCELED: "cancelled",
    pb2.WorkloadStatus.STATUS_RUNNING: "running",
    pb2.WorkloadStatus.STATUS_STOPPING: "running",
    pb2.WorkloadStatus.STATUS_UPLOADING_RESULTS: "running",
}
_CODES = pb2.CancelationCode
_PREEMPTED = (_CODES.CANCELATION_CODE_SYSTEM_PREEMPTION, _CODES.CANCELATION_CODE_USER_PREEMPTION)


class _Patience(logging.Handler):
    """Listens to the client's own retries: raises LostConnection out of them once they have failed for PATIENCE_S."""

    began = last = -1e9

    def emit(self, record: logging.LogRecord) -> None:
        if not str(record.msg).startswith("Request failed with retriable error"):
            return
        now = time.monotonic()
        if now - self.last > 60:  # an earlier failure has been overcome
            self.began = now
        self.last = now
        if now - self.began >= PATIENCE_S:
            self.last = -1e9
            raise LostConnection(record.getMessage().partition("\n")[0].partition(": ")[2])


def has_token() -> bool:
    """Whether this machine is configured for Beaker."""
    return "BEAKER_TOKEN" in os.environ or Config.find_config() is not None


def open_scheduler(folder: Path, cluster: schema.Cluster) -> Scheduler:
    return Scheduler(folder, cluster)


class Scheduler:
    def __init__(self, folder: Path, cluster: schema.Cluster):
        self.folder, self.cluster = folder, cluster
        self._client: Beaker | None = None
        self._uploads: set[str] = set()  # datasets that this process began
        self._shown: dict[str, Any] = {}  # by job: when the last shown line was written

    # --- the connection -------------------------------------------------------------------------------------------

    @property
    def beaker(self) -> Beaker:
        if self._client is None:
            logger = logging.getLogger("beaker")
            logger.setLevel(logging.DEBUG)
            logger.propagate = False  # what it sends and receives is nobody's log
            if not any(isinstance(h, _Patience) for h in logger.handlers):
                logger.addHandler(_Patience())
            try:
                options = {"default_workspace": self.cluster.workspace} if self.cluster.workspace else {}
                self._client = Beaker.from_env(check_for_upgrades=False, user_agent="olmo-sft", **options)
            except (BeakerConfigurationError, OSError, TypeError) as e:
                raise SftError(
                    f"Beaker: {e}; next: BEAKER_TOKEN=…, or `beaker configure`, with the token of https://beaker.org/user"
                ) from None
        return self._client

    def check(self, job: Job) -> None:
        """Everything a submission needs is there: account, workspace, budget, images, clusters, secrets. Raises SftError."""
        from sft.launch.beaker import harnesses

        cluster, where = self.cluster, f"env/{job.place.cluster}.toml"
        specification.check_cluster(job.place.cluster, cluster)
        code.describe(plan.REPO, cluster.code)
        if problems := self.missing(where, harnesses.is_ours(job)):
            raise SftError("\n".join(problems) + f"\nnext: correct {where}, or what it names on Beaker")

    def missing(self, where: str, harness: bool) -> list[str]:
        """What the cluster's file names and Beaker does not have, one line each. Raises SftError or LostConnection.

        harness: whether an evaluation by one of AI2's harnesses is to be submitted.
        """
        with _told():
            return list(self._missing(where, harness))

    def _missing(self, where: str, harness: bool) -> Iterator[str]:
        cluster, client = self.cluster, self.beaker
        if (account := client.user_name) != specification.user():
            yield (
                f"{where}: '{{user}}' stands for {specification.user()}, and you are {account} on Beaker;"
                f" next: SFT_USER={account} make …"
            )
        try:
            workspace = client.workspace.get(cluster.workspace)
        except BeakerWorkspaceNotFound:
            yield f"{where}: 'workspace' = {cluster.workspace!r}: no such workspace, or none you may use"
            workspace = None
        try:
            client.workspace.resolve_budget_id(cluster.budget)
        except BeakerBudgetNotFound:
            yield f"{where}: 'budget' = {cluster.budget!r}: no such budget"
        for field in ("image", *(["evaluate_image"] if harness else [])):
            try:
                client.image.get(getattr(cluster, field))
            except BeakerImageNotFound:
                yield f"{where}: '{field}' = {getattr(cluster, field)!r}: no such image"
        known = self._nodes()
        for name in cluster.clusters:
            if name not in known:
                yield f"{where}: 'clusters': {name!r}: no such cluster; there are {', '.join(sorted(known))}"
                continue
            count, kind = known[name]
            if kind and not set(re.findall(r"\w+", cluster.gpu.upper())) <= set(kind.split()):
                yield f"{where}: 'gpu' = {cluster.gpu!r}: the GPUs of {name} are {kind}"
            if 0 < count < cluster.gpus_per_node:
                yield f"{where}: 'gpus_per_node' = {cluster.gpus_per_node}: a node of {name} has {count}"
        for field in ("secrets", *(["evaluate_secrets"] if harness else [])) if workspace else ():
            for variable, secret in getattr(cluster, field).items():
                secret = paths.for_user(secret)
                if not self._has_secret(secret, workspace):
                    yield (
                        f"{where}: '{field}': {variable} = {secret!r}: the workspace {cluster.workspace} has no such secret"
                        f" (beaker secret write --workspace {cluster.workspace} {secret})"
                    )

    def _nodes(self) -> dict[str, tuple[int, str]]:
        """By cluster, under all its names: the GPUs of a node and their type, as "NVIDIA A100 80GB"; 0 and "" = not told."""
        found = {}
        for c in self.beaker.cluster.list():
            kind = pb2.GpuType.Name(c.node_shape.gpu_type).removeprefix("GPU_TYPE_").replace("_", " ")
            for name in (c.name, *c.aliases):
                found[f"{c.organization_name}/{name}"] = (c.node_shape.gpu_count, kind if kind != "UNSPECIFIED" else "")
        return found

    def gpus(self) -> dict[str, tuple[int, str]]:
        """(GPUs of a node, their type) by each of the cluster file's clusters that Beaker tells it of. Raises SftError or
        LostConnection."""
        with _told():
            nodes = self._nodes()
        return {name: nodes[name] for name in self.cluster.clusters if all(nodes.get(name, (0,)))}

    def _has_secret(self, name: str, workspace: Any) -> bool:
        try:
            self.beaker.secret.get(name, workspace=workspace)
        except BeakerSecretNotFound:
            return False
        return True

    # --- one job --------------------------------------------------------------------------------------------------

    def render(self, job: Job) -> str:
        from sft.launch.beaker import harnesses

        user = specification.user()
        spec = harnesses.experiment(job, user) or specification.experiment(
            job, code.describe(plan.REPO, self.cluster.code, strict=False), user
        )
        head = f"# beaker experiment create --workspace {self.cluster.workspace} --name {specification.name_of(job)} FILE\n"
        if optional := ", ".join(self.cluster.optional_secrets):
            head += f"# left out where the workspace has no such secret: {optional}\n"
        return head + specification.text(spec)

    def submit(self, job: Job) -> str:
        from sft.launch.beaker import harnesses

        user = specification.user()
        spec = harnesses.experiment(job, user)
        with _told(), tempfile.TemporaryDirectory(prefix="olmo-sft-") as folder:
            workspace = self.beaker.workspace.get(self.cluster.workspace)
            if spec is not None:
                for dataset, path in harnesses.model_of(job, user)[2].items():
                    self._upload(dataset, lambda path=path: path, workspace)
            else:
                shipped = code.describe(plan.REPO, self.cluster.code)
                if shipped.dataset:
                    self._upload(
                        shipped.dataset, lambda: code.archive(plan.REPO, shipped.commit, Path(folder)), workspace
                    )
                for stage, (dataset, path) in specification.inputs_of(job).items():
                    size = sum(o.bytes for o in manifest.load(path / manifest.NAME).outputs)
                    if size > INPUT_BYTES:
                        raise SftError(f"{path}: {size:,} bytes are too many to travel with a job; next: remove its manifest"
                                       f" and make {stage} RECIPE={job.recipe.name} CLUSTER={job.place.cluster}")  # fmt: skip
                    self._upload(dataset, lambda path=path: path, workspace)
                spec = specification.experiment(job, shipped, user)
            names = {paths.for_user(s) for s in self.cluster.optional_secrets.values()}
            absent = {name for name in names if not self._has_secret(name, workspace)}
            for task in spec.tasks:
                task.env_vars = [v for v in task.env_vars or [] if v.secret not in absent]
            for attempt in range(ATTEMPTS):
                name = specification.name_of(job, attempt)
                try:
                    return self.beaker.experiment.create(spec=spec, name=name, workspace=workspace).experiment.id
                except (BeakerExperimentConflict, RequestException) as e:
                    if isinstance(e, HTTPError) or (taken := self._experiment(f"{user}/{name}")) is None:
                        raise
                    finished = self._finished(taken)  # an earlier attempt
                    same = taken.experiment.description == spec.description
                    if isinstance(e, RequestException) and same and not finished:
                        return taken.experiment.id  # it was made, only the answer was lost
                    if not finished:
                        raise SftError(
                            f"the experiment {name} is there already and not finished: {self.beaker.workload.url(taken)};"
                            f" it was submitted elsewhere; next: wait for it, or beaker experiment stop {taken.experiment.id}"
                        ) from None
        raise SftError(f"{ATTEMPTS} experiments named {specification.name_of(job)} have ended without a result; next: read the log"
                       f" of the last one, then give the run another name: make new FROM={job.recipe.name} RECIPE=…")  # fmt: skip

    def _experiment(self, name: str) -> Any:
        try:
            return self.beaker.workload.get(name)
        except BeakerWorkloadNotFound:
            return None

    def _finished(self, workload: Any) -> bool:
        return _STATES.get(workload.status, "pending") in ("done", "failed", "cancelled")

    def _upload(self, name: str, source: Any, workspace: Any) -> None:
        """Makes a dataset of this name, which names its content, unless it is there; waits for another's upload of it."""
        client, until = self.beaker, time.monotonic() + UPLOAD_WAIT_S
        while True:
            try:
                dataset = client.dataset.create(name, workspace=workspace, commit=False)
                break
            except BeakerDatasetConflict:
                with contextlib.suppress(BeakerDatasetNotFound):  # removed since
                    dataset = client.dataset.get(f"{client.user_name}/{name}")
                    if dataset.HasField("committed"):
                        return
                    if dataset.id in self._uploads or time.time() - dataset.created.ToSeconds() > UPLOAD_S:
                        client.dataset.delete(dataset)  # of an upload that was killed
                    elif time.monotonic() < until:
                        time.sleep(POLL_S)
                    else:
                        raise SftError(
                            f"Beaker dataset {name}: another upload of it has not ended; next: try again, or, if that one"
                            f" was killed, beaker dataset delete {dataset.id}"
                        ) from None
        self._uploads.add(dataset.id)
        path = source()
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            client.dataset.upload(dataset, file, file.relative_to(path) if path.is_dir() else file.name)
        client.dataset.commit(dataset)

    def _jobs(self, id: str) -> list[Any]:
        """The latest job of every replica, the leader's first; None for one that has none yet."""
        return self._jobs_of(self.beaker.workload.get(id))

    def _jobs_of(self, workload: Any) -> list[Any]:
        tasks = sorted(workload.experiment.tasks, key=lambda t: t.system_details.replica_group_details.rank)
        return [self.beaker.workload.get_latest_job(workload, task=task) for task in tasks]

    def status(self, id: str) -> Status:
        with _told():
            try:
                workload = self.beaker.workload.get(id)
                jobs = self._jobs_of(workload)
            except BeakerWorkloadNotFound:
                return Status("gone", None, "Beaker does not know this experiment")
            states = [self._state(job) for job in jobs]
        if self._finished(workload):  # nothing is started again, whatever a job's own end would allow
            ended = _STATES[workload.status]
            for at, job in enumerate(jobs):
                if states[at].state == "pending":
                    failed = (job and job.status.exit_code) or 1
                    exit_code = {"done": 0, "cancelled": CANCELLED}.get(ended, failed)
                    states[at] = Status(ended, exit_code, "the experiment has ended")
        for state in ("failed", "timeout", "cancelled", "running", "pending"):
            # a replica that failed says more than those that were stopped because of it
            found = [s for s in states if s.state == state]
            if found and not (state == "cancelled" and any(s.living for s in states)):
                return found[0]
        return states[0]

    def _state(self, job: Any) -> Status:
        """A Beaker job as one of sft.launch.job's states; one that Beaker starts again by itself is pending."""
        if job is None:
            return Status("pending")
        status = job.status
        if not status.HasField("finalized"):
            return Status("running" if status.HasField("started") else "pending", None, status.message)
        if status.HasField("canceled"):
            why = status.canceled_for or _CODES.Name(status.canceled_code).removeprefix("CANCELATION_CODE_").lower()
            if status.canceled_code in _PREEMPTED:
                if self.cluster.preemptible:
                    return Status("pending", None, f"preempted ({why}), Beaker starts it again")
                return Status("failed", AGAIN, f"preempted: {why}")
            if status.canceled_code == _CODES.CANCELATION_CODE_TIMEOUT:
                return Status("timeout", 124, why)
            return Status("cancelled", CANCELLED, why)
        if status.exit_code or status.HasField("failed"):
            tried = self._failures(job) if self.cluster.retries else 1
            if tried <= self.cluster.retries:
                return Status(
                    "pending",
                    None,
                    f"failed with {status.exit_code}, Beaker tries again ({tried} of {self.cluster.retries})",
                )
            return Status("failed", status.exit_code or 1, status.message)
        return Status("done", 0)

    def _failures(self, job: Any) -> int:
        """How often the job's task has failed."""
        jobs = self.beaker.job.list(task=pb2.Task(id=job.task_id))
        return sum(j.status.HasField("failed") and not j.status.HasField("canceled") for j in jobs)

    def follow(self, id: str, out: IO[str]) -> int:
        """Shows the leader's log until the experiment ends, then fetches what came back. Returns the exit status."""
        told, pause = "", 0.2
        while True:
            with _told():
                leader = self._jobs(id)[0]
                if leader is not None and leader.status.HasField("started"):
                    self._show(leader, out)
            status = self.status(id)
            if not status.living:
                break
            if str(status) != told:
                out.write(f"[beaker] {self.beaker.config.agent_address}/ex/{id} is {status}\n")
                out.flush()
                told = str(status)
            time.sleep(pause)
            pause = min(1.5 * pause, POLL_S)
        if status.state != "done":
            return status.code
        with _told():
            return self._bring_back(id, out)

    def _show(self, job: Any, out: IO[str]) -> None:
        since = self._shown.get(job.id)
        for line in self.beaker.job.logs(job, follow=True, since=since):
            out.write(line.message.decode(errors="replace").rstrip("\n") + "\n")
            out.flush()
            stamp = (
                line.timestamp.ToNanoseconds() + 1
            )  # the client repeats from here after a broken stream, and so do we
            self._shown[job.id] = type(line.timestamp)(seconds=stamp // 10**9, nanos=stamp % 10**9)

    def cancel(self, id: str) -> None:
        with _told():
            self.beaker.workload.cancel(self.beaker.workload.get(id))

    def attempts(self, id: str) -> int:
        """How many jobs the leader's task has had; Beaker keeps the log of each."""
        with _told():
            leader = self._jobs(id)[0]
            return len(list(self.beaker.job.list(task=pb2.Task(id=leader.task_id)))) if leader else 0

    def tail(self, id: str, lines: int = 20) -> str:
        with _told():
            jobs = [job for job in self._jobs(id) if job is not None]
            failed = [j for j in jobs if self._state(j).state == "failed"] or jobs
            text = (
                [
                    line.message.decode(errors="replace").rstrip()
                    for line in self.beaker.job.logs(failed[0], tail_lines=lines)
                ]
                if failed
                else []
            )
            return "\n".join([*text[-lines:], f"the whole log: {self.beaker.config.agent_address}/ex/{id}"])

    # --- results --------------------------------------------------------------------------------------------------

    def _bring_back(self, id: str, out: IO[str]) -> int:
        """Fetches the files of the stage that this run's record gives the experiment. Raises SftError."""
        from sft.launch.beaker import harnesses

        record = next((r for r in map(Record.load, sorted(self.folder.glob("*.json"))) if r and r.job == id), None)
        if record is None:
            raise SftError(f"{self.folder}: no record names {id}; next: make the stage again")
        job = Job.parse([str(self.folder.parent), record.file.stem, *record.command])
        if job.identity != record.identity:
            raise SftError(
                f"{record.file}: the recipe or its inputs changed since the experiment was submitted; its results are"
                f" {self.beaker.config.agent_address}/ex/{id}; next: put the recipe back, or remove {record.file} and make {job.stage} again"
            )
        arrived = self.folder.parent / ".work" / f"{job.stage}-returned"
        shutil.rmtree(arrived, ignore_errors=True)
        arrived.mkdir(parents=True)
        if harnesses.is_ours(job):  # every task's results in a folder of its own: their files have the same names
            workload = self.beaker.workload.get(id)
            for task in workload.experiment.tasks:
                latest = self.beaker.workload.get_latest_job(workload, task=task)
                self._fetch(latest, arrived / harnesses.folder_of(task.name))
            return harnesses.record_scores(job, arrived)
        names = [self._fetch(found, arrived) for found in self._jobs(id)]
        if job.stage == WATCH:
            came = results.accept_watched(arrived, job.run / "train")
            out.write(f"[beaker] {', '.join(came) or 'no evaluation'} came back to {job.run / 'train'}\n")
            return 0
        away = Elsewhere.of(arrived)
        where, left = away.where, away.outputs
        key = plan.states(job.place, job.recipe)[job.stage].key
        results.accept(arrived, job.run / job.stage, key)
        out.write(
            f"[beaker] {sum(names)} files came back to {job.run / job.stage}; {len(left)} outputs stay in {where}\n"
        )
        return 0

    def _fetch(self, job: Any, target: Path) -> int:
        """Downloads a job's results, every file checked against its digest. Returns how many there were."""
        dataset = None
        try:
            dataset = self.beaker.job.get_results(job) if job is not None else None
        except BeakerDatasetNotFound:
            print(f"[beaker] the results of the job {job.id} are gone from Beaker", flush=True)
        if dataset is None:  # told by who reads the folder
            return 0
        files = list(self.beaker.dataset.list_files(dataset))
        for file in files:
            path = paths.inside(target, file.path, f"results of {job.id}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as f:
                for chunk in self.beaker.dataset.stream_file(dataset, file.path):
                    f.write(chunk)
        return len(files)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns what the client raises into SftError (a person can mend it) or LostConnection (worth another try)."""
    try:
        yield
    except (BeakerServerError, HTTPError) as e:
        raise LostConnection(str(e)) from None
    except RequestException as e:
        raise LostConnection(f"{type(e).__name__}: {e}") from None
    except BeakerError as e:
        raise SftError(f"Beaker: {e or type(e).__name__}") from None
    except grpc.RpcError as e:
        text = e.details() if isinstance(e, grpc.Call) else e
        raise SftError(f"Beaker: {text}; next: check BEAKER_TOKEN and the addresses in ~/.beaker/config.yml") from None
