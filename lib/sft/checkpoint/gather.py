"""A step's files on one disk, where the nodes of a training share none.

In:  a work folder of the same name on every node, each with the files that its ranks wrote, and what every rank says of its own.
Out: all files on rank 0's disk, every byte compared with what its writer said. Where the disk is shared nothing is sent.

They travel over the host-side group in pieces, rank by rank, beside training (sft.training.saving calls it in its thread).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from sft.common.errors import SftError
from sft.formats.manifest import Output
from sft.model.parallel import World

PIECE = 64 << 20  # bytes sent at once


def gather_files(work: Path, described: Sequence[Sequence[Output]], world: World) -> bool:
    """`described`: per rank the manifest entries of its files under `work`. Returns whether this rank's were sent away.
    Raises SharedError on every rank when a file did not arrive as it was written."""
    if world.size == 1:
        return False
    lacking = world.on_rank0(lambda: [[e for e in mine if not (work / e.path).is_file()] for mine in described])
    failures: list[str] = []
    for rank, entries in enumerate(lacking):
        for entry in entries:
            if world.rank == rank:
                _send(work / entry.path, entry.bytes, world)
            elif world.is_rank0 and (problem := _receive(work / entry.path, entry, rank, world)):
                failures.append(problem)

    def told() -> None:
        if failures:
            raise SftError("; ".join(failures[:3]))

    world.on_rank0(told)
    return bool(lacking[world.rank])


def forget(work: Path) -> None:
    """Removes a node's copy of what rank 0 has now; ranks of a node do so at once."""
    shutil.rmtree(work, ignore_errors=True)


def _send(file: Path, size: int, world: World) -> None:
    """Sends as many bytes as were announced, whatever the disk says: the receiver compares."""
    with contextlib.ExitStack() as stack:
        try:
            f = stack.enter_context(file.open("rb"))
        except OSError:
            f = stack.enter_context(open(os.devnull, "rb"))
        for begin in range(0, size, PIECE):
            piece = torch.zeros(min(PIECE, size - begin), dtype=torch.uint8)
            with contextlib.suppress(OSError):
                f.readinto(memoryview(piece.numpy()))  # type: ignore[arg-type]
            dist.send(piece, 0, group=world.group)


def _receive(file: Path, entry: Output, rank: int, world: World) -> str:
    """Writes a file that `rank` sends. Returns what went wrong, once every piece has come: the sender waits for none of it."""
    problem, size, sha256 = "", entry.bytes, hashlib.sha256()
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            f = stack.enter_context(file.open("wb"))
        except OSError as e:
            f, problem = stack.enter_context(open(os.devnull, "wb")), f"{file}: {e.strerror}"
        for begin in range(0, size, PIECE):
            piece = torch.empty(min(PIECE, size - begin), dtype=torch.uint8)
            dist.recv(piece, rank, group=world.group)
            data = memoryview(piece.numpy())  # type: ignore[arg-type]
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
