"""make lr-range and make overfit: on the tiny recipe through Make, and the suggestion on curves with a known answer."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import test_smoke
import warm
from conftest import Workspace, files
from sft.common.errors import SftError
from sft.model.loss import IGNORED
from sft.packing.loader import Microbatch
from sft.reporting import lr_range as shown
from sft.training.lr_range import rates, smooth, suggest
from sft.training.overfit import untrained, why
from sft.training.trials import Measured


def ramp(loss: Callable[[float], float], low: float = 1e-6, high: float = 1.0, steps: int = 121) -> list[Measured]:
    return [Measured(lr, loss(math.log10(lr)), 1.0) for lr in rates(low, high, steps)]


def dip(x: float) -> float:
    """Falls fastest at 1e-4 and is lowest at 1e-2."""
    return 5 - 3 / (1 + math.exp(-4 * (x + 4))) + 2 * max(0.0, x + 2) ** 2


def test_the_rate_rises_by_the_same_factor() -> None:
    found = rates(1e-7, 1.0, 100)
    np.testing.assert_allclose(found, np.geomspace(1e-7, 1.0, 100))


def test_the_suggestion_is_where_the_loss_falls_fastest_and_a_tenth_of_the_lowest() -> None:
    found = suggest(ramp(dip))
    x = np.log10([p.lr for p in found.points])
    lowest = x[np.argmin(found.smoothed)] - 1
    steepest = x[np.argmin(np.gradient(np.array(found.smoothed), x))]  # fastai's steep
    assert math.log10(found.low) == pytest.approx(steepest, abs=0.15) and abs(steepest + 4) < 0.15
    assert math.log10(found.high) == pytest.approx(lowest, abs=1e-9) and abs(lowest + 3) < 0.3
    assert not found.still_falling and "raise HIGH" not in found.line
    assert suggest(ramp(dip, high=1e-3)).still_falling


def test_smoothing_does_not_lag_and_keeps_a_line() -> None:
    line = [3.0 * i for i in range(50)]
    assert smooth(line, 5) == pytest.approx(line)


@pytest.mark.parametrize("loss", [lambda x: 5.0, lambda x: 5 + x, lambda x: 5 + (x + 6) ** 2, lambda x: math.nan])
def test_a_ramp_that_lowers_nothing_suggests_nothing(loss: Callable[[float], float]) -> None:
    with pytest.raises(SftError, match=r"no rate up to .* lowered the loss"):
        suggest(ramp(loss))


def test_the_page_and_the_picture_have_the_range() -> None:
    found = suggest(ramp(dip))
    page = shown.page("x", found)
    assert "1506.01186" in page and f"{found.low:.1e} to {found.high:.1e}" in page and '"log_x": true' in page
    blocks, marks, ends = shown.picture(found)
    assert blocks[6] == "█" and "▁" in blocks and len(blocks) == 66 and max(map(len, (blocks, marks, ends))) <= 90
    assert ends.split() == ["1e-06", "1e+00"]
    first, last = marks.index("="), marks.rindex("=")
    at = [6 * (math.log10(lr) + 6) / 6 * 10 - 0 for lr in (found.low, found.high)]
    assert [first - 6, last - 6] == pytest.approx([a / 60 * 59 for a in at], abs=1.5)


def test_untrained_tokens_are_all_others_but_first_ones_and_padding() -> None:
    ids = torch.arange(10, 20)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 1, 2])  # documents of 4 and 3 tokens, then padding
    batch = Microbatch(
        ids, positions, torch.tensor([0, 4, 7, 10]), 4, torch.tensor([1, 5, 0]), torch.tensor([12, 16, IGNORED]),
        torch.zeros(3, dtype=torch.int64), 2, 7,
    )  # fmt: skip
    found = untrained(batch)
    assert found.target_rows.tolist() == [0, 2, 4] and found.target_ids.tolist() == [11, 13, 15]
    every = Microbatch(
        ids[:2], positions[:2], torch.tensor([0, 2]), 2, torch.tensor([0]), torch.tensor([11]), torch.zeros(1), 1, 2
    )
    assert untrained(every).target_ids.tolist() == [IGNORED]


@pytest.mark.parametrize(
    ("first", "last", "reason"),
    [
        ((math.nan, 1.0), (math.nan, 1.0), "first loss is not finite"),
        ((3.0, 1.0), (math.inf, 1.0), "diverged"),
        ((3.0, 0.0), (3.0, 0.0), "no gradient reaches"),
        ((3.0, 1.0), (3.0, 1.0), "optimizer does not change the loss"),
        ((3.0, 1.0), (1.0, 1.0), "did not reach 0.1 yet"),
        ((3.0, 1.0), (2.5, 1.0), "falls too slowly"),
    ],
)
def test_a_failure_has_its_probable_reason(first: tuple[float, float], last: tuple[float, float], reason: str) -> None:
    assert reason in why([Measured(1e-3, *first), Measured(1e-3, *last)], 0.1)


@pytest.mark.parametrize("goal", ["lr-range", "overfit"])
def test_a_cluster_with_jobs_is_refused_before_anything_runs(workspace: Workspace, goal: str) -> None:
    told = workspace.make(goal, "RECIPE=x", "CLUSTER=slurm", ok=False)
    assert f"make {goal} CLUSTER=slurm: it runs on this machine alone" in told.stderr
    assert not (workspace.root / "runs").exists()


def make(runs: Path, *words: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    return test_smoke.make(runs, *words, f"PY={runs / 'python'}", f"PYTHON={runs / 'planner'}", ok=ok)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    warm.write_python(folder / "python")
    warm.write_python(folder / "planner", warm.LIGHT)
    make(folder, "sync", "RECIPE=smoke")
    (folder / "smoke" / "train").mkdir()
    (folder / "smoke" / "train" / "kept").write_text("a training")
    return folder


@pytest.mark.slow
def test_a_ramp_suggests_a_range_around_the_recipes_rate_and_touches_no_training(runs: Path) -> None:
    before = files(runs / "smoke" / "train")
    said = make(runs, "lr-range", "RECIPE=smoke", "LOW=1e-4", "HIGH=1", "STEPS=40").stdout
    found = next(line for line in said.splitlines() if "suggested [train] lr" in line).split()
    low, high = float(found[-3]), float(found[-1])
    assert 1e-4 < low <= high < 3e-2  # 3e-3 is what smoke.toml trains with
    assert "ETA 0:00:0" in said and "█" in said
    assert (runs / "smoke" / "lr-range" / "index.html").is_file()
    assert files(runs / "smoke" / "train") == before
    assert not any((runs / "smoke" / ".work").glob("lr-range/*"))


@pytest.mark.slow
def test_one_batch_is_learned_in_full_and_with_adapters_and_fails_without_a_rate(runs: Path) -> None:
    said = make(runs, "overfit", "RECIPE=smoke").stdout
    assert "loss and optimizer work: " in said and "mask works: " in said
    failed = make(runs, "overfit", "RECIPE=smoke", "lr=1e-30", "STEPS=12", ok=False)
    assert "one batch was not learned" in failed.stderr and "the optimizer does not change the loss" in failed.stderr
    said = make(runs, "overfit", "RECIPE=smoke", "method=lora", "lora_rank=64", "lr=1e-2", "BOUND=0.5").stdout
    assert "in 28 adapters" in said and "loss and optimizer work: " in said


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_train_a_batch_of_two_microbatches(runs: Path) -> None:
    said = make(runs, "overfit", "RECIPE=smoke", "processes=2", "microbatch_tokens=512", "BOUND=2", "STEPS=60").stdout
    assert "2 x cpu" in said and "1 steps of 1,024 tokens" in said and "loss and optimizer work: " in said
    shutil.rmtree(runs / "smoke" / ".work" / "overfit", ignore_errors=True)
