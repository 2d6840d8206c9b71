"""A GPU that is too small for a step: training starts again once, with more recomputation, and says so everywhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft.common.errors import SftError
from sft.common.process import OUT_OF_MEMORY
from sft.formats import manifest, steps
from sft.formats.metrics import read_attempts
from sft.formats.out_of_memory import OutOfMemory
from sft.model.memory import plan, plan_again
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Hardware, Train
from sft.training.out_of_memory import is_out_of_memory, note
from training import assert_same_bits, run_folder, train

FULL = {"at": "sft.training.loop.clip", "call": 5, "kind": "memory"}
SHORT: dict[str, Any] = {"steps": 6, "validate_every": 0}


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_starts_again_once_with_more_recomputation_and_ends_in_the_same_bits(
    tmp_path: Path, dataset: Path, ranks: int
) -> None:
    whole, folder = run_folder(tmp_path / "whole", dataset), run_folder(tmp_path / "short", dataset)
    train(whole, ranks=ranks, **SHORT)
    said = train(folder, OUT_OF_MEMORY, ranks=ranks, fault={**FULL, "rank": ranks - 1}, **SHORT)
    told = f"step 5 ran out of memory on rank {ranks - 1} with recomputation: none (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    assert f"{told}; training starts again once, from the newest step, with more recomputation" in said
    assert steps.OUT_OF_MEMORY not in manifest.strays(folder / "train", (), steps.BESIDE), "convert would refuse it"
    found = OutOfMemory.read(folder / "train" / steps.OUT_OF_MEMORY)
    assert (found.step, found.recompute, found.hardware["ranks"]) == (5, "none", ranks)

    said = train(folder, ranks=ranks, **SHORT)
    assert f"warning: {told}; recomputation is now: " in said
    first, second = read_attempts(folder / "train/metrics.jsonl")
    assert (first.recompute, first.out_of_memory) == ("none", None)
    assert second.recompute not in ("none", None) and second.out_of_memory == told
    assert told in (folder / "result.json").read_text() and "out_of_memory" not in (whole / "result.json").read_text()
    assert_same_bits(folder / "train/step6", whole / "train/step6")


@pytest.mark.processes
def test_a_second_time_ends_training_and_other_hardware_numbers_begin_afresh(tmp_path: Path, dataset: Path) -> None:
    folder = run_folder(tmp_path / "x", dataset)
    train(folder, OUT_OF_MEMORY, fault=FULL, **SHORT)
    said = train(folder, 1, fault={**FULL, "call": 1}, **SHORT)
    assert "error: " in said and "GB per GPU were planned; next: a smaller" in said
    said = train(folder, fault={**FULL, "call": 99}, hardware={"microbatch_tokens": 64}, **SHORT)
    assert "out of memory" not in said


@pytest.mark.seconds
def test_full_recomputation_is_not_tried_again(tmp_path: Path, dataset: Path) -> None:
    folder = run_folder(tmp_path / "x", dataset)
    hardware = {"microbatch_tokens": 128, "recompute": "full"}
    assert "next: a smaller [on.<cluster>.train] microbatch_tokens" in train(
        folder, 1, fault=FULL, hardware=hardware, **SHORT
    )
    assert not (folder / "train" / steps.OUT_OF_MEMORY).exists()


def test_a_second_time_ends_training_although_more_could_be_recomputed(tmp_path: Path) -> None:
    """In a tiny training the second attempt recomputes everything, which alone would end it."""
    stage = SimpleNamespace(out=tmp_path, hardware=Hardware())
    room = SimpleNamespace(recompute="budget", mode="budget", total=10**9, keep_gathered="none", shard_degree=0)
    values = {"stage": stage, "room": room, "world": SimpleNamespace(rank=0, size=1), "hang": None, "first": 4}
    run: Any = SimpleNamespace(short=None, **values)
    assert "training starts again once" in note(run, torch.OutOfMemoryError("x"))
    run.short = OutOfMemory.read(tmp_path / steps.OUT_OF_MEMORY)
    with pytest.raises(SftError, match=r"step 5 ran out of memory .* next: a smaller"):
        note(run, torch.OutOfMemoryError("x"))


@pytest.mark.parametrize("keep", ["none", "auto"])
@pytest.mark.parametrize("recompute", ["none", "budget", "selected", "auto"])
def test_the_next_plan_needs_less(recompute: str, keep: str) -> None:
    hardware = Hardware(recompute=recompute, recompute_budget=0.4, keep_gathered=keep)
    numbers = (PRESETS["olmo2-7b"], Train(), hardware, 8)
    failed = plan(*numbers, 80.0)
    found = plan_again(*numbers, 80.0, failed.total)
    assert found.total < 0.9 * failed.total and found.limit == 80e9
    kept = {"none": 1.0, "budget": failed.recompute_budget}.get(failed.recompute, 0.0)
    assert found.keep_gathered == "none"
    assert failed.keep_gathered != "none" or found.recompute == "full" or found.recompute_budget < kept


def test_which_errors_are_a_lack_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(ValueError("CUDA out of memory"))
