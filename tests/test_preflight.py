"""The preflight of a job's devices and links: a rank that computes wrongly stops the job, a slow one is named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.training import preflight
from sft.training.preflight import RankMeasurement, rounds, slow, wrong
from training import records, train

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")
FIELDS: dict[str, Any] = {"steps": 1, "hardware": {"microbatch_tokens": 64, "preflight": "always"}}


def job(ranks: int = 8, local_size: int = 4) -> list[RankMeasurement]:
    """A healthy job, as its ranks report it."""
    links = [{o: 100.0 for pairs in rounds(ranks, local_size) if (o := pairs[r]) is not None} for r in range(ranks)]
    return [
        RankMeasurement(r, f"n{r // local_size}", "H100", 7, 600.0 + r, 2000.0 - r, (), links[r]) for r in range(ranks)
    ]


@pytest.mark.parametrize(("ranks", "local_size"), [(1, 1), (2, 1), (2, 2), (3, 3), (8, 8), (16, 8), (6, 2), (64, 8)])
def test_every_rank_is_paired_with_its_neighbours_in_its_node_and_in_the_next_ones(ranks: int, local_size: int) -> None:
    found: set[tuple[int, int]] = set()
    for pairs in rounds(ranks, local_size):
        for rank, other in enumerate(pairs):
            if other is not None:
                assert pairs[other] == rank != other
                found.add((rank, other))
    near = {(r, r + 1) for r in range(ranks - 1) if r // local_size == (r + 1) // local_size}
    far = {(r, r + local_size) for r in range(ranks - local_size)}
    assert near | far <= found


def test_a_healthy_job_has_no_warnings() -> None:
    assert not wrong(job()) and not slow(job())
    assert preflight.summary(job(), 9.4) == (
        "preflight of 8 x H100 in 9 s: matmul 600 to 607 TFLOP/s, memory 1,993 to 2,000 GB/s, link 100 to 100 GB/s"
    )


def test_a_wrong_product_is_named_by_the_majority_of_the_same_device() -> None:
    ranks = job()
    ranks[5] = replace(ranks[5], product=8)
    assert [line.partition(": its")[0] for line in wrong(ranks)] == ["corrupt: rank 5 on n1"]
    others = [replace(f, device="A100", product=9) if f.rank < 4 else f for f in ranks]
    assert [line.partition(": its")[0] for line in wrong(others)] == ["corrupt: rank 5 on n1"], (
        "another GPU, other bits"
    )
    assert "has 2 values on 2 ranks" in wrong([ranks[4], ranks[5]])[0]
    ranks[2] = replace(ranks[2], wrong=("memory returns other values than were written",))
    assert wrong(ranks)[0].startswith("corrupt: rank 2 on n0: memory returns")


def test_a_slow_rank_and_a_slow_link_are_named() -> None:
    ranks = job()
    ranks[3] = replace(ranks[3], matmul=400.0)
    ranks[6] = replace(ranks[6], memory=900.0)
    assert [re.sub(r"; next.*", "", line) for line in slow(ranks)] == [
        "warning: preflight: rank 3 on n0: matmul 400 TFLOP/s, the median is 603",
        "warning: preflight: rank 6 on n1: memory 900 GB/s, the median is 1,996",
    ]
    ranks = job(32, 4)
    for a, b in ((9, 13), (9, 5), (9, 10), (9, 8), (20, 21)):
        for one, two in ((a, b), (b, a)):
            ranks[one].link[two] = 20.0
    assert [line.partition(": ")[2].partition(": 20")[0] for line in slow(ranks)] == [
        "preflight: every link of rank 9 on n2 in its node", "preflight: the link of rank 20 on n5 and rank 21 on n5",
        "preflight: every link of rank 9 on n2 to other nodes",
    ]  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize(
    ("part", "ranks", "said"),
    [
        ("product", 3, "its product of the same matrices is not that of 2 others"),
        ("swap", 2, "a message of rank 0 arrives with other values"),
        ("summed", 2, "a sum over all ranks is wrong"),
    ],
)
def test_a_rank_with_a_wrong_value_stops_the_job_before_it_trains(
    folder: Path, part: str, ranks: int, said: str
) -> None:
    fault = {"at": f"sft.training.preflight.{part}", "kind": "flip", "rank": 1, "call": 0}
    out = train(folder, 1, **FIELDS, global_batch_tokens=128 * ranks, ranks=ranks, fault=fault)
    assert re.search(rf"corrupt: rank 1 on \S+: {said}", out)
    assert "next: leave that host out" in out and not records(folder)


@pytest.mark.processes
def test_a_slow_rank_is_named_and_the_job_trains(folder: Path) -> None:
    fault = {"at": "sft.training.preflight.product", "kind": "slow", "rank": 2, "call": 0}
    out = train(folder, **FIELDS, global_batch_tokens=384, ranks=3, fault=fault)
    assert "preflight of 3 x " in out and len(records(folder)) == 1
    assert re.search(r"warning: preflight: rank 2 on \S+: matmul \S+ TFLOP/s, the median is ", out)


def test_a_product_that_changes_and_a_memory_that_forgets_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    small = replace(preflight.CPU, seconds=1e-6, matrix=32, memory_bytes=1 << 20)
    assert preflight.multiply(cpu, small)[2] and preflight.fill(cpu, small)[1]
    calls = iter(range(100))
    monkeypatch.setattr(preflight, "product", lambda a, b: a @ b + (1e-3 if next(calls) == 3 else 0))
    assert not preflight.multiply(cpu, small)[2]
    copy = torch.Tensor.copy_

    def forgets(block: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        copy(block, value)
        block[77] ^= 1 << 40
        return block

    monkeypatch.setattr(torch.Tensor, "copy_", forgets)
    assert not preflight.fill(cpu, small)[1]


@pytest.mark.gpu
@NO_GPU
def test_a_gpu_passes_its_preflight(folder: Path) -> None:
    out = train(folder, steps=1, device="cuda", precision="bf16", hardware={"microbatch_tokens": 64})
    assert re.search(r"preflight of 1 x .* matmul .* TFLOP/s, memory .* GB/s", out)
