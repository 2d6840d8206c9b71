"""Data sets of evaluation tasks, for machines that cannot reach the hub and do not see this machine's disk.

In:  what the doctor's check of the tasks fetched here, runs/.cache/datasets/<name>. Out: <storage>/task-data/<name>/… with
     <name>.json, the list of its files; an evaluation there copies it to its own runs/.cache/datasets/<name> and asks no network.

<name> is 16 hex digits of the tasks' names, their files and their data: another recipe with the same tasks shares them. Sync sends them,
and so does the launch of an evaluation, as they do not belong to sync's result.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sft.common.files import write_atomic
from sft.formats import manifest
from sft.formats.manifest import FileList
from sft.recipe import schema
from sft.recipe.recipe import Recipe
from sft.runner.plan import Place, task_data
from sft.storage.contract import FileCopy
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer
from sft.sync.folders import FolderCopier

FOLDER = "task-data"
BROUGHT = ".brought.json"
"""In a folder that came from the storage: the list of its files. What is there is complete, so the network is not asked."""
LEFT_OUT = (".lock", ".incomplete", BROUGHT)


def travels(recipe: Recipe, cluster: schema.Cluster) -> bool:
    """Whether evaluations of this recipe run where the disk of this machine is not seen."""
    return cluster.launcher != "local" and not cluster.shared_disk and recipe.evaluate.harness == "lm-eval"


def send(place: Place, recipe: Recipe, cluster: schema.Cluster, log: Callable[[str], None]) -> None:
    """Copies the data sets to the storage, unless they are there or the tasks have none. Raises SftError."""
    if not travels(recipe, cluster):
        return
    folder = task_data(place, recipe)
    names = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.endswith(LEFT_OUT)
    )
    if not names:
        return
    listed = manifest.describe(folder, names)
    root = place.storage(cluster).rstrip("/")
    name = f"{FOLDER}/{folder.name}"
    FolderCopier(root, place.cache, log).copy(
        LocalStorage(folder), name, listed, FileList(listed).to_bytes(), f"{name}.json"
    )


def bring(place: Place, recipe: Recipe, cluster: schema.Cluster, log: Callable[[str], None]) -> Path:
    """The folder of the tasks' data sets, copied from the storage where it has them and this machine does not. Raises SftError."""
    folder = task_data(place, recipe)
    if not travels(recipe, cluster) or (folder / BROUGHT).is_file():
        return folder
    root, name = place.storage(cluster).rstrip("/"), f"{FOLDER}/{folder.name}"
    found = open_storage(root, place.cache).read(f"{name}.json")
    if found is None:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    source = open_storage(f"{root}/{name}", place.cache)
    listed = FileList.from_bytes(found, f"{root}/{name}.json").files
    transfer([FileCopy(o.path, o.path, o.bytes, o.sha256) for o in listed], source, LocalStorage(folder), log)
    write_atomic(folder / BROUGHT, found)
    log(f"data sets of the tasks: from {root}/{name}, without the hub")
    return folder
