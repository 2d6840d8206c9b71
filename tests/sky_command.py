"""A stand-in for the `sky` command, for tests: managed jobs are processes of this machine. State is kept in the folder $SKY_FOLDER.

It answers as SkyPilot 0.14.1 does: the words that it takes, what it prints, exit statuses, the prefixes of a log's lines. Each node
has a home of its own, the code as `workdir` says, and variables SKYPILOT_*. It reads a task as strictly as its table says.
tests/test_sky_real.py compares with the real command where there is one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(os.environ["SKY_FOLDER"])
FIELDS = {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "setup", "run", "config"}
RESOURCES = {"infra", "any_of", "accelerators", "cpus", "memory", "use_spot", "image_id", "disk_size", "job_recovery"}
ENDS = ("SUCCEEDED", "FAILED", "FAILED_SETUP", "CANCELLED")


def record(job: Path, **changes: Any) -> dict[str, Any]:
    """The record of a job, with changes written to it."""
    file = job / "record.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if changes:
        found.update(changes)
        temporary = job / f"record.{os.getpid()}"
        temporary.write_text(json.dumps(found))
        temporary.rename(file)
    return found


def launch(words: list[str]) -> int:
    secrets, options, files = {}, [], []
    while words:
        word = words.pop(0)
        if word == "--secret":
            name = words.pop(0)
            if "=" in name or name not in os.environ:
                sys.exit(f"Error: Invalid value for '--secret': {name} is not set in local environment.")
            secrets[name] = os.environ[name]
        else:
            (options if word.startswith("-") else files).append(word)
    if not {"--detach-run", "--yes"} <= set(options) or len(files) != 1:
        sys.exit(f"Error: not the words of a launch without questions: {options} {files}")
    task = yaml.safe_load(Path(files[0]).read_text())
    if unknown := (set(task) - FIELDS) | (set(task["resources"]) - RESOURCES):
        sys.exit(f"ValueError: Invalid task YAML: {sorted(unknown)}")
    assert all(isinstance(value, str) for value in task["envs"].values())
    job = ROOT / str(1 + max((int(p.name) for p in ROOT.iterdir() if p.name.isdigit()), default=0))
    job.mkdir()
    (job / "task.json").write_text(json.dumps(task))
    record(job, job_id=int(job.name), job_name=task["name"], status="PENDING", recovery_count=0, options=options,
           start_at=None, failure_reason=None, details=None)  # fmt: skip
    with (job / "runner.log").open("w") as log:
        subprocess.Popen([sys.executable, __file__, "RUN", str(job)], env={**os.environ, "SECRETS": json.dumps(secrets)},
                         stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)  # fmt: skip
    print(
        f"YAML to run: {files[0]}\nLaunching managed job {task['name']!r}...\n\n📋 Useful Commands\nManaged Job ID: {job.name}"
    )
    print(f"├── To cancel the job:\t\tsky jobs cancel {job.name}\n└── To view all managed jobs:\tsky jobs queue")
    return 0


def run(job: Path) -> None:
    """What SkyPilot's controller does with a job: attempts until one ends otherwise than by a status that is recovered."""
    task, secrets = json.loads((job / "task.json").read_text()), json.loads(os.environ["SECRETS"])
    recovery, restarts = task["resources"]["job_recovery"], 0
    while True:
        record(job, status="STARTING")
        home = job / f"attempt{record(job)['recovery_count'] + 1}"
        status, codes = attempt(job, task, secrets, home)
        again = any(code in recovery["recover_on_exit_codes"] for code in codes)
        if status == "FAILED" and not again and restarts < recovery["max_restarts_on_errors"]:
            restarts, again = restarts + 1, True
        if record(job)["status"] == "CANCELLED":
            return
        if status == "FAILED" and again:
            record(job, status="RECOVERING", recovery_count=record(job)["recovery_count"] + 1)
            continue
        said = f"code {codes[0]}" if len(codes) == 1 else f"codes {codes}"
        why = f"Job exited with exit {said} (user program failure). To see the details, run: sky jobs logs --controller"
        record(job, status=status, failure_reason=why if status == "FAILED" else None)
        return


