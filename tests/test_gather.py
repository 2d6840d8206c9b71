"""Nodes that share no disk: a step's files come to rank 0 as they were written, or every rank is told."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE

pytestmark = pytest.mark.processes

PROGRAM = """
import sys
from pathlib import Path
from sft.formats import manifest
from sft.checkpoint import gather
from sft.model.parallel import SharedError, join

gather.BLOCK = 1000
world, root, shared = join(1), Path(sys.argv[1]), sys.argv[2] == "shared"
for case in ("whole", "altered", "short"):
    work = root / case / ("one" if shared else f"disk{world.rank}")
    mine = work / "model_and_optim" / f"__{world.rank}_0.distcp"
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_bytes(bytes([world.rank]) * 3500)
    (work / f"empty{world.rank}").touch()
    described = world.on_all_ranks(lambda: manifest.describe(work, [mine.relative_to(work).as_posix(), f"empty{world.rank}"]))
    if world.rank and case != "whole":
        mine.write_bytes(b"?" * (3500 if case == "altered" else 1200))
    try:
        sent = gather.gather_files(work, described, world)
    except SharedError as e:
        print(case, world.rank, str(e).replace(str(root), ""), flush=True)
        continue
    if sent:
        gather.remove_copies(work)
    print(case, world.rank, sent, flush=True)
world.close()
"""


def run(root: Path, how: str) -> list[str]:
    """What two processes that meet over gloo say, in order of rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(root), how], env=env | {"RANK": str(rank)}, text=True, stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=PATIENCE)[0].splitlines() for process in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    return [line for lines in said for line in lines]


def test_files_of_another_disk_arrive_in_pieces_and_what_is_not_as_written_is_an_error_on_every_rank(tmp_path):
    said = run(tmp_path, "separate")
    assert said[0] == "whole 0 False" and said[3] == "whole 1 True"
    there = tmp_path / "whole" / "disk0"
    assert (there / "model_and_optim" / "__1_0.distcp").read_bytes() == b"\1" * 3500 and (there / "empty1").is_file()
    assert not (tmp_path / "whole" / "disk1").exists()
    for number, case in ((1, "altered"), (2, "short")):
        problem = f"/{case}/disk0/model_and_optim/__1_0.distcp: not the bytes that rank 1 wrote"
        assert said[number] == f"{case} 0 {problem}" and said[number + 3] == f"{case} 1 {problem}"


def test_nothing_is_sent_where_the_disk_is_shared(tmp_path):
    assert run(tmp_path, "shared") == [
        f"{case} {rank} False" for rank in (0, 1) for case in ("whole", "altered", "short")
    ]
