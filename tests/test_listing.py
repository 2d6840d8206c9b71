"""make runs, the progress in make show, make delete and make archive."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Workspace
from sft.common import columns
from sft.common.errors import SftError
from sft.common.locks import lock
from sft.formats.job import JobRecord
from sft.formats.metrics import Attempt, StepRecord
from sft.formats.run import RunFile
from sft.runner import listing, models, removal


def manifest(stage: str, **metrics: object) -> str:
    body = {"stage": stage, "run": "x", "key": "k", "config": {}, "inputs": [], "outputs": [], "metrics": metrics}
    return json.dumps({"schema": 1, **body})


def make_run(runs: Path, name: str, *stages: str) -> Path:
    run = runs / name
    for stage in ("train", *stages):
        (run / stage).mkdir(parents=True, exist_ok=True)
    for stage in stages:
        (run / stage / "manifest.json").write_text(manifest(stage, final_step=300, loss=1.25, tokens_per_s=5000.0))
    RunFile(name.split("_")[0], ()).write(run / "run.json")
    return run


def train_to(run: Path, step: int, steps: int | None = 300) -> None:
    lines = [Attempt(1, 0, 1, "cpu", None, "f", steps).to_bytes()]
    lines += [
        StepRecord(n, 2.5 / n, 1e-4, 1.0, 10, 10 * n, 1000.0, 0.1, 0.0, 2.0).to_bytes() for n in range(1, step + 1)
    ]
    (run / "train/metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 99, "lo')


def row(runs: Path, name: str) -> list[str]:
    return next(line.split() for line in listing.listing(runs).splitlines() if line.startswith(f"{name} "))


def test_every_run_is_a_line_with_its_stage_step_loss_job_and_size(tmp_path: Path) -> None:
    done = make_run(tmp_path, "a-recipe_lr-1e-4", "prepare", "sync", "train", "convert")
    (done / "train/step300").write_bytes(b"x" * 5_000_000)
    train_to(make_run(tmp_path, "b", "prepare", "sync"), 100)
    make_run(tmp_path, "c", "prepare")
    (done / ".jobs").mkdir()
    JobRecord("01ABC", "i", "ai2-jupiter", (), "2026-01-01T00:00:00").write(done / ".jobs/convert.json")
    rows = {line.split()[0]: line for line in listing.listing(tmp_path).splitlines()}
    assert rows["RUN"].split() == list(listing.HEAD)
    assert rows["a-recipe_lr-1e-4"].split()[1:6] == ["convert", "300", "1.250", "5,000", "-"]
    assert "01ABC ai2-jupiter" in rows["a-recipe_lr-1e-4"] and "5.0 MB" in rows["a-recipe_lr-1e-4"]
    assert rows["b"].split()[1:8] == ["train", "stopped", "100/300", "0.025", "1,000", "-", "-"]
    (tmp_path / "b/.jobs").mkdir()
    submitted = JobRecord("7", "i", "slurm", (), "2026-01-01T00:00:00")
    submitted.write(tmp_path / "b/.jobs/train.json")  # a node whose locks this machine does not see
    assert row(tmp_path, "b")[1:8] == ["train", "…", "100/300", "0.025", "1,000", "7", "min"]
    replace(submitted, ended="cancelled").write(tmp_path / "b/.jobs/train.json")
    assert row(tmp_path, "b")[1:3] == ["train", "stopped"]
    assert rows["c"].split()[1:6] == ["prepare", "-", "-", "-", "-"]
    assert listing.listing(tmp_path / "no") == f"no runs in {tmp_path / 'no'}; next: make smoke"


def test_a_training_that_holds_its_lock_is_running_and_one_that_does_not_has_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path, "b", "prepare", "sync")
    assert listing.progress(run / "train") is None
    train_to(run, 10, steps=None)
    (run / ".work").mkdir()
    found = listing.progress(run / "train")
    assert found and found.line(listing.is_running(run, "train")).startswith("stopped ")
    with lock(run / ".work/train.lock"):
        assert listing.is_running(run, "train")
        assert found.line(True) == "running at step 10, loss 0.250, 1,000 tokens/s"
        with pytest.raises(SftError, match="train is running; next: stop it"):
            removal.removal(run)


def test_a_table_fits_a_terminal(tmp_path: Path) -> None:
    make_run(tmp_path, "a" * 60 + "_learning-rate-1e-4", "prepare", "sync", "train")
    assert all(len(line) <= columns.WIDTH for line in listing.listing(tmp_path).splitlines())


@pytest.mark.slow
def test_show_tells_the_progress_of_a_training(workspace: Workspace, finished) -> None:
    finished("sync")
    run = workspace.root / "runs/x"
    (run / "train").mkdir()
    train_to(run, 120)
    shown = workspace.make("show", "RECIPE=x").stdout
    assert "# train    not made yet" in shown and " ago at step 120 of 300, loss 0.021" in shown
    assert "120/300" in workspace.make("runs").stdout


@pytest.mark.seconds
def test_deleting_a_run_keeps_what_others_refer_to(workspace: Workspace, finished) -> None:
    finished("evaluate")
    workspace.make("evaluate", "RECIPE=x", "limit=10")
    told = workspace.make("delete", "RUN=x").stdout
    assert "train stays: it moves to x_limit-10, which refers to it" in told and "next: the same with YES=1" in told
    assert (workspace.root / "runs/x").is_dir()
    workspace.make("delete", "RUN=x", "YES=1")
    assert not (workspace.root / "runs/x").exists()
    workspace.make("verify", "RUN=x_limit-10")
    workspace.make("-q", "evaluate", "RECIPE=x", "limit=10")


def test_several_runs_that_share_a_stage_go_on_sharing_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, "x", "prepare", "train")
    (run / "train/out").write_text("weights")
    for name in ("x_limit-1", "x_limit-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train").symlink_to("../x/train")
    removal.delete(removal.removal(run))
    assert not (tmp_path / "x_limit-1/train").is_symlink()
    assert (tmp_path / "x_limit-2/train").readlink() == Path("../x_limit-1/train")
    assert (tmp_path / "x_limit-2/train/out").read_text() == "weights"


@pytest.mark.parametrize("model", ["runs/x", "runs/x/train/step3"])
def test_a_run_that_another_run_scores_is_not_deleted_before_it(tmp_path: Path, model: str) -> None:
    run, scorer = make_run(tmp_path, "x", "train"), make_run(tmp_path, "z_model-x", "evaluate")
    RunFile("z", (f"convert.model={model}",)).write(scorer / "run.json")
    with pytest.raises(SftError, match=r"z_model-x scored it .*next: make delete RUN=z_model-x first"):
        removal.removal(run)
    RunFile("z", ("convert.model=runs/x_limit-1",)).write(scorer / "run.json")
    removal.removal(run)  # another run, whose name begins alike
    file = scorer / "evaluate/manifest.json"  # its recipe's file names the model
    file.write_text(
        file.read_text().replace('"config": {}', json.dumps({"config": {"convert": {"model": model}}})[1:-1])
    )
    assert models.scored_by(run) == ["z_model-x"]


def test_an_archive_holds_the_run_and_replaces_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "x", "prepare", "train")
    (run / "train/out").write_text("weights")
    with pytest.raises(SftError, match=r"a \.tar, \.tar\.gz or \.tar\.xz file is expected"):
        removal.archive(removal.removal(run), tmp_path / "x.zip")
    removal.archive(removal.removal(run), tmp_path / "x.tar.gz")
    assert not run.exists()
    with tarfile.open(tmp_path / "x.tar.gz") as packed:
        stream = packed.extractfile("x/train/out")
        assert stream is not None and stream.read() == b"weights"
    with pytest.raises(SftError, match="exists already"):
        removal.archive(removal.removal(make_run(tmp_path / "runs", "x", "prepare")), tmp_path / "x.tar.gz")


def test_a_run_with_an_unreported_job_is_not_deleted(tmp_path: Path) -> None:
    run = make_run(tmp_path, "x", "prepare")
    (run / ".jobs").mkdir()
    JobRecord("17", "i", "slurm", (), "2026-01-01T00:00:00").write(run / ".jobs/train.json")
    with pytest.raises(SftError, match="the end of job 17 was not reported; next: make cancel"):
        removal.removal(run)


def test_long_messages_are_wrapped_at_spaces() -> None:
    text = "error: " + "word " * 40 + "/a/very/long/path" * 8
    assert all(len(line) <= columns.WIDTH for line in columns.wrapped(text).splitlines()[:-1])
    assert columns.wrapped("short\nlines") == "short\nlines" and columns.cut("abcdefgh", 5) == "ab…gh"
