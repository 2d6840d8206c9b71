#!/usr/bin/env bash
# Runs training from the node's own disk: thousands of small files of Python packages are then read from one archive.
# Usage: env/scratch.sh pack               (once in a job: makes the archive .venv/environment.tar where it is missing or older)
#        env/scratch.sh FOLDER COMMAND…    (on each node: unpacks it under FOLDER, and runs COMMAND with SFT_PYTHON and SFT_SCRATCH)
# Later jobs on a node use its copy again. Training copies its dataset to SFT_SCRATCH.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
archive=.venv/environment.tar

if [ "$1" = pack ]; then
    if [ -n "$(find -L .venv/pyvenv.cfg .venv/lib/python3*/site-packages -maxdepth 0 -newer "$archive" 2>/dev/null)" ] || [ ! -e "$archive" ]; then
        work=$(mktemp "$archive.XXXXXX")
        tar -C .venv -cf "$work" --exclude='./environment.tar*' --exclude=__pycache__ .
        mv "$work" "$archive"
    fi
    exit
fi

[ $# -ge 2 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
[ -d "$1" ] && [ -w "$1" ] || { echo "error: scratch = '$1' is no folder that this node may write; next: correct it in the cluster's file" >&2; exit 1; }
folder="$1/olmo-sft-$(id -u)"
environment="$folder/environment-$(stat -Lc %Y-%s "$archive")"
shift
mkdir -p "$folder" && chmod 700 "$folder"
exec 9>"$folder/lock" # two jobs may share a node
flock 9
if [ ! -d "$environment" ]; then
    work=$(mktemp -d "$environment.XXXXXX")
    tar -xf "$archive" -C "$work"
    mv "$work" "$environment"
fi
exec 9>&-
export SFT_PYTHON="$environment/bin/python" SFT_SCRATCH="$folder"
exec "$@"
