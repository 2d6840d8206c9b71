"""Preparing on several machines: SHARD=i/n encodes every n-th chunk into the shared cache, and SHARD=merge/n checks all n parts.

In:  a `Preparation` with its jobs and its cache.
Out: plan-<digest>-<i>-of-<n>.json beside the encoded chunks: the manifest of part i, with the sha256 of its files. Nothing is
     published before the files of all parts agree with their manifests.
"""

from __future__ import annotations

from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.data.preparation import Preparation
from sft.data.shard import digest
from sft.formats.chunks import ChunkFile, PartManifest


def record(work: Preparation) -> Path:
    """Writes the manifest of this part: its files with their sha256."""
    file = _file(work, work.shard.part or 0)
    PartManifest(tuple(_entry(work.cache / job.name) for job in work.mine)).write(file)
    return file


def check(work: Preparation) -> None:
    """Raises SftError unless all parts are encoded and every file has the size and sha256 of its manifest."""
    n = work.shard.parts
    missing = [str(i) for i in range(n) if not _file(work, i).is_file()]
    if missing:
        raise SftError(
            f"{work.cache}: parts {', '.join(missing)} of {n} are not done; next: SHARD={missing[0]}/{n} with the same recipe"
        )
    broken: list[str] = []
    for part in range(n):
        file = _file(work, part)
        chunks = PartManifest.read(file).chunks
        if {chunk.file for chunk in chunks} != {job.name for job in work.jobs[part::n]}:
            raise SftError(f"{file}: damaged: it lists other chunks; next: SHARD={part}/{n} again")
        for entry in chunks:
            chunk = work.cache / entry.file
            if not chunk.is_file() or _entry(chunk) != entry:
                broken.append(f"{chunk}: missing, or changed since part {part} wrote it; next: SHARD={part}/{n} again")
    if broken:
        raise SftError("\n".join(broken))


def _file(work: Preparation, part: int) -> Path:
    plan = digest([job.name for job in work.jobs])
    return work.cache / f"plan-{plan}-{part}-of-{work.shard.parts}.json"


def _entry(chunk: Path) -> ChunkFile:
    return ChunkFile(chunk.name, chunk.stat().st_size, hash_file(chunk))
