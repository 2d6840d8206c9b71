"""Brings stages of a run from where a cluster made them, or sends them there: what their manifests list, manifests last.

    make fetch RECIPE=x CLUSTER=c [STAGE="train convert"] [FROM=gs://bucket/runs] [CHECK=1] [PUSH=1]

In:  runs/<run>; the folder or gs:// prefix that holds the run there: FROM/<run>, or what elsewhere.json of a stage says, or
     `runs` of env/<cluster>.toml, or <storage>/runs.
Out: runs/<run>/<stage>/… with every file that the stage's manifest and its kept steps' manifests list, each compared with its
     sha256. Nothing is under a manifest that was not proven; a local result of other content is never overwritten.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from sft.common import paths
from sft.common.errors import SftError
from sft.common.hashcache import HashCache
from sft.common.locks import lock
from sft.formats import elsewhere, manifest
from sft.recipe.schema import STAGES
from sft.runner import plan
from sft.runner.cli import RunOptions, program, run_options
from sft.storage.contract import FileCopy, Storage
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer

STEP_LIST = re.compile(rf"step(\d+)/{re.escape(manifest.NAME)}")


@dataclass(frozen=True)
class Lists:
    """A stage as its manifests say it is."""

    top: bytes | None
    jobs: list[FileCopy]  # everything but the manifests
    steps: list[FileCopy]  # manifests of kept steps
    marks: list[str]  # LATEST, BEST, metrics of a run that is not over: nobody has hashed them


def read(source: Storage) -> Lists | None:
    """None when nothing there has a manifest. Raises SftError for a torn one."""
    found = source.list()
    top = source.read(manifest.NAME) if manifest.NAME in found else None
    jobs: dict[str, FileCopy] = {}
    lists = [(n, source.read(n) or b"") for n in found if STEP_LIST.fullmatch(n)]
    for name, text in [*lists, *([(manifest.NAME, top)] if top is not None else [])]:
        folder = name.removesuffix(manifest.NAME)
        for job in listed(text, f"{source.where}/{name}"):
            path = folder + job.source
            jobs[path] = replace(job, source=path, target=path)
    steps = [FileCopy(n, n, found[n].bytes, crc32c=found[n].crc32c) for n, _ in lists]
    for job in steps:
        jobs.pop(job.source, None)
    marks = [name for name in elsewhere.UNLISTED if name in found and name not in jobs]
    return Lists(top, list(jobs.values()), steps, marks) if jobs else None


def listed(text: bytes, what: str) -> list[FileCopy]:
    """The outputs of a manifest. Raises SftError for a torn one."""
    try:
        return [FileCopy(o.path, o.path, o.bytes, o.sha256) for o in manifest.listed_outputs(text, what)]
    except SftError as e:
        raise SftError(f"{e}; see whether the stage has ended there") from None


def bring(source: Storage, target: Storage, log: Callable[[str], None], check_only: bool = False) -> list[FileCopy]:
    """Copies one stage, its manifests last. Returns what it holds; an empty list when nothing is there."""
    lists = read(source)
    if lists is None:
        return []
    mine = target.read(manifest.NAME)
    if lists.top is not None and mine is not None and _digest(mine) != _digest(lists.top):
        raise SftError(
            f"{target.where}/{manifest.NAME} is of another result than {source.where}/{manifest.NAME}; next: move that folder away"
        )
    if lists.jobs:
        transfer(lists.jobs, source, target, log, check_only=check_only)
    for name in lists.marks:  # as they are now: a run that goes on replaces them
        if (text := source.read(name)) is None or text == target.read(name):
            continue
        if check_only:
            raise SftError(f"{target.where}/{name} is missing or has other bytes")
        target.write(name, text)
    if lists.steps:
        transfer(lists.steps, source, target, log, check_only=check_only)
    if lists.top is not None and mine is None:
        if check_only:
            raise SftError(f"{target.where}/{manifest.NAME} is missing: the copy is not complete")
        target.write(manifest.NAME, lists.top)
    return lists.jobs + lists.steps


def _digest(text: bytes) -> str:
    try:
        return manifest.Manifest.from_bytes(text, "").digest
    except SftError:
        return ""


def where(place: plan.Place, run: Path, stage: str, given: str) -> str:
    """The stage's folder on the cluster."""
    if not given and (there := elsewhere.Elsewhere.of(run / stage).where):
        return there
    cluster = place.load_cluster()
    runs = given or paths.for_user(cluster.runs) or f"{place.storage(cluster).rstrip('/')}/runs"
    folder = f"{runs.rstrip('/')}/{run.name}/{stage}"
    return identified(folder, place.cache) if folder.startswith("gs://") else folder


