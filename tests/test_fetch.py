"""Stages of a run brought back from a cluster, and sent there: what manifests list, manifests last, nothing overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import REPO, files
from gcs_server import Server
from patience import PATIENCE
from published import publish, publish_step, rewrite
from sft.common.errors import SftError
from sft.formats import elsewhere, manifest
from sft.formats.elsewhere import Elsewhere
from sft.formats.steps import write_latest
from sft.runner import plan
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage
from sft.sync import fetch

pytestmark = pytest.mark.server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("google.cloud.storage")
    with Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def make_train(folder: Path) -> None:
    """A finished train stage of two kept steps, of which its manifest lists the last."""
    for step in ("step1", "step2"):
        (folder / step / "model").mkdir(parents=True)
        (folder / step / "model" / "0.distcp").write_bytes(os.urandom(50_000))
        publish_step(folder / step, 1, ["model"])
    (folder / "step3" / "model").mkdir(parents=True)
    (folder / "step3" / "model" / "half").write_bytes(b"not finished")
    write_latest(folder / "step2")
    finish(folder, ["step2"])


def finish(folder: Path, outputs: list[str], key: str = "sha256:1") -> None:
    publish(folder, outputs, stage="train", run="x", key=key)


def run(*args: str | Path, ok: bool = True) -> str:
    command = [sys.executable, "-m", "sft.sync.fetch", *map(str, args)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(REPO / "lib")}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_stage_goes_to_a_bucket_and_back_with_its_kept_steps_and_without_an_unfinished_one(
    server: Server, tmp_path: Path
) -> None:
    make_train(tmp_path / "runs/x/train")
    kept = {n: d for n, d in files(tmp_path / "runs/x/train").items() if not n.startswith("step3")}
    run(tmp_path / "runs/x", "--from", "gs://bucket/runs", "--push")
    assert {n.removeprefix("runs/x/train/"): o.data for n, o in server.objects.items()} == kept
    order = sorted(server.objects, key=lambda n: server.objects[n].generation)
    assert order[-1] == "runs/x/train/manifest.json" and {n.rsplit("/", 2)[1] for n in order[-3:-1]} == {
        "step1",
        "step2",
    }
    said = run(tmp_path / "back/x", "--stage", "train", "--from", "gs://bucket/runs")
    assert files(tmp_path / "back/x/train") == kept and "identical" in said
    assert manifest.is_whole(tmp_path / "back/x/train")
    assert "0 files copied" in run(tmp_path / "back/x", "--from", "gs://bucket/runs")
    (tmp_path / "back/x/train/step1/model/0.distcp").write_bytes(b"")
    assert "1 of " in run(tmp_path / "back/x", "--from", "gs://bucket/runs", "--check", ok=False)


def test_what_a_training_that_goes_on_replaces_meanwhile_comes_as_it_is_then(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    make_train(there)
    (there / "manifest.json").unlink()
    where = open_storage("gs://test/train")
    fetch.copy_stage(LocalStorage(there), where, print)
    copy = fetch.transfer

    def slow(*args: Any, **options: Any) -> Any:
        open_storage("gs://test/train").write("LATEST", b"step3\n")
        return copy(*args, **options)

    monkeypatch.setattr(fetch, "transfer", slow)
    fetch.copy_stage(open_storage("gs://test/train"), LocalStorage(tmp_path / "here"), print)
    assert (tmp_path / "here" / "LATEST").read_bytes() == b"step3\n"
    assert (tmp_path / "here" / "step2" / "manifest.json").is_file()


def test_outputs_that_stayed_elsewhere_come_here(tmp_path: Path) -> None:
    there, here = tmp_path / "weka/x/train", tmp_path / "runs/x/train"
    make_train(there)
    here.mkdir(parents=True)
    (here / "manifest.json").write_bytes((there / "manifest.json").read_bytes())
    Elsewhere(str(there), ("step2/model/0.distcp",)).write(here / elsewhere.NAME)
    run(tmp_path / "runs/x", "--stage", "train")
    assert manifest.is_whole(here) and not (here / "elsewhere.json").exists()


def test_a_corrupt_source_fails_with_a_list_and_leaves_no_manifest(tmp_path: Path) -> None:
    make_train(tmp_path / "there")
    (tmp_path / "there/step2/model/0.distcp").write_bytes(os.urandom(50_000))
    with pytest.raises(SftError, match=r"step2/model/0\.distcp has sha256"):
        fetch.copy_stage(open_storage(str(tmp_path / "there")), LocalStorage(tmp_path / "here"), lambda _: None)
    assert not list((tmp_path / "here").rglob("manifest.json")) and (tmp_path / "here/step1/model/0.distcp").exists()


def test_a_local_result_of_other_content_is_not_overwritten(tmp_path: Path) -> None:
    make_train(tmp_path / "there")
    make_train(tmp_path / "here")
    before = files(tmp_path / "here")
    with pytest.raises(SftError, match="is of another result"):
        fetch.copy_stage(open_storage(str(tmp_path / "there")), LocalStorage(tmp_path / "here"), lambda _: None)
    assert files(tmp_path / "here") == before


def test_names_in_a_remote_manifest_do_not_leave_the_folder(tmp_path: Path) -> None:
    make_train(tmp_path / "there")
    file = tmp_path / "there/manifest.json"
    first, *rest = manifest.load(file).outputs
    rewrite(file, outputs=(replace(first, path="../../outside"), *rest))
    with pytest.raises(SftError, match="relative path"):
        fetch.copy_stage(open_storage(str(tmp_path / "there")), LocalStorage(tmp_path / "here"), lambda _: None)
    assert not (tmp_path / "outside").exists()


def test_results_that_jobs_wrote_here_need_no_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_train(tmp_path / "runs/x/train")
    place = plan.Place(tmp_path / "runs", (), "slurm")
    fetch.fetch(place, tmp_path / "runs/x", (), "", push=False, check_only=False)
    assert "nothing to copy: jobs on slurm write into" in "".join(capsys.readouterr())
    for run_folder, runs in ((tmp_path / "runs/x", str(tmp_path / "there")), (tmp_path / "runs/y", "")):
        with pytest.raises(SftError, match="nothing to copy for"):
            fetch.fetch(place, run_folder, (), runs, push=False, check_only=False)


def test_what_is_missing_is_reported(tmp_path: Path) -> None:
    (tmp_path / "there/x/train").mkdir(parents=True)
    assert "no finished stage is there" in run(
        tmp_path / "runs/x", "--stage", "train", "--from", tmp_path / "there", ok=False
    )
    assert "no such folder" in run(tmp_path / "runs/x", "--stage", "convert", "--from", tmp_path / "there", ok=False)
    assert "nothing to copy" in run(tmp_path / "runs/x", "--from", tmp_path / "there", ok=False)
    assert "is none of prepare" in run(tmp_path / "runs/x", "--stage", "trian", ok=False)
    (tmp_path / "there/x/train/manifest.json").write_text("{")
    assert "damaged" in run(tmp_path / "runs/x", "--from", tmp_path / "there", ok=False)
