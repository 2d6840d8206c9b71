"""kill -9 at any moment: the same command again ends in the bits of a run that nobody touched.

KILLS=20 kills more often, which takes some minutes more.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import files
from patience import PATIENCE
from sft.checkpoint import step_folder
from sft.formats.steps import named_step
from training import curve, kill, last_step, run_folder, start, train

pytestmark = [pytest.mark.slow, pytest.mark.processes]

FIELDS: dict[str, Any] = {
    "steps": 40, "save_every": 6, "ephemeral_every": 2, "validate_every": 4, "keep": 2, "model_n_layers": 1,
}  # fmt: skip


KILLS = int(os.environ.get("KILLS", "4"))


def fields(ranks: int) -> dict[str, Any]:
    return {**FIELDS, "ranks": ranks, "hardware": {"microbatch_tokens": 256 // ranks}}  # one microbatch in a step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[int, Path]:
    """Uninterrupted runs by number of processes, over one dataset."""
    top = tmp_path_factory.mktemp("whole")
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = run_folder(top / str(ranks), dataset)
        train(runs[ranks], **fields(ranks))
    return runs


def assert_sound(out: Path) -> None:
    """Whatever a kill left: a step with a manifest is whole, and LATEST and BEST name steps that are."""
    for _, step in step_folder.steps(out):
        assert not (step / "manifest.json").is_file() or step_folder.damage(step) == []
    for name in ("LATEST", "BEST"):
        named = named_step(out, name)
        assert named is None or step_folder.damage(named) == []


def assert_same_end(folder: Path, whole: Path) -> None:
    assert files(folder / "train" / "step40") == files(whole / "train" / "step40"), (
        "every file of the step, not its tensors alone"
    )
    assert curve(folder) == curve(whole)
    for name in ("LATEST", "BEST"):
        assert (folder / "train" / name).read_text() == (whole / "train" / name).read_text()
    left = {n for n, _ in step_folder.steps(folder / "train")}
    assert left == {n for n, _ in step_folder.steps(whole / "train")}, "retention has caught up"
    assert not [*(folder / "train").glob(".trash-*"), *(folder / "train").glob(".saving-*")]


@pytest.mark.parametrize(("ranks", "kills"), [(1, KILLS), (2, KILLS)])
def test_killed_at_random_moments(folder: Path, whole: dict[int, Path], ranks: int, kills: int) -> None:
    """Most of the kills meet a checkpoint that is being written: one is every second step."""
    chance = random.Random(ranks)
    done, reached = 0, set()
    while done < kills:
        process = start(folder, **fields(ranks))
        # Start-up is hit now and then; else the run gets a few steps further, so that the kills spread over it.
        target = max(1, last_step(folder) + chance.randint(0, 40 // kills))
        deadline = time.monotonic() + PATIENCE
        while process.is_alive() and time.monotonic() < deadline and last_step(folder) < target:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        if not process.is_alive():
            break
        kill(process, signal.SIGKILL)
        done += 1
        reached.add(last_step(folder))
        assert_sound(folder / "train")
    assert done == kills, f"the run was over after {done} kills"
    assert len(reached) >= kills // 2
    train(folder, **fields(ranks))
    assert_same_end(folder, whole[ranks])


MOMENTS = {
    "between the weights and their hashes": {"at": "sft.formats.manifest.describe", "call": 2, "thread": "saving"},
    "in the middle of the hashes": {"at": "sft.formats.manifest.hash_file", "call": 13, "thread": "saving"},
    "before the manifest": {"at": "sft.formats.record.write_atomic", "call": 6, "thread": "saving"},
    "between the rename and LATEST": {"at": "sft.checkpoint.step_folder.mark_latest", "call": 2, "thread": "saving"},
    "between LATEST and BEST": {"at": "sft.checkpoint.step_folder.mark_best", "call": 1, "thread": "saving"},
    "before what is superfluous is renamed": {"at": "sft.checkpoint.step_folder.prune", "call": 3, "thread": "saving"},
    "between two renames to the trash": {"at": "sft.checkpoint.step_folder.to_trash", "call": 2, "thread": "saving"},
    "in the middle of a removal": {"at": "os.unlink", "call": 4, "thread": "removing"},
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_every_moment_of_saving(folder: Path, whole: dict[int, Path], ranks: int) -> None:
    """One run, killed and continued at one moment after the other."""
    for moment, where in MOMENTS.items():
        train(folder, status=-signal.SIGKILL, fault={"kind": "kill", **where}, **fields(ranks))
        assert_sound(folder / "train")
        if "removal" in moment:
            assert list((folder / "train").glob(".trash-*"))
    train(folder, **fields(ranks))
    assert_same_end(folder, whole[ranks])
