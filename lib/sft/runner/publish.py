"""What publishing a stage's folder needs: flushing files, hard links, and the provenance that a manifest records."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sft.common.files import sync_folder
from sft.formats.manifest import Provenance
from sft.runner import plan


def provenance(argv: Sequence[str], started: datetime) -> Provenance:
    """The provenance of what this process has made."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(plan.REPO), *command], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    import importlib.metadata  # start-up: a launcher and a stage that is done publish nothing

    versions = {"python": sys.version.split()[0]}
    for package in packages():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Provenance(
        git=git("rev-parse", "HEAD") or os.environ.get("SFT_COMMIT", ""),  # a job's code may be an archive
        dirty=bool(git("status", "--porcelain", "--untracked-files=no") or os.environ.get("SFT_EDITS")),
        argv=tuple(argv),
        host=socket.gethostname(),
        started=started.isoformat(timespec="seconds"),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
    )


def packages() -> list[str]:
    """The packages that pyproject.toml names for running the stages: the dependencies, and the extras without `dev` and `docs`."""
    project = tomllib.loads((plan.REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra not in ("dev", "docs")]
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in itertools.chain(project["dependencies"], *extras)]


def keep_only(folder: Path, names: set[str]) -> None:
    """Deletes all files but `names` (relative to the folder), and folders that are then empty."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()


def flush(folder: Path, files: Sequence[str]) -> None:
    """Flushes files and their folders to disk."""
    for name in files:
        fd = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    for parent in sorted({(folder / name).parent for name in files}):
        sync_folder(parent)


def link_files(source: Path, target: Path, files: Sequence[str]) -> list[str]:
    """Hard links files of `source` into `target`; copies those that cannot be linked. Returns the names of the links."""
    linked = []
    for name in files:
        to = target / name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.unlink(missing_ok=True)
        try:
            os.link(source / name, to)
            linked.append(name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source / name, to)
    return linked
