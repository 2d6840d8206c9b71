"""TODO sft.storage.localise"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from sft.common.errors import SftError
from sft.common.locks import lock
from sft.formats import manifest
from sft.formats.manifest import FileList, Manifest, listed_outputs
from sft.storage.contract import FileCopy, Storage, size
from sft.storage.local import LocalStorage, make_folders
from sft.storage.transfer import open_storage, transfer


def localise(root: str, name: str, cache: Path, log: Callable[[str], None], again: bool = True) -> Path:
    """The folder <root>/<name> that `sync` made, as a local one with every byte verified.

    A folder is where it lies. What lies in a bucket is brought to <cache>/local/<name>, its list last; what is there
    and identical stays, and several processes of a machine bring it once. again=False trusts a local copy whose list is
    in place (another rank has just verified it).
    """
    top = open_storage(root, cache)
    if isinstance(top, LocalStorage):
        return top.root / name
    here = LocalStorage(cache / "local")
    lists = (f"{name}/{manifest.NAME}", f"{name}.json")
    if not again and any(here.find(n) for n in lists):
        return here.root / name
    found = {n: text for n in lists if (text := top.read(n)) is not None}
    if not found:
        raise SftError(f"{root}/{name}: no list of its files there: the copy is not complete; next: make sync")
    list_name, text = next(iter(found.items()))
    listed = FileList.from_bytes(text, list_name).files if list_name == lists[1] else listed_outputs(text, list_name)
    jobs = [FileCopy(o.path, o.path, o.bytes, o.sha256) for o in listed]
    with _locked(here, name, log):
        target = LocalStorage(here.root / name)
        log(f"{root}/{name}: {len(jobs)} files, {size(sum(j.bytes for j in jobs))}, to {target.where}")
        transfer(jobs, open_storage(f"{root}/{name}", cache), target, log)
        here.write(list_name, text)
    return target.root


def _agrees(found: bytes | None, wanted: bytes) -> bool:
    """Whether a list in place lists just this content; when and by which run it was made does not matter."""
    if found is None or found == wanted:
        return found is not None
    try:
        value = json.loads(wanted)
        if "stage" not in value:
            return bool(json.loads(found) == value)
        return Manifest.from_bytes(found, "").digest == Manifest.from_bytes(wanted, "").digest
    except (ValueError, SftError):
        return False


@contextlib.contextmanager
def _locked(top: Storage, name: str, log: Callable[[str], None]) -> Iterator[None]:
    """One writer at a time in a folder of this storage; a second one waits and then finds everything there."""
    if not isinstance(top, LocalStorage):
        yield  # a bucket's objects appear whole, and a write states the generation it replaces
        return
    top.check_access(write=True)
    locks = top.root / ".locks"
    make_folders(locks)
    with lock(locks / f"{name.replace('/', '-')}.lock", wait=True):
        if (top.root / name).is_dir():
            LocalStorage(top.root / name).sweep()
        yield
