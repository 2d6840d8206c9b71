"""Datasets on the Hugging Face hub and in buckets, as files on this machine.

In:  the path of a source, and which of the dataset's files it wants.
Out: {name: file}, the selection, and where the content of each file comes from. The files are selected by the rules for local
     folders (sft.recipe.dataset_files).

A dataset on the hub that has no file of rows in a known format is built by the `datasets` library, as one Parquet file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from sft.common.errors import SftError
from sft.recipe.dataset_files import Choice, FileSelection, Tree, check_single, select
from sft.recipe.file_names import row_format
from sft.sources.unpack import new_file
from sft.storage import hub
from sft.storage import transfer as storage
from sft.storage.contract import FileCopy, FileInfo, Storage

Origin = tuple[tuple[str, str], ...]
RemoteFiles = tuple[dict[str, Path], FileSelection, dict[str, Origin]]
SOURCES = "[prepare] sources"


def from_hub(path: str, wanted: Choice, cache: Path, log: Callable[[str], None]) -> RemoteFiles:
    """A dataset of the hub: its own files at one commit, compared with the hashes that the hub reports."""
    what = f"{SOURCES}: {path} (split {wanted.split!r})"
    repo = hub.resolve(path, what, log, "dataset")
    commit: Origin = (("commit", repo.commit),)
    built = _built_file(repo, wanted, cache)
    if not built.exists():
        files = hub.DatasetFiles.at(repo, what, log)
        if any(row_format(name) for name in files.names):
            chosen = select(Tree(files.names, functools.cache(files.read)), wanted, f"{SOURCES}: {path}")
            local = files.fetch(chosen.files)
            found = {f"{path}/{name}": local / name for name in chosen.files}
            return found, chosen, dict.fromkeys(found, commit)
        _build(repo, wanted, built, what)
    return {path: built}, FileSelection((path,)), {path: commit}


def _built_file(repo: hub.Repo, wanted: Choice, cache: Path) -> Path:
    """The Parquet file in the cache of a dataset that the `datasets` library builds."""
    identity = [repo.name, repo.commit, wanted.subset, wanted.split]
    label = re.sub(r"[^\w.-]+", "-", "-".join(w for w in identity if w))
    # The label is for people. It is not unique: train[:50%] and train[:50], or a-b/c and a/b-c, share one.
    return cache / f"built-{label}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}.parquet"


def _build(repo: hub.Repo, wanted: Choice, file: Path, what: str) -> None:
    """Writes a dataset without files of rows as Parquet. The `datasets` library reads it."""
    if wanted.ignore_files:
        raise SftError(f"{what}: ignore_files: the `datasets` library builds this dataset; next: remove the option")
    with hub.reaching(what):
        import datasets  # start-up: takes seconds, and few sources need it

        rows = datasets.load_dataset(
            repo.name, wanted.subset or None, split=wanted.split or "all", revision=repo.commit
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as out:
        rows.to_parquet(out, batch_size=1000)


def from_bucket(path: str, wanted: Choice, cache: Path, log: Callable[[str], None]) -> RemoteFiles:
    """An object, or the row files under a prefix, as verified copies in the cache. Content names the copies."""
    folder, _, last = path.rstrip("/").rpartition("/")
    what = f"{SOURCES}: {path}"
    single = row_format(last) is not None
    where = folder if single else path.rstrip("/")
    bucket = storage.open_storage(where)
    fetch = functools.partial(_fetch, bucket, where, cache, log)
    if single:
        check_single(last, wanted, what)
        listed = {last: entry} if (entry := bucket.find(last)) else {}
        chosen = FileSelection(tuple(listed))
    else:
        listed = bucket.list()
        read = functools.cache(lambda name: fetch({name: listed[name]})[name].read_bytes())
        chosen = select(Tree(tuple(listed), read), wanted, what)
    if not chosen.files:
        raise SftError(f"{what}: no such object; next: correct the path")
    log(
        f"warning: {path}: a change in the bucket will not make the stage stale; dataset.json records the checksum and generation of"
        " each object that was read"
    )
    entries = {name: listed[name] for name in chosen.files}
    found = {f"{where}/{name}": file for name, file in fetch(entries).items()}
    origins: dict[str, Origin] = {
        f"{where}/{name}": (
            ("crc32c", entry.content if entry.crc32c is not None else ""),
            ("generation", str(entry.generation)),
        )
        for name, entry in entries.items()
    }
    return found, chosen, origins


def _fetch(
    bucket: Storage, where: str, cache: Path, log: Callable[[str], None], entries: dict[str, FileInfo]
) -> dict[str, Path]:
    """{name: copy in the cache} of these objects of a bucket."""
    copies, found = [], {}
    for name, entry in entries.items():
        content = f"{entry.content}-{entry.bytes}/{where.partition('://')[2]}/{name}"
        copies.append(FileCopy(name, content, entry.bytes, crc32c=entry.crc32c))
        found[name] = cache / content
    storage.transfer(copies, bucket, storage.open_storage(str(cache)), log)
    return found
