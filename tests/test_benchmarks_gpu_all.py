"""The list of everything that needs a GPU: a part that fails or hangs does not end the others, and results are kept after each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bench_gpu_all
from conftest import REPO
from patience import PATIENCE
from slurm_place import until


def python(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text]


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_is_reported_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu_all, "RESULTS", tmp_path / "runs" / "results.json")
    child = tmp_path / "child"
    hangs = f"import subprocess, time; subprocess.Popen(['sleep', '{PATIENCE}'], stdout=open({str(child)!r}, 'w')); time.sleep({PATIENCE})"
    parts = {
        "good": python("print('a table'); print('{\"ratio\": 2}')"),
        "bad": python("raise SystemExit('no kernel')"),
        "hangs": python(hangs),
        "last": python("print('42 passed')"),
    }
    began = time.monotonic()
    good, bad, hung, last = bench_gpu_all.run(parts, 8)
    assert time.monotonic() - began < PATIENCE
    assert (good.status, good.numbers, good.last_line) == ("ok", {"ratio": 2}, "")
    assert (bad.status, bad.numbers, bad.last_line) == ("failed", None, "no kernel")
    assert hung.status == "out of time" and child.exists()
    assert (last.status, last.last_line) == ("ok", "42 passed")


@pytest.mark.slow
def test_an_interrupt_ends_the_part_too(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    part = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid()) + chr(10)); time.sleep({PATIENCE})"
    code = f"import sys, bench_gpu_all; bench_gpu_all.run_part('x', [sys.executable, '-S', '-c', {part!r}], {PATIENCE})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(("lib", "benchmarks"))}
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=environment, cwd=REPO
    ) as process:
        until(lambda: started.is_file() and started.read_text().endswith("\n"), "the part starts")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) != 0
    until(lambda: not Path(f"/proc/{started.read_text().strip()}/cmdline").exists(), "the part ends")


def test_every_part_has_a_rehearsal_and_names_a_bench_that_exists() -> None:
    assert list(bench_gpu_all.PARTS) == list(bench_gpu_all.REHEARSAL)
    for command in bench_gpu_all.PARTS.values():
        if "history.py" in command[1]:
            assert (bench_gpu_all.HERE / f"bench_{command[3].replace('-', '_')}.py").is_file()
