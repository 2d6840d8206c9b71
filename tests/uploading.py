"""What other processes do in the tests of uploads. They are forked from `training.SERVER`, which has imported torch already."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

from sft.model.parallel import join
from sft.training import uploads


def send_until_told(out: Path, emulator: str, test: Connection) -> None:
    """Uploads the steps in `out`. On a message, sends back the id of the process that sends; on the next one, ends."""
    os.environ["STORAGE_EMULATOR_HOST"] = emulator
    sending = uploads.Uploads(out, "gs://test/c", out / "cache", print)
    test.recv()
    assert sending.busy == {out / "step1"} and sending._sending is not None
    test.send(sending._sending.pid)
    test.recv()
    sending.close()


def bring_on_node(root: Path, where: str, environment: dict[str, str]) -> None:
    """Brings the newest step to the disk of one of two nodes. Rank 0 logs into <root>/log."""
    os.environ.update(environment)
    world = join(1)
    out = root / f"disk{world.rank}"
    out.mkdir()
    with (root / f"log{world.rank}").open("w") as log:
        uploads.bring_checkpoint(
            out,
            where,
            root / f"cache{world.rank}",
            world,
            lambda text: print(text, file=log) if world.is_rank0 else None,
        )
    world.close()
