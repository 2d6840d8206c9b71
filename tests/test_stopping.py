"""Training that ends before its last step: early stopping and the clock. Checkpoints by the clock, and of the best step alone."""

from __future__ import annotations

import json
import random
import signal
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from sft.formats.steps import Best, is_ephemeral
from sft.recipe.schema import Train
from sft.training import stopping
from sft.training.stopping import EARLY_STOPPING, MAX_MINUTES, Due, Stopping, clock
from training import assert_same_bits, kill, records, run_folder, start, train, wait_for

PLATEAU: dict[str, Any] = {
    "steps": 60, "lr": 1e-9, "warmup_fraction": 0.0, "schedule": "constant", "validate_every": 2, "save_every": 100,
    "ephemeral_every": 3, "early_stopping_patience": 3, "early_stopping_threshold": 0.01,
}  # fmt: skip
"""Nothing is learned, so that the validation loss never falls by the threshold."""


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_patience_is_that_of_transformers(threshold: float, tmp_path: Path) -> None:
    rng = random.Random(1)
    for _ in range(200):
        losses = [round(rng.uniform(0.5, 1.0), 2) for _ in range(12)]
        ours = Stopping(Train(early_stopping_patience=3, early_stopping_threshold=threshold))
        callback = EarlyStoppingCallback(3, threshold)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            eval_strategy="steps",
            use_cpu=True,
            report_to=[],
        )
        state, control = TrainerState(), TrainerControl()
        for loss in losses:
            callback.on_evaluate(arguments, state, control, {"eval_loss": loss})
            ours.validated(loss)
            assert ours.misses == callback.early_stopping_patience_counter
            assert ours.out_of_patience == control.should_training_stop
            if control.should_training_stop:
                break
            if state.best_metric is None or loss < state.best_metric:
                state.best_metric = loss  # the Trainer does this
    assert not Stopping(Train(early_stopping_patience=3)).validated(float("nan"))


@pytest.mark.seconds
def test_a_resume_stops_at_the_same_step(folder: Path, dataset: Path) -> None:
    whole = run_folder(folder / "whole", dataset)
    said = train(whole, **PLATEAU)
    last = result(whole)["final_step"]
    assert last == 8  # the first of the validations at 2, 4, 6 and 8 is the lowest
    assert result(whole)["stopped"] == "early_stopping" and result(whole)["checkpoint"] == "step8"
    assert "stopped early at step 8 of 60: 3 validations in a row had no lower loss than" in said
    assert not is_ephemeral(whole / "train/step8")
    process = start(folder, **PLATEAU, async_save=False)
    wait_for(folder, 5, process)
    kill(process, signal.SIGKILL)
    assert records(folder)[-1].step < 8
    train(folder, **PLATEAU)
    assert result(folder)["final_step"] == 8 and [r.step for r in records(folder)] == list(range(1, 9))
    assert_same_bits(folder / "train/step8", whole / "train/step8")
    # Killed behind the last checkpoint and before the manifest: it ends at once, and trains no step.
    assert "stopped early at step 8 of 60" in train(folder, **PLATEAU) and records(folder)[-1].step == 8
    # With more patience it goes on.
    train(folder, **{**PLATEAU, "early_stopping_patience": 5})
    assert result(folder)["final_step"] == 12


@pytest.mark.seconds
def test_the_limit_on_minutes_leaves_a_whole_step_and_a_higher_one_goes_on(folder: Path) -> None:
    fields = {"steps": 12, "save_every": 100, "ephemeral_every": 0, "validate_every": 100, "async_save": False}
    said = train(folder, max_minutes=1e-4, **fields)
    at = result(folder)["final_step"]
    assert at < 12 and result(folder)["stopped"] == "max_minutes" and result(folder)["max_minutes"] == 1e-4
    assert f"stopped early at step {at} of 12: 0.0001 minutes have passed (max_minutes)" in said
    assert not is_ephemeral(folder / f"train/step{at}") and records(folder)[-1].validation_loss is not None
    again = train(folder, max_minutes=1e-4, **fields)
    assert "stopped early" in again and records(folder)[-1].step == at  # earlier attempts count
    assert f"continuing from {folder / f'train/step{at}'}" in train(folder, max_minutes=60.0, **fields)
    assert result(folder)["final_step"] == 12 and result(folder).get("stopped") is None
    assert [r.step for r in records(folder)] == list(range(1, 13))


