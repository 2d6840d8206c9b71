"""Debian's packages, unpacked into a folder of .venv and fetched once: programs for tests, without root and without an installation."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


class NotDebian(Exception):
    """This is no machine with Debian's packages."""


def unpacked(name: str, packages: Sequence[str], *, depends: bool = False) -> Path:
    """The folder with the files of these packages. `depends`: also of those that they need and this machine lacks.

    Raises NotDebian, and RuntimeError when fetching fails.
    """
    cache = REPO / ".venv" / name
    root = cache / "root"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.is_dir():
            return root
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise NotDebian(f"no apt-get and dpkg here to fetch Debian's packages {', '.join(packages)}")
        work = cache / "work"
        shutil.rmtree(work, ignore_errors=True)
        (work / "debs").mkdir(parents=True)
        for attempt in range(3):
            if attempt:  # a fresh machine has no package lists yet
                subprocess.run(["apt-get", "update", "-qq"], capture_output=True, check=False)
            try:
                wanted = [*packages, *(missing(packages) if depends else ())]
                subprocess.run(["apt-get", "download", *dict.fromkeys(wanted)], cwd=work / "debs", capture_output=True, text=True,
                               check=True)  # fmt: skip
                break
            except subprocess.CalledProcessError as error:
                failure = error.stderr.strip().splitlines()[-1:]
        else:
            raise RuntimeError(f"apt-get download failed: {failure}")
        for deb in (work / "debs").glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(deb), str(work / "root")], check=True)
        (work / "root").rename(root)
        shutil.rmtree(work)
        return root


def missing(packages: Sequence[str]) -> list[str]:
    """The packages that apt would install with these."""
    command = ["apt-get", "install", "--simulate", "--no-install-recommends", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.findall(r"^Inst (\S+)", done.stdout, re.M)
