"""Every test and bench that needs a GPU, one after another, for the few hours in which there is one.

In:  nothing but the GPUs of this machine.
Out: what each part prints, `runs/bench-gpu-all.json` with the results so far, a table, and one JSON object on the last line.
Run: make bench-gpu-all, or some parts of it: .venv/bin/python benchmarks/bench_gpu_all.py --parts tests olmo2-1b --limit-s 1500
     --rehearse takes tiny sizes on the CPU, to check the script itself.

A part is a process of its own. One that fails or takes longer than its share of the time is reported, and the next one begins. The benches
keep their numbers in benchmarks/history/, as `make bench-NAME` does. Exit status 1 where a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from history import HERE, machine, numbers_of
from sft.common.files import write_atomic

REPO = HERE.parent
RESULTS = REPO / "runs" / "bench-gpu-all.json"
TESTS = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
ROWS = ["--no-tests", "--no-eager", "--seq-len", "16384", "--steps", "4"]


def bench(name: str, *options: str) -> list[str]:
    """The command of a bench that keeps its numbers."""
    return [sys.executable, str(HERE / "history.py"), "run", name, *options]


PARTS: Mapping[str, Sequence[str]] = {
    "tests": TESTS,
    "olmo2-1b": bench("gpu", "--presets", "olmo2-1b", *ROWS, "--profile"),
    "olmo2-1b, gathered in each microbatch": bench(
        "gpu", "--presets", "olmo2-1b", *ROWS, "--no-fp8", "--keep-gathered", "none"
    ),
    "olmo3-7b": bench("gpu", "--presets", "olmo3-7b", *ROWS, "--optimizer", "adamw8bit"),
    "peers": bench("peers"),
    "first steps": bench("first-steps"),
    "lora": bench("lora", "--preset", "olmo2-1b", "--device", "cuda", "--compile", "--fetch"),
}
"""The most important ones first: time on a GPU may end."""

TINY = ["--device", "cpu", "--presets", "olmo3-tiny", "--seq-len", "128", "--steps", "1", "--no-tests", "--no-compile"]
REHEARSAL: Mapping[str, Sequence[str]] = {
    "tests": [*TESTS, "--collect-only"],
    "olmo2-1b": [sys.executable, str(HERE / "bench_gpu.py"), *TINY],
    "olmo2-1b, gathered in each microbatch": [
        sys.executable,
        str(HERE / "bench_gpu.py"),
        *TINY,
        "--keep-gathered",
        "none",
    ],
    "olmo3-7b": [sys.executable, str(HERE / "bench_gpu.py"), *TINY, "--optimizer", "adamw8bit"],
    "peers": [sys.executable, str(HERE / "bench_peers.py"), "--device", "cpu", "--steps", "1"],
    "first steps": [sys.executable, str(HERE / "bench_first_steps.py"), "--recipes", "smoke", "--steps", "2"],
    "lora": [sys.executable, str(HERE / "bench_lora.py"), "--steps", "1", "--seq-len", "128", "--fetch"],
}


@dataclass(frozen=True)
class Outcome:
    """How a part ended. `numbers`: the JSON object on its last line, or None."""

    part: str
    status: str  # ok, failed, or out of time
    seconds: float
    last_line: str
    numbers: dict[str, Any] | None


def run_part(part: str, command: Sequence[str], limit_s: float) -> Outcome:
    """Runs a part, prints its output while it runs, and ends it with all its processes after `limit_s` seconds."""
    print(f"\n== {part}: {' '.join(command[1:])}", flush=True)
    began, expired, lines = time.monotonic(), threading.Event(), []
    process = subprocess.Popen(
        command,
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def expire() -> None:
        expired.set()
        kill()

    timer = threading.Timer(limit_s, expire)
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = process.wait()
    except KeyboardInterrupt:  # it has a session of its own, so only this process got the signal
        kill()
        raise
    finally:
        timer.cancel()
    numbers = numbers_of("".join(lines))
    status = "out of time" if expired.is_set() else "failed" if code else "ok"
    last_line = "" if numbers else next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Outcome(part, status, round(time.monotonic() - began, 1), last_line, numbers)


def run(parts: Mapping[str, Sequence[str]], limit_s: float) -> Iterator[Outcome]:
    """The outcomes, the first as soon as there is one. A part may take half of the time that is left, the last one all of it."""
    end = time.monotonic() + limit_s
    for left, (part, command) in zip(range(len(parts), 0, -1), parts.items(), strict=True):
        remaining = max(end - time.monotonic(), 1.0)
        yield run_part(part, command, remaining if left == 1 else remaining / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--limit-s", type=float, default=7200, help="seconds for everything; a part may take half of what is left"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on the CPU; nothing is added to the history"
    )
    args = parser.parse_args()
    import torch  # late: --help needs no second

    if not args.rehearse and not torch.cuda.is_available():
        sys.exit(
            "bench-gpu-all needs a CUDA device and torch finds none here; next: run it where there is one, or try the script:"
            " benchmarks/bench_gpu_all.py --rehearse"
        )
    chosen = REHEARSAL if args.rehearse else PARTS
    report: dict[str, Any] = {"machine": machine(), "rehearsal": args.rehearse, "parts": []}
    for outcome in run({part: chosen[part] for part in args.parts}, args.limit_s):
        report["parts"].append(asdict(outcome))
        write_atomic(RESULTS, json.dumps(report, indent=1).encode())
    print(f"\n{'part':40} {'ended':12} {'seconds':>8}")
    for part in report["parts"]:
        print(f"{part['part']:40} {part['status']:12} {part['seconds']:8.1f}  {part['last_line'][:36]}".rstrip())
    failed = [part["part"] for part in report["parts"] if part["status"] != "ok"]
    seconds = {part["part"]: part["seconds"] for part in report["parts"]}
    print(json.dumps({"rehearsal": args.rehearse, "failed": failed, "seconds": seconds}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
