"""Slurm's commands, and what they answer about jobs. Standard library only."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence

from sft.common.errors import SftError
from sft.common.process import AGAIN
from sft.launch.job import LostConnection, Status

ANSWER_S = 60
# Slurm's states of a job that has not ended. In the first ones it waits.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
ENDS = {"COMPLETED": "done", "TIMEOUT": "timeout", "DEADLINE": "timeout", "CANCELLED": "cancelled"}
NOT_INHERITED = ("MAKE", "MFLAGS", "SLURM_", "SHARD", "DETACH", "DRY_RUN")
"""Prefixes of variables that a job must not inherit from the shell that submits it."""
SILENCE = r"contact slurm controller|[Cc]onnect|timed out|transmitted|temporarily|Zero Bytes|slurm_receive_msg"
"""What Slurm's commands print when the controller does not answer."""


class UnknownJob(SftError):
    """The controller never knew this job, or has forgotten it."""


def run(*command: str, variables: Mapping[str, str] | None = None) -> str:
    """Runs one of Slurm's commands and returns what it printed. `variables`: more of its environment, which sbatch gives to
    the job. Raises LostConnection, UnknownJob, or SftError."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED) or k == "SLURM_CONF"}
    env |= variables or {}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, env=env, check=False)
    except FileNotFoundError:
        raise SftError(f"{command[0]}: not found; next: run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise LostConnection(f"{command[0]} did not answer within {ANSWER_S} s") from None
    if done.returncode == 0:
        return done.stdout.strip()
    text = (done.stderr or done.stdout).strip()
    if "Invalid job id" in text:
        raise UnknownJob(f"{shlex.join(command)}: {text}")
    if re.search(SILENCE, text):
        raise LostConnection(f"{command[0]}: {text.splitlines()[-1]}")
    raise SftError(f"{shlex.join(command)} failed with exit status {done.returncode}:\n{text}")


def exit_code(text: str) -> int:
    """A status as shells give it, from Slurm's `<exit status>:<signal>`: 3:0 -> 3, 0:9 -> 137."""
    status, _, signal = text.partition(":")
    return int(status) or (int(signal) and 128 + int(signal))


def parse_status(line: str) -> Status:
    """The status in one line of `scontrol show job --oneliner`."""
    fields = {
        key: match[1] for key in ("JobState", "Reason", "Restarts") if (match := re.search(rf"{key}=(\S+)", line))
    }
    code = re.search(r" ExitCode=(\d+:\d+)", line)
    reason = "" if fields.get("Reason") in (None, "None") else fields["Reason"]
    if int(fields.get("Restarts", 0)):
        reason = (f"{reason}, " if reason else "") + f"attempt {int(fields['Restarts']) + 1}"
    return status_of(fields["JobState"], exit_code(code[1]) if code else 0, reason)


def status_of(state: str, code: int, reason: str) -> Status:
    """A status from Slurm's state, the exit status and Slurm's reason."""
    if "DependencyNeverSatisfied" in reason:
        return Status("failed", code, "a part failed")
    if state in WAITING:
        return Status("pending", None, reason)
    if state in RUNNING:
        return Status("running", None, "" if reason == "NonZeroExitCode" else reason)
    if state in ENDS:
        return Status(ENDS[state], code, "" if state == "COMPLETED" else reason)
    if state == "PREEMPTED":
        return Status("failed", AGAIN, "preempted")
    return Status("failed", code, state.lower() if state != "FAILED" else reason)


def status_of_array(parts: Sequence[Status]) -> Status:
    """One status for all parts of an array job: active while a part is, else that of the first part that failed."""
    counts = Counter(status.state for status in parts)
    summary = ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))
    if active := [s for s in parts if s.active]:
        state = "running" if any(s.state == "running" for s in active) else "pending"
        return Status(state, reason=f"parts: {summary}")
    bad = next((s for s in parts if s.state != "done"), parts[0])
    return Status(bad.state, bad.exit_code, bad.reason if bad.state == "done" else f"parts: {summary}")
