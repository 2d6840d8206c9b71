#!/usr/bin/env bash
# Trains one run: a process per GPU (or one on the CPU) under torchrun, resuming from the last valid checkpoint.
# Usage: stages/train.sh runs/<run> [--cluster C] [--data FOLDERS] [field=value …]
# On each of SFT_NODES machines with SFT_NODE_RANK=0… and SFT_HEAD=host:port of the first, where launchers start it so.
# SIGTERM or SIGUSR1: saves, then exits with 75, which asks the scheduler to run the same command again. What has not ended
# SFT_GRACE_S (300) seconds after SIGTERM is killed. Where a process was killed it starts again: sft.launch.restarts. Where a GPU had
# too little memory it starts again once, with more recomputation: sft.training.out_of_memory.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/lib${PYTHONPATH:+:$PYTHONPATH}" # this checkout's code, whichever clone .venv was made in
python="${SFT_PYTHON:-.venv/bin/python}" # of a copy on this node's own disk: env/scratch.sh
case "${1:--}" in -*) sed -n '2,7s/^# //p' "$0" >&2; exit 2 ;; esac

rm -f -- "$1/train/.requeue"
notice="" child="" # a signal that comes before the training is remembered
stop() {
    notice=TERM
    [ -n "$child" ] || return 0
    kill -TERM "$child"
    (exec >/dev/null 2>&1; sleep "${SFT_GRACE_S:-300}"; kill -KILL "$child") & # a stopped process handles no signal
}
trap stop TERM INT # bash starts a background child deaf to Ctrl-C
trap 'notice=USR1; [ -z "$child" ] || kill -USR1 "$child"' USR1
numbers=$("$python" -m sft.launch.processes train "$@") || { status=$?; [ -z "$notice" ] || exit 75; exit "$status"; }
[ "$notice" != TERM ] || exit 75 # nothing has started, so nothing is lost
read -r processes threads <<<"$numbers"
ulimit -n "$(ulimit -Hn)" # the usual 1,024 files of a process end at 337 ranks
export OMP_NUM_THREADS="$threads"
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || # torch reads either; this one also before 2.10's
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" # threads that spin while they wait cost a busy machine a factor of four
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 # torchrun's 30 s would kill a large model in the middle of its save
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGUSR1

if [ "${SFT_NODES:-1}" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ]; then # a node's own name may resolve to 127.0.1.1
    interface=$("$python" -m sft.launch.interface)
    export GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$interface}" # '=': this name, not a prefix
    echo "[train] node $SFT_NODE_RANK of $SFT_NODES: gloo uses $interface, NCCL $NCCL_SOCKET_IFNAME"
fi
if [ "${SFT_NODES:-1}" -gt 1 ]; then # ranks follow the nodes' numbers, so that a resumed run deals them as before
    command=("$python" -m sft.launch.torchrun --nnodes "$SFT_NODES" --node-rank "$SFT_NODE_RANK" --nproc-per-node "$processes"
        --master-addr "${SFT_HEAD%:*}" --master-port "${SFT_HEAD##*:}")
elif [ "$processes" -gt 1 ]; then
    command=("$python" -m sft.launch.torchrun --standalone --nproc-per-node "$processes")
else
    command=("$python") # one process needs no rendezvous, and starts sooner
fi

(trap '' INT USR1; exec "${command[@]}" -m sft.training "$@") & # a default action would end it: this shell passes INT on as TERM
child=$!
[ "$notice" != TERM ] || stop
status=0
while kill -0 "$child" 2>/dev/null; do # a signal ends a wait, not the training
    if [ "$notice" = USR1 ]; then sleep 1; kill -USR1 "$child" 2>/dev/null || true; else wait "$child" || true; fi # again, until it is handled
done
wait "$child" || status=$? # bash has kept it, however long ago the training ended
start_again() {
    [ "${SFT_NODES:-1}" -gt 1 ] || exec stages/train.sh "$@"
    touch "$1/train/.requeue" # the other nodes must start again too
}
case "$notice$status" in
    12) # a GPU had too little memory: train/.out-of-memory makes the next start recompute more
        [ -n "${SFT_RECOMPUTES_MORE:-}" ] || SFT_RECOMPUTES_MORE=1 start_again "$@"
        ;;
    134 | 135 | 137 | 139) # ABRT, BUS, KILL, SEGV: memory, a GPU or a node has failed
        if "$python" -m sft.launch.restarts "$@"; then start_again "$@"; fi
        ;;
esac
[ "$processes$notice$status" != 1TERM143 ] || exit 75 # SIGTERM itself ended it: it came before the training could handle it
[ -e "$1/train/.requeue" ] || exit "$status"
[ -n "${SFT_JOB:-}" ] || echo "[train] next: run the same command to resume; on this machine nothing restarts it"
exit 75 # torchrun itself says 1
