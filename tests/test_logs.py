"""What training's processes said is kept per attempt, up to a kill -9, and still reaches the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE
from sft.training import logs

PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from sft.training import logs
out = Path(sys.argv[1])
attempt = logs.next_attempt(out)
logs.record(out, attempt, 3)
print("said", flush=True)
if sys.argv[2] == "warn":
    import logging, warnings
    warnings.warn("old name")
    logging.getLogger("torchao").warning("no C++ extension")
    sys.exit(0)
subprocess.run(["sh", "-c", "echo from a library >&2"])
if sys.argv[2] == "go on":
    sys.stdin.read()
    for number in range(2000):
        print("step", number, flush=True)
        print("warning", number, file=sys.stderr, flush=True)
    sys.exit(0)
if sys.argv[2] == "both":
    class Slow(int):
        def __str__(self):
            time.sleep(0.05)
            print("warning", int(self), file=sys.stderr, flush=True)
            time.sleep(0.05)
            return repr(int(self))
    for number in range(3):
        print("step", Slow(number), flush=True)
    sys.exit(0)
if sys.argv[2] == "kill":
    os.killpg(0, signal.SIGKILL)
sys.exit("failed: why")
"""


def speak(out: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(out), how]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE, start_new_session=True
    )


def test_every_attempt_has_its_log_and_the_terminal_hears_the_same(tmp_path: Path) -> None:
    first, second = speak(tmp_path, "fail"), speak(tmp_path, "kill")
    assert (first.stdout, first.stderr) == ("said\n", "from a library\nfailed: why\n")
    assert first.returncode == 1
    assert second.returncode == -signal.SIGKILL
    folder = tmp_path / "logs"
    assert sorted(os.listdir(folder)) == ["attempt-001-rank3.log", "attempt-002-rank3.log"]
    assert sorted((folder / "attempt-001-rank3.log").read_text().splitlines()) == [
        "failed: why", "from a library", "said",
    ]  # fmt: skip
    assert sorted((folder / "attempt-002-rank3.log").read_text().splitlines()) == ["from a library", "said"]
    assert logs.next_attempt(tmp_path) == 3


def test_warnings_of_libraries_are_in_the_log_and_not_on_the_terminal(tmp_path: Path) -> None:
    done = speak(tmp_path, "warn")
    assert (done.stdout, done.stderr) == ("said\n", "")
    text = (tmp_path / "logs/attempt-001-rank3.log").read_text()
    assert "UserWarning: old name" in text and "torchao: WARNING: no C++ extension" in text


def test_other_files_are_not_counted_as_attempts(tmp_path: Path) -> None:
    assert logs.next_attempt(tmp_path) == 1
    (tmp_path / "logs").mkdir()
    for name in ("attempt-x.log", "attempt-007-rank0.log.gz", "attempt-004-rank11.log"):
        (tmp_path / "logs" / name).touch()
    assert logs.next_attempt(tmp_path) == 5


def test_training_goes_on_with_its_log_where_the_reader_of_its_output_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "go on"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdin and process.stdout
    assert {process.stdout.readline() for _ in range(2)} == {b"said\n", b"from a library\n"}, (
        "each stream has its own tee"
    )
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=PATIENCE) == 0
    said = ["said", "from a library", *(f"{word} {number}" for word in ("step", "warning") for number in range(2000))]
    text = (tmp_path / "logs/attempt-001-rank3.log").read_text()
    # tee copies blocks, so a burst of one stream may be cut by a line of the other: nothing is lost of either.
    assert sorted(text) == sorted("".join(f"{line}\n" for line in said))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_of_the_two_streams_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    assert speak(tmp_path, "both").returncode == 0
    lines = (tmp_path / "logs/attempt-001-rank3.log").read_text().splitlines()
    said = ["said", "from a library", *(f"{word} {number}" for word in ("step", "warning") for number in range(3))]
    assert sorted(lines) == sorted(said)
