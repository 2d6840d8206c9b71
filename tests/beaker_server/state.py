"""The server's state: what exists on it, its datasets, experiments and jobs, and the faults that tests ask for."""

from __future__ import annotations

import datetime
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from beaker import BeakerExperimentSpec
from beaker import beaker_pb2 as pb2
from google.protobuf.timestamp_pb2 import Timestamp

ORG, USER, WORKSPACE, BUDGET, TOKEN = "ai2", "ann", "team", "ai2/oe-test", "token-that-nobody-may-see"


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


class State:
    """The base of the server's parts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.secrets: dict[str, str] = {}
        self.images = {"ann/image"}
        self.clusters = {"ai2/jupiter": 8, "ai2/ceres": 8}
        self.nodes: dict[str, str] = {}  # host name: the cluster that it belongs to
        self.cordoned: set[str] = set()
        self.experiments: dict[str, Experiment] = {}
        self.runs: dict[str, Run] = {}
        self.datasets: dict[str, Dataset] = {}
        self.uploads: dict[str, bytearray] = {}  # of files over 32 MiB, which come in pieces
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.hold = False  # jobs stay queued
        self.slow_from = 1000  # the attempt, from 0, from which a job waits SLOW_S before it starts
        self.stranded = False  # a preempted task waits for a place and gets no new job
        self._lock = threading.RLock()
        self._count = 0
        self._threads: list[threading.Thread] = []

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
