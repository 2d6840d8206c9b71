"""A rank that hangs is found, named with its stack, and the job asks to be run again; a slow rank is named."""

from __future__ import annotations

import re

import pytest
import torch

from patience import PATIENCE
from sft.formats import manifest
from sft.formats.steps import BESIDE
from sft.training import hang, stopwatch
from sft.training.hang import HangWatch, Report, verdict
from training import finish, records, start


def report(rank: int, parts: int, waits: bool = True) -> Report:
    return Report(rank, f"n{rank}", 12, parts, "microbatch 1 of 2", "model.py:7 in forward", waits)


def test_the_rank_that_is_behind_is_named():
    assert verdict([report(0, 9), report(1, 7), report(2, 9)], 3, 700.0) == [
        "hung: rank 1 on n1: step 13, microbatch 1 of 2, model.py:7 in forward; no step for 700 s"
    ]
    assert verdict([report(0, 9), report(1, 9, waits=False)], 2, 1.0)[0].startswith("hung: rank 1 on n1")
    assert verdict([report(0, 9), report(2, 9)], 3, 1.0)[0] == "hung: no step for 1 s; rank 1 did not answer"
    assert "no rank is behind" in verdict([report(0, 9), report(1, 9)], 2, 1.0)[0]
    assert verdict([report(0, 4)], 1, 1.0)[0].startswith("hung: rank 0 on n0")


def test_the_bound_is_learnt_from_the_steps(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(hang.time, "monotonic", lambda: clock[0])
    from sft.model.parallel import World

    watch = HangWatch(tmp_path, 0, World(0, 1, 0, torch.device("cpu")), 0)
    for step, seconds in enumerate((500, 30, 90, 30, 30), 1):  # the first one compiles
        assert watch.bound_s == 0
        clock[0] += seconds
        watch.finish_step(step)
    assert watch.bound_s == 900
    with watch.paused():
        clock[0] += 5000
    clock[0] += 20
    watch.finish_step(6)
    assert watch.bound_s == 900
    watch.close()


def hangs(folder, **fields):
    """Three ranks; rank 1 sleeps in the third step, where `at` is called. Returns (exit status, output)."""
    process = start(
        folder, ranks=3, hardware={"microbatch_tokens": 128, "hang_s": 20}, global_batch_tokens=384, **fields
    )
    process.join(timeout=PATIENCE)
    return process.exitcode, (folder / "log").read_text()


SLEEP = {"at": "sft.training.loop.clip", "call": 3, "kind": "sleep", "rank": 1}


@pytest.mark.processes
def test_a_rank_that_hangs_is_named_and_the_job_asks_to_be_run_again_once(folder):
    status, out = hangs(folder, fault=SLEEP, ephemeral_every=100)
    assert status == 75, out
    assert re.search(
        r"hung: rank 1 on \S+: step 3, update of the weights, \S+training.py:\d+ in armed; no step for \d+ s", out
    )
    assert out.count("most recent call first") >= 3 and "it asks to be run again" in out
    assert (folder / "train/.requeue").exists() and (folder / "train/.hangs").read_text() == "0\n"
    assert {".requeue", ".hangs"}.isdisjoint(manifest.strays(folder / "train", (), BESIDE)), "convert would refuse them"
    status, out = hangs(folder, fault=SLEEP, ephemeral_every=100)
    assert status == 1 and "a second hang from step 0: not run again" in out
    assert not (folder / "train/.requeue").exists()


@pytest.mark.processes
def test_a_training_that_does_not_hang_is_left_alone(folder):
    process = start(
        folder, ranks=2, hardware={"microbatch_tokens": 128, "hang_s": 60}, steps=4, validate_every=2, save_every=2
    )
    out = finish(process, folder)
    assert "hung" not in out and len(records(folder)) == 4


def test_a_rank_that_computes_longer_over_many_steps_is_named():
    watch, found = stopwatch.Stragglers(4), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(2 * stopwatch.Stragglers.WINDOW):
        found += watch.add(torch.tensor([1.0, 1.0, 1.4, 1.0]) * (0.5 + torch.rand(4, generator=generator)))
    assert [rank for rank, _ in found] == [2, 2] and all(1.2 < ratio < 1.6 for _, ratio in found)
    even = [watch.add(0.5 + torch.rand(4, generator=generator)) for _ in range(2 * stopwatch.Stragglers.WINDOW)]
    assert not any(even)
