"""Slurm: a stage as an sbatch job on one or many nodes.

    env/slurm.sh runs/<run> <stage> COMMAND…      submits or finds the job, follows its log, returns its status

The script lies in runs/<run>/.jobs/<stage>.sbatch and can be submitted by hand; attempt K of job N writes
<stage>-N.attempt-K.log beside it, and <stage>-N.log is what Slurm itself says of them. srun starts COMMAND once on each node with SFT_NODES, SFT_NODE_RANK and SFT_HEAD (host:port of the
first node, for torchrun). Preempted, or told shortly before its time is up, training saves and exits with 75: the script
puts the job back into the queue, and its next attempt resumes. SHARDS=n makes prepare an array of n parts and a merge.

Values from recipes and clusters enter the script in two ways only: `#SBATCH` lines through `directive`, the command and the
cluster's `env` through shlex.quote. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.launch.job import AGAIN, WATCH, Job, LostConnection, Status, beside, retried
from sft.recipe import schema

ANSWER_S = 60
LONGEST_POLL_S = 10.0
SETTLING_S = 10.0
"""For so long after a script has ended Slurm is asked often: it knows the end soon, unless it runs the job again."""
# Slurm's states that are not an end; the first ones wait.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
ENDS = {"COMPLETED": "done", "TIMEOUT": "timeout", "DEADLINE": "timeout", "CANCELLED": "cancelled"}

SCRIPT = r"""
attempt=$((${SLURM_RESTART_COUNT:-0} + 1)) ended="$job.exit"
exec >>"$job.attempt-$(printf %02d "$attempt").log" 2>&1
rm -f "$ended" # of an attempt that Slurm itself has put back into the queue
SFT_HEAD="$(hostname):$((20000 + SLURM_JOB_ID % 10000))"
export SFT_HEAD SFT_JOB="$SLURM_JOB_ID" SFT_NODES="$SLURM_JOB_NUM_NODES"
echo "--- attempt $attempt of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"
# shellcheck disable=SC2016  # the inner shell is the one on each node; a node that ends first leaves the others time to save
srun --kill-on-bad-exit=0 --wait=120 --cpu-bind=none${SLURM_CPUS_PER_TASK:+ --cpus-per-task=$SLURM_CPUS_PER_TASK} \
    bash -c 'SFT_NODE_RANK="$SLURM_NODEID" exec "$@"' - "${command[@]}" &
task=$!
trap 'kill -USR1 "$task"' USR1 # time is nearly up: srun hands it on
trap : TERM                    # Slurm has told the tasks itself: wait until they have saved
status=0
while kill -0 "$task" 2>/dev/null; do wait "$task" && status=0 || status=$?; done
# 75: saved, run me again; 143: ended by SIGTERM. Again, unless Slurm is ending the job (cancelled, or sent back already).
case "$status" in 75 | 143)
    for _ in 1 2 3 4 5 6; do if state=$(squeue -h -j "$SLURM_JOB_ID" -o %T); then break; else sleep 10; fi; done
    if [ "$state" = RUNNING ]; then
        echo "--- stopped early (exit status $status): back into the queue"
        trap - TERM
        scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until Slurm ends this attempt
    fi ;;
