"""Checkpoints beside training: the bytes of their own step, what stays of them, who may ask for one, and what a failure does."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver

import training
from patience import PATIENCE
from sft.checkpoint import olmo_core, step_folder
from sft.common.errors import SftError
from sft.formats.steps import is_ephemeral, named_step
from sft.recipe.schema import Train
from sft.training.optim import Guard
from sft.training.saving import Saver
from test_checkpoint import ALONE, CONFIG, FACTS, save, trained
from training import records, run_folder, start, train, wait_for


def files(step: Path) -> list[dict[str, Any]]:
    """Paths, sizes and hashes of a whole step."""
    assert step_folder.damage(step) == []
    return json.loads((step / "manifest.json").read_bytes())["outputs"]


def saver(out: Path, **fields: Any) -> Saver:
    return Saver(out, Train(**fields), olmo_core.step_config(CONFIG, FACTS), ALONE, lambda _: None)


@pytest.mark.seconds
def test_training_on_while_a_save_runs_does_not_change_what_it_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    guard = Guard(6.0, torch.device("cpu"))
    guard.history.fill_(1.0)
    at_once = tmp_path / "at once"
    at_once.mkdir()
    state = {"guard": guard.state()}
    step_folder.save(
        at_once,
        3,
        step_folder.snapshot(model, optimizer),
        state,
        olmo_core.step_config(CONFIG, FACTS),
        ALONE,
        ephemeral=False,
    )
    trained_on, inside = threading.Event(), threading.Event()
    original = state_dict_saver.save

    def held(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        assert trained_on.wait(PATIENCE)
        return original(*args, **kwargs)

    monkeypatch.setattr(state_dict_saver, "save", held)
    beside = saver(tmp_path)
    beside.begin(3, model, optimizer, {"guard": guard.state()}, ephemeral=False)
    assert inside.wait(PATIENCE)
    before = model.lm_head.w_out.weight.clone()
    for p in model.parameters():
        p.grad = torch.ones(p.shape)
    optimizer.step()  # as the loop does during a save
    guard.history.fill_(9.0)
    assert not torch.equal(before, model.lm_head.w_out.weight)
    assert not (tmp_path / "step3").exists()
    trained_on.set()
    beside.wait()
    assert files(tmp_path / "step3") == files(at_once / "step3")
    # The next save reuses the memory of the copy, and holds the new weights.
    beside.begin(4, model, optimizer, {}, ephemeral=False)
    beside.close()
    assert torch.equal(step_folder.DcpReader(tmp_path / "step4")["lm_head.w_out.weight"], model.lm_head.w_out.weight)
    assert torch.equal(step_folder.DcpReader(tmp_path / "step3")["lm_head.w_out.weight"], before)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_saved_beside_training_are_bitwise_those_saved_while_it_waits(
    folder: Path, dataset: Path, ranks: int
) -> None:
    waiting = run_folder(folder / "waiting", dataset)
    fields = {"steps": 6, "save_every": 2, "ephemeral_every": 0, "ranks": ranks}
    train(folder, **fields)
    train(waiting, async_save=False, **fields)
    for step in ("step2", "step4", "step6"):
        assert files(folder / "train" / step) == files(waiting / "train" / step)
    reported = [r.checkpoint for r in records(folder) if r.checkpoint]
    assert reported
    for r in reported:
        assert r.step % 2 == 0
        assert r.blocked_s >= 0
        assert r.seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_fails_stops_the_run_and_leaves_the_earlier_steps(folder: Path, ranks: int) -> None:
    fault = {"at": "sft.formats.manifest.hash_file", "call": 9 if ranks == 1 else 6, "kind": "disk", "thread": ""}
    out = train(folder, status=1, steps=400, save_every=2, ephemeral_every=0, ranks=ranks, fault=fault)
    assert "No space left on device" in out
    assert "could not be saved" in out
    left = step_folder.steps(folder / "train")
    assert left
    assert all(step_folder.damage(step) == [] for _, step in left)
    assert len(records(folder)) < 400
    assert "continuing from" in train(folder, steps=left[-1][0] + 2, save_every=2, ranks=ranks)


def test_a_failed_save_is_known_without_waiting_and_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    model, optimizer = trained()
    beside = saver(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(state_dict_saver, "save", full)
        beside.begin(3, model, optimizer, {}, ephemeral=False)
        deadline = time.monotonic() + PATIENCE
        while not beside.failed:
            assert time.monotonic() < deadline
        assert beside.finished() is None
        with pytest.raises(SftError, match="step3: could not be saved"):
            beside.begin(4, model, optimizer, {}, ephemeral=False)
    assert beside.newest_complete() is None
    beside.begin(5, model, optimizer, {}, ephemeral=False)
    assert beside.newest_complete() == tmp_path / "step5"
    beside.close()


def names(out: Path) -> list[int]:
    return [number for number, _ in step_folder.steps(out)]


@pytest.mark.seconds
def test_retention_keeps_the_newest_and_whatever_latest_or_best_names(tmp_path: Path) -> None:
    for step, ephemeral in ((1, False), (2, True), (3, False), (4, False), (5, True), (6, False)):
        save(tmp_path, step, ephemeral=ephemeral)
    assert step_folder.prune(tmp_path, 2) == []  # nothing is named the latest: nothing is superfluous
    step_folder.mark_latest(tmp_path / "step6")
    assert step_folder.mark_best(tmp_path, 2, "validation_loss", 1.5, higher_is_better=False)
    doomed = step_folder.prune(tmp_path, 2)
    assert names(tmp_path) == [2, 4, 6]
    assert sorted(p.name[:12] for p in doomed) == [".trash-step1", ".trash-step3", ".trash-step5"]
    assert step_folder.mark_best(tmp_path, 4, "validation_loss", 1.0, higher_is_better=False)
    step_folder.prune(tmp_path, 1)
    assert names(tmp_path) == [4, 6]
    step_folder.mark_latest(tmp_path / "step4")  # a resume from an older step: a later one is not older than it
    step_folder.prune(tmp_path, 1)
    assert names(tmp_path) == [4, 6]
    step_folder.latest(tmp_path, ALONE, print)
    assert not list(tmp_path.glob(".trash-*"))
    assert (tmp_path / "LATEST").read_text() == "step6\n"


def test_a_request_is_answered_by_a_permanent_step_only(tmp_path: Path) -> None:
    model, optimizer = trained()
    request = tmp_path / "SAVE"
    request.touch()
    beside = saver(tmp_path)
    for step, ephemeral in ((3, True), (4, False)):  # a signal's save is ephemeral, too
        assert beside.requested()
        beside.begin(step, model, optimizer, {}, ephemeral=ephemeral)
        beside.wait()
        assert request.exists() == ephemeral
    beside.close()


@pytest.mark.seconds
def test_an_ephemeral_step_goes_when_a_newer_one_is_whole(tmp_path: Path) -> None:
    for step, ephemeral in ((1, True), (2, False), (3, True), (4, True)):
        save(tmp_path, step, ephemeral=ephemeral)
    step_folder.mark_latest(tmp_path / "step4")
    step_folder.prune(tmp_path, 0)
    assert names(tmp_path) == [2, 4]


@pytest.mark.seconds
def test_a_step_that_was_not_finished_counts_for_nothing_in_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step2" / "manifest.json").unlink()
    step_folder.mark_latest(tmp_path / "step3")
    step_folder.prune(tmp_path, 2)
    assert names(tmp_path) == [1, 2, 3]


@pytest.mark.seconds
def test_best_moves_only_to_a_better_finite_value_of_a_step_that_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    best = tmp_path / "BEST"
    assert step_folder.mark_best(tmp_path, 1, "gsm8k", 0.50)
    assert not step_folder.mark_best(tmp_path, 2, "gsm8k", 0.50)
    assert not step_folder.mark_best(tmp_path, 2, "gsm8k", 0.25)
    assert step_folder.mark_best(tmp_path, 3, "gsm8k", 0.75)
    assert best.read_text() == "step3\ngsm8k 0.75\n"
    assert step_folder.mark_best(tmp_path, 2, "loss", 3.0, higher_is_better=False)  # another metric replaces it
    assert not step_folder.mark_best(tmp_path, 3, "loss", 4.0, higher_is_better=False)
    assert step_folder.mark_best(tmp_path, 3, "loss", 2.0, higher_is_better=False)
    for step, value in ((9, 1.0), (1, float("nan")), (1, float("inf"))):
        with pytest.raises(SftError, match="no such step" if step == 9 else "only finite"):
            step_folder.mark_best(tmp_path, step, "loss", value, higher_is_better=False)
    assert named_step(tmp_path, "BEST") == tmp_path / "step3"
    for torn in ("", "../../etc\nloss 1\n", "step3", "step3\nloss\n", "step3\nloss x\n"):
        best.write_text(torn)
        assert step_folder.mark_best(tmp_path, 1, "loss", 9.0, higher_is_better=False)


@pytest.mark.slow
def test_a_run_names_its_latest_and_best_and_keeps_what_was_asked(folder: Path) -> None:
    out = train(folder, steps=24, save_every=3, ephemeral_every=2, validate_every=3, keep=2, lr=1e-2)
    kept = folder / "train"
    losses = {r.step: r.validation_loss for r in records(folder) if r.validation_loss is not None}
    best = min(losses, key=losses.__getitem__)
    assert (kept / "LATEST").read_text() == "step24\n"
    assert (kept / "BEST").read_text() == f"step{best}\nvalidation_loss {losses[best]!r}\n"
    assert names(kept) == sorted({21, 24, best})
    assert not list(kept.glob(".trash-*"))
    assert f"best so far: step {best}" in out


@pytest.mark.seconds
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_request_file_saves_the_next_step_and_goes_when_it_is_whole(folder: Path, ranks: int) -> None:
    process = start(folder, steps=600, save_every=10_000, ephemeral_every=0, validate_every=0, ranks=ranks)
    wait_for(folder, 3, process)
    asked_at = records(folder)[-1].step
    request = folder / "train" / "SAVE"
    request.touch()
    deadline = time.monotonic() + PATIENCE
    while request.exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    saved = step_folder.steps(folder / "train")
    process.terminate() if ranks == 1 else training.kill(process, training.signal.SIGTERM)
    process.join(PATIENCE)
    assert len(saved) == 1
    step, path = saved[0]
    assert asked_at < step < 600
    assert step_folder.damage(path) == []
    assert not is_ephemeral(path)


@pytest.mark.processes
def test_retention_catches_up_at_the_start(folder: Path) -> None:
    """A kill may come between the last save and its retention, and no save follows."""
    fields: dict[str, Any] = {"steps": 4, "save_every": 1, "ephemeral_every": 0, "validate_every": 0}
    train(folder, **fields)
    assert [n for n, _ in step_folder.steps(folder / "train")] == [1, 2, 3, 4]
    train(folder, keep=1, **fields)
    assert [n for n, _ in step_folder.steps(folder / "train")] == [4]
