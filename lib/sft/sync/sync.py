"""The sync stage: puts a run's dataset and base weights under the storage root that training reads from.

In:  prepare's published folder; [model] base (a folder under DATA, gs://…, s3://… or hf://org/name[@revision]); the storage root.
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
from functools import partial

from sft.common.errors import SftError
from sft.common.files import canonical
from sft.formats import manifest
from sft.formats.manifest import FileList
from sft.formats.record import to_json
from sft.formats.remote import NAME, Remote, SyncMetrics
from sft.recipe.base_config import tokenizer_of
from sft.runner.stage import Result, Stage
from sft.storage.base_weights import find_base_weights
from sft.storage.local import LocalStorage
from sft.sync import task_data
from sft.sync.base_check import check_base, check_weights
from sft.sync.folders import FolderCopier


def sync(stage: Stage) -> Result:
    """The stage: copies, verifies, writes remote.json."""
    remote, commit = copy_inputs(stage, check_only=False)
    remote.write(stage.out / NAME)
    task_data.send(stage.place, stage.recipe, stage.cluster, stage.log)
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
        beside = None
        tokenizer = tokenizer_of(source.root)
        if tokenizer is not None and not tokenizer.is_relative_to(source.root):
            beside = LocalStorage(source.root.parent)  # one tokenizer/ is for all steps of a training
            listed += manifest.describe(beside.root, [tokenizer.relative_to(beside.root).as_posix()])
        base = f"base/{found.label}-{hashlib.sha256(canonical(to_json(listed))).hexdigest()[:16]}"
        files += copier.copy(source, base, listed, FileList(listed).to_bytes(), f"{base}.json", beside)
    return Remote(dataset, base, tuple(files)), commit