def identified(folder: str, cache: Path) -> str:
    """The one result in a bucket's folder of a stage, where jobs keep each under the name of what it is (sft.launch.beaker.bucket_runs); else
    the folder itself. Raises SftError for several."""
    names = sorted({m[1] for n in open_storage(folder, cache).list() if (m := re.match(r"([0-9a-f]{16})/", n))})
    if len(names) > 1:
        found = ", ".join(f"{folder}/{name}" for name in names)
        raise SftError(f"{folder}: {len(names)} results: {found}; next: make cp SRC=<one of them> DST=<a folder>")
    return f"{folder}/{names[0]}" if names else folder


def fetch(place: plan.Place, run: Path, stages: list[str], given: str, push: bool, check_only: bool) -> None:
    """Raises SftError when nothing was found, or with a list of what failed."""
    total = 0
    hashes = HashCache(place.cache)
    for stage in stages or STAGES:
        here, there = LocalStorage(run / stage), open_storage(where(place, run, stage, given), place.cache)
        source, target = (here, there) if push else (there, here)
        if isinstance(source, LocalStorage) and not source.root.is_dir():
            if stages:
                raise SftError(f"{source.where}: no such folder; next: correct STAGE=, CLUSTER= or FROM=")
            continue
        (run / ".work").mkdir(parents=True, exist_ok=True)
        with lock(run / ".work" / f"{stage}.lock"):
            brought = bring(source, target, log, check_only)
            if brought and not push and not check_only:
                (here.root / elsewhere.NAME).unlink(missing_ok=True)  # now everything is here
                for job in brought:
                    if job.sha256:
                        hashes.note(here.path(job.target), job.sha256)
        if brought:
            total += len(brought)
            log(f"{stage}: {len(brought)} files of {source.where} are identical in {target.where}")
        elif stages:
            raise SftError(
                f"{source.where}: no manifest: nothing there is finished; next: correct STAGE=, CLUSTER= or FROM="
            )
    if not total:
        raise SftError(f"nothing to copy for {run}: no stage with a manifest; next: correct CLUSTER= or FROM=")
    if not push:
        with contextlib.suppress(OSError):
            hashes.save()


def log(text: str) -> None:
    print(f"[fetch] {text}", flush=True)


@program("fetch", "python -m sft.sync.fetch")
@run_options
@click.option("--stage", default="", metavar="STAGES", help="Stages, separated by spaces. Default: all that are there.")
@click.option("--from", "given", default="", metavar="FOLDER", help="The folder of runs on the cluster.")
@click.option("--push", is_flag=True, help="Copy from here to the cluster instead.")
@click.option("--check", is_flag=True, help="Copy nothing; report what is missing or different.")
def main(options: RunOptions, stage: str, given: str, push: bool, check: bool) -> None:
    """Copies stages of a run from the place where a cluster made them, every file verified."""
    stages = stage.split()
    if unknown := [s for s in stages if s not in (*STAGES, "report")]:
        raise SftError(f"STAGE={stage}: {unknown[0]} is none of {', '.join(STAGES)}")
    fetch(options.place, options.run, stages, given, push, check)


if __name__ == "__main__":
    sys.exit(main())
