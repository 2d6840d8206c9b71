"""[train] continue: a run goes on from a step of another one, with its optimizer state and its place in the data."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patience import wait_until
from sft.checkpoint.dcp_reader import DcpReader
from sft.common.errors import SftError
from sft.data.dataset import Dataset
from sft.formats.metrics import Attempt, read_metrics
from sft.formats.packs import PackingLosses
from sft.packing.packs import pack_dataset
from sft.packing.steps import StepPlan
from sft.recipe.schema import Train
from sft.reporting import trainings
from sft.training.build import held_out_problems
from sft.training.optim import Start, learning_rate
from training import TRAIN, assert_same_bits, curve, kill, records, run_folder, start, train, wait_for

EPOCHS: dict[str, Any] = {
    "steps": 0, "schedule": "constant", "warmup_fraction": 0.0, "epoch_tail": "drop", "global_batch_tokens": 1024,
    "ephemeral_every": 0, "validate_every": 0,
}  # fmt: skip
"""A schedule that does not depend on the length, so that 1 + 1 epochs can be 2."""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def final_step(run: Path) -> int:
    return int(json.loads((run / "result.json").read_text())["final_step"])


def same_curve(run: Path, whole: Path, after: int) -> bool:
    """Whether the run's steps are those of the whole one after so many, apart from the validation at the end of an epoch."""
    ours, theirs = ([{**r, "validation_loss": 0} for r in curve(f) if r["step"] > after] for f in (run, whole))
    return ours == theirs and len(ours) > 0


@pytest.mark.seconds
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.processes)])
def test_one_epoch_and_one_more_by_continue_are_two_epochs_bit_for_bit(runs: Path, dataset: Path, ranks: int) -> None:
    whole, one, two = (run_folder(runs / name, dataset) for name in ("whole", "one", "two"))
    train(whole, epochs=2.0, ranks=ranks, **EPOCHS)
    train(one, epochs=1.0, ranks=ranks, **EPOCHS)
    steps = final_step(one)
    before = {p: p.read_bytes() for p in (one / "train").rglob("*") if p.is_file()}
    said = train(two, epochs=2.0, ranks=ranks, continue_from=f"runs/one/train/step{steps}", **EPOCHS)
    assert f"continuing from {one / 'train' / f'step{steps}'}" in said
    assert final_step(two) == 2 * steps and same_curve(two, whole, steps)
    assert_same_bits(two / "train" / f"step{2 * steps}", whole / "train" / f"step{2 * steps}")
    assert before == {p: p.read_bytes() for p in (one / "train").rglob("*") if p.is_file()}  # nothing is written there
    assert json.loads((two / "result.json").read_text())["continues"] == f"runs/one/train/step{steps}"


@pytest.mark.seconds
def test_a_continued_run_that_is_killed_goes_on_from_its_own_step_or_from_the_first_again(
    runs: Path, dataset: Path
) -> None:
    whole, one, two = (run_folder(runs / name, dataset) for name in ("whole", "one", "two"))
    fields = {**TRAIN, "schedule": "constant", "warmup_fraction": 0.0, "save_every": 4, "ephemeral_every": 0}
    train(whole, **{**fields, "steps": 14})
    train(one, **{**fields, "steps": 4})
    more = {**fields, "steps": 14, "continue_from": "runs/one/train/step4"}
    for step in (6, 10):  # before the first step of its own is saved, and after it
        process = start(two, **more, async_save=False)
        wait_for(two, step, process)
        kill(process, signal.SIGKILL)
    train(two, **more)
    assert same_curve(two, whole, 4)
    assert_same_bits(two / "train" / "step14", whole / "train" / "step14")
    headers = [a.from_step for a in read_metrics(two / "train" / "metrics.jsonl") if isinstance(a, Attempt)]
    assert headers[0] == 4 and headers[-1] >= 8


