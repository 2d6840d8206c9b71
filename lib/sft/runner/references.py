"""Stages that a run shares with another one: runs/<run>/<stage> is then a link to runs/<origin>/<stage>. Standard library only.

    origin = find_origin(runs, "smoke_limit-10", "train", key, is_current)      -> runs/smoke/train, or None
    refer(runs / "smoke_limit-10", "train", origin)                             makes the link ../smoke/train
    release(runs / "smoke_limit-10" / "train")                                  before the run makes a stage of its own

A link is relative, so that it holds on every machine that sees the folder of runs. A stage that reads a shared one verifies it
as its own. An origin is a folder, never a link, so that links do not form chains.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import read_file
from sft.formats import manifest
from sft.formats.elsewhere import Elsewhere
from sft.formats.manifest import Manifest


def runs_in(folder: Path) -> list[Path]:
    """The folders of runs, sorted."""
    return sorted(p for p in folder.glob("[a-z0-9]*") if p.is_dir()) if folder.is_dir() else []


def others(run: Path) -> list[Path]:
    """The folders of the other runs beside this one, sorted."""
    return [other for other in runs_in(run.parent) if other != run]


def find_origin(
    runs: Path, run: str, stage: str, key: str, is_current: Callable[[Manifest], bool]
) -> tuple[Path, Manifest] | None:
    """The finished stage of another run that has this key and every file that it lists, and its manifest; None if there is none.

    The run of the recipe itself is asked first, then the others in the order of their names.
    """
    base = run.split("_")[0]
    for other in sorted(runs_in(runs), key=lambda p: (p.name.split("_")[0] != base, p.name)):
        folder = other / stage
        if other.name == run or folder.is_symlink():
            continue
        try:
            if key not in read_file(folder / manifest.NAME).decode("utf-8"):
                continue
            made = manifest.load(folder / manifest.NAME)
            if made.key == key and is_current(made) and not missing(folder, made):
                return folder, made
        except (OSError, UnicodeDecodeError, SftError):
            continue
    return None


def missing(folder: Path, made: Manifest) -> str:
    """A listed file that is not there or has another size; empty if all are there. Files elsewhere are not looked for."""
    for output in Elsewhere.of(folder).here(folder, made.outputs):
        file = folder / output.path
        if not file.is_file() or file.stat().st_size != output.bytes:
            return str(file)
    return ""


def refer(run: Path, stage: str, origin: Path) -> None:
    """Makes run/stage a link to the folder `origin`. An earlier folder is moved to .replaced. Raises SftError."""
    try:
        made = manifest.load(origin / manifest.NAME)
    except FileNotFoundError:
        raise SftError(f"{origin}: it is gone; next: run the same make again") from None
    if lost := missing(origin, made):
        raise SftError(f"{lost}: missing or of another size than its manifest says; next: run the same make again")
    folder = run / stage
    run.mkdir(parents=True, exist_ok=True)
    release(folder)
    if folder.exists():
        set_aside(folder)
    target = os.path.relpath(origin, run)
    work = run / f".{stage}-{os.getpid()}"
    work.symlink_to(target, target_is_directory=True)
    os.rename(work, folder)


def release(folder: Path) -> None:
    """Removes a link, so that a stage is not written into another run's folder. A folder stays as it is."""
    if folder.is_symlink():
        folder.unlink()


def set_aside(folder: Path) -> Path:
    """Moves a stage's folder to .replaced in its run. Returns its new place."""
    replaced = folder.parent / ".replaced" / f"{folder.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    replaced.parent.mkdir(exist_ok=True)
    os.rename(folder, replaced)
    return replaced


def owner(folder: Path) -> str:
    """The run that made a stage's folder: its own, or the one that the link names."""
    return Path(os.readlink(folder)).parent.name if folder.is_symlink() else folder.parent.name


def referrers(run: Path) -> dict[str, list[Path]]:
    """{stage: the links of other runs to it} of a run."""
    found: dict[str, list[Path]] = {}
    for other in others(run):
        for link in (p for p in other.iterdir() if p.is_symlink()):
            if Path(os.readlink(link)).parts[-2:] == (run.name, link.name):
                found.setdefault(link.name, []).append(link)
    return found
