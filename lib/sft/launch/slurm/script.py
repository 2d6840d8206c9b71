"""The sbatch script of a stage, or of one part of it.

It is written to runs/<run>/.jobs/<stage>.sbatch and can be submitted by hand. srun starts the command once on each node
with SFT_NODES, SFT_NODE_RANK and SFT_HEAD (host:port of the first node, for torchrun). When training is preempted, or
signalled shortly before its time is up, it saves and exits with 75; the script then puts the job back into the queue, and
its next attempt resumes. Values from recipes and clusters enter the script in two ways only: `#SBATCH` lines through
`directive`, the command and the cluster's `env` through shlex.quote. Standard library only.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from sft.common.errors import SftError
from sft.launch.job import WATCH, Job
from sft.recipe import time_limit

SCRIPT = r"""
export PYTHONPATH="$PWD/lib${PYTHONPATH:+:$PYTHONPATH}"
attempt=$((${SLURM_RESTART_COUNT:-0} + 1)) ended="$job.exit"
exec >>"$job.attempt-$(printf %02d "$attempt").log" 2>&1
rm -f "$ended" # of an attempt that Slurm itself put back into the queue
SFT_HEAD="$(hostname):$((20000 + SLURM_JOB_ID % 10000))"
export SFT_HEAD SFT_JOB="$SLURM_JOB_ID" SFT_NODES="$SLURM_JOB_NUM_NODES"
task=""
trap '[ -z "$task" ] || kill -USR1 "$task"' USR1 # time is nearly up: srun forwards the signal
echo "--- attempt $attempt of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"
# shellcheck disable=SC2016  # the inner shell is the one on each node; a node that ends first leaves the others time to save
srun --kill-on-bad-exit=0 --wait=120 --cpu-bind=none${SLURM_CPUS_PER_TASK:+ --cpus-per-task=$SLURM_CPUS_PER_TASK} \
    bash -c 'SFT_NODE_RANK="$SLURM_NODEID" exec "$@"' - "${command[@]}" &
task=$!
trap : TERM                    # Slurm has signalled the tasks itself: wait until they have saved
status=0
while kill -0 "$task" 2>/dev/null; do wait "$task" && status=0 || status=$?; done
# 75: saved, run me again; 143: ended by SIGTERM. Requeue, unless Slurm is ending the job (cancelled, or requeued already).
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


def job_script(job: Job, name: str, folder: Path) -> str:
    """The script of a stage (`name` = its name) or of an array's part (`<stage>-part`). `folder` is runs/<run>/.jobs."""
    part = name != job.stage
    lines = [directive(f"--{option}", str(value)) for option, value in _options(job, name, folder).items() if value]
    lines += ["#SBATCH --exclusive"] * _takes_nodes(job) + ["#SBATCH --requeue"]
    lines += [extra_directive(text) for text in job.cluster.sbatch]
    number = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if part else '"$SLURM_JOB_ID"'
    body = [f"export {variable}={shlex.quote(value)}" for variable, value in job.cluster.env.items()]
    body += [f"command=({shlex.join(job.command)})", f"job={shlex.quote(str(folder / f'{name}-'))}{number}"]
    if job.shards:
        body.append(f"export SHARD={'$SLURM_ARRAY_TASK_ID' if part else 'merge'}/{job.shards}")
    title = f"# {job.stage} of the run {job.run.name}; by hand: {_by_hand(job, name, folder)}"
    return "\n".join(["#!/bin/bash", title, *lines, "", *body]) + SCRIPT


def _options(job: Job, name: str, folder: Path) -> dict[str, object]:
    part = name != job.stage
    cluster, hardware = job.cluster, job.hardware
    if signalled := job.stage in ("train", WATCH):
        time_limit.check_notice(cluster, hardware)
    log = str(folder / f"{name}-").replace("%", "%%") + ("%A_%a.log" if part else "%j.log")
    return {
        "job-name": f"{job.run.name}-{name}",
        "comment": comment(job, name),
        "chdir": Path.cwd(),
        "output": log,
        "open-mode": "append",
        "nodes": 1 if part else job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": hardware.cpus,
        "mem": f"{hardware.memory_gb}G" if hardware.memory_gb else "0" if _takes_nodes(job) else "",
        "gpus-per-node": job.gpus,
        "time": hardware.time or cluster.time,
        "partition": hardware.partition or cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "array": f"0-{job.shards - 1}" if part else "",
        "signal": f"B:USR1@{cluster.notice_s}" if signalled else "",
    }


def _takes_nodes(job: Job) -> bool:
    """Whether the job takes its nodes with all their cores and memory: it requests all their GPUs and names no `cpus`."""
    return bool(job.gpus) and job.gpus == job.cluster.gpus_per_node and not job.hardware.cpus


def _by_hand(job: Job, name: str, folder: Path) -> str:
    """The command that submits the script by hand; the merge of an array submits the array first."""
    if not job.shards or name != job.stage:
        return f"sbatch {shlex.quote(str(folder / f'{name}.sbatch'))}"
    parts = f"$(sbatch --parsable {shlex.quote(str(folder / f'{name}-part.sbatch'))})"
    return (
        f"sbatch --dependency=afterok:{parts} --kill-on-invalid-dep=yes {shlex.quote(str(folder / f'{name}.sbatch'))}"
    )


def comment(job: Job, name: str) -> str:
    """The comment by which a job is found in the queue: the folder that it makes, and from what."""
    return f"{job.run.absolute()}/{name}#{job.identity[:16]}"


def directive(option: str, value: str) -> str:
    """An #SBATCH line, quoted for Slurm's own parser. Raises SftError for a value that such a line cannot hold."""
    if re.search(r"[\x00-\x1f\x7f\\]", value):
        raise SftError(
            f"{option} = {value!r}: a backslash or control character cannot be given to sbatch; next: change it"
        )
    if not re.fullmatch(r"[A-Za-z0-9_.,:=@%+/\[\]&|*-]+", value):
        value = '"' + value.replace('"', '\\"') + '"'
    return f"#SBATCH {option}={value}"


def extra_directive(text: str) -> str:
    """An #SBATCH line for one of a cluster's `sbatch` options, '--name' or '--name=value'. Raises SftError."""
    name, _, value = text.partition("=")
    if not re.fullmatch(r"--[a-z][a-z-]*", name):
        raise SftError(f"'sbatch' holds {text!r}: --option or --option=value is expected, e.g. --constraint=ib")
    return directive(name, value) if value else f"#SBATCH {name}"
