"""The sbatch script of a stage, or of one part of it.

It is written to runs/<run>/.jobs/<stage>.sbatch and can be submitted by hand. srun starts the command once on each node
with SFT_NODES, SFT_NODE_RANK and SFT_HEAD (host:port of the first node, for torchrun). When training is preempted, or
signalled shortly before its time is up, it saves and exits with 75; the script then puts the job back into the queue, and
its next attempt resumes. Values from recipes and clusters enter the script in two ways only: `#SBATCH` lines through
`directive`, the command and the cluster's `env` through shlex.quote. Standard library only.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sft.common.errors import SftError
from sft.common.machine import OFFLINE
from sft.launch import failed
from sft.launch.job import WATCH, Job
from sft.recipe import time_limit
from sft.recipe.schema import Cluster, Hardware

LOG = r"""
attempt=$((${SLURM_RESTART_COUNT:-0} + 1)) ended="$job.exit"
log="$job.attempt-$(printf %02d "$attempt").log"
exec >>"$log" 2>&1
rm -f "$ended" # of an attempt that Slurm itself put back into the queue
"""
PROLOGUE = r"""set -eE
trap 'status=$?; echo "--- a line of the prologue failed with exit status $status"; echo "$status" >"$ended"; exit "$status"' ERR
%s
trap - ERR
set +eE
"""
SCRIPT = r"""export PYTHONPATH="$PWD/lib${PYTHONPATH:+:$PYTHONPATH}"
SFT_HEAD="$(hostname):$((20000 + SLURM_JOB_ID % 10000))"
export SFT_HEAD SFT_JOB="$SLURM_JOB_ID" SFT_NODES="$SLURM_JOB_NUM_NODES"
if [ "$SFT_NODES" -gt 1 ]; then # the first node finds its interface by its route to the last one
    peer=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
    SFT_PEER=$(scontrol show node --oneliner "$peer" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    export SFT_PEER
fi
python=.venv/bin/python
[ -x "$python" ] || python=python3 # the environment of an image, which this shell is outside of
notice() { [ -z "${SFT_ON_EVENT:-}" ] || "$python" -m sft.launch.notice "$1" "${event[@]}" "$SLURM_JOB_ID" "$2"; }
notice start "attempt $attempt on $SLURM_JOB_NODELIST"
task=""
trap '[ -z "$task" ] || kill -USR1 "$task"' USR1 # time is nearly up: srun forwards the signal
echo "--- attempt $attempt of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"
# shellcheck disable=SC2016  # the inner shell is the one on each node; a node that ends first leaves the others time to save
srun --kill-on-bad-exit=0 --wait=120 --cpu-bind=none${SLURM_CPUS_PER_TASK:+ --cpus-per-task=$SLURM_CPUS_PER_TASK} "${srun[@]}" \
    bash -c 'SFT_NODE_RANK="$SLURM_NODEID" exec "$@"' - "${command[@]}" &
task=$!
trap : TERM                    # Slurm has signalled the tasks itself: wait until they have saved
status=0
while kill -0 "$task" 2>/dev/null; do wait "$task" && status=0 || status=$?; done
# The node that failed: where a rank hung or computed wrongly, or, after a kill or an error of the hardware, where the first task ended.
seek=""
if grep -qE '(hung|corrupt): rank [0-9]+ on [^ ,:]+:' "$log"; then
    seek='s/.*(hung|corrupt): rank [0-9]+ on ([^ ,:]+):.*/\2/p'
elif { [ "$status" -gt 128 ] && [ "$status" != 143 ]; } || { [ "$status" != 75 ] && grep -qE 'CUDA error|HIP error|uncorrectable|Bus error' "$log"; }; then
    seek='s/^srun: error: ([^:,[]+): task.*/\1/p'
fi
node=$([ -z "$seek" ] || sed -nE "$seek" "$log" | head -n 1)
[ "$status" = 0 ] || [ -z "$node" ] || echo "$node $SLURM_JOB_ID attempt $attempt exit $status" >>"$failures"
bad=$(awk '++seen[$1] == 2 {printf "%s%s", comma, $1; comma = ","}' "$failures" 2>/dev/null)
# 75: saved, run me again; 143: ended by SIGTERM. Requeue, unless Slurm is ending the job (cancelled, or requeued already).
case "$status" in 75 | 143)
    for _ in 1 2 3 4 5 6; do if state=$(squeue -h -j "$SLURM_JOB_ID" -o %T); then break; else sleep 10; fi; done
    if [ "$state" = RUNNING ]; then
        echo "--- stopped early (exit status $status): back into the queue"
        ending=""
        trap 'ending=1' TERM # Slurm ends this attempt; only then may the nodes of the next one be changed
        (trap '' TERM && notice requeue "exit status $status${node:+, failed on $node}")
        if (trap '' TERM && scontrol requeue "$SLURM_JOB_ID"); then
            [ -z "$bad" ] || { echo "--- without $bad, which failed twice: $failures"; (trap '' TERM && scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$bad"); }
            trap - TERM
            [ -z "$ending" ] || exit 143 # else Slurm would wait KillWait for it
            sleep 600 # until Slurm ends this attempt
        fi
    fi ;;
esac
if [ "$status" = 0 ]; then notice end ""; else notice failure "exit status $status${node:+, failed on $node}"; fi
echo "$status" >"$ended"
exit "$status"
"""

NO_INTERNET = {**dict.fromkeys(OFFLINE, "1"), "WANDB_MODE": "offline"}
"""Variables of jobs that reach no internet: libraries then fail at once, or write to files, instead of waiting."""
OWN_OPTIONS = ("array", "chdir", "comment", "dependency", "export", "nodes", "no-requeue", "ntasks", "ntasks-per-node", "open-mode",
               "output", "signal", "wrap")  # fmt: skip
"""Options of sbatch that the script sets itself, or that would keep its variables from the nodes."""
OWN_FIELDS = {"time": "time", "gpus": "gpus", "gpus-per-node": "gpus", "gpus-per-task": "gpus"}
"""Options whose values the checks and plans of a stage read from a field."""
VARIABLE = r"\$(?:[A-Za-z_]|\{[A-Za-z_]\w*\})"
"""The start of a variable in a word of the shell."""


def job_script(job: Job, name: str, folder: Path) -> str:
    """The script of a stage (`name` = its name) or of an array's part (`<stage>-part`). `folder` is runs/<run>/.jobs."""
    part = name != job.stage
    lines = [directive(f"--{option}", str(value)) for option, value in _options(job, name, folder).items() if value]
    lines += ["#SBATCH --exclusive"] * takes_nodes(job.cluster, job.hardware, job.gpus) + ["#SBATCH --requeue"]
    lines += [extra_directive(text) for text in (*job.cluster.sbatch, *job.hardware.sbatch)]
    number = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if part else '"$SLURM_JOB_ID"'
    body = [
        f"job={shlex.quote(str(folder / f'{name}-'))}{number}",
        f"failures={shlex.quote(str(folder / failed.NAME))}",
    ]
    title = f"# {job.stage} of the run {job.run.name}; by hand: {_by_hand(job, name, folder)}"
    head = "\n".join(["#!/bin/bash", title, *lines, "", *body])
    return head + LOG + _prologue(job.cluster.prologue) + _commands(job, part) + SCRIPT


def check_site(cluster: Cluster, hardware: Hardware, gpus: int) -> None:
    """Raises SftError for the first field of the cluster or of one stage that no script could hold."""
    if not cluster.shared_disk:
        raise SftError("shared_disk = false, but Slurm jobs work in this folder; next: shared_disk = true")
    time_limit.check_limit(cluster, hardware)
    for option, value in resources(cluster, hardware, gpus).items():
        directive(f"--{option}", str(value))
    for text in (*cluster.sbatch, *hardware.sbatch):
        extra_directive(text)
    _srun(cluster)
    _wrap(cluster)
    _prologue(cluster.prologue)


def _prologue(lines: Sequence[str]) -> str:
    """The cluster's own lines. Raises SftError for lines that no shell reads: an open quote would take in the rest of the script."""
    if not lines:
        return ""
    text = "\n".join(lines)
    read = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if read.returncode:
        raise SftError(f"'prologue': {read.stderr.strip().splitlines()[0]}; next: correct it in the cluster's file")
    return PROLOGUE % text


def _commands(job: Job, part: bool) -> str:
    """The lines that set the cluster's variables, srun's options and the command that each node runs."""
    variables = ({} if job.cluster.internet else NO_INTERNET) | job.cluster.env
    lines = [f"export {variable}={shlex.quote(value)}" for variable, value in variables.items()]
    lines.append(f"event=({shlex.join([job.run.name, job.stage])})")
    if job.shards:
        lines.append(f"export SHARD={'$SLURM_ARRAY_TASK_ID' if part else 'merge'}/{job.shards}")
    words = _wrap(job.cluster)
    if job.cluster.scratch and job.stage == "train":
        lines.append('env/scratch.sh pack || { echo 1 >"$ended"; exit 1; }')
        words += ["env/scratch.sh", shell_word(job.cluster.scratch)]
    lines += [f"srun=({' '.join(_srun(job.cluster))})"]
    return "\n".join([*lines, f"command=({' '.join([*words, shlex.join(job.command)])})", ""])


def _srun(cluster: Cluster) -> list[str]:
    for text in cluster.srun:
        _option(text, "srun", "--container-image=image.sqsh")
    return [shell_word(text) for text in cluster.srun]


def _wrap(cluster: Cluster) -> list[str]:
    """The words before the command. Raises SftError for a whole command line in the first one, which is a program's name."""
    if cluster.wrap and re.search(r"\s", cluster.wrap[0]):
        words = json.dumps(cluster.wrap[0].split() + list(cluster.wrap[1:]), ensure_ascii=False)
        raise SftError(
            f"'wrap' starts with {cluster.wrap[0]!r}: each word is a string of its own; next: wrap = {words}"
        )
    return [shell_word(word) for word in cluster.wrap]


def _options(job: Job, name: str, folder: Path) -> dict[str, object]:
    part = name != job.stage
    cluster, hardware = job.cluster, job.hardware
    time_limit.check_limit(cluster, hardware)
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
        **resources(cluster, hardware, job.gpus),
        "exclude": ",".join(failed.failed_twice(folder)),
        "array": f"0-{job.shards - 1}" if part else "",
        "signal": f"B:USR1@{cluster.notice_s}" if signalled else "",
    }


def takes_nodes(cluster: Cluster, hardware: Hardware, gpus: int) -> bool:
    """Whether a job takes its nodes with all their cores and memory: it requests all their GPUs and names no `cpus`."""
    return bool(gpus) and gpus == cluster.gpus_per_node and not hardware.cpus


def resources(cluster: Cluster, hardware: Hardware, gpus: int) -> dict[str, object]:
    """sbatch's options for what a job with this many GPUs on each node gets, and where. Empty values are Slurm's defaults.

    A job that names no cores or memory gets its GPUs' share of the node, where the cluster's file says what a node has.
    """
    share = gpus / cluster.gpus_per_node if cluster.gpus_per_node else 0.0
    memory_gb = hardware.memory_gb or int(cluster.memory_gb_per_node * share)
    whole = takes_nodes(cluster, hardware, gpus) and not hardware.memory_gb
    by_cores = cluster.cores_per_node and not cluster.memory_gb_per_node  # the site divides memory by cores
    gres = hardware.gres or cluster.gres
    return {
        "cpus-per-task": hardware.cpus or int(cluster.cores_per_node * share),
        "mem": ("" if by_cores else "0") if whole else f"{memory_gb}G" if memory_gb else "",
        "gpus-per-node": "" if gres else gpus,
        "gres": _gres(gres, gpus) if gres and gpus else "",
        "time": hardware.time or cluster.time,
        "partition": hardware.partition or cluster.partition,
        "account": hardware.account or cluster.account,
        "qos": hardware.qos or cluster.qos,
        "constraint": hardware.constraint or cluster.constraint,
    }


def _gres(form: str, gpus: int) -> str:
    """The value of --gres. Raises SftError for a form that has a number already, which sbatch would read as a type."""
    if "," in form or re.search(r":\d{1,2}$", form):
        raise SftError(
            f"'gres' = {form!r}: the form of one request without its number is expected, e.g. gpu:a100; next: correct it, and let"
            " `gpus_per_node` or `gpus` be the number"
        )
    return f"{form}:{gpus}"


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
    """An #SBATCH line for one of the `sbatch` options, '--name' or '--name=value'. Raises SftError."""
    name, value = _option(text, "sbatch", "--mail-type=END")
    if name[2:] in OWN_OPTIONS:
        raise SftError(
            f"'sbatch' holds {text!r}: the launcher sets {name} itself; next: remove it (nodes are `nodes` of [on.train])"
        )
    if field := OWN_FIELDS.get(name[2:]):
        raise SftError(
            f"'sbatch' holds {text!r}: {name} is planned with; next: remove it, and write it as the field {field!r}"
        )
    return directive(name, value) if value else f"#SBATCH {name}"


def _option(text: str, field: str, example: str) -> tuple[str, str]:
    """The name and value of an option of Slurm's commands. Raises SftError for another text."""
    name, _, value = text.partition("=")
    if not re.fullmatch(r"--[a-z][a-z-]*", name) or re.search(r"\s--[a-z]", value):
        raise SftError(
            f"'{field}' holds {text!r}: --option or --option=value is expected, e.g. {example}; next: a string for each"
        )
    return name, value


def shell_word(text: str) -> str:
    """A word for the shell, in which $NAME and ${NAME} are expanded and nothing else is."""
    if not re.search(VARIABLE, text):
        return shlex.quote(text)
    escaped = re.sub(rf'[\\"`]|(?!{VARIABLE})\$', lambda m: "\\" + m[0], text)
    return f'"{escaped}"'
