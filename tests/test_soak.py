"""The short form of `make soak` and `make flip`: a few faults in every stage, and each kind of damage of each kind of file once."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

import flip
import soak
from events import library

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def test_faults_and_damage_in_a_whole_run(tmp_path: Path) -> None:
    with soak.opened(tmp_path) as made:
        table = soak.soak(made, 2, soak.STAGES, faults=2)
        assert made.failures == []
        assert [stage for stage, _, _ in table] == list(soak.STAGES)
        assert all(count > 40 and seen["faults"] >= 2 for _, count, seen in table)
        made.undisturbed("report")
        with contextlib.chdir(made.place):
            found = flip.flip(made.place / "runs", 1, both=False)
    lost = [(name, dict(seen)) for name, seen, why in found if seen["named"] < seen["damages"] and not why]
    assert lost == [] and len(found) > 80


def test_the_shim_kills_and_fails_where_it_is_asked_to(tmp_path: Path) -> None:
    """The fault comes at the call that was asked for, and at no other."""
    events = soak.Events(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    program = f"import os\nfor n in range(4): open({str(tmp_path / 'out')!r} + f'/{{n}}', 'w').close()\n"
    for fault, status, made in (("kill", -9, 2), ("EIO", 1, 2), ("short", 0, 4)):
        events.arm(3, fault)
        done = subprocess.run([sys.executable, "-c", program], env=events.environment, capture_output=True, check=False)
        assert done.returncode == status, done.stderr
        assert len(list((tmp_path / "out").iterdir())) == made and library().is_file()
        for file in (tmp_path / "out").iterdir():
            file.unlink()