esac
echo "$status" >"$ended"
exit "$status"
"""


class Slurm:
    """The jobs of one run; see sft.launch.job.Scheduler. An id is a Slurm job id, or `array+merge` of a sharded prepare."""

    def __init__(self, folder: Path, cluster: schema.Cluster):
        self.folder, self.cluster = folder.absolute(), cluster

    def check(self, job: Job) -> None:
        for command in ("sbatch", "squeue", "scontrol", "scancel"):
            if not shutil.which(command):
                raise SftError(f"{command}: not found; next: type this on a login node of the cluster")
        if not self.cluster.shared_disk:
            raise SftError(f"env/{job.place.cluster}.toml: shared_disk = false, but Slurm jobs work in this folder")
        self.render(job)

    def submit(self, job: Job) -> str:
        """Submits the stage, or takes over a job in the queue that makes the same (submitted by hand, or when an answer was lost)."""
        if known := self._queued(job, job.stage):
            return known
        if not job.shards:
            training = beside(job)  # the training whose checkpoints it evaluates: not before that begins
            return self._sbatch(
                self._write(job.stage, self._script(job, job.stage)),
                *[f"--dependency=after:{training}"] * bool(training),
            )
        part = f"{job.stage}-part"
        array = self._queued(job, part) or self._sbatch(self._write(part, self._script(job, part)))
        after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes"]
        return f"{array}+{self._sbatch(self._write(job.stage, self._script(job, job.stage)), *after)}"

    def status(self, id: str) -> Status:
        *array, last = id.split("+")
        if array:
            parts = self._status(array[0])
            if parts.state not in ("done", "gone"):
                return parts
        return self._status(last)

    def follow(self, id: str, out: IO[str]) -> int:
        tail, said, pause = Tail([self._pattern(i) for i in id.split("+")], self.folder), "", 0.25
        while True:
            status = retried(lambda: self.status(id), lambda text: print(text, file=out, flush=True))
            if str(status) != said and status.living:
                said = str(status)
                print(f"job {id}: {said}", file=out, flush=True)
            wake = time.monotonic() + pause
            while True:  # the log is read more often than Slurm is asked
                tail.pump(out)
                if not status.living or time.monotonic() >= wake or self._left(id):
                    break
                time.sleep(0.2)
            if not status.living:
                return status.code
            time.sleep(0.2)
            pause = 0.25 if self._left(id) else min(1.3 * pause, LONGEST_POLL_S)

    def cancel(self, id: str) -> None:
        _slurm("scancel", *id.split("+"))

    def render(self, job: Job) -> str:
        names = [f"{job.stage}-part", job.stage] if job.shards else [job.stage]
        return "\n".join(self._script(job, name) for name in names)

    def tail(self, id: str, lines: int = 20) -> str:
        logs: dict[
            str, list[Path]
        ] = {}  # of each job or part, those that say something: Slurm's own after the attempts'
        for file in [file for i in id.split("+") for file in sorted(self.folder.glob(self._pattern(i)))]:
            if _read(file).strip() or not file.name.endswith(f"{_job_of(file)}.log"):
                logs.setdefault(_job_of(file), []).append(file)
        broken = [j for j in logs if _read(self.folder / f"{j}.exit").strip() not in ("", "0")] or [*logs][-1:]
        texts = [
            f"last lines of {f}:\n" + "\n".join(_read(f).splitlines()[-lines:])
            for j in broken[:3]
            for f in logs[j][-2:]
        ]
        return "\n".join(texts) or f"no log in {self.folder}: the job never started"

    def attempts(self, id: str) -> int:
        """How often the job has begun; of an array, its part that began most often."""
        logs = [f.name for i in id.split("+") for f in self.folder.glob(self._pattern(i))]
        return max((int(m[1]) for name in logs if (m := re.search(r"\.attempt-(\d+)\.log$", name))), default=0)

    # --- what Slurm is told -----------------------------------------------------------------------------------------

    def _script(self, job: Job, name: str) -> str:
        """The sbatch script of a stage, or of one part (`<stage>-part`, an array)."""
        part = name != job.stage
        cluster, hardware = self.cluster, job.hardware
        nodes = 1 if part else job.nodes
        whole = (
            bool(job.gpus) and job.gpus == cluster.gpus_per_node and not hardware.cpus
        )  # all its GPUs: all its cores
        log = str(self.folder / f"{name}-").replace("%", "%%") + ("%A_%a.log" if part else "%j.log")
        options: dict[str, object] = {
            "job-name": f"{job.run.name}-{name}",
            "comment": _mark(job, name),
            "chdir": Path.cwd(),
            "output": log,
            "open-mode": "append",
            "nodes": nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": hardware.cpus,
            "mem": f"{hardware.memory_gb}G" if hardware.memory_gb else "0" if whole else "",
            "gpus-per-node": job.gpus,
            "time": hardware.time or cluster.time,
            "partition": hardware.partition or cluster.partition,
            "account": cluster.account,
            "qos": cluster.qos,
            "array": f"0-{job.shards - 1}" if part else "",
            "signal": f"B:USR1@{cluster.notice_s}" if job.stage in ("train", WATCH) else "",
        }
        lines = [directive(f"--{option}", str(value)) for option, value in options.items() if value]
        lines += ["#SBATCH --exclusive"] * whole + ["#SBATCH --requeue"] + [*(extra(text) for text in cluster.sbatch)]
        mine = shlex.quote(str(self.folder / f"{name}-")) + (
            '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if part else '"$SLURM_JOB_ID"'
        )
        body = [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
        body += [f"command=({shlex.join(job.command)})", f"job={mine}"]
        if job.shards:
            body.append(f"export SHARD={'$SLURM_ARRAY_TASK_ID' if part else 'merge'}/{job.shards}")
        again = f"sbatch {shlex.quote(str(self.folder / f'{name}.sbatch'))}"
        if job.shards and not part:  # the merge of parts that are made first
            parts = f"$(sbatch --parsable {shlex.quote(str(self.folder / f'{name}-part.sbatch'))})"
            again = again.replace("sbatch", f"sbatch --dependency=afterok:{parts} --kill-on-invalid-dep=yes", 1)
        head = ["#!/bin/bash", f"# {job.stage} of the run {job.run.name}; by hand: {again}", *lines, "", *body]
        return "\n".join(head) + SCRIPT

    def _write(self, name: str, script: str) -> Path:
        file = self.folder / f"{name}.sbatch"
        write_atomic(file, script.encode())
        return file

    def _sbatch(self, script: Path, *options: str) -> str:
        answer = _slurm("sbatch", "--parsable", *options, str(script))
        if not (match := re.match(r"(\d+)", answer)):
            raise SftError(f"sbatch answered {answer!r}, which is no job id; next: squeue --me, and {script}")
        return match[1]

    def _queued(self, job: Job, name: str) -> str:
        """The id of a job in the queue that makes the same of the same folder, or ''. Raises SftError for one from other options."""
        called = f"--name={job.run.name}-{name}"
        answer = _slurm("squeue", "--me", "-h", "-t", "PENDING,RUNNING,SUSPENDED", called, "-o", "%F|%k")
        mine = _mark(job, name)
        for line in answer.splitlines():
            identifier, _, comment = line.partition("|")
            if comment.strip() == mine:
                return identifier
            if comment.startswith(mine.rpartition("#")[0] + "#"):
                raise SftError(f"job {identifier} named {job.run.name}-{name} is in the queue already, from other options or inputs;"
                               f" next: wait for it, or scancel {identifier}")  # fmt: skip
        return ""

    # --- what Slurm says --------------------------------------------------------------------------------------------

    def _status(self, id: str) -> Status:
        try:
            answer = _slurm("scontrol", "show", "job", "--oneliner", id)
        except UnknownJob:
            return self._afterwards(id)
        found = [_parse(line) for line in answer.splitlines() if "JobState=" in line]
        if len(found) <= 1:
            return found[0] if found else self._afterwards(id)
        counts = Counter(status.state for status in found)
        summary = ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))
        if living := [s for s in found if s.living]:
            state = "running" if any(s.state == "running" for s in living) else "pending"
            return Status(state, reason=f"parts: {summary}")
        bad = next((s for s in found if s.state != "done"), found[0])
        return Status(bad.state, bad.exit_code, bad.reason if bad.state == "done" else f"parts: {summary}")

    def _afterwards(self, id: str) -> Status:
        """A job that the controller no longer knows: what its script or the accounting wrote down."""
        files = [file for name in (f"*-{id}.exit", f"*-{id}_*.exit") for file in self.folder.glob(name)]
        left = [text for file in files if (text := _read(file).strip()).isdigit()]
        if left:
            code = max(map(int, left))
            return Status("failed" if code else "done", code)
        if shutil.which("sacct"):
            try:
                answer = _slurm("sacct", "-X", "-n", "-P", "-j", id, "-o", "State,ExitCode")
            except (SftError, LostConnection):
                answer = ""
            if match := re.match(r"(\w+)[^|]*\|(\d+):(\d+)", answer):
                return _ended(match[1], int(match[2]) or (int(match[3]) and 128 + int(match[3])), "")
        return Status("gone", None, "Slurm no longer knows it, and it left no exit status: killed or cancelled")

    def _left(self, id: str) -> bool:
        """Whether the job's own script has just come to its end."""
        for file in self.folder.glob(f"*-{id.split('+')[-1]}.exit"):
            with contextlib.suppress(OSError):  # the next attempt removes it
                if abs(time.time() - file.stat().st_mtime) < SETTLING_S:
                    return True
        return False

    @staticmethod
    def _pattern(id: str) -> str:
        return f"*-{id}[._]*log"


