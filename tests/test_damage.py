"""Damage in a finished run: found and named by make verify and by the stage that would read it, or harmless."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from conftest import Workspace
from published import publish, publish_step, rewrite, step_record, train_metrics
from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.common.hashcache import HashCache
from sft.formats import manifest, steps
from sft.formats.elsewhere import Elsewhere
from sft.formats.identity import write_identity
from sft.formats.metrics import TrainMetrics
from sft.formats.remote import Remote, SyncMetrics
from sft.formats.steps import Best, write_latest
from sft.reporting.run_files import RunFiles
from sft.runner import plan
from sft.runner.upstream import Upstream
from sft.runner.verify import verify


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with prepare, sync and its copy, and train with two steps."""
    run, storage = tmp_path / "runs/x", tmp_path / "storage"
    for stage in ("prepare", "sync", "train"):
        (run / stage).mkdir(parents=True)
    key = manifest.key("prepare", 1, {"seed": 1}, [])
    (run / "prepare/data").write_text("tokens")
    made = publish(run / "prepare", ["data"], key=key, config={"seed": 1})
    dataset = f"datasets/{made.digest[:16]}"
    (storage / dataset).mkdir(parents=True)
    for name in ("data", "manifest.json"):
        shutil.copy(run / "prepare" / name, storage / dataset / name)
    files = tuple(manifest.Output(f"{dataset}/{o.path}", o.bytes, o.sha256) for o in made.outputs)
    Remote(dataset, None, files).write(run / "sync/remote.json")
    prepared = manifest.Input(manifest="../prepare/manifest.json", sha256=made.digest)
    key = manifest.key("sync", 1, {}, [key])
    metrics = SyncMetrics(str(storage), str(storage / dataset), None, 1, 6).to_metrics()
    sync = publish(run / "sync", ["remote.json"], key=key, inputs=[prepared], metrics=metrics)
    train = run / "train"
    for step in (1, 2):
        (train / f"step{step}").mkdir()
        (train / f"step{step}/weights").write_text(f"weights {step}")
        publish_step(train / f"step{step}", step, ["weights"])
    losses = [step_record(step, validation_loss=1 / step).to_bytes() for step in (1, 2)]
    (train / "metrics.jsonl").write_bytes(b"".join(losses))
    write_latest(train / "step2")
    records = (train / "metrics.jsonl").read_bytes()
    (train / ".metrics").mkdir()
    (train / f".metrics/step2-{hashlib.sha256(records).hexdigest()[:16]}.jsonl").write_bytes(records)
    Best(2, "validation_loss", 0.5).write(train)
    synced = manifest.Input(manifest="../sync/manifest.json", sha256=sync.digest)
    trained = publish(train, ["step2", "metrics.jsonl"], key=manifest.key("train", 1, {"lr": 1.0}, [key]), config={"lr": 1.0},
                      inputs=[synced], metrics=train_metrics(2).to_value())  # fmt: skip
    write_identity(train, plan.identity(trained.key, trained.inputs))
    return run


