"""Folders that sync made (a dataset or base weights) as local, verified folders.

In:  the storage root, the folder's name under it, the cache.
Out: the folder itself if the storage is a folder. A folder in a bucket is copied to <cache>/local/<name>; the list of its files
     is written last, so a list that is present means that all its files were verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import canonical
from sft.common.locks import lock
from sft.formats import manifest
from sft.formats.manifest import FileList, Manifest, listed_outputs
from sft.formats.record import to_json
from sft.storage.contract import FileCopy, Storage, size
from sft.storage.local import LocalStorage, make_folders
from sft.storage.transfer import open_storage, transfer


def localise(
    root: str, name: str, cache: Path, log: Callable[[str], None], again: bool = True, copy: bool = False
) -> Path:
    """The folder <root>/<name> as a local folder with every byte verified. Raises SftError.

    The name is a hash of the content, so a local copy that is whole needs no answer of the storage, which may be away. Identical files
    are not copied again, and processes of one machine copy one after the other. again=False trusts a local copy
    whose list is present (another rank has just verified it). copy: also copies from a folder, for a `cache` on a faster disk.
    """
    top = open_storage(root, cache)
    if isinstance(top, LocalStorage) and not copy:
        return top.root / name
    local = LocalStorage(cache / "local")
    lists = (f"{name}/{manifest.NAME}", f"{name}.json")
    if any(local.find(n) for n in lists) and (not again or _is_whole(local.root / name)):
        return local.root / name
    found = {n: data for n in lists if (data := top.read(n)) is not None}
    if not found:
        raise SftError(f"{root}/{name}: no list of its files: the copy is not complete; next: make sync")
    list_name, data = next(iter(found.items()))
    listed = FileList.from_bytes(data, list_name).files if list_name == lists[1] else listed_outputs(data, list_name)
    copies = [FileCopy(o.path, o.path, o.bytes, o.sha256) for o in listed]
    with writer_lock(local, name):
        target = LocalStorage(local.root / name)
        log(f"{root}/{name}: {len(copies)} files, {size(sum(c.bytes for c in copies))}, to {target.where}")
        transfer(copies, open_storage(f"{root}/{name}", cache), target, log)
        local.write(list_name, data)
    return target.root


def _is_whole(folder: Path) -> bool:
    """Whether the local copy has every byte of the content that its name is a hash of."""
    wanted = folder.name[-16:]
    try:
        if (folder / manifest.NAME).is_file():
            made = manifest.load(folder / manifest.NAME)
            found, listed = made.digest[:16], made.outputs
        else:
            listed = FileList.read(folder.with_name(f"{folder.name}.json")).files
            found = hashlib.sha256(canonical(to_json(listed))).hexdigest()[:16]
        return found == wanted and not manifest.broken_outputs(folder, listed)
    except (OSError, SftError):
        return False


def same_files(found: bytes | None, wanted: bytes) -> bool:
    """Whether two lists (bytes of a stage's manifest, or of a FileList) have the same content.

    A manifest's run, time and host are not compared.
    """
    if found is None or found == wanted:
        return found is not None
    try:
        value = json.loads(wanted)
        if "stage" not in value:
            return bool(json.loads(found) == value)
        return Manifest.from_bytes(found, "").digest == Manifest.from_bytes(wanted, "").digest
    except (ValueError, RecursionError, SftError):
        return False


@contextlib.contextmanager
def writer_lock(top: Storage, name: str) -> Iterator[None]:
    """Allows one writer at a time in a folder of the storage. A second one waits, then finds the files there."""
    if not isinstance(top, LocalStorage):
        yield  # a bucket needs no lock: objects appear complete, and a write states the generation that it replaces
        return
    top.check_access(write=True)
    locks = top.root / ".locks"
    make_folders(locks)
    with lock(locks / f"{name.replace('/', '-')}.lock", wait=True):
        if (top.root / name).is_dir():
            LocalStorage(top.root / name).sweep()
        yield
