"""Sweeps and shared stages as jobs of a real Slurm on this machine (tests/slurm.py); the stages are a few lines on the real runner."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from patience import PATIENCE
from slurm_place import program, record, slurm, until, workspace

__all__ = ["slurm", "workspace"]  # the fixtures
pytestmark = pytest.mark.slurm

WAITS = "Path(f'at-{run.name}').touch()\nwhile not Path('go').exists(): time.sleep(0.05)"
SWEEP = ["make", "sweep", "RECIPE=x", "CLUSTER=slurm", "lr=1e-4 2e-4"]
RUNS = ("x_lr-1e-4", "x_lr-2e-4")


def test_a_sweep_trains_in_jobs_at_once_on_shared_data_and_goes_on_after_ctrl_c(workspace) -> None:
    program(workspace, "train", WAITS)
    workspace.use_new_python()  # Ctrl-C reaches every process of the group, and a fork has a group of its own
    sweep = subprocess.Popen(
        SWEEP, cwd=workspace.root, env=workspace.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )  # fmt: skip
    until(lambda: all((workspace.root / f"at-{run}").exists() for run in RUNS), "both jobs")
    os.killpg(sweep.pid, signal.SIGINT)
    told = sweep.communicate(timeout=PATIENCE)[0]
    assert sweep.returncode and "Traceback" not in told
    assert "[sweep] stopped; jobs go on; next: the same make sweep resumes" in told
    assert workspace.ran() == ["prepare x", "sync x"]
    jobs = [record(workspace, "train", run).job for run in RUNS]
    (workspace.root / "go").touch()
    again = workspace.make(*SWEEP[1:]).stdout
    assert all(f"[sweep] {run}: done" in again for run in RUNS)
    assert [record(workspace, "train", run).job for run in RUNS] == jobs and workspace.ran() == []
    for run in RUNS:
        assert os.readlink(workspace.root / "runs" / run / "sync") == "../x/sync"
    listed = workspace.make("jobs").stdout.splitlines()
    assert listed[0].split() == ["RUN", "STAGE", "CLUSTER", "JOB", "AGE", "TRIES", "STATE"]
    assert {line.split()[0] for line in listed[1:3]} == set(RUNS)  # the newest first


def test_on_a_cluster_a_sibling_run_refers_to_the_stages_that_exist_and_its_jobs_verify_them(workspace) -> None:
    workspace.make("train", "RECIPE=x", "CLUSTER=slurm")
    assert workspace.ran() == ["prepare x", "sync x", "train x"]
    out = workspace.make("evaluate", "RECIPE=x", "CLUSTER=slurm", "limit=3").stdout
    assert "[train] reuses runs/x/train" in out and workspace.ran() == ["convert x_limit-3", "evaluate x_limit-3"]
    run = workspace.root / "runs/x_limit-3"
    assert sorted(p.stem for p in (run / ".jobs").glob("*.json")) == ["convert", "evaluate"]
    assert os.readlink(run / "train") == "../x/train"

    program(workspace, "convert", "stage.folder('train')")
    made = Path(workspace.root / "runs/x/train/out")
    made.write_bytes(made.read_bytes()[::-1])
    failed = workspace.make("convert", "RECIPE=x", "CLUSTER=slurm", "dtype=float32", ok=False)
    assert "runs/x_dtype-float32/train/out" in failed.stdout and "sha256" in failed.stdout