@pytest.mark.seconds
def test_an_epoch_that_ends_within_a_batch_goes_on_behind_it(runs: Path, dataset: Path) -> None:
    """No pack is left out and none comes twice: the shorter run ended with a smaller batch."""
    one, two = (run_folder(runs / name, dataset) for name in ("one", "two"))
    fields = {**EPOCHS, "epoch_tail": "next"}
    index = pack_dataset(Dataset.open(dataset / "data"), 64, "truncate")
    short = Train(**{**TRAIN, **fields, "epochs": 1.0})
    first, long = StepPlan.build(index, short), StepPlan.build(index, replace(short, epochs=2.0))
    assert first.total_packs % first.batch_packs  # the case
    position = first.consumed(first.steps)
    plan = long.goes_on(position, replace(short, epochs=2.0))
    seen = np.concatenate([plan.packs(step) for step in range(plan.steps)])
    assert np.array_equal(seen, np.concatenate([long.packs(step) for step in range(long.steps)]))
    assert all(np.array_equal(plan.packs(step), first.packs(step)) for step in range(first.steps))
    assert plan.consumed(first.steps) == position and plan.check(plan.consumed(plan.steps)) == plan.steps
    assert long.goes_on(long.consumed(1), short) is long  # a usual resume
    counted = replace(short, steps=first.steps + 2)
    assert StepPlan.build(index, counted).goes_on(position, counted).steps == first.steps + 2
    train(one, epochs=1.0, **fields)
    train(two, epochs=2.0, continue_from=f"runs/one/train/step{first.steps}", save_every=3, **fields)
    assert [r.step for r in records(two)] == list(range(first.steps + 1, plan.steps + 1))
    assert records(two)[-1].tokens == 2 * records(one)[-1].tokens
    # The steps that it saved in between have the same place: a resume from one of them ends in the same bytes.
    last = two / "train" / f"step{plan.steps}"
    shutil.move(last, runs / "kept")
    assert "continuing from" in train(
        two, epochs=2.0, continue_from=f"runs/one/train/step{first.steps}", save_every=3, **fields
    )
    assert_same_bits(last, runs / "kept")


@pytest.mark.seconds
def test_other_data_start_anew_from_the_same_state_and_that_is_said(runs: Path, dataset: Path, tmp_path: Path) -> None:
    one, two = (run_folder(runs / name, dataset) for name in ("one", "two"))
    train(one)
    said = train(two, continue_from="runs/one/train/step12", data_seed=7, lr=1e-9, steps=2, warmup_fraction=0.0)
    assert "the data or their order differ from that run's" in said and "steps count from 0" in said
    assert [r.step for r in records(two)] == [1, 2]
    ours, theirs = DcpReader(two / "train/step2"), DcpReader(one / "train/step12")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-7) for name in theirs)
    assert DcpReader(two / "train/step2", "optim.state.")["lm_head.norm.weight.step"].item() == 14  # 12 there, and 2


def test_the_rate_after_a_step_follows_the_schedule_that_the_recipe_names() -> None:
    start = Start(100, 5e-4)
    train = Train(lr=1e-3, schedule="linear", warmup_fraction=0.1, final_lr_fraction=0.1)

    def rates(name: str, **fields: Any) -> list[float]:
        options = replace(train, continue_schedule=name, **fields)
        return [learning_rate(step, 200, options, start) for step in range(101, 201)]

    assert rates("constant") == [5e-4] * 100
    assert rates("recipe") == [learning_rate(step, 200, train) for step in range(101, 201)]
    assert rates("rewarmed") == [learning_rate(step, 100, train) for step in range(1, 101)]
    decayed = rates("decayed")
    assert (
        decayed[0] == 5e-4 and decayed[50] == pytest.approx(5e-4 * 0.55) and decayed[-1] == pytest.approx(5e-4 * 0.109)
    )
    assert rates("decayed", decay_shape="cosine")[50] == pytest.approx(5e-4 * 0.55)
    assert rates("decayed", decay_shape="cosine")[25] > decayed[25]