def attempt(job: Path, task: dict[str, Any], secrets: dict[str, str], home: Path) -> tuple[str, list[int]]:
    """Runs setup and command on every node. Returns the job's status and the nodes' exit statuses."""
    nodes = task["num_nodes"]
    log = (job / "log").open("ab", buffering=0)
    environment = {"PATH": os.environ["PATH"], **task["envs"], **secrets, "SKYPILOT_NUM_NODES": str(nodes),
                   "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * nodes)}  # fmt: skip
    folders, processes = [], []
    for rank in range(nodes):
        folder = home / f"node{rank}" / "sky_workdir"
        folder.parent.mkdir(parents=True)
        match task.get("workdir"):
            case str(path):
                shutil.copytree(path, folder)
            case {"url": url, "ref": ref}:
                subprocess.run(["git", "clone", "--quiet", url, str(folder)], check=True)
                subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", ref], check=True)
            case _:
                folder.mkdir()
        folders.append(folder)
        setup = ["bash", "-c", task.get("setup", "true")]
        done = subprocess.run(
            setup, cwd=folder, env={**environment, "HOME": str(folder.parent)}, stdout=log, stderr=log, check=False
        )
        if done.returncode:
            return "FAILED_SETUP", [done.returncode]
    record(job, status="RUNNING", start_at=time.time())
    for rank, folder in enumerate(folders):
        name = task["name"] if nodes == 1 else f"{'head' if rank == 0 else f'worker{rank}'}, rank={rank}"
        own = {**environment, "HOME": str(folder.parent), "SKYPILOT_NODE_RANK": str(rank)}
        process = subprocess.Popen(["bash", "-c", task["run"]], cwd=folder, env=own, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        prefix = f"\x1b[36m({name}, pid={process.pid})\x1b[0m "
        subprocess.Popen(["sed", "-u", f"s/^/{prefix}/"], stdin=process.stdout, stdout=log)
        processes.append(process)
    (job / "pids").write_text(" ".join(str(p.pid) for p in processes))
    while any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes):  # one has failed: the others are ended
            for p in processes:
                if p.poll() is None:
                    p.terminate()
        time.sleep(0.05)
    codes = [p.returncode if p.returncode >= 0 else 128 - p.returncode for p in processes]
    return ("FAILED" if any(codes) else "SUCCEEDED"), codes


def jobs() -> list[Path]:
    return sorted((p for p in ROOT.iterdir() if p.name.isdigit()), key=lambda p: -int(p.name))


def queue(words: list[str]) -> int:
    if not jobs():
        print("sky.exceptions.ClusterNotUpError: No in-progress managed jobs.", file=sys.stderr)
        return 1
    assert {"--all", "--verbose", "--output", "json"} <= set(words), words
    found = [record(job) for job in jobs()]
    print(json.dumps([r for r in found if "--skip-finished" not in words or r["status"] not in ENDS], indent=2))
    return 0


def logs(words: list[str]) -> int:
    job = ROOT / words[-1]
    print("Showing the last 1000 lines (default). Pass --tail 0 to print the entire log.", file=sys.stderr)
    print("\x1b[2m├── \x1b[0m\x1b[2mWaiting for task resources on 1 node.\x1b[0m", flush=True)
    if "--controller" in words:
        print((job / "runner.log").read_text())
        return 0
    done = 0
    while True:
        status = record(job)["status"]
        data = (job / "log").read_bytes() if (job / "log").exists() else b""
        sys.stdout.write(data[done:].decode())
        sys.stdout.flush()
        done = len(data)
        if status in ENDS or "--no-follow" in words:
            break
        time.sleep(0.05)
    print(f"\x1b[0m\x1b[32m✓ Managed job finished: {job.name} (status: {status}).\x1b[0m\x1b[0m")
    return {"SUCCEEDED": 0, "CANCELLED": 103}.get(status, 100 if status in ENDS else 101)


def cancel(words: list[str]) -> int:
    job = ROOT / words[-1]
    record(job, status="CANCELLED")
    for pid in (job / "pids").read_text().split():
        subprocess.run(["kill", "-TERM", "--", f"-{pid}"], check=False, capture_output=True)
    print(f"Job with ID {job.name} is scheduled to be cancelled.")
    return 0


def main(words: list[str]) -> int:
    (ROOT / "calls").open("a").write(json.dumps(words) + "\n")
    match words:
        case ["RUN", job]:
            run(Path(job))
            return 0
        case ["--version"]:
            print("skypilot, version 0.14.1")
            return 0
        case ["check", *clouds]:
            print("Checking credentials to enable infra for SkyPilot.")
            if "k8s" in clouds:
                print(
                    "\n🎉 Enabled infra 🎉\n  Kubernetes [compute]\n    Allowed contexts:\n    └── here\n\nTo enable a cloud, follow the hints"
                )
            else:
                print(
                    "  Lambda: disabled\n    Reason [compute]: no key.\n🎉 Enabled infra 🎉\n  No infra to check/enabled.\nTo enable a cloud, …"
                )
            return 0
        case ["jobs", ("launch" | "queue" | "logs" | "cancel") as what, *rest]:
            return {"launch": launch, "queue": queue, "logs": logs, "cancel": cancel}[what](rest)
    sys.exit(f"Error: No such command {words}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
