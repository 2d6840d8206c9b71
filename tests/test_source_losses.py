"""loss_weight of a source: the gradient, however the work is divided, its place in keys, and what is reported of each source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import test_context
import training
from published import publish, train_metrics
from sft.checkpoint.lora_step import RandomWeights
from sft.common.errors import SftError
from sft.common.strings import distinct
from sft.data.dataset import Dataset
from sft.formats.dataset import SourceMix
from sft.formats.metrics import SourceUse, TrainMetrics
from sft.model.loss import IGNORED, cross_entropy
from sft.model.model import Transformer
from sft.packing.packs import pack_dataset
from sft.packing.steps import StepPlan
from sft.recipe import recipe
from sft.recipe.resolve import resolve
from sft.recipe.schema import Model, Train
from sft.reporting import report
from sft.runner import plan
from sft.training import sources
from test_lora import train
from test_loss import make

WEIGHTS = {"odd": 0.25, "even": 3.0}


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [10, 1000])
def test_row_weights_multiply_loss_and_z_loss_and_leave_the_rows_own_losses(chunk: int, z_loss: float) -> None:
    hidden, weight, labels = make()
    row_weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) + 0.1
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    penalty = z_loss * logits.logsumexp(1).square() * (labels != IGNORED)
    wanted = ((plain + penalty) * row_weights).sum() / 11
    loss, rows = cross_entropy(hidden, weight, labels, 11.0, z_loss, chunk, row_weights=row_weights)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(rows, plain)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(3 * wanted, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def plain_gradients(dataset: Path, weights: list[float], z_loss: float) -> dict[str, torch.Tensor]:
    """The first step's, with PyTorch's own loss on one document after another."""
    fields = {**training.TRAIN, "global_batch_tokens": 384, "steps": 0, "epochs": 11 / 60}
    data = Dataset.open(dataset / "data")
    steps = StepPlan.build(pack_dataset(data, 64), Train(**fields))
    config = resolve(Model(**training.MODEL), training.VOCAB)
    model = Transformer(config)
    model.load_state_dict(dict(RandomWeights(config, Train().seed)))
    total, count = torch.zeros(()), 0
    for pack in steps.packs(0):
        for segment in steps.index.pack(int(pack)):
            ids, mask = (torch.from_numpy(np.array(x)) for x in data[int(segment["document"])])
            length = len(ids)
            edges = torch.tensor([0, length], dtype=torch.int32)
            logits, _ = model(ids.long(), torch.arange(length), edges, length)
            trained = mask[1:].bool()
            loss = F.cross_entropy(logits[:-1][trained], ids[1:][trained].long(), reduction="sum")
            loss = loss + z_loss * logits[:-1][trained].logsumexp(1).square().sum()
            total = total + weights[int(data.documents[segment["document"]]["source"])] * loss
            count += int(trained.sum())
    (total / count).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.processes
def test_the_weighted_gradient_is_that_of_plain_torch_however_the_work_is_divided(
    tmp_path: Path, dataset: Path
) -> None:
    """The weighted sum over the number of trained tokens, and not over the sum of the weights."""
    wanted = plain_gradients(dataset, list(WEIGHTS.values()), 0.01)
    unweighted = plain_gradients(dataset, [1.0, 1.0], 0.01)
    assert max((wanted[n] - g).norm() / g.norm() for n, g in unweighted.items()) > 0.1
    names = ("one rank, no accumulation", "one rank", "three ranks", "two groups of two, two copies")
    plans = {name: test_context.PLANS[name] for name in names}
    found = test_context.gradients(tmp_path, dataset, plans, {"loss_weights": WEIGHTS, "z_loss": 0.01})
    for name in names:
        for parameter, value in wanted.items():
            difference = (found[name]["steps"][0][parameter] - value).norm() / value.norm()
            assert difference < 2e-5, (name, parameter, difference)


@pytest.mark.seconds
def test_a_weighted_run_reports_both_losses_and_the_losses_of_each_source(folder: Path) -> None:
    train(folder, steps=3, loss_weights=WEIGHTS)
    for record in training.records(folder):
        assert record.weighted_loss is not None and record.sources is not None
        assert record.weighted_loss != pytest.approx(record.loss, rel=1e-3)
    made = TrainMetrics.from_value(json.loads((folder / "result.json").read_text()), "result.json").sources or ()
    assert [(use.source, use.loss_weight) for use in made] == list(WEIGHTS.items())
    first, last = training.records(folder)[0].sources or {}, training.records(folder)[-1].sources or {}
    assert {u.source: (u.first_loss, u.last_loss) for u in made} == {n: (first[n], last[n]) for n in first}
    assert sum(u.seen for u in made) == sum(r.labels for r in training.records(folder))


@pytest.mark.seconds
def test_without_weights_nothing_is_weighted(folder: Path) -> None:
    said = train(folder, steps=3)
    assert all(r.weighted_loss is None for r in training.records(folder))
    lines = [line for line in said.splitlines() if line.startswith(("[train] SOURCE", "[train] odd", "[train] even"))]
    assert lines[0].split() == [
        "[train]",
        "SOURCE",
        "DOCUMENTS",
        "LABELS",
        "SEEN",
        "SKIPPED",
        "LOST",
        "FIRST",
        "LOSS",
        "LAST",
        "LOSS",
    ]
    assert len(lines) == 3 and max(map(len, lines)) <= 100
    documents = Dataset.open(folder / "dataset" / "data").documents
    for line, number in zip(lines[1:], (0, 1), strict=True):
        mine = documents[documents["source"] == number]
        assert line.split()[2:4] == [f"{len(mine)}", f"{mine['labels'].sum(dtype=int):,}"]


@pytest.mark.seconds
def test_a_resume_keeps_the_first_losses_of_the_sources(tmp_path: Path, dataset: Path) -> None:
    whole, parts = (training.run_folder(tmp_path / name, dataset) for name in ("whole", "parts"))
    train(whole, steps=6, save_every=3, loss_weights=WEIGHTS)
    shutil.copytree(whole / "train", parts / "train")
    shutil.rmtree(parts / "train" / "step6")
    assert "continuing from" in train(parts, steps=6, save_every=3, loss_weights=WEIGHTS)
    a, b = (json.loads((f / "result.json").read_text())["sources"] for f in (whole, parts))
    assert a == b and a[0]["first_loss"] != a[0]["last_loss"]


def test_a_dataset_of_other_sources_than_the_recipes_is_refused() -> None:
    assert sources.source_weights({}, ["a", "b"]) == [1.0, 1.0]
    with pytest.raises(SftError, match="the recipe has the sources a, b, the dataset has b, a; next: make prepare"):
        sources.source_weights({"a": 0.5, "b": 1.0}, ["b", "a"])


def test_a_part_that_every_epoch_repeats_is_told() -> None:
    def taken(path: str, taken: int, weight: float) -> SourceMix:
        return SourceMix(
            path=path, weight=weight, found=100, duplicates=0, contaminated=0, validation=0, available=100, taken=taken
        )

    every = [taken("a", 250, 2.5), taken("b", 30, 0.3), taken("c", 200, 2.0)]
    assert sources.repeated_choices(every, 1.0) == []
    a, b = sources.repeated_choices(every, 3.0)
    assert (
        a.startswith("a: each epoch takes each document 2 times and the same 50 once more, of 100")
        and "weight = 7.5" in a
    )
    assert b.startswith("b: each epoch takes the same 30, of 100; for 3 epochs") and "weight = 0.9 " in b


def test_names_of_sources_are_distinct() -> None:
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def smoke(tmp_path: Path, line: str = "") -> recipe.Recipe:
    text = (plan.REPO / "recipes" / "smoke.toml").read_text()
    file = tmp_path / "smoke.toml"
    file.write_text(text.replace('path = "smoke/train.jsonl"', f'path = "smoke/train.jsonl"\n{line}'))
    return recipe.load(file)


def test_a_weight_is_in_the_key_of_training_alone_and_only_if_it_is_not_1(tmp_path: Path) -> None:
    plain, one, half = (smoke(tmp_path, line) for line in ("", "loss_weight = 1.0", "loss_weight = 0.5"))
    for stage in ("prepare", "sync", "train"):
        assert plain.config(stage) == one.config(stage)
    assert half.config("prepare") == plain.config("prepare")
    assert half.config("train") == {**plain.config("train"), "loss_weights": {"smoke/train.jsonl": 0.5}}


@pytest.mark.parametrize("value", ["0", "-1", "0.0", "inf", "nan", "'a'"])
def test_a_weight_is_a_finite_number_above_0(tmp_path: Path, value: str) -> None:
    with pytest.raises(SftError, match="'loss_weight' in"):
        smoke(tmp_path, f"loss_weight = {value}")


def test_the_report_has_the_table_and_marks_a_source_that_lost_a_tenth(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    (run / "train").mkdir(parents=True)
    uses = (
        SourceUse("easy", 1000, 40, 960, 0, 50, 1.0, 3.0, 1.0),
        SourceUse("rare", 24, 0, 48, 40, 2, 0.5, None, None),
    )
    metrics = train_metrics(3, sources=uses)
    publish(run / "train", [], metrics=metrics.to_value())
    page = report.page(run)
    assert "1,000" in page and "rare" in page and 'class="num bad">83.3%' in page and ">0.5<" in page
    colours = [line.startswith("\x1b[31m") for line in sources.lost_sources(uses, colour=True)]
    assert colours == [True]
