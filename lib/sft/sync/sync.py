"""The sync stage: puts a run's dataset and base weights under the storage root that training reads from.

In:  prepare's published folder; [model] base (a folder under DATA, gs://… or hf://org/name[@revision]); the storage root.
Out: <root>/datasets/<16 hex of the prepare manifest's digest>/…, with prepare's manifest.json
     <root>/base/<name>-<16 hex of its content>/…, with <that>.json, the list of its files
     remote.json in the stage's folder (sft.formats.remote); its paths are relative to the root. Only the metrics in the manifest
     name the root, so the same content on another cluster is the same result.
Run: make sync RECIPE=…, or python stages/sync.py runs/<run>. CHECK=1 (--check) only compares.

Folders are named by their content: runs share them, and nothing overwrites other content. The list of a folder (manifest.json or
<name>.json) is written last, so its presence means that every file it lists was verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import canonical
from sft.formats import manifest
from sft.formats.manifest import FileList, Output
from sft.formats.record import to_json
from sft.formats.remote import NAME, Remote, SyncMetrics
from sft.runner.stage import Result, Stage
from sft.storage.base_weights import find_base_weights
from sft.storage.contract import FileCopy, size
from sft.storage.local import LocalStorage
from sft.storage.localise import same_files, writer_lock
from sft.storage.transfer import open_storage, transfer
from sft.sync.base_check import check_base, check_weights


def sync(stage: Stage) -> Result:
    """The stage: copies, verifies, writes remote.json."""
    remote, commit = copy_inputs(stage, check_only=False)
    remote.write(stage.out / NAME)
    metrics = SyncMetrics(
        storage=stage.storage,
        dataset=f"{stage.storage}/{remote.dataset}",
        base=f"{stage.storage}/{remote.base}" if remote.base else None,
        files=len(remote.files),
        bytes=sum(f.bytes for f in remote.files),
        base_commit=commit or None,
    )
    return Result([NAME], metrics.to_metrics())


def copy_inputs(stage: Stage, check_only: bool) -> tuple[Remote, str]:
    """Copies the dataset and the base weights, or only compares them. Raises SftError.

    Returns where they are, and the hub's commit of the base weights ("" for other sources).
    """
    root = stage.storage.rstrip("/")
    prepared = stage.folder("prepare")
    file = prepared / manifest.NAME
    record = manifest.load(file)
    dataset = f"datasets/{record.digest[:16]}"
    copier = FolderCopier(root, stage.cache, stage.log, check_only)
    files = copier.copy(
        LocalStorage(prepared), dataset, record.outputs, file.read_bytes(), f"{dataset}/{manifest.NAME}"
    )
    base, commit = None, ""
    if stage.recipe.model.base:
        check = partial(check_base, stage.recipe, prepared)
        found = find_base_weights(stage.recipe.model.base, stage.find, stage.cache, stage.log, check)
        source, commit = found.folder, found.commit
        names = [n for n in source.list() if not n.startswith(".cache/")]  # files of the hub client
        if not names:
            raise SftError(f"{source.where}: no files; next: correct [model] base")
        check_weights(stage.recipe, prepared, source.root)
        listed = manifest.describe(source.root, names)
        base = f"base/{found.label}-{hashlib.sha256(canonical(to_json(listed))).hexdigest()[:16]}"
        files += copier.copy(source, base, listed, FileList(listed).to_bytes(), f"{base}.json")
    return Remote(dataset, base, tuple(files)), commit


@dataclass(frozen=True)
class FolderCopier:
    """Copies folders with a list of their files to a storage root, or only compares them."""

    root: str
    cache: Path
    log: Callable[[str], None]
    check_only: bool = False

    def copy(
        self, source: LocalStorage, name: str, listed: Sequence[Output], list_bytes: bytes, list_name: str
    ) -> list[Output]:
        """Copies the listed files to <root>/<name>, then writes the list. Returns the files with paths relative to the root."""
        top, target = open_storage(self.root, self.cache), open_storage(f"{self.root}/{name}", self.cache)
        copies = [FileCopy(o.path, o.path, o.bytes, o.sha256) for o in listed]
        self.log(f"{target.where}: {len(copies)} files, {size(sum(c.bytes for c in copies))}")
        if self.check_only:
            if not same_files(top.read(list_name), list_bytes):
                raise SftError(
                    f"{self.root}/{list_name} is missing or damaged: the copy is not complete; next: make sync"
                )
            transfer(copies, source, target, self.log, check_only=True)
        else:
            with writer_lock(top, name):
                found = top.read(list_name)
                if found is not None and not same_files(found, list_bytes):
                    top.remove(list_name)  # it is damaged: no list may be present before the files are verified
                transfer(copies, source, target, self.log)
                if not same_files(found, list_bytes):
                    top.write(list_name, list_bytes)
        return [replace(o, path=f"{name}/{o.path}") for o in listed]