@pytest.mark.seconds
def test_a_decay_starts_at_the_rate_of_the_step_and_a_resume_keeps_it(runs: Path, dataset: Path) -> None:
    one, two = (run_folder(runs / name, dataset) for name in ("one", "two"))
    train(one, steps=12, save_every=6, log_every=5, schedule="linear", warmup_fraction=0.0)
    rate = next(r.lr for r in records(one) if r.step == 6)  # saved steps are logged
    fields = {"continue_from": "runs/one/train/step6", "continue_schedule": "decayed", "steps": 12, "save_every": 3}
    unsaved = run_folder(runs / "unsaved", dataset)
    killed = {"at": "sft.training.optim.Guard.step", "call": 4, "kind": "kill"}
    train(unsaved, status=-signal.SIGKILL, fault=killed, **fields | {"save_every": 100, "ephemeral_every": 0})
    assert records(unsaved)[-1].step == 9
    process = start(two, **fields)
    wait_until((two / "train/LATEST").exists)
    kill(process, signal.SIGKILL)
    (one / "train/metrics.jsonl").write_text("")  # a run that has saved a step knows the rate itself
    assert "has no record of step 6" in train(unsaved, status=1, **fields)
    train(two, **fields)
    assert records(two)[-1].step == 12
    found = {r.step: r.lr for r in records(two)}
    for step in set(found):
        assert found[step] == pytest.approx(rate * (1 - (step - 7) / 6))