def problems(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What verify prints of a damaged run."""
    with pytest.raises(SftError, match="problem"):
        verify(run, run.parent / ".cache")
    return capsys.readouterr().out


def test_a_whole_run_verifies_every_step_and_the_synced_copy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(run, run.parent / ".cache")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == [
        "prepare", "sync", "copy", "train", "step1", "step2", "marks", "convert", "evaluate", "report"]  # fmt: skip
    assert shown[2].split(None, 1)[1].startswith("1 files verified in ")


@pytest.mark.parametrize(("old", "new"), [
    ('"lr": 1.0', '"lr": 2.0'), ('"final_step": 2', '"final_step": 3'), ('"loss": 1.0', '"loss": 0.1'), ('"version": 1', '"version": 2'),
    ('"run": "x"', '"run": "y"'), ('"host": ""', '"host": "h"'), ('"cluster": "local"', '"cluster": "other"')])  # fmt: skip
def test_a_changed_figure_of_a_manifest_is_found(
    run: Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    file = run / "train/manifest.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(SftError, match=r"train/manifest\.json: damaged: its seal"):
        manifest.load(file)
    assert "its seal is not that of its content" in problems(run, capsys)


def test_a_manifest_of_a_version_without_seals_is_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "train/manifest.json"
    value = json.loads(file.read_text()) | {"schema": 1}
    del value["seal"]
    digest = manifest.load(file).digest
    file.write_text(json.dumps(value))
    assert TrainMetrics.of(manifest.load(file), "x").final_step == 2
    assert manifest.load(file).digest == digest  # the stages after it stay current
    verify(run, run.parent / ".cache")
    assert "its manifest is of a version without seals" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"schema": 2, "seal": None}, {"schema": 1, "seal": None}, {"schema": 2}])
def test_a_manifest_whose_seal_was_taken_out_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object]
) -> None:
    file = run / "train/manifest.json"
    value = json.loads(file.read_text())
    del value["seal"]
    value["metrics"]["final_step"] = 1
    file.write_text(json.dumps(value | change))
    with pytest.raises(SftError, match=r"train/manifest\.json: damaged: it has no seal"):
        manifest.load(file)
    assert "it has no seal" in problems(run, capsys)


def test_a_key_that_its_options_do_not_make_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(run / "train/manifest.json", config={"lr": 3.0})
    assert "train/manifest.json: its key is sha256:" in problems(run, capsys)


def test_damage_in_any_step_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "train/step1/weights").write_text("weights 3")
    assert "step1/weights has sha256" in problems(run, capsys)


@pytest.mark.parametrize("name", ["prepare/other", "train/step1/stray.pt", "train/notes.txt", "sync/.hidden"])
def test_a_file_that_no_stage_made_is_named(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (run / name).write_text("x")
    assert f"{run / name}: no stage made this file" in problems(run, capsys)


def test_a_step_under_another_name_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "train/step1").rename(run / "train/step3")
    assert "step3/manifest.json: it is of step 1" in problems(run, capsys)


@pytest.mark.parametrize(("mark", "text", "found"), [
    ("LATEST", "step9\n", "names no finished step"), ("BEST", "step1\n", "damaged"),
    (".identity", "1" * 64 + "\n", "it is of another recipe or other inputs"), ("../run.json", "[[", "damaged: not JSON"),
    (".identity", "1" * 64 + " 00000000\n", "missing or damaged"), (".identity", "", "missing or damaged"),
    ("BEST", "step2\nvalidation_loss 0.4\n", "0.4 is not the validation_loss of step 2"),
    ("BEST", "step2\nvalidatioo_loss 0.5\n", "0.5 is not the validatioo_loss of step 2")])  # fmt: skip
def test_a_wrong_mark_is_found(run: Path, capsys: pytest.CaptureFixture[str], mark: str, text: str, found: str) -> None:
    (run / "train" / mark).write_text(text)
    assert found in problems(run, capsys)


@pytest.mark.parametrize("name", ["train/BEST", "train/LATEST", "train/.identity", "train/manifest.json", "run.json"])
def test_a_pipe_in_place_of_a_file_is_found_and_not_waited_for(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert f"{run / name}: not a file" in problems(run, capsys)


def test_a_pipe_in_place_of_the_cache_of_hashes_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hashes.json")
    (tmp_path / "data").write_text("tokens")
    assert HashCache(tmp_path).sha256(tmp_path / "data") == hash_file(tmp_path / "data")


@pytest.mark.parametrize("damage", ["flip", "torn list", "list of another dataset", "stray"])
def test_damage_in_the_synced_copy_is_found(run: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    dataset = run.parent.parent / "storage" / Remote.read(run / "sync/remote.json").dataset
    if damage == "flip":
        (dataset / "data").write_text("tokenz")
    elif damage == "torn list":
        (dataset / "manifest.json").write_text("{")
    elif damage == "stray":
        (dataset / "more").write_text("")
    else:
        shutil.copy(run / "train/manifest.json", dataset / "manifest.json")
    assert str(dataset) in problems(run, capsys)


def test_a_damaged_file_that_is_here_is_not_excused_by_elsewhere(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Elsewhere("/there", ("data",)).write(run / "prepare/elsewhere.json")
    verify(run, run.parent / ".cache")
    (run / "prepare/data").write_text("tokenz")
    assert "prepare/data has sha256" in problems(run, capsys)
    (run / "prepare/data").unlink()
    verify(run, run.parent / ".cache")
    assert "0 files verified; 1 are elsewhere: /there (data)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [steps.REQUEUE, steps.RESTARTS, steps.HANGS, steps.OUT_OF_MEMORY, *(f"{t}/file" for t in steps.TRACKERS)]
)
def test_what_training_keeps_beside_its_outputs_is_accepted(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = run / "train" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("x")
    assert Upstream(run, "convert", "x", run.parent / ".cache", False, print).folder("train") == run / "train"
    verify(run, run.parent / ".cache")
    assert name not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["changed", "missing", "torn manifest"])
def test_a_stage_refuses_damage_in_what_it_reads(run: Path, damage: str) -> None:
    if damage == "changed":
        (run / "prepare/data").write_text("tokenz")
    elif damage == "missing":
        (run / "prepare/data").unlink()
    else:
        (run / "prepare/manifest.json").write_text("{")
    with pytest.raises(SftError, match=r"(?s)prepare/(data|manifest\.json).*next: "):
        Upstream(run, "sync", "x", run.parent / ".cache", False, print).folder("prepare")


def test_a_stage_refuses_a_file_that_no_stage_made(run: Path) -> None:
    upstream = Upstream(run, "convert", "x", run.parent / ".cache", False, print)
    assert upstream.folder("prepare") == run / "prepare"
    (run / "prepare/special_tokens_map.json").write_text("{}")
    upstream = Upstream(run, "convert", "x", run.parent / ".cache", False, print)
    with pytest.raises(
        SftError, match=r"no stage made special_tokens_map\.json, and convert could read it; next: remove it"
    ):
        upstream.folder("prepare")
    assert upstream.folder("train") == run / "train", "training keeps steps and marks that its manifest does not list"


def test_the_digest_leaves_out_files_with_times_in_them(run: Path) -> None:
    first = manifest.load(run / "train/manifest.json")
    timed = tuple(
        manifest.Output(o.path, o.bytes, o.sha256, True) if o.path == "metrics.jsonl" else o for o in first.outputs
    )
    rewrite(run / "train/manifest.json", outputs=timed)
    before = manifest.load(run / "train/manifest.json")
    with (run / "train/metrics.jsonl").open("a") as file:
        file.write("\n")
    assert manifest.broken_outputs(run / "train", before.outputs)
    changed = tuple(manifest.Output(o.path, 1, "0" * 64, o.measured) if o.measured else o for o in timed)
    rewrite(run / "train/manifest.json", outputs=changed)
    assert manifest.load(run / "train/manifest.json").digest == before.digest != first.digest


def test_the_report_does_not_show_a_damaged_file(run: Path) -> None:
    assert len(RunFiles(run).steps) == 2
    file = run / "train/metrics.jsonl"
    file.write_text(file.read_text().replace("0.5", "0.4"))
    with pytest.raises(SftError, match=r"metrics\.jsonl has sha256 .*; next: make verify RUN=x"):
        _ = RunFiles(run).steps


def test_a_damaged_hash_in_the_cache_is_read_from_the_file_again(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("one")
    cache = HashCache(tmp_path)
    cache.sha256(file)
    cache.save()
    text = (tmp_path / "hashes.json").read_text()
    wrong = "0" if text[text.index(hash_file(file))] != "0" else "1"
    (tmp_path / "hashes.json").write_text(text.replace(hash_file(file), wrong + hash_file(file)[1:]))
    assert HashCache(tmp_path).sha256(file) == hash_file(file)
    (tmp_path / "hashes.json").write_text(text.replace("[", "[" * 100_000))
    assert HashCache(tmp_path).sha256(file) == hash_file(file)


@pytest.mark.seconds
def test_a_torn_list_in_the_storage_makes_sync_run_again(workspace: Workspace, finished) -> None:
    finished("sync")
    (copy,) = (workspace.root / "runs/.storage").glob("*/manifest.json")
    assert "up to date" in workspace.make("why", "RECIPE=x").stdout
    copy.write_text(copy.read_text()[:100])
    workspace.make("sync", "RECIPE=x")
    assert workspace.ran() == ["sync x"] and manifest.load(copy)


def test_a_missing_mark_and_a_changed_copy_of_the_records_are_found(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy,) = (run / "train/.metrics").iterdir()
    copy.write_bytes(copy.read_bytes() + b"x")
    (run / "train/.identity").unlink()
    (run / "train/LATEST").unlink()
    found = problems(run, capsys)
    assert (
        f"{copy}: its name is not the hash of its content" in found
        and "train/.identity: missing" in found
        and "LATEST: missing" in found
    )
