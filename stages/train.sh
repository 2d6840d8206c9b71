#!/usr/bin/env bash
# Trains one run: a process per GPU (or one on the CPU) under torchrun, resuming from the last valid checkpoint.
# Usage: stages/train.sh runs/<run> [--cluster C] [--data FOLDERS] [field=value …]
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }

numbers=$(.venv/bin/python -m sft.launch train "$@")
read -r processes threads <<<"$numbers"
export OMP_NUM_THREADS="$threads"
exec .venv/bin/torchrun --standalone --nproc-per-node "$processes" -m sft.train "$@"
