#!/usr/bin/env bash
# For cron: make smoke in a clean clone with its own runs and environment. Prints nothing when it passes.
# Usage: env/nightly.sh [ROOT [REPOSITORY]]    ROOT: folder for all it writes, default ~/olmo-sft-nightly
#                                              REPOSITORY: URL or folder to clone, default this repository
# GOALS="smoke test": the goals of make (default smoke). TIMEOUT_S=7200: the longest time it may take (default 3600).
# Exit status: 0 passed, 75 another one is running, else failed, with the reason and the last lines of the log on stderr.
set -euo pipefail

fail() { # fail STATUS REASON
    printf 'nightly: %s\n' "$2" >&2
    exit "$1"
}
case "${1:-}" in -*) sed -n '2,6s/^# //p' "$0" >&2 && exit 2 ;; esac

repository="${2:-$(cd "$(dirname "$0")/.." && pwd)}"
root="${1:-$HOME/olmo-sft-nightly}"
read -ra goals <<<"${GOALS:-smoke}"
mkdir -p "$root/logs"
root="$(cd "$root" && pwd)"
# The clone must not inherit variables of the caller (cron, a git hook, another make).
unset "${!MAKE@}" "${!GIT_@}" MFLAGS RECIPE RUNS DATA CLUSTER PYTHONPATH VIRTUAL_ENV

exec 9<>"$root/lock" # children keep it open too: busy as long as any process of this run lives
flock --nonblock 9 || fail 75 "busy: $(cat "$root/lock") is running in $root"
printf 'pid %s on %s' "$$" "$(hostname)" >"$root/lock"

log="$root/logs/$(date -u +%Y%m%dT%H%M%SZ).log"
rm -rf "$root"/work.* # of an earlier failure
work="$(mktemp -d "$root/work.XXXXXX")"
find "$root/logs" -name '*.log' -mtime +30 -delete

step() { # step WHAT COMMAND…
    local what="$1" status=0
    shift
    printf '+ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null || status=$?
    ((status == 0)) && return
    ((status == 124)) && what+=" took longer than ${TIMEOUT_S:-3600} s and"
    printf 'nightly: %s\n' "last lines of $log (the clone and its runs are in $work):" >&2
    tail -n 20 "$log" >&2
    fail "$status" "$what failed with exit status $status"
}

step "git clone $repository" git clone --quiet -- "$repository" "$work/clone"
step "git log" git -C "$work/clone" log -1 --format='commit %H %cI'
step "make ${goals[*]}" timeout --kill-after=60 "${TIMEOUT_S:-3600}" make -C "$work/clone" RUNS="$work/runs" "${goals[@]}"

# Keep the runs of the last night that passed, with their report; delete the clone and its environment.
rm -rf "$root/runs"
if [ -d "$work/runs" ]; then mv "$work/runs" "$root/runs"; fi
rm -rf "$work"
