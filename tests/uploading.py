"""What other processes do in the tests of uploads. They are forked from `training.SERVER`, which has imported torch already."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sft.model.parallel import World, join
from sft.training import stored_steps, uploads


def send_until_told(out: Path, emulator: str, test: Connection) -> None:
    """Uploads the steps in `out`. On a message, sends back the id of the process that sends; on the next one, ends."""
    os.environ["STORAGE_EMULATOR_HOST"] = emulator
    sending = uploads.Uploads(out, "gs://test/c", out / "cache", print)
    test.recv()
    assert sending.busy == {out / "step1"} and sending._sending is not None
    test.send(sending._sending.pid)
    test.recv()
    sending.close()


def bring(out: Path, where: str, cache: Path, world: World, log: Callable[[str], None]) -> None:
    """Brings the newest step, of which each rank reads all."""
    if stored := stored_steps.find_steps(out, where, cache, world, log):
        stored_steps.bring_step(stored, out, cache, world, log, lambda _, listed: set(listed))


def bring_on_node(root: Path, where: str, environment: dict[str, str]) -> None:
    """Brings the newest step to the disk of one of two nodes. Rank 0 logs into <root>/log."""
    os.environ.update(environment)
    world = join(1)
    out = root / f"disk{world.rank}"
    out.mkdir()
    with (root / f"log{world.rank}").open("w") as log:
        bring(
            out,
            where,
            root / f"cache{world.rank}",
            world,
            lambda text: print(text, file=log) if world.is_rank0 else None,
        )
    world.close()


def train_on_node(root: Path, fields: dict[str, Any]) -> int:
    """A training whose ranks are nodes with a disk and an address of the bucket each."""
    import training
    from sft.training.train import prepare_attempt, train_stage

    rank = int(os.environ.get("RANK", 0))
    os.environ.update({"LOCAL_RANK": "0", "STORAGE_EMULATOR_HOST": fields.pop("emulators")[rank]})
    world = join(threads=1)
    stage: Any = training.FakeStage(root / f"node{rank}", storage="gs://test/pre", **fields)
    _, stored = prepare_attempt(stage, world)
    train_stage(stage, world, lambda: False, stored=stored)
    world.close()
    return 0
