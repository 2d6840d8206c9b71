"""Puts a run's dataset and base weights under the storage root that training reads from, proven byte by byte.

In:  prepare's published folder; [model] base (a folder under DATA, gs://… or hf://org/name[@revision]); the storage root.
Out: <root>/datasets/<16 hex of the prepare manifest's digest>/…, with prepare's manifest.json last
     <root>/base/<name>-<16 hex of its content>/…, with <that>.json, the list of its files, last
     remote.json in the stage's folder: {"dataset": path, "base": path or null, "files": [{"path", "bytes", "sha256"}]}, all under
     the root, which only the manifest's metrics name: the same content on another cluster is the same result

Folders are named by content, so that runs share them, nothing is overwritten by something else, and a list (manifest.json,
<name>.json) under its final name says that everything it lists was verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import canonical
from sft.formats import manifest
from sft.formats.manifest import FileList, Output
from sft.formats.record import to_json
from sft.formats.remote import NAME, Remote, SyncMetrics
from sft.runner.stage import Result, Stage
from sft.storage.base_weights import find_base
from sft.storage.contract import FileCopy, size
from sft.storage.local import LocalStorage
from sft.storage.localise import _agrees, _locked
from sft.storage.transfer import open_storage, transfer


def sync(stage: Stage) -> Result:
    remote, commit = bring(stage, check_only=False)
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


def bring(stage: Stage, check_only: bool) -> tuple[Remote, str]:
    """Copies, or only compares, dataset and base. Returns where they are, and the commit of a base from the hub."""
    root = stage.storage.rstrip("/")
    prepared = stage.folder("prepare")
    record = manifest.load(prepared / manifest.NAME)
    name = f"datasets/{record.digest[:16]}"
    text = (prepared / manifest.NAME).read_bytes()
    copier = Copier(root, stage.cache, stage.log, check_only)
    files = copier.folder(LocalStorage(prepared), name, record.outputs, text, f"{name}/{manifest.NAME}")
    base, commit = None, ""
    if stage.recipe.model.base:
        found = find_base(stage.recipe.model.base, stage.find, stage.cache, stage.log)
        source, commit = found.folder, found.commit
        names = [n for n in source.list() if not n.startswith(".cache/")]  # the hub client's own notes
        if not names:
            raise SftError(f"{source.where}: no files; next: correct [model] base")
        listed = manifest.describe(source.root, names)
        base = f"base/{found.label}-{hashlib.sha256(canonical(to_json(listed))).hexdigest()[:16]}"
        text = FileList(listed).to_bytes()
        files += copier.folder(source, base, listed, text, f"{base}.json")
    return Remote(name, base, tuple(files)), commit


@dataclass(frozen=True)
class Copier:
    """Makes folders under a storage root hold what a list says."""

    root: str
    cache: Path
    log: Callable[[str], None]
    check_only: bool = False

    def folder(
        self, source: LocalStorage, name: str, listed: Sequence[Output], text: bytes, list_name: str
    ) -> list[Output]:
        """Brings the listed files to <root>/<name>, then writes the list. Returns the entries with names under the root."""
        top, target = open_storage(self.root, self.cache), open_storage(f"{self.root}/{name}", self.cache)
        jobs = [FileCopy(o.path, o.path, o.bytes, o.sha256) for o in listed]
        self.log(f"{target.where}: {len(jobs)} files, {size(sum(j.bytes for j in jobs))}")
        if self.check_only:
            if not _agrees(top.read(list_name), text):
                raise SftError(f"{self.root}/{list_name} is missing or torn: the copy is not complete; next: make sync")
            transfer(jobs, source, target, self.log, check_only=True)
        else:
            with _locked(top, name, self.log):
                known = top.read(list_name)
                if known is not None and not _agrees(known, text):
                    top.remove(list_name)  # torn: until the files are proven, no list claims that they are
                transfer(jobs, source, target, self.log)
                if not _agrees(known, text):
                    top.write(list_name, text)
        return [replace(o, path=f"{name}/{o.path}") for o in listed]
