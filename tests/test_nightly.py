"""env/nightly.sh on a small repository whose Makefile stands in for the pipeline; git, flock and make are real."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import REPO
from patience import PATIENCE

PASS = "smoke:\n\t@mkdir -p $(RUNS)/smoke && pwd > $(RUNS)/smoke/where && echo levels=$(MAKELEVEL) recipe=$(RECIPE)\n"


class Night:
    def __init__(self, folder: Path):
        self.root, self.repository = folder / "root", folder / "repository"
        self.repository.mkdir()
        self.git("init", "-q")
        self.commit(PASS)

    def git(self, *args: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *args], cwd=self.repository, check=True, capture_output=True)

    def commit(self, makefile: str) -> None:
        (self.repository / "Makefile").write_text(makefile)
        self.git("add", "Makefile")
        self.git("commit", "-q", "-m", "a")

    def command(self) -> list[str]:
        return [str(REPO / "env" / "nightly.sh"), str(self.root), str(self.repository)]

    def run(self, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(), capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **env}
        )

    def start(self) -> subprocess.Popen[bytes]:
        """A night that is in the middle of make."""
        self.commit("smoke:\n\t@touch $(RUNS).started; sleep 900\n")
        running = subprocess.Popen(self.command(), start_new_session=True, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + PATIENCE
        while not list(self.root.glob("work.*/runs.started")) and time.monotonic() < limit:
            time.sleep(0.02)
        return running

    @staticmethod
    def kill(running: subprocess.Popen[bytes]) -> None:
        """The whole session, until none of it is left: timeout runs make in a process group of its own."""
        while groups := Night.living_groups(running.pid):
            for group in groups:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            time.sleep(0.05)
        running.wait()

    @staticmethod
    def living_groups(session: int) -> set[int]:
        """The process groups of a session that have a process, zombies aside."""
        listed = subprocess.run(["ps", "-eo", "pgid=,sid=,stat="], capture_output=True, text=True).stdout.splitlines()
        rows = [line.split() for line in listed]
        return {int(group) for group, of, state, *_ in rows if int(of) == session and not state.startswith("Z")}

    def logs(self) -> str:
        return "".join(p.read_text() for p in sorted((self.root / "logs").glob("*.log")))


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path)


def test_it_runs_make_smoke_in_a_clean_clone_with_its_own_runs(night: Night) -> None:
    (night.repository / "Makefile").write_text("smoke:\n\tfalse\n")  # not committed, so not in a clean clone
    done = night.run()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    where = Path((night.root / "runs/smoke/where").read_text().strip())
    assert where.is_relative_to(night.root) and not where.exists()
    assert "commit " in night.logs() and "levels=0" in night.logs()
    assert not list(night.root.glob("work.*"))


def test_nothing_of_the_caller_reaches_the_clone(night: Night) -> None:
    done = night.run(MAKEFLAGS=" -- RECIPE=theirs", MAKELEVEL="3", RECIPE="theirs", GIT_DIR="/nowhere", RUNS="/nowhere")
    assert done.returncode == 0, done.stderr
    assert "levels=0 recipe=\n" in night.logs()


def test_a_failure_exits_nonzero_with_the_reason_and_keeps_the_last_good_runs(night: Night) -> None:
    assert night.run().returncode == 0
    night.commit("smoke:\n\t@echo the loss is not finite >&2; exit 3\n")
    done = night.run()
    assert done.returncode == 2 and "the loss is not finite" in done.stderr
    assert done.stderr.splitlines()[-1] == "nightly: make smoke failed with exit status 2"
    assert (night.root / "runs/smoke/where").exists() and len(list(night.root.glob("work.*/clone"))) == 1
    night.commit(PASS)
    assert night.run().returncode == 0 and not list(night.root.glob("work.*"))


def test_a_repository_that_cannot_be_cloned_is_reported(night: Night) -> None:
    night.repository.rename(night.repository.with_name("moved"))
    done = night.run()
    assert done.returncode == 128 and "git clone" in done.stderr.splitlines()[-1] and "does not exist" in done.stderr


@pytest.mark.seconds
def test_a_run_that_takes_too_long_is_ended_and_reported(night: Night) -> None:
    night.commit("smoke:\n\t@sleep 30\n")
    done = night.run(TIMEOUT_S="1")
    assert done.returncode == 124 and "took longer than 1 s" in done.stderr


def test_a_second_run_exits_at_once_saying_busy_with_the_pid_of_the_first(night: Night) -> None:
    first = night.start()
    try:
        second = night.run()
        assert first.poll() is None
        assert second.returncode == 75 and f"busy: pid {first.pid} on " in second.stderr
        assert len(list(night.root.glob("work.*"))) == 1
    finally:
        night.kill(first)


def test_after_a_kill_the_next_run_is_not_busy(night: Night) -> None:
    night.kill(night.start())
    night.commit(PASS)
    assert night.run().returncode == 0 and not list(night.root.glob("work.*"))
