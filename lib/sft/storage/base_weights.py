"""Base weights as a local folder.

In:  [model] base of a recipe: a folder under DATA, gs://…, s3://… or hf://org/name[@revision].
Out: `BaseWeights`. Remote weights are downloaded to the cache and verified.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft.common.paths import BUCKETS
from sft.storage import hub
from sft.storage.contract import FileCopy, size
from sft.storage.local import LocalStorage, make_folders
from sft.storage.transfer import open_storage, transfer


@dataclass(frozen=True)
class BaseWeights:
    """Base weights in a local folder. `label` is a short name for paths; `commit` is the hub's, "" for other sources."""

    folder: LocalStorage
    label: str
    commit: str = ""


def find_base_weights(
    base: str,
    find: Callable[[str, str], Path],
    cache: Path,
    log: Callable[[str], None],
    check: Callable[[Path], None] = lambda _: None,
) -> BaseWeights:
    """The base weights of a recipe; `find` looks up a path under DATA. Raises SftError.

    `check` gets the folder as soon as it has the small files, where they can be had before the weights.
    """
    if base.startswith("hf://"):
        repo = hub.resolve(base, f"[model] base {base}", log)
        folder = cache / "hub" / f"{repo.name.replace('/', '--')}-{repo.commit[:16]}"
        log(f"{base}: commit {repo.commit}, to {folder}")
        hub.snapshot(repo, folder, f"[model] base {base}", check)
        return BaseWeights(LocalStorage(folder), f"{_label(repo.name)}-{repo.commit[:8]}", repo.commit)
    if base.startswith(BUCKETS):
        bucket = open_storage(base, cache)
        storage = LocalStorage(cache / "base" / hashlib.sha256(base.encode()).hexdigest()[:16])
        copies = [FileCopy(n, n, f.bytes, crc32c=f.crc32c) for n, f in bucket.list().items()]
        log(f"{base}: {len(copies)} files, {size(sum(c.bytes for c in copies))}, to {storage.where}")
        make_folders(storage.root)
        wanted = {c.target for c in copies}
        for name in storage.list():
            if name not in wanted:
                storage.remove(name)
        small = [c for c in copies if c.target.endswith(hub.SMALL)]
        transfer(small, bucket, storage, log)
        check(storage.root)
        transfer([c for c in copies if c not in small], bucket, storage, log)
        return BaseWeights(storage, _label(base))
    folder = find(base, "[model] base")
    check(folder)
    return BaseWeights(LocalStorage(folder), _label(base))


def _label(base: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", base.rstrip("/").rsplit("/", 1)[-1]).strip(".-")[:80] or "base"
