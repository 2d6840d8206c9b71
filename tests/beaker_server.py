"""A small Beaker on 127.0.0.1 for tests: what the real client speaks (gRPC with TLS, and HTTP), jobs run as local processes.

In:  `with Server(folder) as s:` and os.environ.update(s.environment); s.fault("GetWorkload", "unavailable", times=2)
Out: s.experiments (name -> Experiment with its spec as it was sent), s.requests, s.secrets_read

Every replica of a task is one process in a session of its own. There are no containers: where an argument or a variable's
value is a mount's path (or begins with it), the folder that stands for the mount takes its place; weka bucket `b` is
folder/weka/b. Like the real one it refuses a name that is taken, an unknown workspace, budget, cluster, image or secret.

Faults: `unavailable` (an RPC is refused before anything is done; times < 0 = for ever), `break` (a log's stream ends after
`after` lines), `lost` (the experiment is made, the answer is not sent), `dropped` (neither), or an HTTP status for `create`.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import grpc
import trustme
import yaml
from beaker import BeakerExperimentSpec, beaker_pb2_grpc
from beaker import beaker_pb2 as pb2
from google.protobuf.timestamp_pb2 import Timestamp

ORG, USER, WORKSPACE, BUDGET, TOKEN = "ai2", "ann", "team", "ai2/oe-test", "token-that-nobody-may-see"
AUTHORITY = trustme.CA()  # one for all servers: gRPC reads its roots once in a process


LIMIT = 32 << 20  # bytes of one request


def digest_of(data: bytes | bytearray) -> str:
    return "SHA256 " + base64.b64encode(hashlib.sha256(data).digest()).decode()


def now() -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.datetime.now(datetime.UTC))
    return stamp


@dataclass
class Fault:
    operation: str
    kind: str | int
    times: int
    after: int = 0


@dataclass
class Run:
    """One job: a replica's process."""

    message: pb2.Job
    task: Task
    dataset: str
    process: subprocess.Popen[bytes] | None = None
    lines: list[tuple[Timestamp, bytes]] = field(default_factory=list)
    cancelled: tuple[str, int] | None = None


@dataclass
class Task:
    message: pb2.Task
    experiment: Experiment
    spec: Any
    rank: int
    runs: list[Run] = field(default_factory=list)


@dataclass
class Experiment:
    message: pb2.Experiment
    body: dict[str, Any]
    spec: BeakerExperimentSpec
    tasks: list[Task] = field(default_factory=list)
    cancelled: bool = False


@dataclass
class Dataset:
    message: pb2.Dataset
    folder: Path