class UnknownJob(SftError):
    """The controller does not know this id (any more)."""


class Tail:
    """Prints what is added to log files, whole lines only; a part's lines with its number in front."""

    def __init__(self, patterns: Sequence[str], folder: Path):
        self.patterns, self.folder = patterns, folder
        self.offsets: dict[Path, int] = {}

    def pump(self, out: IO[str]) -> None:
        for pattern in self.patterns:
            for file in sorted(self.folder.glob(pattern)):
                self._pump(file, out)
        out.flush()

    def _pump(self, file: Path, out: IO[str]) -> None:
        with file.open("rb") as f:
            if file not in self.offsets:
                self.offsets[file] = self._start(f, file, out)
            f.seek(self.offsets[file])
            data = f.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offsets[file] += len(whole)
        part = re.search(r"-\d+_(\d+)\.(?:attempt-\d+\.)?log$", file.name)
        for line in whole.decode(errors="replace").splitlines():
            print(f"part {part[1]}: {line}" if part else line, file=out)

    @staticmethod
    def _start(f: IO[bytes], file: Path, out: IO[str], most: int = 16384) -> int:
        """Where to begin: at the start, or near the end of a log that is long already."""
        size = f.seek(0, os.SEEK_END)
        if size <= most:
            return 0
        f.seek(size - most // 4)
        f.readline()
        print(f"… earlier lines are in {file}", file=out)
        return f.tell()


def open_scheduler(folder: Path, cluster: schema.Cluster) -> Slurm:
    return Slurm(folder, cluster)


def directive(option: str, value: str) -> str:
    """An #SBATCH line, quoted for Slurm's own reader. Raises SftError for what cannot be said there."""
    if re.search(r"[\x00-\x1f\x7f\\]", value):
        raise SftError(
            f"{option} = {value!r}: a backslash or control character cannot be given to sbatch; next: change it"
        )
    if not re.fullmatch(r"[A-Za-z0-9_.,:=@%+/\[\]&|*-]+", value):
        value = '"' + value.replace('"', '\\"') + '"'
    return f"#SBATCH {option}={value}"


def extra(text: str) -> str:
    """A line for one of a cluster's `sbatch` options, '--name' or '--name=value'."""
    name, _, value = text.partition("=")
    if not re.fullmatch(r"--[a-z][a-z-]*", name):
        raise SftError(f"'sbatch' holds {text!r}: --option or --option=value is expected, e.g. --constraint=ib")
    return directive(name, value) if value else f"#SBATCH {name}"


def _mark(job: Job, name: str) -> str:
    """What a job is, in its comment: the folder it makes and from what."""
    return f"{job.run.absolute()}/{name}#{job.identity[:16]}"


def _parse(line: str) -> Status:
    """The status in one line of `scontrol show job --oneliner`."""
    fields = {
        key: match[1] for key in ("JobState", "Reason", "Restarts") if (match := re.search(rf"{key}=(\S+)", line))
    }
    code = re.search(r" ExitCode=(\d+):(\d+)", line)
    number = (int(code[1]) or (int(code[2]) and 128 + int(code[2]))) if code else 0
    reason = "" if fields.get("Reason") in (None, "None") else fields["Reason"]
    if int(fields.get("Restarts", 0)):
        reason = (f"{reason}, " if reason else "") + f"attempt {int(fields['Restarts']) + 1}"
    return _ended(fields["JobState"], number, reason)


def _ended(state: str, code: int, reason: str) -> Status:
    """Slurm's state as ours."""
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


def _slurm(*command: str) -> str:
    """Runs one of Slurm's commands. Raises LostConnection, UnknownJob, or SftError with what it said."""
    drop = ("MAKE", "MFLAGS", "SLURM_", "SHARD", "DETACH", "DRY_RUN")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop) or k == "SLURM_CONF"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, env=env, check=False)
    except FileNotFoundError:
        raise SftError(f"{command[0]}: not found; next: type this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise LostConnection(f"{command[0]} did not answer within {ANSWER_S} s") from None
    if done.returncode == 0:
        return done.stdout.strip()
    said = (done.stderr or done.stdout).strip()
    if "Invalid job id" in said:
        raise UnknownJob(f"{shlex.join(command)}: {said}")
    if re.search(
        r"contact slurm controller|[Cc]onnect|timed out|transmitted|temporarily|Zero Bytes|slurm_receive_msg", said
    ):
        raise LostConnection(f"{command[0]}: {said.splitlines()[-1]}")
    raise SftError(f"{shlex.join(command)} failed with status {done.returncode}:\n{said}")


def _job_of(log: Path) -> str:
    """`train-12`, or `prepare-part-12_3`, of a log's name."""
    return re.sub(r"(\.attempt-\d+)?\.log$", "", log.name)


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
