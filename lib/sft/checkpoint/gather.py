"""Gathers a step's files on rank 0's disk, where the nodes of a training have no common disk, and finds out whether they have one.

Where a bucket takes the checkpoints, nothing is gathered: each node uploads its own files (sft.training.uploads).

In:  a work folder of the same name on every node with the files that its ranks wrote, and the manifest entries of every
     rank's files.
Out: all files on rank 0's disk, compared with their entries. On a common disk nothing is sent.

Files are sent over the host-side group in blocks, rank after rank, beside training (sft.training.saving runs this in
its thread).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from sft.common.errors import SftError
from sft.formats.manifest import Output
from sft.model.parallel import World

BLOCK = 64 << 20  # bytes sent at once


def apart(folder: Path, world: World) -> list[bool]:
    """For every rank, whether its disk is another one than rank 0's. `folder` exists on every node. Every rank calls this."""
    word = world.on_rank0(lambda: uuid.uuid4().hex)
    mark = folder / f".saving-step-{word}-{world.rank}"  # a name that `step_folder.latest` removes after a kill
    world.on_all_ranks(mark.mkdir)
    marks = [mark.with_name(f".saving-step-{word}-{rank}") for rank in range(world.size)]
    found: list[bool] = world.on_rank0(lambda: [not one.is_dir() for one in marks])
    world.on_all_ranks(mark.rmdir)
    return found


def leads_disk(apart: Sequence[bool], world: World) -> bool:
    """Whether this rank acts for a disk: rank 0, and the first rank of every node whose disk is another one."""
    return world.is_rank0 or (any(apart) and apart[world.rank] and world.local_rank == 0)


def gather_files(work: Path, described: Sequence[Sequence[Output]], world: World) -> bool:
    """Sends files that rank 0 does not have. `described`: for every rank the manifest entries of its files under
    `work`.

    Returns whether files of this rank were sent. Raises SharedError on every rank when a file did not arrive as it was
    written.
    """
    if world.size == 1:
        return False
    missing = world.on_rank0(lambda: [[e for e in mine if not (work / e.path).is_file()] for mine in described])
    failures: list[str] = []
    for rank, entries in enumerate(missing):
        for entry in entries:
            if world.rank == rank:
                _send(work / entry.path, entry.bytes, world)
            elif world.is_rank0 and (problem := _receive(work / entry.path, entry, rank, world)):
                failures.append(problem)

    def check() -> None:
        if failures:
            raise SftError("; ".join(failures[:3]))

    world.on_rank0(check)
    return bool(missing[world.rank])


def remove_copies(work: Path) -> None:
    """Removes a node's copies of files that rank 0 has now. Ranks of a node may do so at the same time."""
    shutil.rmtree(work, ignore_errors=True)


def _send(file: Path, size: int, world: World) -> None:
    """Sends the announced number of bytes, also after a read error: the receiver expects them and compares their
    hash."""
    with contextlib.ExitStack() as stack:
        try:
            f = stack.enter_context(file.open("rb"))
        except OSError:
            f = stack.enter_context(open(os.devnull, "rb"))
        for begin in range(0, size, BLOCK):
            block = torch.zeros(min(BLOCK, size - begin), dtype=torch.uint8)
            with contextlib.suppress(OSError):
                f.readinto(memoryview(block.numpy()))  # type: ignore[arg-type]
            dist.send(block, 0, group=world.group)


def _receive(file: Path, entry: Output, rank: int, world: World) -> str:
    """Writes a file that `rank` sends. Returns the problem, or "". Receives all blocks also after a problem, so that
    the sender does not block."""
    problem, size, sha256 = "", entry.bytes, hashlib.sha256()
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            f = stack.enter_context(file.open("wb"))
        except OSError as e:
            f, problem = stack.enter_context(open(os.devnull, "wb")), f"{file}: {e.strerror}"
        for begin in range(0, size, BLOCK):
            block = torch.empty(min(BLOCK, size - begin), dtype=torch.uint8)
            dist.recv(block, rank, group=world.group)
            data = memoryview(block.numpy())  # type: ignore[arg-type]
            sha256.update(data)
            try:
                f.write(data)
            except OSError as e:
                problem = problem or f"{file}: {e.strerror}"
        try:
            f.flush()
            if not problem:
                os.fsync(f.fileno())
        except OSError as e:
            problem = problem or f"{file}: {e.strerror}"
    return problem or ("" if sha256.hexdigest() == entry.sha256 else f"{file}: not the bytes that rank {rank} wrote")
