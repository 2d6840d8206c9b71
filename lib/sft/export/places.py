"""SRC and DST of make to-hf, to-core and soup: folders, or remote ones that pass through the cache.

In:  a folder, gs://…, s3://…, or (as a source) hf://org/name[@revision]; the cache.
Out: `local_folder`: a source as a local folder, verified if it was remote
     `new_folder`: a target to write into, which gets its final name only after the body succeeded
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import sync_folder
from sft.common.paths import BUCKETS
from sft.formats import manifest
from sft.storage.base_weights import find_base_weights
from sft.storage.contract import FileCopy
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer

Log = Callable[[str], None]


def local_folder(source: str, cache: Path, log: Log, variable: str = "SRC") -> Path:
    """The source, or its copy in the cache if it is remote. Raises SftError naming the Make variable."""

    def find(path: str, _: str) -> Path:
        if not Path(path).is_dir():
            raise SftError(f"{variable}={path}: no such folder; next: correct {variable}=")
        return Path(path)

    return find_base_weights(source, find, cache, log).folder.root


@contextlib.contextmanager
def new_folder(target: str, cache: Path, log: Log) -> Iterator[Path]:
    """A path at which the body creates a folder. If the body succeeds, the folder is renamed or uploaded to `target`.

    Raises SftError for a target that exists.
    """
    remote = target.startswith(BUCKETS)
    if not target or (not remote and Path(target).exists()):
        raise SftError(f"DST={target}: {'exists already' if target else 'missing'}; next: name a new folder with DST=")
    if remote:
        with scratch_folder(cache) as work:
            yield work / "out"
            _upload(LocalStorage(work / "out"), target, cache, log)
        return
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    work = final.parent / f".{final.name}.part"
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield work
        for path in sorted(p for p in work.rglob("*") if p.is_dir()):
            sync_folder(path)
        sync_folder(work)
        work.rename(final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _upload(local: LocalStorage, target: str, cache: Path, log: Log) -> None:
    """Uploads the folder. manifest.json and config.json go last: their presence means that the folder is complete."""
    bucket = open_storage(target, cache)
    copies = [FileCopy(o.path, o.path, o.bytes, o.sha256) for o in manifest.describe(local.root, local.list())]
    last = [c for c in copies if c.source in (manifest.NAME, "config.json")]
    transfer([c for c in copies if c not in last], local, bucket, log)
    transfer(last, local, bucket, log)


@contextlib.contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """A temporary folder in the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="convert-") as name:
        yield Path(name)
