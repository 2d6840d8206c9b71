"""Stages on this machine: locks on its GPUs, shared by all users; signals and exit statuses."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from conftest import REPO
from patience import PATIENCE
from sft.common import machine
from sft.launch import local

LAUNCH = [sys.executable, "-m", "sft.launch", "local"]


@pytest.fixture
def launch(tmp_path):
    """Starts a command through env/local.sh's program with the given GPUs visible."""
    started = []

    def start(gpus, *command, stage="train", **env):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "SFT_LOCKS": str(tmp_path / "locks"), **env}
        process = subprocess.Popen(
            [*LAUNCH, "runs/x", stage, *command], cwd=REPO, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )  # fmt: skip
        started.append(process)
        if "DRY_RUN" not in env:
            line = b""
            while not line.endswith(b"\n"):  # not readline, which would keep what follows from communicate()
                line += os.read(process.stdout.fileno(), 1)
            assert line.startswith(b"env/local.sh runs/x ")
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def lock_folder(tmp_path):
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks").chmod(0o1777)


def held(process):
    """Waits for the stage to say that it runs."""
    assert process.stdout.readline() == "running\n"


HOLD = ["sh", "-c", "echo running; exec sleep 900"]


@pytest.mark.seconds
def test_runs_that_share_a_gpu_take_turns_and_others_do_not_wait(launch):
    first = launch("0,1", *HOLD)
    held(first)
    held(launch("2", *HOLD))
    held(launch("0,1", *HOLD, stage="convert"))  # uses none
    held(launch("", *HOLD))  # the CPU
    second = launch("1,3", "echo", "mine")
    assert re.fullmatch(
        rf"waiting for GPU 1: busy with pid {first.pid} of \w+: train of /.*/runs/x\n", second.stdout.readline()
    )
    first.terminate()  # reaches the stage itself, whose end frees its GPUs
    assert first.wait(timeout=PATIENCE) == -signal.SIGTERM
    assert second.communicate(timeout=PATIENCE)[0] == "mine\n" and second.returncode == 0


@pytest.mark.seconds
def test_a_run_that_must_not_wait_fails_and_names_who_has_the_gpu(launch):
    first = launch("0", *HOLD)
    held(first)
    out, _ = (second := launch("0", "echo", "mine", GPU_WAIT="0")).communicate(timeout=PATIENCE)
    assert second.returncode == 1 and f"GPU 0 is busy with pid {first.pid} of " in out and "next: wait for it" in out


@pytest.mark.seconds
def test_the_lock_lives_as_long_as_any_process_of_the_stage(launch):
    first = launch("0", "sh", "-c", "sleep 60 & echo running $!")
    child = int(first.stdout.readline().split()[1])
    first.wait(timeout=PATIENCE)
    busy = launch("0", "echo", "mine", GPU_WAIT="0")
    assert busy.wait(timeout=PATIENCE) == 1
    os.kill(child, signal.SIGKILL)
    assert launch("0", "echo", "mine").communicate(timeout=PATIENCE)[0].endswith("mine\n")


@pytest.mark.seconds
def test_locks_are_refused_in_a_folder_of_another_kind_and_dry_run_starts_nothing(launch, tmp_path):
    (tmp_path / "locks").rename(tmp_path / "elsewhere")
    (tmp_path / "locks").symlink_to(tmp_path / "elsewhere")
    out, _ = (process := launch("0", "echo", "mine")).communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "not a folder of this user" in out
    out, _ = launch("0", "touch", str(tmp_path / "a file"), DRY_RUN="1").communicate(timeout=PATIENCE)
    assert out == f"touch '{tmp_path}/a file'\n" and not (tmp_path / "a file").exists()


NOBODY = 65534


def as_user(uid: int, action) -> str:
    """What `action()` returns or raises in a process of another user."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setgid(uid)
            os.setuid(uid)
            os.umask(0o077)
            text = str(action())
        except BaseException as e:
            text = f"{type(e).__name__}: {e}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as f:
        return f.read()


@pytest.fixture
def shared(tmp_path_factory, monkeypatch):
    """A folder like /run/lock, which every user reaches and may write to."""
    folder = Path(tempfile.mkdtemp(prefix="olmo-sft-locks-"))
    folder.chmod(0o1777)
    monkeypatch.setattr(local, "SHARED", (folder / "gone", folder))
    monkeypatch.delenv("SFT_LOCKS", raising=False)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.seconds
def test_the_locks_of_all_users_are_the_same(shared):
    assert local.lock_folder() == (shared, True)
    take = lambda: local.lock_gpus(["GPU-1"], "train", wait=False)  # noqa: E731
    if os.getuid():  # no other user can be played: what the file allows shows it
        (fd,) = take()
        assert os.fstat(fd).st_mode & 0o777 == 0o666
        return
    assert "SftError" not in as_user(NOBODY, take)
    (file,) = shared.iterdir()
    assert file.stat().st_uid == NOBODY and file.stat().st_mode & 0o777 == 0o666
    (fd,) = take()
    output = as_user(NOBODY, take)
    assert f"GPU GPU-1 is busy with pid {os.getpid()} of root: train" in output
    assert "GPU-1 is busy" in as_user(NOBODY - 1, take)
    os.close(fd)
    assert "SftError" not in as_user(NOBODY - 1, take)


@pytest.mark.parametrize("trap", ["link", "hard link", "fifo", "unreadable"])
def test_a_trap_in_the_place_of_a_lock_is_refused_and_nothing_is_written(shared, tmp_path, trap):
    precious, file = tmp_path / "precious", shared / "olmo-sft-gpu-7.lock"
    precious.write_text("data")
    if trap == "link":
        file.symlink_to(precious)
    elif trap == "hard link":
        try:
            os.link(precious, file)
        except OSError as e:
            pytest.skip(f"no hard link across these folders: {e}")
    elif trap == "fifo":
        os.mkfifo(file)
    else:
        file.touch(0o600)
    take = lambda: local.lock_gpus(["7"], "train", wait=False)  # noqa: E731
    if trap == "unreadable" and os.getuid():
        pytest.skip("needs root, to play two users")
    output = as_user(NOBODY, take) if trap == "unreadable" else as_user(os.getuid(), take)
    assert "SftError" in output and str(file) in output and "; next: have " in output
    assert precious.read_text() == "data"


def test_locks_that_other_users_do_not_see_are_reported(shared, monkeypatch, tmp_path, capsys):
    shared.chmod(0o755)
    monkeypatch.setenv("SFT_LOCKS", str(tmp_path / "mine"))
    for fd in local.lock_gpus(["0"], "train", wait=False):
        os.close(fd)
    assert "only this user sees the locks" in capsys.readouterr().out
    assert local.lock_gpus([], "train", wait=False) == [] and not capsys.readouterr().out


def test_the_exit_status_is_the_stages_own(launch):
    assert launch("0", "sh", "-c", "exit 75").wait(timeout=PATIENCE) == 75


def test_cores_are_counted_where_the_system_has_no_affinity(monkeypatch):
    """macOS has no os.sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert machine.cores() == os.cpu_count()
