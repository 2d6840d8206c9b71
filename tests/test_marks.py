"""train/.identity, and train's folder where no step is whole: neither lets a training begin again in silence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from published import step_record
from sft.checkpoint import step_folder
from sft.common.errors import SftError
from sft.common.files import UNFINISHED, write_atomic
from sft.formats.identity import NAME, read_identity, write_identity
from sft.model.parallel import World
from sft.recipe.schema import Train
from sft.runner.stage import Stage
from sft.training.train import summary

ME, OTHER = "0a" * 32, "1b" * 32


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """runs/x/train with a step, made from ME."""
    folder = tmp_path / "train"
    (folder / "step4").mkdir(parents=True)
    write_identity(folder, ME)
    return folder


def open_in_place(train: Path, identity: str = ME) -> list[str]:
    """What the stage logs."""
    logged: list[str] = []
    stage = SimpleNamespace(out=train, run=train.parent, name="train", identity=identity, log=logged.append)
    Stage.open_in_place(stage)  # type: ignore[arg-type]
    return logged


@pytest.mark.parametrize("damage", ["digit", "bit", "empty", "missing", "cut"])
def test_a_damaged_mark_stops_the_training_and_changes_nothing(train: Path, damage: str) -> None:
    mark = train / NAME
    data = mark.read_bytes()
    changed = {"digit": b"1" + data[1:], "bit": bytes([data[0] ^ 0x80]) + data[1:], "empty": b"", "cut": data[:30]}
    if damage == "missing":
        mark.unlink()
    else:
        mark.write_bytes(changed[damage])
    with pytest.raises(SftError, match=rf"{mark}: missing or damaged: .*nothing was changed; next: restore"):
        open_in_place(train)
    assert (train / "step4").is_dir() and not (train.parent / ".replaced").exists()


def test_the_same_inputs_continue_and_other_inputs_get_a_new_folder(train: Path) -> None:
    assert open_in_place(train) == [] and (train / "step4").is_dir()
    (train / NAME).write_text(ME)  # as older versions wrote it
    assert open_in_place(train) == [] and read_identity(train) == ME
    assert "inputs changed" in open_in_place(train, OTHER)[0]
    assert not (train / "step4").exists() and read_identity(train) == OTHER
    assert len(list((train.parent / ".replaced").glob("train-*/step4"))) == 1


def test_a_folder_without_a_step_and_without_a_mark_is_a_new_one(train: Path) -> None:
    (train / "step4").rmdir()
    (train / NAME).unlink()
    open_in_place(train)
    assert read_identity(train) == ME


@pytest.mark.parametrize("name", ["step4", ".damaged-step4", ".damaged-step4-0123abcd"])
def test_training_does_not_begin_again_beside_damaged_steps(train: Path, name: str) -> None:
    (train / "step4").rename(train / name)
    (train / name / "manifest.json").write_text("{}")
    with pytest.raises(SftError, match=r"it has steps, and none is whole; .*next: restore a step"):
        step_folder.latest(train, World(0, 1, 0, None), lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(SftError, match="none is whole"):  # also the next time
        step_folder.latest(train, World(0, 1, 0, None), lambda _: None)  # type: ignore[arg-type]


def test_what_a_killed_write_left_is_removed_and_is_no_output(train: Path) -> None:
    work = SimpleNamespace(run=train.parent, name="evaluate", identity=ME)
    left = [train / f".BEST.ab12{UNFINISHED}", train.parent / ".work" / f"evaluate-{ME[:16]}" / "samples"]
    left[1].mkdir(parents=True)
    left[1] /= f".one.jsonl.cd34{UNFINISHED}"
    for file in left:
        file.write_text("half")
    with pytest.raises(SftError, match="none is whole"):
        step_folder.latest(train, World(0, 1, 0, None), lambda _: None)  # type: ignore[arg-type]
    Stage.open_work(work)  # type: ignore[arg-type]
    assert not any(file.exists() for file in left) and left[1].parent.is_dir()
    with pytest.raises(OSError, match="Is a directory"):  # a write that fails removes its own
        write_atomic(train / "step4", b"x")
    assert {p.name for p in train.iterdir()} == {NAME, "step4", ".steps.lock"}


def test_a_training_whose_last_record_is_missing_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(step_record(1).to_bytes())
    run = SimpleNamespace(last=2, stage=SimpleNamespace(recipe=SimpleNamespace(train=Train())))
    with pytest.raises(SftError, match=r"metrics.jsonl: its last record is not of the final step 2; next: restore"):
        summary(tmp_path, run, tmp_path / "step2", None)  # type: ignore[arg-type]
