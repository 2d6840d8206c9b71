"""Nodes that share no disk: a step's files come to rank 0 as they were written, or every rank raises the error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import training

pytestmark = pytest.mark.processes

CASES = ("whole", "altered", "short")


def gather_here(root: Path, fields: dict[str, Any]) -> int:
    """What one of two ranks does; it prints "case rank result"."""
    from sft.checkpoint import gather
    from sft.formats import manifest
    from sft.model.parallel import SharedError, join

    gather.BLOCK = 1000
    world = join(1)
    for case in CASES:
        work = root / case / ("one" if fields["shared"] else f"disk{world.rank}")
        mine = work / "model_and_optim" / f"__{world.rank}_0.distcp"
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_bytes(bytes([world.rank]) * 3500)
        (work / f"empty{world.rank}").touch()
        names = [mine.relative_to(work).as_posix(), f"empty{world.rank}"]
        described = world.on_all_ranks(lambda work=work, names=names: manifest.describe(work, names))
        if world.rank and case != "whole":
            mine.write_bytes(b"?" * (3500 if case == "altered" else 1200))
        try:
            sent = gather.gather_files(work, described, world)
        except SharedError as e:
            print(f"{case} {world.rank} {str(e).replace(str(root), '')}\n", end="", flush=True)
            continue
        if sent:
            gather.remove_copies(work)
        print(f"{case} {world.rank} {sent}\n", end="", flush=True)
    world.close()
    return 0


def run(root: Path, shared: bool) -> list[str]:
    """The lines of two processes that meet over gloo, in order of rank."""
    process = training.SERVER.Process(target=training.run, args=(root, {"ranks": 2, "shared": shared}, gather_here))
    process.start()
    lines = training.finish(process, root).splitlines()
    return [line for rank in "01" for case in CASES for line in lines if line.startswith(f"{case} {rank} ")]


def test_files_of_another_disk_arrive_in_pieces_and_what_is_not_as_written_is_an_error_on_every_rank(tmp_path):
    lines = run(tmp_path, shared=False)
    assert lines[0] == "whole 0 False" and lines[3] == "whole 1 True"
    there = tmp_path / "whole" / "disk0"
    assert (there / "model_and_optim" / "__1_0.distcp").read_bytes() == b"\1" * 3500 and (there / "empty1").is_file()
    assert not (tmp_path / "whole" / "disk1").exists()
    for number, case in ((1, "altered"), (2, "short")):
        problem = f"/{case}/disk0/model_and_optim/__1_0.distcp: not the bytes that rank 1 wrote"
        assert lines[number] == f"{case} 0 {problem}" and lines[number + 3] == f"{case} 1 {problem}"


def test_nothing_is_sent_where_the_disk_is_shared(tmp_path):
    assert run(tmp_path, shared=True) == [f"{case} {rank} False" for rank in (0, 1) for case in CASES]