class Server(beaker_pb2_grpc.BeakerServicer):
    def __init__(self, folder: Path):
        self.folder = folder
        self.secrets: dict[str, str] = {}
        self.images = {"ann/image"}
        self.clusters = {"ai2/jupiter": 8, "ai2/ceres": 8}
        self.experiments: dict[str, Experiment] = {}
        self.runs: dict[str, Run] = {}
        self.datasets: dict[str, Dataset] = {}
        self.uploads: dict[str, bytearray] = {}  # of files over 32 MiB, which come in pieces
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.hold = False  # jobs stay queued
        self.stranded = False  # a preempted task waits for a place and gets no new job
        self._lock = threading.RLock()
        self._count = 0
        self._threads: list[threading.Thread] = []

    # --- life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Server:
        certificate = AUTHORITY.issue_cert("localhost")
        AUTHORITY.cert_pem.write_to_path(str(self.folder / "ca.pem"))
        self._rpc = grpc.server(ThreadPoolExecutor(max_workers=16))
        beaker_pb2_grpc.add_BeakerServicer_to_server(self, self._rpc)
        key, chain = certificate.private_key_pem.bytes(), b"".join(p.bytes() for p in certificate.cert_chain_pems)
        port = self._rpc.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
        self._rpc.start()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"beaker": self}))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # clients that are killed
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        (self.folder / "beaker.yml").write_text(yaml.safe_dump({
            "agent_address": self.url, "rpc_address": f"localhost:{port}", "user_token": TOKEN, "default_org": ORG}))  # fmt: skip
        self.environment = {
            "BEAKER_CONFIG": str(self.folder / "beaker.yml"),
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(self.folder / "ca.pem"),
        }
        return self

    def __exit__(self, *_: object) -> None:
        for run in list(self.runs.values()):
            self._stop(run, "the test is over", pb2.CancelationCode.CANCELATION_CODE_MANUAL)
        for thread in self._threads:
            thread.join(20)
        self._http.shutdown()
        self._http.server_close()
        self._rpc.stop(0).wait()

    def fault(self, operation: str, kind: str | int, times: int = 1, after: int = 0) -> None:
        self.faults.append(Fault(operation, kind, times, after))

    def _take(self, operation: str) -> Fault | None:
        with self._lock:
            self.requests.append(operation)
            for f in self.faults:
                if f.operation == operation and f.times:
                    f.times -= 1
                    return f
        return None

    def _name(self, kind: str) -> str:
        with self._lock:
            self._count += 1
            return f"01{kind.upper()}{self._count:020d}"

    def _begin(self, operation: str, context: grpc.ServicerContext) -> None:
        if dict(context.invocation_metadata()).get("authorization") != f"bearer {TOKEN}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
        if (fault := self._take(operation)) and fault.kind == "unavailable":
            context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset by the test")

    # --- what there is ----------------------------------------------------------------------------------------------

    def GetUser(self, request, context):
        self._begin("GetUser", context)
        return pb2.GetUserResponse(user=pb2.User(id="01USER", name=USER))

    def GetOrganization(self, request, context):
        self._begin("GetOrganization", context)
        return pb2.GetOrganizationResponse(organization=pb2.Organization(id="01ORG", name=ORG))

    def ResolveOrganizationName(self, request, context):
        self._begin("ResolveOrganizationName", context)
        return pb2.ResolveOrganizationNameResponse(organization_id="01ORG")

    def ResolveWorkspaceName(self, request, context):
        self._begin("ResolveWorkspaceName", context)
        if (request.owner_name, request.workspace_name) != (ORG, WORKSPACE):
            context.abort(grpc.StatusCode.NOT_FOUND, "no such workspace")
        return pb2.ResolveWorkspaceNameResponse(workspace_id="01WORKSPACE")

    def GetWorkspace(self, request, context):
        self._begin("GetWorkspace", context)
        return pb2.GetWorkspaceResponse(workspace=pb2.Workspace(id="01WORKSPACE", name=f"{ORG}/{WORKSPACE}"))

    def ResolveBudgetName(self, request, context):
        self._begin("ResolveBudgetName", context)
        if f"{request.organization_name}/{request.budget_name}" != BUDGET:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such budget")
        return pb2.ResolveBudgetNameResponse(budget_id="01BUDGET")

    def ResolveImageName(self, request, context):
        self._begin("ResolveImageName", context)
        if f"{request.author_name}/{request.image_name}" not in self.images:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such image")
        return pb2.ResolveImageNameResponse(image_id="01IMAGE")

    def GetImage(self, request, context):
        self._begin("GetImage", context)
        return pb2.GetImageResponse(image=pb2.Image(id=request.image_id))

    def ListClusters(self, request, context):
        self._begin("ListClusters", context)
        shape = pb2.Cluster.DESCRIPTOR.fields_by_name["node_shape"].message_type._concrete_class
        return pb2.ListClustersResponse(clusters=[
            pb2.Cluster(id=f"01{n}", name=n.partition("/")[2], organization_name=ORG,
                        node_shape=shape(gpu_count=g, gpu_type=pb2.GpuType.GPU_TYPE_NVIDIA_H100))
            for n, g in self.clusters.items()])  # fmt: skip

    def GetSecret(self, request, context):
        self._begin("GetSecret", context)
        if request.secret_name not in self.secrets:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such secret")
        return pb2.GetSecretResponse(secret=pb2.Secret(name=request.secret_name))

    def ListSecrets(self, request, context):
        self._begin("ListSecrets", context)
        return pb2.ListSecretsResponse(secrets=[pb2.Secret(name=n) for n in sorted(self.secrets)])

    # --- datasets ---------------------------------------------------------------------------------------------------

    def make_dataset(self, name: str) -> Dataset:
        key = self._name("dataset")
        folder = self.folder / "datasets" / key
        folder.mkdir(parents=True)
        made = pb2.Dataset(id=key, name=name, full_name=f"{USER}/{name}", created=now())
        self.datasets[key] = Dataset(made, folder)
        return self.datasets[key]

    def find_dataset(self, name: str) -> Dataset | None:
        return self.datasets.get(name) or next(
            (d for d in self.datasets.values() if d.message.full_name == name or d.message.name == name), None
        )

    def ResolveDatasetName(self, request, context):
        self._begin("ResolveDatasetName", context)
        found = self.find_dataset(f"{request.author_name}/{request.dataset_name}")
        if found is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such dataset")
        return pb2.ResolveDatasetNameResponse(dataset_id=found.message.id)

    def GetDataset(self, request, context):
        self._begin("GetDataset", context)
        found = self.datasets.get(request.dataset_id)
        if found is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such dataset")
        return pb2.GetDatasetResponse(dataset=found.message)

    def DeleteDatasets(self, request, context):
        self._begin("DeleteDatasets", context)
        for key in request.dataset_ids:
            self.datasets.pop(key, None)
        return pb2.DeleteDatasetsResponse()

    def ListDatasetFiles(self, request, context):
        self._begin("ListDatasetFiles", context)
        root = self.datasets[request.options.dataset_id].folder
        sha256 = pb2.DatasetFile.ALGORITHM_TYPE_SHA256
        digest = pb2.DatasetFile.DESCRIPTOR.nested_types_by_name["Digest"]._concrete_class
        files = []
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            name, data = path.relative_to(root).as_posix(), path.read_bytes()
            if name.startswith(request.options.prefix):
                value = digest(algorithm=sha256, value=hashlib.sha256(data).digest())
                files.append(pb2.DatasetFile(path=name, size=len(data), digest=value))
        return pb2.ListDatasetFilesResponse(dataset_files=files)

    # --- experiments ------------------------------------------------------------------------------------------------

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
        jobs = [
            r for r in self.runs.values() if request.options.task_id in ("", r.task.message.id)
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

    # --- jobs -------------------------------------------------------------------------------------------------------

    def _launch(self, task: Task) -> None:
        key = self._name("job")
        status = pb2.JobStatus(status=pb2.WorkloadStatus.STATUS_QUEUED, created=now(), message="waiting for a slot")
        dataset = self.make_dataset(f"results-{key}")
        message = pb2.Job(id=key, task_id=task.message.id, workload_id=task.experiment.message.id, status=status)
        message.assignment_details.result_dataset_id = dataset.message.id
        run = Run(message, task, dataset.message.id)
        task.runs.append(run)
        self.runs[key] = run
        thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _paths(self, run: Run) -> dict[str, Path]:
        """The folder that stands for each mounted path."""
        spec, found = run.task.spec, {}
        for mount in spec.datasets or []:
            source = dict(mount.source)  # the client's from_json leaves it a table
            if source.get("weka"):
                folder = self.folder / "weka" / source["weka"]
                folder.mkdir(parents=True, exist_ok=True)
                found[mount.mount_path] = folder
            elif source.get("beaker"):
                dataset = self.find_dataset(source["beaker"])
                assert dataset is not None
                found[mount.mount_path] = dataset.folder
        if spec.result:
            found[spec.result.path] = self.datasets[run.dataset].folder
        return found

    def _work(self, run: Run) -> None:
        spec, status = run.task.spec, run.message.status
        while self.hold and not run.cancelled:
            time.sleep(0.01)
        paths = self._paths(run)

        def here(text: str) -> str:
            for path, folder in paths.items():
                if text == path or text.startswith(path + "/"):
                    return str(folder) + text[len(path) :]
            return text

        variables = {e.name: self.secrets[e.secret] if e.secret else here(str(e.value)) for e in spec.env_vars or []}
        variables |= {
            "PATH": os.environ["PATH"], "HOME": str(self.folder), "BEAKER_JOB_ID": run.message.id,
            "BEAKER_ASSIGNED_GPU_COUNT": "0", "BEAKER_REPLICA_RANK": str(run.task.rank),
            "BEAKER_REPLICA_COUNT": str(spec.replicas or 1), "BEAKER_NODE_HOSTNAME": "localhost",
        }  # fmt: skip
        if spec.leader_selection:
            variables["BEAKER_LEADER_REPLICA_HOSTNAME"] = "127.0.0.1"
        home = self.folder / "jobs" / run.message.id
        home.mkdir(parents=True)
        if not run.cancelled:
            status.started.CopyFrom(now())
            status.status = pb2.WorkloadStatus.STATUS_RUNNING
            status.message = ""
            command = [here(a) for a in [*spec.command, *(spec.arguments or [])]]
            run.process = subprocess.Popen(command, cwd=home, env=variables, stdin=subprocess.DEVNULL,
                                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
            timer = threading.Timer((spec.timeout or 1e18) / 1e9, self._stop, (run, "took longer than its timeout",
                                    pb2.CancelationCode.CANCELATION_CODE_TIMEOUT)) if spec.timeout else None  # fmt: skip
            if timer:
                timer.start()
            threading.Thread(target=self._end, args=(run,), daemon=True).start()
            assert run.process.stdout is not None
            for line in run.process.stdout:
                run.lines.append((now(), line))
            code = run.process.wait()
            if timer:
                timer.cancel()
            status.exit_code = code if code >= 0 else 128 - code
            status.exited.CopyFrom(now())
        self._finish(run, home)

    def _end(self, run: Run) -> None:
        """A container ends with its first process, and so do those in sessions of their own, as torchrun's."""
        run.process.wait()
        mark = f"BEAKER_JOB_ID={run.message.id}\0HOME={self.folder}\0".encode()
        mine = True
        while mine:
            mine = False
            for proc in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    environment = (proc / "environ").read_bytes()
                    if all(word in environment for word in mark.split(b"\0")):
                        os.kill(int(proc.name), signal.SIGKILL)
                        mine = True

    def _finish(self, run: Run, home: Path) -> None:
        task, status = run.task, run.message.status
        shutil.rmtree(home, ignore_errors=True)
        context = task.spec.context
        if run.cancelled:
            status.canceled.CopyFrom(now())
            status.canceled_for, status.canceled_code = run.cancelled
            status.status = pb2.WorkloadStatus.STATUS_CANCELED
        elif status.exit_code:
            status.failed.CopyFrom(now())
            status.status = pb2.WorkloadStatus.STATUS_FAILED
        else:
            status.status = pb2.WorkloadStatus.STATUS_SUCCEEDED
        self.datasets[run.dataset].message.committed.CopyFrom(now())
        preempted = run.cancelled and run.cancelled[1] == pb2.CancelationCode.CANCELATION_CODE_SYSTEM_PREEMPTION
        retry = task.experiment.spec.retry
        failures = [r for r in task.runs if r.message.status.status == pb2.WorkloadStatus.STATUS_FAILED]
        if (preempted and context.auto_resume is not False and not self.stranded) or (
            status.status == pb2.WorkloadStatus.STATUS_FAILED
            and len(failures) <= (retry.allowed_task_retries if retry else 0)
        ):
            self._launch(task)
        elif status.status == pb2.WorkloadStatus.STATUS_FAILED and task.spec.propagate_failure:
            for other in task.experiment.tasks:
                if other is not task:
                    self._stop(other.runs[-1], "a sibling failed",
                               pb2.CancelationCode.CANCELATION_CODE_SIBLING_TASK_FAILED)  # fmt: skip
        status.finalized.CopyFrom(now())

    def _stop(self, run: Run, why: str, code: int) -> None:
        if run.message.status.HasField("finalized") or run.cancelled:
            return
        run.cancelled = (why, code)
        if run.process and run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGTERM)
            threading.Timer(
                10, lambda: run.process.poll() is None and os.killpg(run.process.pid, signal.SIGKILL)
            ).start()

    def lose(self, run: Run) -> None:
        """Its machine is gone, without a word to anybody in it."""
        run.cancelled = ("node lost", pb2.CancelationCode.CANCELATION_CODE_SYSTEM_PREEMPTION)
        os.kill(run.process.pid, signal.SIGKILL)

    def preempt(self, run: Run) -> None:
        self._stop(run, "preempted", pb2.CancelationCode.CANCELATION_CODE_SYSTEM_PREEMPTION)


class Handler(BaseHTTPRequestHandler):
    beaker: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _parts(self) -> tuple[list[str], dict[str, str]]:
        url = urlsplit(self.path)
        path = url.path.removeprefix("/api/v3")
        return [unquote(p) for p in path.strip("/").split("/")], {k: v[0] for k, v in parse_qs(url.query).items()}

    def _storage(self, dataset: Dataset) -> dict[str, Any]:
        key = dataset.message.id
        return {"id": key, "token": "storage-token", "tokenExpires": "2099-01-01T00:00:00Z", "address": self.beaker.url}

    def do_POST(self) -> None:
        parts, query = self._parts()
        if parts == ["uploads"]:
            key = self.beaker._name("upload")
            self.beaker.uploads[key] = bytearray()
            return self._answer(200, headers={"Upload-ID": key})
        body = json.loads(self._body() or b"{}")
        if parts[0] == "workspaces" and parts[2] == "experiments":
            fault = self.beaker._take("create")
            if fault and isinstance(fault.kind, int):
                return self._answer(fault.kind, {"message": "the server is broken"})
            if fault and fault.kind == "dropped":
                self.close_connection = True
                return None
            if refusal := self.beaker.refusal(body, query.get("name", "")):
                return self._answer(refusal[0], {"message": refusal[1]})
            made = self.beaker.create(body, query.get("name", ""))
            if fault and fault.kind == "lost":
                self.close_connection = True
                return None
            return self._answer(200, {"id": made.message.id})
        if parts == ["datasets"]:
            if self.beaker.find_dataset(query["name"]):
                return self._answer(409, {"message": "dataset name is already in use"})
            made_dataset = self.beaker.make_dataset(query["name"])
            return self._answer(200, {"id": made_dataset.message.id, "storage": self._storage(made_dataset)})
        return self._answer(404, {"message": self.path})

    def do_PUT(self) -> None:
        parts, _ = self._parts()
        if parts[0] == "datasets" and parts[2] == "files":
            file = self.beaker.datasets[parts[1]].folder.joinpath(*parts[3:])
            file.parent.mkdir(parents=True, exist_ok=True)
            data = self._body()
            if digest := self.headers.get("Digest"):  # the content is that of an upload
                found = [bytes(u) for u in self.beaker.uploads.values() if digest_of(u) == digest]
                if data or not found:
                    return self._answer(400, {"message": f"no upload has the digest {digest}"})
                data = found[0]
            elif len(data) > LIMIT:
                return self._answer(413, {"message": "larger than one request may be"})
            file.write_bytes(data)
            return self._answer(200)
        return self._answer(404, {"message": self.path})

    def do_PATCH(self) -> None:
        parts, _ = self._parts()
        data = self._body()
        if parts[0] == "uploads":
            return self._piece(self.beaker.uploads[parts[1]], data)
        self.beaker.datasets[parts[1]].message.committed.CopyFrom(now())
        return self._answer(200)

    def _piece(self, upload: bytearray, data: bytes) -> None:
        """A piece of a file at its offset; the last one is answered with the digest of the whole."""
        fault = self.beaker._take("piece")
        if fault and fault.kind == "dropped":
            self.close_connection = True
            return None
        length, offset = int(self.headers["Upload-Length"]), int(self.headers["Upload-Offset"])
        if len(data) > LIMIT or offset + len(data) > length or offset > len(upload):
            return self._answer(
                400, {"message": f"a piece of {len(data)} at {offset} of {length}, {len(upload)} are here"}
            )
        upload[offset : offset + len(data)] = data
        return self._answer(200, headers={"Digest": digest_of(upload)} if len(upload) == length else {})

    def do_GET(self) -> None:
        parts, _ = self._parts()
        if parts[0] == "datasets" and len(parts) == 2:
            return self._answer(200, {"storage": self._storage(self.beaker.datasets[parts[1]])})
        if parts[0] == "datasets" and parts[2] == "files":
            fault = self.beaker._take("download")
            data = self.beaker.datasets[parts[1]].folder.joinpath(*parts[3].split("/")).read_bytes()
            return self._answer(200, data if not fault else data[: len(data) // 2])
        return self._answer(404, {"message": self.path})
