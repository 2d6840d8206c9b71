"""Nodes that share no disk: each keeps the files of a step that its ranks wrote. Without a bucket such a training is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import training
from sft.formats import manifest

pytestmark = pytest.mark.processes


def save_on_own_disks(root: Path, fields: dict[str, Any]) -> int:
    """One of two ranks saves a step; its disk is its own one. Prints "disks rank result"."""
    import torch

    from sft.checkpoint import disks, step_folder
    from sft.model.parallel import join

    world = replace(join(1), local_rank=0)  # each rank is a node
    out = root / ("one" if fields["shared"] else f"disk{world.rank}")
    out.mkdir(exist_ok=True)
    other_disk = disks.other_disks(out, world)
    assert not list(out.iterdir())
    state = {"model": {f"w{i}": torch.full((1000,), float(i)) for i in range(6)}, "optim": {}}
    step_folder.save(out, 4, state, {"rank": world.rank}, {"a": 1}, world, ephemeral=False, other_disk=other_disk)
    print(f"disks {world.rank} {other_disk} {disks.leads_disk(other_disk, world)}\n", end="", flush=True)
    world.close()
    return 0


def processes(root: Path, shared: bool, action: Callable[[Path, dict[str, Any]], int]) -> list[str]:
    """The lines of two processes that meet over gloo."""
    process = training.SERVER.Process(target=training.run, args=(root, {"ranks": 2, "shared": shared}, action))
    process.start()
    return training.finish(process, root).splitlines()


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_each_node_keeps_its_files_of_a_step_and_the_manifest_of_the_whole(tmp_path):
    lines = processes(tmp_path, False, save_on_own_disks)
    assert sorted(line for line in lines if line.startswith("disks")) == [
        "disks 0 [False, True] True",
        "disks 1 [False, True] True",
    ]
    steps = [tmp_path / f"disk{rank}" / "step4" for rank in (0, 1)]
    mine, theirs = map(files, steps)
    assert "train/rank0.pt" in mine and "train/rank1.pt" not in mine
    assert {"train/rank1.pt", "model_and_optim/__1_0.distcp", "manifest.json"} == theirs
    assert (steps[0] / "manifest.json").read_bytes() == (steps[1] / "manifest.json").read_bytes()
    listed = {o.path for o in manifest.StepManifest.read(steps[0] / "manifest.json").outputs}
    assert listed == (mine | theirs) - {"manifest.json"}


def test_on_a_common_disk_no_rank_has_another_disk(tmp_path):
    lines = processes(tmp_path, True, save_on_own_disks)
    assert {"disks 0 [False, False] True", "disks 1 [False, False] False"} <= set(lines)
    assert {"train/rank0.pt", "train/rank1.pt"} <= files(tmp_path / "one" / "step4")


def train_on_own_disks(root: Path, fields: dict[str, Any]) -> int:
    """A training on two nodes with a folder each."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"
    return training.train_here(root / f"node{rank}", {k: v for k, v in fields.items() if k not in ("ranks", "shared")})


def test_a_training_whose_nodes_share_no_disk_is_refused_without_a_bucket_before_it_starts(tmp_path):
    for rank in (0, 1):
        training.run_folder(tmp_path / f"node{rank}", training.write_dataset(tmp_path / f"dataset{rank}"))
    process = training.SERVER.Process(
        target=training.run, args=(tmp_path, {"ranks": 2, "steps": 2}, train_on_own_disks)
    )
    process.start()
    out = training.finish(process, tmp_path, status=1)
    assert "rank 1 runs on a node where this is another disk, and storage = '" in out, out
    assert "next: `runs` of env/" in out and "is no bucket" in out
    assert not list((tmp_path / "node0" / "train").glob("step*"))
