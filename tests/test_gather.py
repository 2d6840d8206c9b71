"""Nodes that share no disk: a step's files come to rank 0 as they were written, or every rank raises the error. Where a bucket
takes the steps, they stay on their nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import training
from sft.formats import manifest

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


def save_apart(root: Path, fields: dict[str, Any]) -> int:
    """One of two ranks saves a step; its disk is its own one. Prints "apart rank result"."""
    import torch

    from sft.checkpoint import gather, step_folder
    from sft.model.parallel import join

    world = replace(join(1), local_rank=0)  # each rank is a node
    out = root / ("one" if fields["shared"] else f"disk{world.rank}")
    out.mkdir(exist_ok=True)
    apart = gather.apart(out, world)
    assert not list(out.iterdir())
    state = {"model": {f"w{i}": torch.full((1000,), float(i)) for i in range(6)}, "optim": {}}
    step_folder.save(out, 4, state, {"rank": world.rank}, {"a": 1}, world, ephemeral=False, apart=apart)
    print(f"apart {world.rank} {apart} {gather.leads_disk(apart, world)}\n", end="", flush=True)
    world.close()
    return 0


def processes(root: Path, shared: bool, action: Callable[[Path, dict[str, Any]], int]) -> list[str]:
    """The lines of two processes that meet over gloo."""
    process = training.SERVER.Process(target=training.run, args=(root, {"ranks": 2, "shared": shared}, action))
    process.start()
    return training.finish(process, root).splitlines()


def run(root: Path, shared: bool) -> list[str]:
    """The lines of `gather_here`, in order of rank."""
    lines = processes(root, shared, gather_here)
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


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_each_node_keeps_its_files_of_a_step_and_the_manifest_of_the_whole(tmp_path):
    lines = processes(tmp_path, False, save_apart)
    assert sorted(line for line in lines if line.startswith("apart")) == [
        "apart 0 [False, True] True",
        "apart 1 [False, True] True",
    ]
    steps = [tmp_path / f"disk{rank}" / "step4" for rank in (0, 1)]
    mine, theirs = map(files, steps)
    assert "train/rank0.pt" in mine and "train/rank1.pt" not in mine
    assert {"train/rank1.pt", "model_and_optim/__1_0.distcp", "manifest.json"} == theirs
    assert (steps[0] / "manifest.json").read_bytes() == (steps[1] / "manifest.json").read_bytes()
    listed = {o.path for o in manifest.StepManifest.read(steps[0] / "manifest.json").outputs}
    assert listed == (mine | theirs) - {"manifest.json"}


def test_on_a_common_disk_no_rank_is_apart(tmp_path):
    lines = processes(tmp_path, True, save_apart)
    assert {"apart 0 [False, False] True", "apart 1 [False, False] False"} <= set(lines)
    assert {"train/rank0.pt", "train/rank1.pt"} <= files(tmp_path / "one" / "step4")
