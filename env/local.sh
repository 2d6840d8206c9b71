#!/usr/bin/env bash
# Runs a stage on this machine, alone on its GPUs; see sft.launch.local.
# Usage: env/local.sh runs/<run> <stage> COMMAND…
set -euo pipefail
exec .venv/bin/python -m sft.launch local "$@"
