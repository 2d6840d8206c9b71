#!/usr/bin/env bash
# Runs a stage on this machine, with its GPUs locked; see sft.launch.local.
# Usage: env/local.sh runs/<run> <stage> COMMAND…
set -euo pipefail
export PYTHONPATH="$PWD/lib${PYTHONPATH:+:$PYTHONPATH}" # this checkout's code, whichever clone .venv was made in
exec .venv/bin/python -m sft.launch local "$@"
