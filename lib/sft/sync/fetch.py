"""Copies stages of a run from the cluster that made them, or to it: the files that their manifests list, manifests last.

    make fetch RECIPE=x CLUSTER=c [STAGE="train convert"] [FROM=gs://bucket/runs] [CHECK=1] [PUSH=1]

In:  runs/<run>; the folder or gs:// prefix of the run there: FROM/<run>, or the folder in the stage's elsewhere.json, or `runs` of
     env/<cluster>.toml, or <storage>/runs.
Out: runs/<run>/<stage>/… with every file that the manifests of the stage and of its kept steps list, each compared with its
     sha256. A manifest is written after its files were verified. A local result with other content is never overwritten.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from sft.common import paths
from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.hashcache import HashCache
from sft.common.locks import lock
from sft.formats import elsewhere, manifest
from sft.recipe.schema import STAGES
from sft.runner import plan, references
from sft.runner.cli import RunOptions, program, run_options
from sft.storage.contract import FileCopy, Storage
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer

STEP_MANIFEST = re.compile(rf"step(\d+)/{re.escape(manifest.NAME)}")


@dataclass(frozen=True)
class StageFiles:
    """The files of a stage, as its manifests list them.

    `manifest` is the stage's own manifest (None while it runs), `copies` are all listed files, `step_manifests` the manifests of
    kept steps, and `unlisted` the names of small files that no manifest lists (LATEST, BEST, metrics).
    """

    manifest: bytes | None
    copies: list[FileCopy]
    step_manifests: list[FileCopy]
    unlisted: list[str]


def stage_files(source: Storage) -> StageFiles | None:
    """The files of the stage in this folder; None if it has no manifest. Raises SftError for a damaged one."""
    found = source.list()
    top = source.read(manifest.NAME) if manifest.NAME in found else None
    copies: dict[str, FileCopy] = {}
    manifests = [(n, source.read(n) or b"") for n in found if STEP_MANIFEST.fullmatch(n)]
    for name, data in [*manifests, *([(manifest.NAME, top)] if top is not None else [])]:
        folder = name.removesuffix(manifest.NAME)
        for copy in listed_copies(data, f"{source.where}/{name}"):
            path = folder + copy.source
            copies[path] = replace(copy, source=path, target=path)
    steps = [FileCopy(n, n, found[n].bytes, crc32c=found[n].crc32c) for n, _ in manifests]
    for copy in steps:
        copies.pop(copy.source, None)
    unlisted = [name for name in elsewhere.UNLISTED if name in found and name not in copies]
    return StageFiles(top, list(copies.values()), steps, unlisted) if copies else None


def listed_copies(data: bytes, what: str) -> list[FileCopy]:
    """The outputs in the bytes of a manifest. Raises SftError for a damaged one; `what` names it."""
    try:
        return [FileCopy(o.path, o.path, o.bytes, o.sha256) for o in manifest.listed_outputs(data, what)]
    except SftError as e:
        raise SftError(f"{e}; check that the stage has ended there") from None


def copy_stage(
    source: Storage, target: Storage, log: Callable[[str], None], check_only: bool = False
) -> list[FileCopy]:
    """Copies one stage, or only compares it; manifests last. Returns its files, or [] if the source has no manifest.

    Raises SftError if the target has a manifest with other content.
    """
    files = stage_files(source)
    if files is None:
        return []
    present = target.read(manifest.NAME)
    if files.manifest is not None and present is not None and _digest(present) != _digest(files.manifest):
        raise SftError(
            f"{target.where}/{manifest.NAME} is of another result than {source.where}/{manifest.NAME};"
            " next: move that folder away"
        )
    if files.copies:
        transfer(files.copies, source, target, log, check_only=check_only)
    for name in files.unlisted:  # read now: a running training replaces them
        if (data := source.read(name)) is None or data == target.read(name):
            continue
        if check_only:
            raise SftError(f"{target.where}/{name} is missing or has other bytes; next: the same without CHECK=1")
        target.write(name, data)
    if files.step_manifests:
        transfer(files.step_manifests, source, target, log, check_only=check_only)
    if files.manifest is not None and present is None:
        if check_only:
            raise SftError(
                f"{target.where}/{manifest.NAME} is missing: the copy is not complete; next: the same without CHECK=1"
            )
        target.write(manifest.NAME, files.manifest)
    return files.copies + files.step_manifests


def _digest(data: bytes) -> str:
    try:
        return manifest.Manifest.from_bytes(data, "").digest
    except SftError:
        return ""


def cluster_folder(place: plan.Place, run: Path, stage: str, runs_folder: str) -> str:
    """The stage's folder on the cluster. `runs_folder` is the folder of runs from the command line, or ""."""
    if not runs_folder and (there := elsewhere.Elsewhere.of(run / stage).where):
        return there
    cluster = place.load_cluster()
    runs = runs_folder or paths.for_user(cluster.runs) or f"{place.storage(cluster).rstrip('/')}/runs"
    folder = f"{runs.rstrip('/')}/{references.owner(run / stage)}/{stage}"
    return single_result(folder, place.cache) if folder.startswith(paths.BUCKETS) else folder


