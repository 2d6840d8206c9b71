#!/usr/bin/env bash
# What cron calls: a clean clone, its own runs and environment, make smoke. Quiet when it passes.
# Usage: env/nightly.sh [ROOT [REPOSITORY]]    ROOT: all it writes, default ~/olmo-sft-nightly
#                                              REPOSITORY: URL or folder to clone, default this one
# GOALS="smoke test" chooses the goals of make (smoke), TIMEOUT_S=7200 the longest it may take (3600).
# Exit status: 0 passed, 75 another one is running, else failed: the reason and the log's last lines go to stderr.
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
# Nothing of the caller's (cron, a git hook, another make) may reach the clone.
unset "${!MAKE@}" "${!GIT_@}" MFLAGS RECIPE RUNS DATA CLUSTER PYTHONPATH VIRTUAL_ENV

exec 9<>"$root/lock" # kept open by children too: busy as long as anything of this run is alive
flock --nonblock 9 || fail 75 "busy: $(cat "$root/lock") is running in $root"
printf 'pid %s on %s' "$$" "$(hostname)" >"$root/lock"

log="$root/logs/$(date -u +%Y%m%dT%H%M%SZ).log"
rm -rf "$root"/work.* # of an earlier failure, kept until now
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

# The last good night's runs stay, with their report; the clone and its environment do not.
rm -rf "$root/runs"
if [ -d "$work/runs" ]; then mv "$work/runs" "$root/runs"; fi
rm -rf "$work"
