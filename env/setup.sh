#!/usr/bin/env bash
# Makes .venv from the pins in env/lock.txt. Idempotent: the stamp names the pins it was made from.
# Usage: env/setup.sh packages|tools STAMP   (what runs need | what tests and checks need as well)
#        env/setup.sh lock                    (resolve again and rewrite env/lock.txt)
# PYTHON=python3.12 chooses the interpreter, TORCH=2.13.0+cu126 another build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH # pip must not take the checkout for an installed package

python="${PYTHON:-python3}"
torch=2.13.0
cpu_index=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1

progress() { # progress WHAT COMMAND…: one line with the seconds gone by, output only on failure
    local what="$1" log started=$SECONDS pid
    shift
    log=$(mktemp)
    "$@" >"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        [ -t 2 ] && printf '\r%s … %d s' "$what" $((SECONDS - started)) >&2
        sleep 0.5
    done
    if ! wait "$pid"; then
        printf '\n%s failed:\n' "$what" >&2
        tail -n 20 "$log" >&2
        rm -f "$log"
        return 1
    fi
    [ -t 2 ] && printf '\r' >&2
    printf '%s: %d s\n' "$what" $((SECONDS - started)) >&2
    rm -f "$log"
}

pip() { .venv/bin/python -m pip install --quiet "$@"; }

has_gpu() { [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ] || [ "$(uname -s)" != Linux ]; }

install_torch() { # a GPU gets PyPI's CUDA build ('===': never a local CPU wheel); others a CPU build where one is offered
    if [ -n "${TORCH:-}" ]; then
        pip "torch===$TORCH"
    elif has_gpu; then
        pip "torch===$torch"
    else
        pip "torch===$torch+cpu" || pip --retries 1 --timeout 15 --index-url "$cpu_index" "torch===$torch+cpu" || pip "torch===$torch"
    fi
}

make_venv() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $python is older than 3.11; next: make PYTHON=python3.11 …" >&2
        exit 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
}

if [ -n "${2:-}" ] && command -v flock >/dev/null; then # two makes on a fresh clone: the second finds the work done
    exec 9>.setup.lock
    flock 9
    [ ! -e "$2" ] || exit 0
fi

case "${1:-}" in
packages)
    make_venv
    rm -f .venv/ready-* .venv/tools-*
    progress "torch (about half a minute)" install_torch
    extras=fast
    if has_gpu && [ "$(uname -s)" = Linux ]; then extras=fast,hybrid; fi
    progress "packages (about a minute)" pip -c env/lock.txt -e ".[$extras]"
    # IFEval splits sentences with it. Without internet the doctor says what is missing.
    .venv/bin/python -m nltk.downloader -q -d .venv/nltk_data punkt_tab >/dev/null 2>&1 || true
    ;;
tools) progress "test tools (about half a minute)" pip -c env/lock.txt -e '.[fast,trackers,lowbit,dev,interop]' ;;
lock)
    make_venv
    progress torch install_torch
    progress "newest allowed packages" pip --upgrade --upgrade-strategy eager -e '.[fast,trackers,lowbit,dev,interop]'
    .venv/bin/python -m pip freeze --exclude-editable | grep -viE '^(torch|triton|nvidia-.*|cuda-.*)==' >env/lock.txt
    exit
    ;;
*)
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
    ;;
esac
touch "$2"