def single_result(folder: str, cache: Path) -> str:
    """The result in a bucket's folder of a stage. Raises SftError for several results.

    Jobs store each result in a folder named by its identity (sft.launch.bucket_runs). Without such a folder, the result is
    the folder itself.
    """
    names = sorted({m[1] for n in open_storage(folder, cache).list() if (m := re.match(r"([0-9a-f]{16})/", n))})
    if len(names) > 1:
        found = ", ".join(f"{folder}/{name}" for name in names)
        raise SftError(f"{folder}: {len(names)} results: {found}; next: make cp SRC=<one of them> DST=<a folder>")
    return f"{folder}/{names[0]}" if names else folder


def fetch(place: plan.Place, run: Path, stages: Sequence[str], runs_folder: str, push: bool, check_only: bool) -> None:
    """Copies stages, all that are present if none are named. push: from here to the cluster.

    Raises SftError if there is nothing to copy, or with a list of what failed.
    """
    total = 0
    hashes = HashCache(place.cache)
    for stage in stages or STAGES:
        local = LocalStorage(run / stage)
        remote = open_storage(cluster_folder(place, run, stage, runs_folder), place.cache)
        source, target = (local, remote) if push else (remote, local)
        if isinstance(source, LocalStorage) and not source.root.is_dir():
            if stages:
                raise SftError(f"{source.where}: no such folder; next: correct STAGE=, CLUSTER= or FROM=")
            continue
        (run / ".work").mkdir(parents=True, exist_ok=True)
        with lock(run / ".work" / f"{stage}.lock"):
            copied = copy_stage(source, target, log, check_only)
            if copied and not push and not check_only:
                (local.root / elsewhere.NAME).unlink(missing_ok=True)  # all outputs are local now
                for copy in copied:
                    if copy.sha256:
                        hashes.note(local.path(copy.target), copy.sha256)
        if copied:
            total += len(copied)
            log(f"{stage}: {len(copied)} files of {source.where} are identical in {target.where}")
        elif stages:
            raise SftError(
                f"{source.where}: no manifest: no finished stage is there; next: correct STAGE=, CLUSTER= or FROM="
            )
    if not total:
        here = [stage for stage in STAGES if (run / stage / manifest.NAME).is_file()]
        cluster = place.load_cluster()
        if here and not runs_folder and cluster.shared_disk and not cluster.runs:
            log(f"nothing to copy: jobs on {place.cluster} write into {run} (shared_disk), which has {', '.join(here)}")
            return
        raise SftError(f"nothing to copy for {run}: no stage with a manifest; next: correct CLUSTER= or FROM=")
    if not push:
        with contextlib.suppress(OSError):
            hashes.save()


def log(text: str) -> None:
    say(f"[fetch] {text}")


@program("fetch", "python -m sft.sync.fetch")
@run_options
@click.option("--stage", default="", metavar="STAGES", help="Stages, separated by spaces. Default: all that are there.")
@click.option("--from", "runs_folder", default="", metavar="FOLDER", help="The folder of runs on the cluster.")
@click.option("--push", is_flag=True, help="Copy from here to the cluster instead.")
@click.option("--check", is_flag=True, help="Copy nothing; report what is missing or different.")
def main(options: RunOptions, stage: str, runs_folder: str, push: bool, check: bool) -> None:
    """Copies stages of a run from the place where a cluster made them, every file verified."""
    stages = stage.split()
    if unknown := [s for s in stages if s not in (*STAGES, "report")]:
        raise SftError(f"STAGE={stage}: {unknown[0]} is none of {', '.join(STAGES)}")
    fetch(options.place, options.run, stages, runs_folder, push, check)


if __name__ == "__main__":
    sys.exit(main())
