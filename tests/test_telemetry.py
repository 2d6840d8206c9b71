"""Telemetry by group of layers: what it measures, on any number of ranks, and where it is seen."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from published import step_record
from sft.formats.metrics import Attempt, StepRecord, read_metrics
from sft.model import memory
from sft.model.trained import matches
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Hardware, Train
from sft.reporting import trainings
from sft.training.metrics import MetricsWriter
from sft.training.telemetry import BLOCK_GROUPS, block_groups
from training import finish, records, run_folder, start, tensors, train_here

FIELDS: dict[str, Any] = {"steps": 3, "save_every": 1, "ephemeral_every": 0, "max_grad_norm": 0.01}


def here(folder: Path, **fields: Any) -> list[StepRecord]:
    """A training in this process, and its records."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train_here(folder, FIELDS | fields) == 0, said.getvalue()
    return records(folder)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = run_folder(tmp_path_factory.mktemp("telemetry"), dataset)
    here(folder, telemetry_every=1)
    return folder


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return {n: t.double() for n, t in tensors(folder / "train" / f"step{step}").items() if not n.startswith("optim")}


def norm(found: dict[str, torch.Tensor], group: str) -> float:
    return torch.cat([t.flatten() for name, t in found.items() if matches(group, name)]).norm().item()


@pytest.mark.seconds
def test_the_update_ratio_is_that_of_the_saved_weights(one_rank: Path) -> None:
    steps = records(one_rank)
    for before, record in itertools.pairwise(range(4)):
        if before == 0:
            continue  # the starting weights are in no step folder
        old, new = weights(one_rank, before), weights(one_rank, record)
        assert steps[record - 1].update_ratios == {
            group: pytest.approx(norm({n: new[n] - old[n] for n in old}, group) / norm(old, group), rel=1e-4)
            for group in ("embeddings", "blocks.0", "blocks.1", "lm_head")
        }


@pytest.mark.seconds
def test_the_gradient_norms_are_torchs_before_clipping(tmp_path: Path, dataset: Path, one_rank: Path) -> None:
    """The gradients of the first step, whole, by autograd alone."""
    from sft.model.parallel import join
    from sft.training.build import build_run
    from sft.training.loop import accumulate
    from training import FakeStage

    world = join(threads=1)
    with contextlib.redirect_stdout(io.StringIO()):
        run, _ = build_run(FakeStage(run_folder(tmp_path / "run", dataset), **FIELDS), world)  # type: ignore[arg-type]
        step, batches = next(iter(run.loader(0)))
        accumulate(run, step, batches)
    grads = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    first = records(one_rank)[0]
    assert first.grad_norms is not None
    assert first.grad_norms == {group: pytest.approx(norm(grads, group), rel=1e-5) for group in first.grad_norms}
    for record in records(one_rank):
        assert record.grad_norms is not None and record.grad_norm > 0.01
        assert math.hypot(*record.grad_norms.values()) == pytest.approx(record.grad_norm, rel=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize("hardware", [{}, {"shard_degree": 1}], ids=["two shards", "two copies"])
def test_two_ranks_measure_what_one_does(
    hardware: dict[str, Any], tmp_path: Path, dataset: Path, one_rank: Path
) -> None:
    folder = run_folder(tmp_path / "two", dataset)
    finish(start(folder, ranks=2, hardware=hardware, telemetry_every=1, **FIELDS), folder)
    for found, wanted in zip(records(folder), records(one_rank), strict=True):
        assert found.grad_norms == pytest.approx(wanted.grad_norms, rel=1e-4)
        assert found.update_ratios == pytest.approx(wanted.update_ratios, rel=1e-3)


@pytest.mark.seconds
def test_it_changes_no_weight_and_is_off_by_default(one_rank: Path, tmp_path: Path, dataset: Path) -> None:
    folder = run_folder(tmp_path / "off", dataset)
    assert all(record.grad_norms is None and record.update_ratios is None for record in here(folder))
    ours, theirs = tensors(folder / "train" / "step3"), tensors(one_rank / "train" / "step3")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.seconds
def test_it_comes_every_n_steps_also_between_logged_ones_and_of_trained_parameters_alone(
    tmp_path: Path, dataset: Path
) -> None:
    folder = run_folder(tmp_path / "frozen", dataset)
    steps = here(folder, telemetry_every=2, log_every=3, freeze=["embeddings", "blocks.0"], steps=4)
    assert [(r.step, list(r.grad_norms or ())) for r in steps if r.grad_norms] == [
        (2, ["blocks.1", "lm_head"]),
        (4, ["blocks.1", "lm_head"]),
    ]


@pytest.mark.parametrize("blocks", [1, 4, 6, 7, 32, 64])
def test_groups_are_consecutive_blocks_and_their_names_are_patterns(blocks: int) -> None:
    groups = block_groups(blocks)
    assert len(groups) == blocks and len(set(groups)) == min(blocks, BLOCK_GROUPS)
    assert all(matches(group, f"blocks.{i}.attention.w_q.weight") for i, group in enumerate(groups))
    sizes = [groups.count(group) for group in dict.fromkeys(groups)]
    assert max(sizes) - min(sizes) <= 1


def test_the_report_draws_a_line_for_each_group_and_a_step_that_ran_twice_once(tmp_path: Path) -> None:
    def step(number: int, value: float) -> StepRecord:
        return step_record(
            number, grad_norms={"embeddings": value, "lm_head": 2 * value}, update_ratios={"lm_head": value}
        )

    for attempt, first, last in ((1, 0, 5), (2, 3, 6)):  # the first is killed after step 5, where step 3 was saved
        header = Attempt(attempt, first, 1, "cpu", None, "", 6)
        writer = MetricsWriter(tmp_path, first, 6, print, header)
        for number in range(first + 1, last + 1):
            writer.write(step(number, attempt + number / 10))
        writer.close()
    made = trainings.of_one(read_metrics(tmp_path / "metrics.jsonl"))
    charts = {chart["title"]: chart for chart in made["small"] if chart}
    lines = {line["name"]: line["points"] for line in charts["gradient norm by group of layers"]["lines"]}
    points = [(point[0], point[-1]) for point in lines["embeddings"]]
    assert points == [(1, 1.1), (2, 1.2), (3, 1.3), (4, 2.4), (5, 2.5), (6, 2.6)]
    assert list(lines) == ["embeddings", "lm_head"]
    assert [p[0] for p in made["loss"]["lines"][0]["points"]] == [1, 2, 3, 4, 5, 6]
    assert "Attempts: 2, continued from step 3." in made["notes"]


def test_the_memory_plan_has_the_copy_of_the_weights() -> None:
    config, hardware = PRESETS["olmo2-1b"], Hardware(microbatch_tokens=2048, recompute="full")
    watched = memory.plan(config, Train(seq_len=2048, telemetry_every=10), hardware, 1, 0)
    assert watched.parts["weights before the step"] == 4 * config.parameters
    assert watched.total > memory.plan(config, Train(seq_len=2048), hardware, 1, 0).total
