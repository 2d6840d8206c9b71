"""A copy of this checkout, to change or to run in: the tracked and new files as they are, with the same environment."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PEERS = REPO / ".peers"
"""What other projects' packages have brought (tests/peers.py)."""


def copied(target: Path) -> Path:
    """Makes the copy and returns its folder."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in names.stdout.splitlines():
        if (REPO / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, target / name)
            shutil.copymode(REPO / name, target / name)
    (target / ".venv").symlink_to((REPO / ".venv").resolve())
    return target
