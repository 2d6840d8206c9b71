#!/usr/bin/env bash
# Makes .venv from the pins in env/lock.txt. Idempotent: the stamp names the pins it was made from.
# Usage: env/setup.sh packages|tools STAMP   (what runs need | what tests and checks need as well)
#        env/setup.sh lock                    (resolve again and rewrite env/lock.txt)
# PYTHON=python3.12 chooses the interpreter, TORCH=2.13.0+cu129 another build of torch, TORCH=image the one that PYTHON has.
# Make passes `python` and `torch` of the cluster's file. uv installs the same pins in a quarter of the time. It is used where it is on the
# PATH and pip has no configuration, because uv does not read that; INSTALLER=uv or INSTALLER=pip decides otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH # pip must not take the checkout for an installed package

python="${PYTHON:-python3}"
torch=2.13.0
index=https://download.pytorch.org/whl # has a folder for each kind of build: cpu, cu129, rocm7.1 …
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
    grep '^note: ' "$log" >&2 || true
    rm -f "$log"
}

choose_installer() { # uv reads UV_INDEX_URL, UV_FIND_LINKS …, and not pip's files and variables of an index
    [ -z "${INSTALLER:-}" ] || return 0
    INSTALLER=pip
    command -v uv >/dev/null || return 0
    .venv/bin/python -m pip config list 2>&1 | grep -qv disable-pip-version-check || INSTALLER=uv
}

pip() { # bytecode is left to the first import, because most modules are never imported; where imports may not write it, it is made here
    local now=${PYTHONDONTWRITEBYTECODE:-}
    if [ "$INSTALLER" = uv ]; then
        uv pip install --quiet ${now:+--compile-bytecode} --python .venv/bin/python "$@"
    elif [ -n "$now" ]; then
        .venv/bin/python -m pip install --quiet --compile "$@"
    else
        .venv/bin/python -m pip install --quiet --no-compile "$@"
    fi
}

has_gpu() { [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ] || [ "$(uname -s)" != Linux ]; }

build() { # build VERSION+KIND: from the configured index, else from torch's own
    local patience=(--retries 1 --timeout 15)
    [ "$INSTALLER" = pip ] || patience=()
    pip "torch===$1" || pip "${patience[@]}" --index-url "$index/${1#*+}" "torch===$1"
}

instead() { # instead VERSION: PyPI's build, where no index has one for the CPU
    echo "note: no index offered torch $1+cpu, so PyPI's build for CUDA is installed: some 3 GB"
    pip "torch===$1"
}

install_torch() { # a GPU gets PyPI's CUDA build ('===': never a local CPU wheel); others a CPU build where one is offered
    case "${TORCH:-}" in
    image) .venv/bin/python -c 'import torch; print(torch.__version__)' ;;
    *+*) build "$TORCH" ;;
    ?*) pip "torch===$TORCH" ;;
    *)
        if [ -e /dev/kfd ] && ! [ -e /dev/nvidiactl ]; then
            echo "error: this machine has AMD's GPUs, and PyPI's torch is for NVIDIA's; next: TORCH=$torch+rocm… make setup, or TORCH=$torch+cpu" >&2
            return 1
        elif has_gpu; then pip "torch===$torch"; else build "$torch+cpu" || instead "$torch"; fi
        ;;
    esac
}

make_venv() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $python is older than 3.11; next: make PYTHON=python3.11 …" >&2
        exit 1
    }
    local options=()
    [ "${TORCH:-}" != image ] || options=(--system-site-packages)
    [ -x .venv/bin/python ] || "$python" -m venv "${options[@]}" .venv
}

refuse_anothers() { # an installation from here would make another checkout's environment run this one's code
    local owner
    owner=$(cd -P .venv/.. 2>/dev/null && pwd -P) || return 0
    [ "$owner" != "$(pwd -P)" ] && [ -e "$owner/env/setup.sh" ] || return 0
    echo "error: .venv is that of $owner, and it has not the packages that this checkout pins; next: make setup there, or rm .venv for one of this checkout's own" >&2
    exit 1
}

if [ -n "${2:-}" ] && command -v flock >/dev/null; then # two makes on a fresh clone: the second finds the work done
    exec 9>.setup.lock
    flock 9
    [ ! -e "$2" ] || exit 0
fi

refuse_anothers
case "${1:-}" in
packages)
    make_venv
    choose_installer
    rm -f .venv/ready-* .venv/tools-*
    progress "torch (about half a minute)" install_torch
    extras=fast
    if has_gpu && [ "$(uname -s)" = Linux ]; then extras=fast,hybrid; fi
    progress "packages (about a minute)" pip -c env/lock.txt -e ".[$extras]"
    if [ "${TORCH:-}" = image ] && compgen -G '.venv/lib/python3*/site-packages/torch' >/dev/null; then
        echo "error: $python has no torch that pyproject.toml allows, so another one was installed; next: another image, or a version as torch" >&2
        exit 1
    fi
    # IFEval splits sentences with it. Without internet the doctor says what is missing.
    .venv/bin/python -m nltk.downloader -q -d .venv/nltk_data punkt_tab >/dev/null 2>&1 || true
    ;;
tools)
    choose_installer
    progress "test tools (about half a minute)" pip -c env/lock.txt -e '.[fast,trackers,lowbit,dev,interop,docs]'
    ;;
lock)
    make_venv
    choose_installer
    progress torch install_torch
    progress "newest allowed packages" .venv/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[fast,trackers,lowbit,dev,interop,docs]'
    .venv/bin/python -m pip freeze --exclude-editable | grep -viE '^(torch|triton|nvidia-.*|cuda-.*)==' >env/lock.txt
    exit
    ;;
*)
    sed -n '2,7s/^# //p' "$0" >&2
    exit 2
    ;;
esac
touch "$2"
