"""Preparing on several machines: SHARD=i/n encodes every n-th chunk into the shared cache, SHARD=merge/n checks all n parts.

In: a `Preparation`, which knows its jobs and its cache. Out: plan-<digest>-<i>-of-<n>.json beside the encoded chunks, the
manifest of part i: its files with their sha256. Nothing is published before all parts are what their manifests say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.common.errors import SftError
from sft.common.files import hash_file, write_atomic

if TYPE_CHECKING:
    from sft.data.preparation import Preparation
from sft.data.shard import digest


def record(work: Preparation) -> Path:
    """Writes the manifest of this part: its files with their sha256."""
    chunks = [_entry(work.cache / job.name) for job in work.mine]
    file = _file(work, work.shard.part or 0)
    write_atomic(file, json.dumps({"format": 1, "chunks": chunks}, indent=1).encode())
    return file


def check(work: Preparation) -> None:
    """Raises SftError unless all parts are done and every byte is what their manifests say."""
    n = work.shard.parts
    absent = [str(i) for i in range(n) if not _file(work, i).is_file()]
    if absent:
        raise SftError(
            f"{work.cache}: parts {', '.join(absent)} of {n} are not done; next: SHARD={absent[0]}/{n} with the same recipe"
        )
    broken: list[str] = []
    for part in range(n):
        file = _file(work, part)
        try:
            entries = json.loads(file.read_bytes())["chunks"]
            if {e["file"] for e in entries} != {job.name for job in work.jobs[part::n]}:
                raise ValueError("it lists other chunks")
        except (ValueError, KeyError, TypeError) as e:
            raise SftError(f"{file}: torn ({e}); next: SHARD={part}/{n} again") from None
        for entry in entries:
            chunk = work.cache / entry["file"]
            if not chunk.is_file() or _entry(chunk) != entry:
                broken.append(f"{chunk}: not what part {part} wrote; next: SHARD={part}/{n} again")
    if broken:
        raise SftError("\n".join(broken))


def _file(work: Preparation, part: int) -> Path:
    plan = digest([job.name for job in work.jobs])
    return work.cache / f"plan-{plan}-{part}-of-{work.shard.parts}.json"


def _entry(chunk: Path) -> dict[str, Any]:
    return {"file": chunk.name, "bytes": chunk.stat().st_size, "sha256": hash_file(chunk)}
