"""The files that a job on other disks returns, and the note of those that stay there.

In the job:  python -m sft.launch.results runs/<run>/<stage> RESULTS [WHERE]  copies the stage's small files to RESULTS
Here:        accept(folder, runs/<run>/<stage>, key)                    checks them and renames them into place

elsewhere.json (sft.formats.elsewhere) beside the manifest names the stage's folder and the outputs that are only there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import click

from sft.common.errors import SftError
from sft.common.files import sync_folder, write_atomic
from sft.common.paths import inside
from sft.formats import manifest
from sft.formats.elsewhere import NAME, UNLISTED, Elsewhere
from sft.formats.manifest import Manifest, Output
from sft.runner import references
from sft.runner.cli import program

FILE_BYTES = 64 << 20
TOTAL_BYTES = 512 << 20
EVALUATIONS = ("evaluations.jsonl", "BEST")
"""The files that an evaluation of checkpoints writes into training's folder."""


def small_outputs(outputs: Iterable[Output]) -> set[str]:
    """The paths of the outputs that are returned: the smallest ones, up to TOTAL_BYTES together."""
    small, total = set(), 0
    for entry in sorted(outputs, key=lambda o: (o.bytes, o.path)):
        total += entry.bytes
        if entry.bytes > FILE_BYTES or total > TOTAL_BYTES:
            break
        small.add(entry.path)
    return small


def copy_results(folder: Path, results: Path, where: str = "") -> None:
    """Copies a finished stage's small files to `results`. Raises SftError when the stage left no manifest.

    `where` is the address of the stage's folder after the job, where that is another one than now.
    """
    if folder.name == "watch":
        for name in EVALUATIONS:
            with contextlib.suppress(FileNotFoundError):  # no step was due, or none has a score
                shutil.copyfile(folder.parent / "train" / name, results / name)
        return
    try:
        made = manifest.load(folder / manifest.NAME)
    except FileNotFoundError:
        raise SftError(
            f"{folder / manifest.NAME}: the stage succeeded but left no manifest; next: read the job's log"
        ) from None
    small = small_outputs(Elsewhere.of(folder).here(folder, made.outputs))
    for name in [*sorted(small), *(n for n in UNLISTED if (folder / n).is_file())]:
        target = inside(results, name, "results")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target)
    left = tuple(o.path for o in made.outputs if o.path not in small)
    Elsewhere(where or str(folder), left).write(results / NAME)
    shutil.copyfile(folder / manifest.NAME, results / manifest.NAME)
    print(f"[results] {len(small)} files returned, {len(left)} stay in {where or folder}", flush=True)


def accept_evaluations(arrived: Path, train: Path) -> list[str]:
    """Copies the files of an evaluation of checkpoints into training's folder. Returns their names."""
    names = [name for name in EVALUATIONS if (arrived / name).is_file()]
    train.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_atomic(train / name, (arrived / name).read_bytes())
    return names


def accept(arrived: Path, final: Path, key: str) -> Manifest:
    """Renames the folder of a stage's returned files to `final`, runs/<run>/<stage>. Returns the stage's manifest.

    Raises SftError when the manifest has another key or a returned file differs from it; `final` is then unchanged.
    """
    try:
        made = manifest.load(arrived / manifest.NAME)
    except FileNotFoundError:
        raise SftError(f"{arrived}: the job returned no {manifest.NAME}; next: read its log") from None
    if made.key != key:
        raise SftError(f"{arrived}: the job made {made.key[:20]}…, the recipe wants {key[:20]}…; next: make it again")
    if broken := manifest.broken_outputs(arrived, Elsewhere.of(arrived).here(arrived, made.outputs)):
        raise SftError("\n".join(broken) + "\nnext: collect it again")
    for file in [p for p in arrived.rglob("*") if p.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    references.release(final)
    if final.exists():
        references.set_aside(final)
    os.rename(arrived, final)
    sync_folder(final.parent)
    return made


@program("results", "python -m sft.launch.results")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("where", default="")
def main(folder: Path, results: Path, where: str) -> None:
    """Copies the small files of the stage in FOLDER to RESULTS. WHERE: its address in a bucket that outlives the job."""
    copy_results(folder, results, where)


if __name__ == "__main__":
    sys.exit(main())
