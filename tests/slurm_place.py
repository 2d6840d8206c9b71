"""What the tests of Slurm share: a Slurm of each module, workspaces, and jobs as they are recorded."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from conftest import Workspace
from debian import NotDebian
from patience import PATIENCE
from sft.formats.job import JobRecord
from slurm import Slurm

T = TypeVar("T")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm whose commands are on PATH."""
    try:
        made = Slurm(tmp_path_factory.mktemp("slurm"))
    except NotDebian as e:
        pytest.skip(f"no Slurm to test with: {e}")
    before = os.environ["PATH"]
    with made:
        os.environ["PATH"] = made.env["PATH"]
        yield made
        os.environ["PATH"] = before


@pytest.fixture
def workspace(slurm: Slurm, tmp_path: Path) -> Workspace:
    """A workspace whose stages leave a note of the job they ran in."""
    return Workspace(tmp_path)


def program(workspace: Workspace, stage: str, body: str) -> None:
    """A stage whose body is `body`, indented by four; `stage` and `run` (a Path) are what it has."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    (workspace.root / f"stages/{stage}.py").write_text(
        "import json, os, signal, sys, time\nfrom pathlib import Path\nfrom sft.runner.stage import Result, main\n"
        f"def body(stage):\n    run = Path(sys.argv[1])\n{lines}\n    (stage.out / 'out').write_text('x')\n    return Result(['out'])\n"
        f"main({stage!r}, body, shared=False)\n"
    )


def start(workspace: Workspace, *args: str) -> subprocess.Popen[str]:
    """make, running; `communicate` returns its output."""
    return subprocess.Popen(
        ["make", *args], cwd=workspace.root, env=workspace.environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def until(condition: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """Waits for `condition()` and returns it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return found


def record(workspace: Workspace, stage: str, run: str = "x") -> JobRecord:
    return JobRecord.read(workspace.root / f"runs/{run}/.jobs/{stage}.json")