@pytest.mark.processes
def test_ranks_end_together_by_the_clock_of_rank_0(folder: Path, dataset: Path) -> None:
    fields = {"steps": 12, "save_every": 100, "ephemeral_every": 0, "ranks": 2, "hardware": {"microbatch_tokens": 64}}
    train(folder, max_minutes=1e-4, **fields)
    at = result(folder)["final_step"]
    assert at < 12 and (folder / f"train/step{at}/train/rank1.pt").is_file()
    late = Stopping(Train(max_minutes=1e-9, save_every_minutes=1e-9))
    first: Any = types.SimpleNamespace(is_rank0=True)
    other: Any = types.SimpleNamespace(is_rank0=False)
    assert clock(late, first) == (True, True)
    assert clock(late, other) == (False, False) and late.out_of_time and late.save_due


@pytest.mark.seconds
def test_checkpoints_by_the_clock_are_ephemeral_and_begin_when_the_last_one_did(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"steps": 6, "save_every": 100, "ephemeral_every": 0, "async_save": False}
    train(folder, save_every_minutes=1e-6, **fields)
    saved = [r.checkpoint.step for r in records(folder) if r.checkpoint]
    assert saved == [1, 2, 3, 4, 5]  # the last save ends after the last record
    assert [p.name for p in (folder / "train").glob("step*")] == ["step6"]
    now = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    timer = Stopping(Train(save_every_minutes=2.0))
    timer.begin()

    def due(seconds: float) -> bool:
        now[0] = seconds
        return timer.save_due

    assert [due(s) for s in (60.0, 119.0, 120.0)] == [False, False, True]
    timer.saved()
    assert [due(s) for s in (239.0, 240.0)] == [False, True]


@pytest.mark.seconds
def test_the_best_step_is_saved_at_once_and_only_it_and_the_newest_stay(folder: Path) -> None:
    fields = {"steps": 12, "validate_every": 2, "save_every": 5, "ephemeral_every": 0, "save_best_only": True}
    train(folder, **fields)
    losses = {r.step: r.validation_loss for r in records(folder) if r.validation_loss is not None}
    best = Best.read(folder / "train")
    assert best and best.value == min(losses.values()) and losses[best.step] == best.value
    assert {p.name for p in (folder / "train").glob("step*")} == {f"step{best.step}", "step12"}


@pytest.mark.seconds
def test_a_restored_step_that_only_save_best_only_saves_is_named_in_best(folder: Path) -> None:
    """A kill between the step and BEST."""
    fields = {"steps": 12, "validate_every": 2, "save_every": 100, "ephemeral_every": 0, "save_best_only": True, "async_save": False}  # fmt: skip
    train(
        folder,
        status=-signal.SIGKILL,
        fault={"at": "sft.checkpoint.step_folder.mark_best", "call": 1, "kind": "kill"},
        **fields,
    )
    assert Best.read(folder / "train") is None and (folder / "train/step2/manifest.json").is_file()
    process = start(folder, **fields)
    wait_for(folder, 3, process)
    kill(process, signal.SIGKILL)
    best = Best.read(folder / "train")
    assert best is not None and best.step >= 2


def test_what_is_due_after_a_step() -> None:
    def due(done: int, loss: float = 1.0, stop: bool = False, out_of_time: bool = False, **fields: Any) -> Due:
        train = Train(validate_every=3, save_every=100, ephemeral_every=0, **fields)
        state = Stopping(train, lowest=0.5, misses=1)
        found = Due.after(
            done, 12, train, held_out=True, stop=stop, requested=False, timed=False, out_of_time=out_of_time
        )
        return found.validated(done, 12, state, loss)

    assert not due(4).any and due(6).validation and not due(6).saves
    ended = due(6, stop=True, early_stopping_patience=2)
    assert ended.ended == EARLY_STOPPING and ended.permanent and not ended.stop
    assert due(12, early_stopping_patience=2).ended == ""  # the last step is the end anyway
    timed = due(4, stop=True, out_of_time=True)
    assert timed.ended == MAX_MINUTES and timed.permanent and timed.validation and not timed.stop
    # A validation that only the limit has brought counts for nothing: with a higher limit it would not have been there.
    state = Stopping(Train(validate_every=3, early_stopping_patience=2))
    at_limit = Due.after(4, 12, state.train, held_out=True, stop=False, requested=False, timed=False, out_of_time=True)
    assert at_limit.validation and at_limit.validated(4, 12, state, 0.1).ended == MAX_MINUTES
    assert (state.lowest, state.misses) == (float("inf"), 0)
    assert due(6, loss=0.4, save_best_only=True).permanent and not due(6, save_best_only=True).permanent
    assert not Stopping(Train()).state()  # bytes of checkpoints without these options stay as they were
