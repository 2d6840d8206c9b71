"""Manifests: the record a stage writes last, and the proof that its folder is whole. Standard library only.

    {"schema": 1, "stage": "train", "run": "smoke", "cluster": "local", "key": "sha256:…", "version": 1,
     "config": {…exactly what the key hashed…},
     "inputs": [{"manifest": "../sync/manifest.json", "sha256": "…"}, {"file": "smoke/train.jsonl", "bytes": 1, "sha256": "…"}],
     "outputs": [{"path": "data/token_ids_part_0000.npy", "bytes": 1, "sha256": "…"}],
     "metrics": {…}, "provenance": {"git", "dirty", "argv", "host", "started", "finished", "versions"}}

Paths are relative to the manifest, so that a copied run still verifies. A manifest's digest covers what was made and
from what (stage, key, inputs, outputs), not when or where, so equal content has an equal digest on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.common.paths import inside

SCHEMA = 1
NAME = "manifest.json"
_FIELDS = {
    "schema": int,
    "stage": str,
    "run": str,
    "key": str,
    "config": dict,
    "inputs": list,
    "outputs": list,
    "metrics": dict,
}


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def key(stage: str, version: int, config: Mapping[str, Any], upstream: Iterable[str]) -> str:
    """The name of a stage's result before it exists: its options, the stage's version and the upstream keys."""
    body = {"stage": stage, "version": version, "config": config, "upstream": list(upstream)}
    return "sha256:" + hashlib.sha256(canonical(body)).hexdigest()


def digest(manifest: Mapping[str, Any]) -> str:
    """sha256 (hex) of what was made and from what."""
    body = {k: manifest[k] for k in ("schema", "stage", "key", "inputs", "outputs")}
    return hashlib.sha256(canonical(body)).hexdigest()


def load(file: Path) -> dict[str, Any]:
    """A manifest that is whole and well-formed. Raises FileNotFoundError, or SftError for a torn one."""
    try:
        data = json.loads(file.read_bytes())
    except ValueError as e:
        raise SftError(f"{file}: torn manifest ({e}); the stage counts as not done; next: run it again") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise SftError(f"{file}: not a manifest of schema {SCHEMA}; next: run the stage again")
    wrong = [
        f"{name} is not a {kind.__name__}" for name, kind in _FIELDS.items() if not isinstance(data.get(name), kind)
    ]
    for entry in data["inputs"] if not wrong else []:
        ok = isinstance(entry, dict) and isinstance(entry.get("manifest", entry.get("file")), str)
        wrong += [] if ok and isinstance(entry.get("sha256"), str) else [f"input {entry!r} lacks a name or sha256"]
    for entry in data["outputs"] if not wrong else []:
        ok = isinstance(entry, dict) and isinstance(entry.get("path"), str) and isinstance(entry.get("bytes"), int)
        wrong += (
            [] if ok and isinstance(entry.get("sha256"), str) else [f"output {entry!r} lacks path, bytes or sha256"]
        )
    if wrong:
        raise SftError(f"{file}: {'; '.join(wrong)}; next: run the stage again")
    return data


def write_atomic(file: Path, data: bytes) -> None:
    """Temporary name, fsync, rename, fsync of the folder: after a crash the file is the old one or the new one, whole."""
    fd, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def write(file: Path, manifest: Mapping[str, Any]) -> None:
    write_atomic(file, json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hash_file(file: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def describe(root: Path, paths: Iterable[str], known: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """One output entry per file, for files and folders named relative to `root`; `known` has the sha256 of some files. Raises
    SftError on a link or a missing path."""
    files: list[str] = []
    for name in paths:
        path = inside(root, name, f"output of {root.name}")
        if not path.exists():
            raise SftError(f"{path}: the stage names this output but did not write it")
        found = sorted(p for p in path.rglob("*") if not p.is_dir() or p.is_symlink()) if path.is_dir() else [path]
        if links := [str(p) for p in found if p.is_symlink()]:
            raise SftError(f"outputs must not be links: {', '.join(links)}")
        files += [p.relative_to(root).as_posix() for p in found]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda f: (known or {}).get(f) or hash_file(root / f), files)
        return [
            {"path": f, "bytes": (root / f).stat().st_size, "sha256": h} for f, h in zip(files, hashes, strict=True)
        ]


def is_whole(folder: Path) -> bool:
    """Whether the folder has a well-formed manifest and every byte it lists."""
    try:
        return not broken_outputs(folder, load(folder / NAME))
    except (FileNotFoundError, SftError):
        return False


def broken_outputs(folder: Path, manifest: Mapping[str, Any], hashes: bool = True) -> list[str]:
    """What is wrong with the outputs a manifest lists: one line per missing, short or altered file."""

    def check(entry: Mapping[str, Any]) -> str | None:
        file = inside(folder, entry["path"], f"{folder / NAME}: outputs")
        if not file.is_file():
            return f"{file} is missing"
        if (size := file.stat().st_size) != entry["bytes"]:
            return f"{file} has {size} bytes, the manifest says {entry['bytes']}"
        if hashes and (found := hash_file(file)) != entry["sha256"]:
            return f"{file} has sha256 {found[:16]}…, the manifest says {entry['sha256'][:16]}…"
        return None

    with ThreadPoolExecutor() as pool:
        return [line for line in pool.map(check, manifest["outputs"]) if line]
