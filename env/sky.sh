#!/usr/bin/env bash
# Runs a stage as a managed job of SkyPilot: launches it or finds it, follows its log, returns its exit status; see sft.launch.sky.
# Usage: [DETACH=1] env/sky.sh runs/<run> <stage> COMMAND…
set -euo pipefail
export PYTHONPATH="$PWD/lib${PYTHONPATH:+:$PYTHONPATH}" # this checkout's code, whichever clone .venv was made in
exec .venv/bin/python -m sft.launch sky "$@"
