#!/usr/bin/env bash
# Inside a Beaker job: gets the code, prepares its environment, runs a stage's command, returns its small files.
# Usage: beaker-job.sh RUN STAGE COUNT LINE… COMMAND…   (COUNT shell lines that prepare the environment)
# The code is the archive in SFT_CODE, or SFT_COMMIT of SFT_REPOSITORY. SFT_INPUT_<stage> is an earlier stage that was made on
# another machine; Beaker stores SFT_RESULTS. Where no disk outlives the job, SFT_STAGE_ADDRESS=gs://… is where the stage is
# stored, and earlier stages are fetched from gs:// too. SIGTERM reaches the stage, which saves.
set -euo pipefail
run="$1" stage="$2" count="$3"
shift 3
child='' stopped=''
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
mkdir -p olmo-sft && cd olmo-sft

fetch() { # git asks for the token of a private repository, so that it is in no command line
    # shellcheck disable=SC2016
    git -c credential.helper= -c credential.helper='!f() { echo username=x-access-token; echo "password=${GITHUB_TOKEN:-}"; }; f' \
        fetch --quiet --depth 1 "$SFT_REPOSITORY" "$SFT_COMMIT"
}
if [ -n "${SFT_CODE:-}" ]; then
    tar -xf "$SFT_CODE/code.tar"
else
    git init --quiet .
    for pause in 2 8 30 0; do
        fetch && break
        [ "$pause" -gt 0 ] || { echo "cannot fetch $SFT_COMMIT from $SFT_REPOSITORY" >&2; exit 1; }
        sleep "$pause"
    done
    git checkout --quiet FETCH_HEAD
fi
sft_kept=("$PWD" "$run" "$stage" "${@:count + 1}") sft_lines=("${@:1:count}")
set -- # the lines run in this shell, so that what one exports, sources or defines is there for the next and for the stage
for sft_line in "${sft_lines[@]}"; do eval "$sft_line"; done
set -euo pipefail # a line may have changed these, and the folder
set -- "${sft_kept[@]}"
cd "$1"
run="$2" stage="$3"
shift 3
if [ -n "${SFT_TCPXO:-}" ]; then
    # shellcheck source=/dev/null
    source env/tcpxo.sh "$SFT_TCPXO" "${BEAKER_ASSIGNED_GPU_COUNT:-1}"
fi

mkdir -p "$run"
secret_file() { # SECRET VARIABLE FILE: the text of a secret in a file, whose path is in the variable that clients read
    [ -n "${!1:-}" ] && [ -z "${!2:-}" ] || return 0
    (umask 077 && printenv "$1" >"$3")
    export "$2=$PWD/$3"
}
secret_file GOOGLE_CREDENTIALS GOOGLE_APPLICATION_CREDENTIALS .google.json
secret_file AWS_CONFIG AWS_CONFIG_FILE .aws-config
secret_file AWS_CREDENTIALS AWS_SHARED_CREDENTIALS_FILE .aws-credentials
if [ "${BEAKER_REPLICA_RANK:-0}" -eq 0 ]; then # earlier stages that this run shares with another one on the same disk
    for variable in "${!SFT_REFERENCE_@}"; do
        name="${variable#SFT_REFERENCE_}"
        [ -e "$run/$name" ] || ln -sfn -- "../$(basename "$(dirname "${!variable}")")/$name" "$run/$name"
    done
fi
if [ "${BEAKER_REPLICA_RANK:-0}" -eq 0 ] || [ -n "${SFT_STAGE_ADDRESS:-}" ]; then # nodes without a shared disk need it on each
    for variable in "${!SFT_INPUT_@}"; do # earlier stages that were uploaded with the job
        name="${variable#SFT_INPUT_}" folder="${!variable}"
        case "$folder" in gs://* | s3://*) continue ;; esac
        if ! cmp -s "$folder/manifest.json" "$run/$name/manifest.json"; then
            rm -rf "${run:?}/.arriving-$name" && cp -rL "$folder" "$run/.arriving-$name"
            [ ! -e "$run/$name" ] || { mkdir -p "$run/.replaced" && mv "$run/$name" "$run/.replaced/$name-$(date +%s)"; }
            mv "$run/.arriving-$name" "$run/$name"
        fi
    done
fi

if [ "${BEAKER_REPLICA_COUNT:-1}" -gt 1 ]; then # stages/train.sh passes them to torchrun
    export SFT_NODES="$BEAKER_REPLICA_COUNT" SFT_NODE_RANK="$BEAKER_REPLICA_RANK" SFT_HEAD="$BEAKER_LEADER_REPLICA_HOSTNAME:$SFT_PORT"
fi
export PYTHONPATH="$PWD/lib"
if [ -n "${SFT_NODES:-}" ] && [ -n "${SFT_TCPXO:-}" ]; then
    SFT_NODE_RANK=$(.venv/bin/python -m sft.launch.beaker.node_order)
fi
[ -z "${SFT_STAGE_ADDRESS:-}" ] || forward_signals .venv/bin/python -m sft.launch.bucket_runs fetch "$run" "$stage" "$@"
status=0
forward_signals "$@" || status=$?
if [ "$status" -ne 0 ] && [ -n "${SFT_NODES:-}" ] && [ -z "$stopped" ]; then # of all nodes, so that each tells Beaker the same
    if agreed=$(.venv/bin/python -m sft.launch.agree "$status"); then status="$agreed"; fi
fi
rank="${BEAKER_REPLICA_RANK:-0}"
case "${SFT_STAGE_ADDRESS:+bucket}$status-$rank" in bucket0-0 | bucket75-*) # each node has a part of a checkpoint
    forward_signals .venv/bin/python -m sft.launch.bucket_runs send "$run" "$stage" "$status" ;;
esac
[ "$rank" -eq 0 ] || exit "$status"
[ "$status" -eq 0 ] && [ -z "${SFT_TOOL:-}" ] || exit "$status"
.venv/bin/python -m sft.launch.results "$run/$stage" "$SFT_RESULTS" ${SFT_STAGE_ADDRESS:+"$SFT_STAGE_ADDRESS"}
