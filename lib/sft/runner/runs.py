"""Commands about finished runs: make diff, make clean-cache. Standard library only."""

from __future__ import annotations

import difflib
import fcntl
import shutil
from pathlib import Path

from sft.common.errors import SftError
from sft.formats import manifest
from sft.recipe import recipe, schema
from sft.runner import plan


def run_folder(place: plan.Place, run: str, variable: str) -> Path:
    """The folder of an existing run. Raises SftError naming the Make variable and similar names."""
    if not run:
        raise SftError(f"which run? next: make … {variable}=<name of a folder in {place.runs}>")
    recipe.from_run(run)
    folder = place.runs / run
    if not folder.is_dir():
        known = sorted(p.name for p in place.runs.glob("[a-z0-9]*") if p.is_dir()) if place.runs.is_dir() else []
        near = difflib.get_close_matches(run, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none'}"
        raise SftError(f"{variable}={run}: no such run in {place.runs}; {hint}; next: correct {variable}=")
    return folder


def diff(first: Path, second: Path) -> None:
    """Prints the first stage in which two runs differ, and its fields and files that differ."""
    for stage in schema.STAGES:
        files = [folder / stage / manifest.NAME for folder in (first, second)]
        a, b = (manifest.load(f) if f.is_file() else None for f in files)
        if a is None or b is None:
            print(f"{stage}: not made in {(first if a is None else second).name}")
            return
        lines = plan.differences(a.config, b.config)
        names = {e.file: e.sha256 for e in a.inputs if e.file}
        others = {e.file: e.sha256 for e in b.inputs if e.file}
        lines += [f"{n} differs" for n in {**names, **others} if names.get(n) != others.get(n)]
        if lines:
            print(f"{stage}:\n" + "\n".join(f"  {line}" for line in lines))
            return
        if a.outputs != b.outputs:
            print(f"{stage}: same options and inputs, different outputs")
            return
    print("no difference")


def clean_cache(cache: Path) -> None:
    """Deletes what prepare keeps to be faster and can make again. Datasets, runs and downloads stay. Raises SftError if busy."""
    for file in (cache / "tokens").glob("*/lock*"):
        with file.open("a+") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                f.seek(0)
                raise SftError(f"{file}: busy, held by {f.read().strip()}; next: wait for it or stop it") from None
    for folder in (cache / kind for kind in ("tokens", "screens", "unpacked")):
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        if folder.exists():
            shutil.rmtree(folder)
        print(f"{folder}: {size / 1e6:,.1f} MB removed")
