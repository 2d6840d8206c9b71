"""Kept steps go to the bucket beside training; a bucket that fails stops nothing, is tried again and told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcs_server import Server
from test_checkpoint import save

pytest.importorskip("google.cloud.storage")

import training
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage
from sft.training import checkpoint
from sft.training.remote import Uploads, destination
from training import train


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def stored(server: Server, where: str) -> set[str]:
    """The files of steps that the bucket has."""
    prefix = where.removeprefix("gs://test/") + "/"
    return {name.removeprefix(prefix) for name in server.objects if name.startswith(f"{prefix}step")}


def local(step: Path) -> set[str]:
    return {f"{step.name}/{p.relative_to(step).as_posix()}" for p in step.rglob("*") if p.is_file()}


def test_a_step_arrives_whole_and_is_not_sent_twice(tmp_path: Path, server: Server) -> None:
    out = tmp_path / "train"
    out.mkdir()
    save(out, 1)
    save(out, 2, ephemeral=True)
    where = destination("gs://test/pre/", "x", "abcdef0123456789ffff")
    assert where == "gs://test/pre/checkpoints/x-abcdef0123456789"
    said: list[str] = []
    uploads = Uploads(out, where, tmp_path / "cache", said.append)
    uploads.add(save(out, 3))
    assert uploads.finish() == {"where": where, "steps": ["step1", "step3"], "missing": []}
    assert stored(server, where) == local(out / "step1") | local(out / "step3")
    assert uploads.busy == set()
    uploads.close()
    received = server.received
    again = Uploads(out, where, tmp_path / "cache", said.append)
    assert again.finish()["steps"] == ["step1", "step3"]
    again.close()
    assert server.received == received
    assert len([line for line in said if line.startswith("uploaded")]) == 2
    assert destination(str(tmp_path), "x", "abc") == ""


def test_a_failed_upload_is_told_kept_from_retention_and_tried_again(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "train"
    out.mkdir()
    said: list[str] = []
    uploads = Uploads(out, "gs://test/c", tmp_path / "cache", said.append)

    def broken(*_: object) -> None:
        raise OSError("no route to the bucket")

    with monkeypatch.context() as patch:
        patch.setattr("sft.training.remote.transfer", broken)
        uploads.add(save(out, 1))
        sent = uploads.finish()
    assert sent["missing"] == ["step1"]
    assert f"next: make cp SRC={out / 'step1'} DST=gs://test/c/step1" in said[-1]
    assert uploads.busy == {out / "step1"}
    checkpoint.mark_latest(save(out, 2))
    assert checkpoint.retire(out, 1, uploads.busy) == []
    uploads.add(out / "step2")
    assert uploads.finish() == {"where": "gs://test/c", "steps": ["step1", "step2"], "missing": []}
    uploads.close()
    assert stored(server, "gs://test/c") == local(out / "step1") | local(out / "step2")


def test_a_run_on_a_bucket_sends_its_permanent_steps_and_keeps_few_here(tmp_path: Path, server: Server) -> None:
    training.write_dataset(tmp_path / "dataset")
    out = train(
        tmp_path, steps=6, save_every=2, ephemeral_every=1, keep=1, validate_every=0, best_metric="none",
        storage="gs://test/pre", environment={"STORAGE_EMULATOR_HOST": server.url},
    )  # fmt: skip
    where = "gs://test/pre/checkpoints/fake-0123456789abcdef"
    sent = json.loads((tmp_path / "result.json").read_text())["remote"]
    assert sent == {"where": where, "steps": ["step2", "step4", "step6"], "missing": []}
    assert f"uploaded step4 to {where}" in out
    assert [n for n, _ in checkpoint.steps(tmp_path / "train")] == [6]
    assert {name.split("/")[0] for name in stored(server, where)} == {"step2", "step4", "step6"}
    bucket, here = open_storage(f"{where}/step6"), LocalStorage(tmp_path / "train" / "step6")
    assert {n: f.bytes for n, f in bucket.list().items()} == {n: f.bytes for n, f in here.list().items()}
    metrics = [json.loads(line) for line in (open_storage(where).read("metrics.jsonl") or b"").splitlines()]
    assert [r["step"] for r in metrics if "step" in r] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # beside the steps, and never older than they are
