"""The `sky` command, and what it answers about managed jobs. Standard library only.

SkyPilot is no package of this project: whoever uses this launcher has `sky` on PATH, in an environment of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sft.common.errors import SftError
from sft.launch.job import LostConnection, Status

ANSWER_S = 120.0
LAUNCH_S = 1800.0
"""The first launch may start SkyPilot's jobs controller, a machine of its own."""
INSTALL = 'pip install "skypilot[kubernetes]" in an environment of its own, and its bin on PATH'
NOT_INHERITED = ("MAKE", "MFLAGS", "PYTHON", "VIRTUAL_ENV", "SHARD", "DETACH", "DRY_RUN")
"""Prefixes of variables that `sky` must not inherit: its Python has an environment of its own."""
NO_JOBS = "No in-progress managed jobs"
"""What `sky` prints where no jobs controller was ever started."""
SILENCE = r"ApiServerConnectionError|Could not connect|[Cc]onnection (refused|reset|aborted|error)|timed out|Service Unavailable|Bad Gateway"
"""What `sky` prints when its API server does not answer."""
LOG_CODES = (0, 100, 101, 103)
"""Exit statuses of `sky jobs logs`: sky.exceptions.JobExitCode, which says how the job is."""
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PENDING = ("PENDING", "SUBMITTED", "STARTING")
_RUNNING = ("RUNNING", "WINDING_DOWN", "CANCELLING")
_KILLED = (137, 143)
"""Exit statuses of nodes that were ended because another one had failed."""


def find() -> str:
    """The path of the `sky` command. Raises SftError where there is none."""
    if found := shutil.which("sky"):
        return found
    raise SftError(f"sky: not found; next: {INSTALL}")


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a `sky` process, with more variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
    return {**kept, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **(variables or {})}


def run(
    *words: str, variables: Mapping[str, str] | None = None, codes: Collection[int] = (0,), limit_s: float = ANSWER_S
) -> str:
    """Runs `sky WORDS…` and returns what it printed, without colours. Raises LostConnection or SftError."""
    command = [find(), *words]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=limit_s, env=environment(variables), check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise LostConnection(f"sky {words[0]} did not answer within {limit_s:.0f} s") from None
    text = plain(done.stdout)
    if done.returncode in codes:
        return text
    said = (plain(done.stderr).strip() + "\n" + text.strip()).strip()
    if re.search(SILENCE, said):
        raise LostConnection(f"sky {words[0]}: {said.splitlines()[-1]}")
    raise SftError(f"sky {shlex.join(words)} failed with exit status {done.returncode}:\n{said}")


def plain(text: str) -> str:
    """`text` without colours and other control sequences of terminals."""
    return _ANSI.sub("", text)


def queue(*options: str) -> list[dict[str, Any]]:
    """The managed jobs of this user, as `sky jobs queue --output json` prints them. Raises LostConnection or SftError."""
    try:
        text = run("jobs", "queue", "--all", "--verbose", "--output", "json", *options)
    except SftError as e:
        if NO_JOBS in str(e):
            return []
        raise
    start = re.search(r"^\[", text, re.MULTILINE)  # other lines may come before: SkyPilot has started its API server
    try:
        found = json.loads(text[start.start() :]) if start else None
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, list):
        raise SftError(
            f"sky jobs queue --output json: not the list of jobs, but {text[:200]!r}; next: a newer SkyPilot"
        )
    return found


def status_of(record: Mapping[str, Any]) -> Status:
    """The status of one managed job. Raises SftError for a state that this launcher does not know."""
    state, why = str(record.get("status")), str(record.get("failure_reason") or record.get("details") or "")
    attempt = f"attempt {int(record.get('recovery_count') or 0) + 1}" if record.get("recovery_count") else ""
    if state in _PENDING:
        return Status("pending", None, why)
    if state in _RUNNING:
        return Status("running", None, attempt)
    if state == "RECOVERING":
        return Status("pending", None, f"recovering, {attempt or 'attempt 2'}")
    if state == "SUCCEEDED":
        return Status("done", 0)
    if state == "CANCELLED":
        return Status("cancelled")
    if state.startswith("FAILED"):
        return Status("failed", exit_code(why), state.lower() + (f": {' '.join(why.split())}" if why else ""))
    raise SftError(
        f"sky jobs queue: job {record.get('job_id')} has the state {state!r}; next: sky --version, another one"
    )


def exit_code(reason: str) -> int:
    """The stage's exit status in SkyPilot's reason of a failure, "exit code 3" or "exit codes [0, 3]"; 1 where it has none."""
    match = re.search(r"exit codes? \[?([\d, ]+)", reason)
    codes = [int(n) for n in re.findall(r"\d+", match[1])] if match else []
    bad: Sequence[int] = [c for c in codes if c]
    return next((c for c in bad if c not in _KILLED), bad[0] if bad else 1)