@pytest.mark.seconds
def test_a_step_of_other_options_is_refused_with_both_values(runs: Path, dataset: Path) -> None:
    one = run_folder(runs / "one", dataset)
    train(one, steps=2)
    for name, fields, expected in (
        ("precision", {"precision": "bf16"}, "precision  'fp32'  'bf16'  precision=fp32"),
        ("frozen", {"freeze": ("embeddings",)}, "freeze"),
        ("lora", {"method": "lora"}, "method"),
        ("wide", {"model_hidden": 96}, "intermediate_size  64    96"),
        ("past", {"steps": 2}, "steps = 2: they count from the start of the data, and step2 has"),
        ("gone", {"continue_from": "runs/one/train/step9"}, "step9"),
    ):
        two = run_folder(runs / name, dataset)
        said = train(two, status=1, **{"continue_from": "runs/one/train/step2", "steps": 4, **fields})
        assert any(word in said for word in expected.split("|")), said
        assert not list((two / "train").glob("step*"))
    damaged = next((one / "train/step2/model_and_optim").glob("*.distcp"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    two = run_folder(runs / "two", dataset)
    assert "has sha256" in train(two, status=1, continue_from="runs/one/train/step2", steps=4)
    assert (one / "train/step2").is_dir()  # another run's step is not renamed


@pytest.mark.seconds
def test_adapters_go_on_from_adapters_of_the_same_base(runs: Path, dataset: Path) -> None:
    whole, one, two, full = (run_folder(runs / name, dataset) for name in ("whole", "one", "two", "full"))
    fields = {"method": "lora", "schedule": "constant", "warmup_fraction": 0.0, "ephemeral_every": 0}
    train(whole, steps=6, **fields)
    train(one, steps=3, **fields)
    train(two, steps=6, continue_from="runs/one/train/step3", **fields)
    assert_same_bits(two / "train/step6", whole / "train/step6")
    said = train(full, status=1, steps=6, continue_from="runs/one/train/step3")
    assert "method" in said and "'lora'" in said and "'full'" in said
    (one / "train/metrics.jsonl").write_text("")  # an older training, which recorded no options: config.json says it
    assert "method" in train(full, status=1, steps=6, continue_from="runs/one/train/step3")
    other = run_folder(runs / "other", dataset)
    said = train(other, status=1, steps=6, continue_from="runs/one/train/step3", **fields, seed=1)
    assert "its adapters were trained on another base" in said


@pytest.mark.seconds
def test_other_parameters_than_the_steps_are_refused_where_nothing_recorded_its_options(
    runs: Path, dataset: Path
) -> None:
    one, two = (run_folder(runs / name, dataset) for name in ("one", "two"))
    train(one, steps=2)
    (one / "train/metrics.jsonl").unlink()
    said = train(two, status=1, steps=4, continue_from="runs/one/train/step2", train_only=("attention",))
    assert "other optimizer state than this run has" in said and "tensors (" in said


@pytest.mark.seconds
def test_another_tokenizer_is_refused(runs: Path, dataset: Path) -> None:
    one, two = (run_folder(runs / name, dataset) for name in ("one", "two"))
    train(one, steps=2)
    (one / "train/tokenizer/tokenizer.json").write_text('{"version": "2.0"}')
    said = train(two, status=1, steps=4, continue_from="runs/one/train/step2")
    assert "'continue' in [train] = 'runs/one/train/step2' is the base here" in said and "tokenizer.json sha256" in said


@pytest.mark.seconds
def test_a_step_that_another_run_goes_on_from_is_not_pruned(runs: Path, dataset: Path) -> None:
    one = run_folder(runs / "one", dataset)
    (runs / "two").mkdir()
    run = {"recipe": "smoke", "overrides": ["train.continue=runs/one/train/step4"]}
    (runs / "two" / "run.json").write_text(json.dumps(run))
    train(one, steps=12, save_every=2, keep=1, ephemeral_every=0)
    assert {p.name for p in (one / "train").glob("step*")} >= {"step4", "step12"}
    assert not (one / "train/step2").exists()


@pytest.mark.seconds
def test_the_curves_of_a_continued_run_join_those_before_it(runs: Path, dataset: Path) -> None:
    one, two = (run_folder(runs / name, dataset) for name in ("one", "two"))
    train(one, steps=6)
    train(two, steps=12, continue_from="runs/one/train/step6")
    found = trainings.training(two)
    assert [s.step for s in found.steps] == list(range(1, 13))
    assert [x for x, *_ in found.validations()] == [0, 6, 12]
    notes = trainings.of_one(trainings.joined(two))["notes"]
    assert "It continues runs/one/train/step6: the curves up to step 6 are of that run." in notes
    shutil.rmtree(one)
    assert [s.step for s in trainings.training(two).steps] == list(range(7, 13))
    assert [x for x, *_ in trainings.training(two).validations()] == [6, 12]
    notes = trainings.of_one(trainings.joined(two))["notes"]
    assert "It continues runs/one/train/step6, whose metrics are not here: the curves begin there." in notes


def test_what_is_refused_where_nothing_is_left(dataset: Path) -> None:
    index = pack_dataset(Dataset.open(dataset / "data"), 64, "truncate")
    options = Train(**{**TRAIN, "steps": 0, "epochs": 2.0})
    plan = StepPlan.build(index, options)
    short = replace(options, epochs=1.0)
    with pytest.raises(SftError, match=r"epochs = 1: they count from the start of the data, and step\d+ has 2 epochs"):
        StepPlan.build(index, short).goes_on(plan.consumed(plan.steps), short)
    other = StepPlan.build(index, replace(options, data_seed=1))
    with pytest.raises(SftError, match="data position differs"):
        other.goes_on(plan.consumed(1), options)


def test_held_out_documents_that_lose_every_trained_token_are_told_and_refused_where_their_loss_is_needed() -> None:
    """The case of prompts that are all too long, in the validation split alone."""
    none = PackingLosses(4, 400, 40, 4, 0, 4, 400, 40, True, 100)
    some = replace(none, pieces=3, unlabelled_pieces=1)

    class Packs(list[int]):
        losses = some

    class Nothing(Packs):
        losses = none

    lost: Any = Nothing()
    left: Any = Packs([1])
    text = "of 4 validation documents lose every trained token to seq_len 64"
    assert held_out_problems(left, Train(seq_len=64)) == [f"warning: 1 {text}; they are left out"]
    assert held_out_problems(lost, Train(seq_len=64)) == [f"warning: 4 {text}; there is no validation loss"]
    for field in ("early_stopping_patience", "save_best_only"):
        with pytest.raises(SftError, match=f"4 {text}, so there is no validation loss, which {field} needs"):
            held_out_problems(lost, Train(seq_len=64, **{field: 1}))
