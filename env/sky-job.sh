#!/usr/bin/env bash
# Inside a job of SkyPilot, on each node: runs a stage's command in the repository, which is the current folder.
# Usage: env/sky-job.sh RUN STAGE COMMAND…
# SFT_STAGE_ADDRESS=gs://… or s3://… says that no disk outlives the job: earlier stages are fetched from buckets (SFT_INPUT_<stage>)
# before the command, and what it made is sent to that address after it. SIGTERM reaches the stage, which saves.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
run="$1" stage="$2"
shift 2
child="" stopped=""
trap 'stopped=1; [ -n "$child" ] || exit 143; kill -TERM "$child"' TERM INT
forward_signals() { # runs a command that gets this script's SIGTERM, and returns its status
    local status=0
    "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends a wait, not the command
    wait "$child" || status=$? # bash remembers it after the command has ended
    child=
    return "$status"
}

export PYTHONPATH="$PWD/lib"
rank="${SKYPILOT_NODE_RANK:-0}"
if [ "${SKYPILOT_NUM_NODES:-1}" -gt 1 ]; then # stages/train.sh passes them to torchrun; the first node's route to the last decides its interface
    mapfile -t nodes <<<"$SKYPILOT_NODE_IPS"
    export SFT_NODES="$SKYPILOT_NUM_NODES" SFT_NODE_RANK="$rank" SFT_HEAD="${nodes[0]}:$SFT_PORT" SFT_PEER="${nodes[-1]}"
fi
secret_file() { # SECRET VARIABLE FILE: the text of a secret in a file, whose path is in the variable that clients read
    [ -n "${!1:-}" ] && [ -z "${!2:-}" ] || return 0
    (umask 077 && printenv "$1" >"$HOME/$3")
    export "$2=$HOME/$3"
}
secret_file GOOGLE_CREDENTIALS GOOGLE_APPLICATION_CREDENTIALS .olmo-sft-google.json
secret_file AWS_CONFIG AWS_CONFIG_FILE .olmo-sft-aws-config
secret_file AWS_CREDENTIALS AWS_SHARED_CREDENTIALS_FILE .olmo-sft-aws-credentials
if [ -n "${SFT_STAGE_ADDRESS:-}" ]; then
    mkdir -p "$run"
    forward_signals .venv/bin/python -m sft.launch.bucket_runs fetch "$run" "$stage" "$@"
fi
status=0
forward_signals "$@" || status=$?
case "${SFT_STAGE_ADDRESS:+bucket}$status-$rank" in bucket0-0 | bucket75-*) # each node has a part of a checkpoint
    forward_signals .venv/bin/python -m sft.launch.bucket_runs send "$run" "$stage" "$status" ;;
esac
# SkyPilot ends the other nodes of one that has failed, and Slurm below it then reports 143 for all. So the nodes agree, and the first ends last.
if [ "$status" -ne 0 ] && [ -n "${SFT_NODES:-}" ] && agreed=$(.venv/bin/python -m sft.launch.agree "$status"); then
    [ "$rank" -eq 0 ] || exit 0
    status="$agreed"
    sleep 5
fi
[ "$rank" -eq 0 ] || [ -z "$stopped" ] || exit 0
exit "$status"
