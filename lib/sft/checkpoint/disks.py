"""Which ranks of a training write to the same disk.

In:  the training folder, which every node has at the same path.
Out: for every rank whether its disk is rank 0's, and the ranks that act for a disk.

Nodes without a common disk keep their own files of a step, and each uploads them to a bucket (sft.training.uploads).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from sft.model.parallel import World

SEEN_S = 2.0
"""Seconds that a network file system has to show rank 0 what other nodes have made."""


def other_disks(folder: Path, world: World) -> list[bool]:
    """For every rank, whether its disk is another one than rank 0's. Makes `folder` where it is missing. Every rank calls this."""
    folder.mkdir(parents=True, exist_ok=True)
    word = world.on_rank0(lambda: uuid.uuid4().hex)
    mark = folder / f".saving-step-{word}-{world.rank}"  # a name that `step_folder.latest` removes after a kill
    world.on_all_ranks(mark.mkdir)
    marks = [mark.with_name(f".saving-step-{word}-{rank}") for rank in range(world.size)]

    def unseen() -> list[bool]:
        deadline = time.monotonic() + SEEN_S
        while any(found := [not one.is_dir() for one in marks]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    found: list[bool] = world.on_rank0(unseen)
    world.on_all_ranks(mark.rmdir)
    return found


def leads_disk(other_disk: Sequence[bool], world: World) -> bool:
    """Whether this rank acts for a disk: rank 0, and the first rank of every node whose disk is another one."""
    return world.is_rank0 or (any(other_disk) and other_disk[world.rank] and world.local_rank == 0)
