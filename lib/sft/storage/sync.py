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

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import manifest
from sft.errors import SftError
from sft.stage import Result, Stage, lock
from sft.storage import hub
from sft.storage.files import Job, Storage, size
from sft.storage.local import LocalStorage, make_folders
from sft.storage.transfer import open_storage, transfer


def sync(stage: Stage) -> Result:
    files, place, commit = bring(stage, check_only=False)
    (stage.out / "remote.json").write_text(json.dumps({**place, "files": files}, indent=1) + "\n", encoding="utf-8")
    where = {k: f"{stage.storage}/{v}" if v else None for k, v in place.items()}
    metrics = {"storage": stage.storage, **where, "files": len(files), "bytes": sum(f["bytes"] for f in files)}
    if commit:
        metrics["base_commit"] = commit
    return Result(["remote.json"], metrics)


def bring(stage: Stage, check_only: bool) -> tuple[list[dict[str, Any]], dict[str, str | None], str]:
    """Copies, or only compares, dataset and base. Returns the files by name under the root, where the two are, and the
    commit of a base from the hub."""
    root = stage.storage.rstrip("/")
    prepared = stage.folder("prepare")
    record = manifest.load(prepared / manifest.NAME)
    name = f"datasets/{manifest.digest(record)[:16]}"
    text = (prepared / manifest.NAME).read_bytes()
    copier = Copier(root, stage.cache, stage.say, check_only)
    files = copier.folder(LocalStorage(prepared), name, record["outputs"], text, f"{name}/{manifest.NAME}")
    base, commit = None, ""
    if stage.recipe.model.base:
        found = find_base(stage.recipe.model.base, stage.find, stage.cache, stage.say)
        source, commit = found.folder, found.commit
        names = [n for n in source.list() if not n.startswith(".cache/")]  # the hub client's own notes
        if not names:
            raise SftError(f"{source.where}: no files; next: correct [model] base")
        listed = manifest.describe(source.root, names)
        base = f"base/{found.label}-{hashlib.sha256(manifest.canonical(listed)).hexdigest()[:16]}"
        text = json.dumps({"files": listed}, indent=1).encode() + b"\n"
        files += copier.folder(source, base, listed, text, f"{base}.json")
    return files, {"dataset": name, "base": base}, commit


@dataclass(frozen=True)
class Copier:
    """Makes folders under a storage root hold what a list says."""

    root: str
    cache: Path
    say: Callable[[str], None]
    check_only: bool = False

    def folder(
        self, source: LocalStorage, name: str, listed: Sequence[dict[str, Any]], text: bytes, list_name: str
    ) -> list[dict[str, Any]]:
        """Brings the listed files to <root>/<name>, then writes the list. Returns the entries with names under the root."""
        top, target = open_storage(self.root, self.cache), open_storage(f"{self.root}/{name}", self.cache)
        jobs = [Job(e["path"], e["path"], e["bytes"], e["sha256"]) for e in listed]
        self.say(f"{target.where}: {len(jobs)} files, {size(sum(j.bytes for j in jobs))}")
        if self.check_only:
            if not _agrees(top.read(list_name), text):
                raise SftError(f"{self.root}/{list_name} is missing or torn: the copy is not complete; next: make sync")
            transfer(jobs, source, target, self.say, check_only=True)
        else:
            with _locked(top, name, self.say):
                known = top.read(list_name)
                if known is not None and not _agrees(known, text):
                    top.remove(list_name)  # torn: until the files are proven, no list claims that they are
                transfer(jobs, source, target, self.say)
                if not _agrees(known, text):
                    top.write(list_name, text)
        return [{**e, "path": f"{name}/{e['path']}"} for e in listed]


def localise(root: str, name: str, cache: Path, say: Callable[[str], None], again: bool = True) -> Path:
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
    said = json.loads(text)
    jobs = [Job(e["path"], e["path"], e["bytes"], e["sha256"]) for e in said.get("outputs", said.get("files"))]
    with _locked(here, name, say):
        target = LocalStorage(here.root / name)
        say(f"{root}/{name}: {len(jobs)} files, {size(sum(j.bytes for j in jobs))}, to {target.where}")
        transfer(jobs, open_storage(f"{root}/{name}", cache), target, say)
        here.write(list_name, text)
    return target.root


def _agrees(found: bytes | None, wanted: bytes) -> bool:
    """Whether a list in place lists just this content; when and by which run it was made does not matter."""
    if found is None or found == wanted:
        return found is not None
    try:
        a, b = json.loads(found), json.loads(wanted)
        return manifest.digest(a) == manifest.digest(b) if "stage" in b else a == b
    except (ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _locked(top: Storage, name: str, say: Callable[[str], None]) -> Iterator[None]:
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


@dataclass(frozen=True)
class Base:
    """Base weights as a local folder, a name for them, and the commit on the hub that they are of ("" elsewhere)."""

    folder: LocalStorage
    label: str
    commit: str = ""


def find_base(base: str, find: Callable[[str, str], Path], cache: Path, say: Callable[[str], None]) -> Base:
    """Fetches base weights that are remote into the cache."""
    if base.startswith("hf://"):
        repo = hub.resolve(base, f"[model] base {base}", say)
        folder = cache / "hub" / f"{repo.name.replace('/', '--')}-{repo.commit[:16]}"
        say(f"{base}: commit {repo.commit}, to {folder}")
        hub.snapshot(repo, folder, f"[model] base {base}")
        return Base(LocalStorage(folder), f"{_label(repo.name)}-{repo.commit[:8]}", repo.commit)
    if base.startswith("gs://"):
        bucket = open_storage(base, cache)
        storage = LocalStorage(cache / "base" / hashlib.sha256(base.encode()).hexdigest()[:16])
        jobs = [Job(n, n, f.bytes, crc32c=f.crc32c) for n, f in bucket.list().items()]
        say(f"{base}: {len(jobs)} files, {size(sum(j.bytes for j in jobs))}, to {storage.where}")
        make_folders(storage.root)
        wanted = {j.target for j in jobs}
        for name in storage.list():
            if name not in wanted:
                storage.remove(name)
        transfer(jobs, bucket, storage, say)
        return Base(storage, _label(base))
    return Base(LocalStorage(find(base, "[model] base")), _label(base))


def _label(base: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", base.rstrip("/").rsplit("/", 1)[-1]).strip(".-")[:80] or "base"
