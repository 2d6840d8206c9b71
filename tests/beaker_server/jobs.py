"""Jobs as local processes: started, stopped, preempted, lost, and started again as Beaker does it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

from beaker import beaker_pb2 as pb2

from beaker_server.datasets import DatasetCalls
from beaker_server.state import Run, Task, now

SLOW_S = 30.0
"""A real Beaker takes about a minute to start a job again."""


class Jobs(DatasetCalls):
    def _launch(self, task: Task) -> None:
        key = self._name("job")
        status = pb2.JobStatus(status=pb2.WorkloadStatus.STATUS_QUEUED, created=now(), message="waiting for a slot")
        dataset = self.make_dataset(f"results-{key}")
        message = pb2.Job(id=key, task_id=task.message.id, workload_id=task.experiment.message.id, status=status)
        message.assignment_details.result_dataset_id = dataset.message.id
        constraints = task.spec.constraints
        allowed = [
            host
            for host, cluster in self.nodes.items()
            if host not in self.cordoned
            and (host in (constraints.hostname or ()) or cluster in (constraints.cluster or ()))
        ]
        if allowed:  # replicas get different ones
            message.assignment_details.node_id = f"01NODE-{allowed[task.rank % len(allowed)]}"
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
        began = time.monotonic()
        while not run.cancelled and (
            self.hold or (run.task.runs.index(run) >= self.slow_from and time.monotonic() < began + SLOW_S)
        ):
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
        retried = status.status == pb2.WorkloadStatus.STATUS_FAILED and len(failures) <= (
            retry.allowed_task_retries if retry else 0
        )
        attempt, codes = task.runs.index(run), pb2.CancelationCode
        with_sibling = run.cancelled and run.cancelled[1] == codes.CANCELATION_CODE_SIBLING_TASK_RETRY
        retried = retried and not task.experiment.cancelled
        resumed = preempted and context.auto_resume is not False and not self.stranded
        if resumed or retried or (with_sibling and not task.experiment.cancelled):
            self._launch(task)
        if status.status == pb2.WorkloadStatus.STATUS_FAILED and task.spec.propagate_failure:
            why, code = ("retry", codes.CANCELATION_CODE_SIBLING_TASK_RETRY) if retried else ("failed", codes.CANCELATION_CODE_SIBLING_TASK_FAILED)  # fmt: skip
            for other in task.experiment.tasks:
                if other is not task and attempt < len(other.runs):
                    self._stop(other.runs[attempt], f"sibling: {why}", code)
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
