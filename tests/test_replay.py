"""Silent corruption: a microbatch that two ranks compute differently is found, the rank is named, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sft.common.machine import node_name
from sft.recipe.schema import Train
from sft.training import replay
from sft.training.replay import Numbers, wrong_of
from training import assert_same_bits, curve, records, run_folder, train

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")
FIELDS: dict[str, Any] = {"steps": 4, "save_every": 4, "ephemeral_every": 0, "hardware": {"microbatch_tokens": 64}}


@pytest.mark.processes
@pytest.mark.parametrize(("ranks", "hardware"), [(1, {}), (2, {}), (4, {"shard_degree": 2, "context_degree": 2})])
def test_replays_change_no_byte_and_agree(folder: Path, dataset: Path, ranks: int, hardware: dict[str, Any]) -> None:
    plain, replayed = (run_folder(folder / name, dataset) for name in ("plain", "replayed"))
    fields = FIELDS | {"ranks": ranks, "hardware": FIELDS["hardware"] | hardware, "neftune_alpha": 5.0}
    assert "computed twice" not in train(plain, **fields)
    out = train(replayed, **fields, replay_every=2)
    assert "replay: 2 microbatches of this attempt were computed twice and agree in every bit" in out
    assert_same_bits(plain / "train/step4", replayed / "train/step4")
    assert curve(plain) == curve(replayed)


def corrupt(folder: Path, ranks: int, call: int, **fields: Any) -> str:
    """The line that names a rank, of a training in which rank `ranks` - 1 computes a bit wrongly in the given forward pass of a block. A
    step has four of its own, two blocks in two microbatches, and two of its replay before them."""
    fault = {"at": "sft.model.model.FeedForward.forward", "kind": "flip", "rank": ranks - 1, "call": call}
    fields = FIELDS | {"global_batch_tokens": 128 * ranks, "validate_start": False} | fields
    out = train(folder, 1, **fields, ranks=ranks, replay_every=1, fault=fault)
    assert "next: leave that host out" in out and not (folder / "train/result.json").exists()
    return next(line for line in out.splitlines() if "corrupt: " in line)


@pytest.mark.processes
@pytest.mark.parametrize(("call", "owner", "other"), [(11, 2, 0), (7, 1, 2)])
def test_a_rank_that_computes_one_bit_wrongly_is_outvoted_and_named(
    folder: Path, call: int, owner: int, other: int
) -> None:
    """Three ranks, in the second step: in its own microbatch, and in the replay of another rank's."""
    line = corrupt(folder, 3, call)
    host = node_name()
    assert (
        f"corrupt: rank 2 on {host}: step 2, microbatch 2 of rank {owner}: rank {owner} and rank {other} on {host}"
        in line
    )
    assert [r.step for r in records(folder)] == [1], "the weights of the wrong step changed"


@pytest.mark.processes
def test_a_wrong_bit_without_a_third_rank(folder: Path, dataset: Path) -> None:
    """One rank is named. Of two, the one that computes its own microbatch otherwise a second time."""
    one, two = (run_folder(folder / name, dataset) for name in ("one", "two"))
    assert "corrupt: rank 0 on " in corrupt(one, 1, 11)
    assert "corrupt: rank 1 on " in corrupt(two, 2, 11)


def numbers(gradient: torch.Tensor, exact: bool = False) -> Numbers:
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    loss = (weight * gradient).sum()
    return replay.backward(loss, torch.ones(3, dtype=torch.float64), exact)


def test_the_vote_names_the_rank_that_is_alone() -> None:
    a, b, c = (numbers(torch.full((4,), value), exact=True) for value in (1.0, 2.0, 3.0))
    assert wrong_of(0, 1, 2, own=a, theirs=b, vote=b) == [0]
    assert wrong_of(0, 1, 2, own=a, theirs=b, vote=a) == [1]
    assert wrong_of(0, 1, 2, own=a, theirs=b, vote=c) == [0, 1]
    assert wrong_of(0, 1, 0, own=a, theirs=b, vote=a) == [0, 1], "two ranks cannot outvote each other"
    assert wrong_of(0, 1, 0, own=a, theirs=b, vote=c) == [0], "it differs from itself"
    assert wrong_of(0, 0, 0, own=a, theirs=b, vote=a) == [0]


def test_bits_differ_by_any_bit_and_bounds_by_what_matters() -> None:
    gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    for bit in range(32):
        other = gradient.clone()
        other.view(torch.int32)[3, 5] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert not numbers(gradient, exact=True).same(numbers(other, exact=True)), bit
    assert numbers(gradient).same(numbers(gradient.bfloat16().float())), "rounding is allowed"
    assert numbers(gradient * float("nan")).same(numbers(gradient * float("nan"))), "the guard skips such a step"
    for wrong in (gradient * 1.1, gradient.flip(0) + 0.1, gradient * float("nan"), gradient.clone().fill_(1e9)):
        assert not numbers(gradient).same(numbers(wrong))


def test_replays_are_off_and_in_no_key_unless_asked_for() -> None:
    assert Train().replay_every == 0
    assert Train.__dataclass_fields__["replay_every"].metadata["key"] is False


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_agrees_with_itself(folder: Path, deterministic: bool) -> None:
    fields = FIELDS | {"device": "cuda", "precision": "bf16", "deterministic": deterministic}
    out = train(folder, **fields, replay_every=1)
    assert f"computed twice and agree {'in every bit' if deterministic else 'within their bounds'}" in out
