"""What comes back from a stage that was made on a machine whose disks are not here, and what stays there.

In the job:  python -m sft.launch.beaker.results runs/<run>/<stage> RESULTS [WHERE]  copies the files that are small enough
Here:        accept(folder, runs/<run>/<stage>, key)                    checks them and puts them in place, manifest last

`elsewhere.json` beside the manifest says where the stage's folder is and which outputs are only there:
{"where": "/weka/…/runs/<run>/train", "outputs": ["step300/…", …]}. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import sync_folder, write_atomic
from sft.common.paths import inside
from sft.formats import manifest
from sft.formats.elsewhere import NAME, UNLISTED, Elsewhere
from sft.formats.manifest import Manifest, Output

FILE_BYTES = 64 << 20
TOTAL_BYTES = 512 << 20
WATCHED = ("evaluations.jsonl", "BEST")
"""What the evaluation of a training's checkpoints leaves in training's folder."""


def small(outputs: Iterable[Output], file_bytes: int = FILE_BYTES, total_bytes: int = TOTAL_BYTES) -> set[str]:
    """The outputs that come back: the smallest ones first, until `total_bytes`."""
    kept, total = set(), 0
    for entry in sorted(outputs, key=lambda o: (o.bytes, o.path)):
        total += entry.bytes
        if entry.bytes > file_bytes or total > total_bytes:
            break
        kept.add(entry.path)
    return kept


def hand_back(folder: Path, results: Path, where: str = "") -> None:
    """Copies a finished stage's small files to `results`. `where`: its folder when the job's disk has gone, if that
    is not where it is now. Raises SftError when the stage left no manifest."""
    if folder.name == "watch":
        for name in WATCHED:
            with contextlib.suppress(FileNotFoundError):  # no step was due, or none has a score
                shutil.copyfile(folder.parent / "train" / name, results / name)
        return
    try:
        made = manifest.load(folder / manifest.NAME)
    except FileNotFoundError:
        raise SftError(f"{folder / manifest.NAME}: the stage ended well but left none") from None
    kept = small(made.outputs)
    for name in [*sorted(kept), *(n for n in UNLISTED if (folder / n).is_file())]:
        target = inside(results, name, "handback")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target)
    left = tuple(o.path for o in made.outputs if o.path not in kept)
    Elsewhere(where or str(folder), left).write(results / NAME)
    shutil.copyfile(folder / manifest.NAME, results / manifest.NAME)
    print(f"[handback] {len(kept)} files handed back, {len(left)} stay in {where or folder}", flush=True)


def accept_watched(arrived: Path, train: Path) -> list[str]:
    """Puts what came back from the evaluation of checkpoints beside what came back from training. Returns its names."""
    names = [name for name in WATCHED if (arrived / name).is_file()]
    train.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_atomic(train / name, (arrived / name).read_bytes())
    return names


def accept(arrived: Path, final: Path, key: str) -> Manifest:
    """Puts a stage's returned files in place of runs/<run>/<stage>, whole or not at all. Returns its manifest.

    Raises SftError when the manifest is of another key or a returned file is not what it lists; `final` is then untouched.
    """
    try:
        made = manifest.load(arrived / manifest.NAME)
    except FileNotFoundError:
        raise SftError(f"{arrived}: the job returned no {manifest.NAME}: its log says why") from None
    if made.key != key:
        raise SftError(f"{arrived}: the job made {made.key[:20]}…, the recipe wants {key[:20]}…; next: make it again")
    if broken := manifest.broken_outputs(arrived, Elsewhere.of(arrived).here(made.outputs)):
        raise SftError("\n".join(broken) + "\nnext: collect it again")
    for file in [p for p in arrived.rglob("*") if p.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    if final.exists():
        aside = final.parent / ".replaced" / f"{final.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
        aside.parent.mkdir(exist_ok=True)
        os.rename(final, aside)
    os.rename(arrived, final)
    sync_folder(final.parent)
    return made


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m sft.launch.beaker.results runs/<run>/<stage> RESULTS [gs://where it is kept]")
    try:
        hand_back(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    except SftError as e:
        sys.exit(f"[handback] error: {e}")
