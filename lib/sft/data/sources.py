"""Reads the rows of a source: JSONL, JSON, Parquet, Arrow, Hugging Face datasets, local or on gs://.

In:  one [[prepare.sources]] table.
Out: files with their sha256, each cut into chunks that depend on the content alone, not on the number of workers.
     sft.data.blocks reads the rows of a chunk.

    files = resolve(source, stage.find, stage.cache, sha256)
    for chunk in cut(files[0]):
        for batch in blocks.read(chunk): ...      # batch.rows, batch.numbers (from 0 inside the chunk), batch.rejects
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.data.unpack import gunzip, is_array, json_array, new_file
from sft.recipe import inputs
from sft.recipe.schema import Source
from sft.storage import hub
from sft.storage import transfer as storage
from sft.storage.contract import FileCopy

CHUNK_BYTES = 8 << 20
"""Input bytes of a chunk of a large file: the unit of work of a worker, and the work that a kill -9 can lose."""
MIN_CHUNK_BYTES = 1 << 20
CHUNKS = 64
"""Largest number of chunks of a smaller file: enough for many workers, so that few are idle at the end."""

Origin = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class InputFile:
    """A file of rows on this machine. `name` is its name in the recipe and in messages."""

    name: str
    path: str
    kind: str
    sha256: str
    bytes: int
    origin: Origin = ()
    """The version of the content at its origin: the commit on the hub, or crc32c and generation in a bucket."""


@dataclass(frozen=True)
class Chunk:
    """Bytes [start, stop) of a JSONL file, or row groups / record batches of a Parquet / Arrow file."""

    file: InputFile
    index: int
    start: int
    stop: int
    bytes: int


def resolve(
    source: Source,
    find: Callable[[str], Path],
    cache: Path,
    sha256: Callable[[Path], str] = hash_file,
    log: Callable[[str], None] = print,
) -> list[InputFile]:
    """The files of a source on this machine. Remote and compressed files are copied or unpacked into `cache`.

    Raises SftError for a path that does not exist or cannot be read.
    """
    origins: dict[str, Origin] = {}
    if source.path.startswith("hf://"):
        found, origins = _hub(source, cache / "hub", log)
    elif source.path.startswith("gs://"):
        found, origins = _gs(source.path, cache / "gs", log)
    elif inputs.is_remote(source.path):
        raise SftError(
            f"[prepare] sources: {source.path!r}: prepare reads local paths, gs:// and hf://; next: copy it to one of them"
        )
    else:
        found = inputs.members(find(source.path), source.path)
    return [_plain(name, file, cache / "unpacked", sha256, origins.get(name, ())) for name, file in found.items()]


def _plain(name: str, file: Path, cache: Path, sha256: Callable[[Path], str], origin: Origin) -> InputFile:
    """The file, or its JSONL copy in the cache if it is compressed or one JSON array, which cannot be cut."""
    kind = inputs.kind(file.name)
    digest = sha256(file)
    if kind == "json" and not is_array(name, file):
        kind = "jsonl"
    if kind in ("json", "jsonl.gz"):
        copy = cache / f"{digest}-{kind.replace('.', '-')}.jsonl"
        if not copy.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with new_file(copy) as out:
                if kind == "json":
                    for value in json_array(name, file):
                        out.write(json.dumps(value).encode() + b"\n")
                else:
                    gunzip(name, file, out)
        file, kind = copy, "jsonl"
    return InputFile(name, str(file), str(kind), digest, file.stat().st_size, origin)


def _hub(source: Source, cache: Path, log: Callable[[str], None]) -> tuple[dict[str, Path], dict[str, Origin]]:
    """A Hugging Face dataset as one Parquet file in the cache, and its commit."""
    repo = hub.resolve(source.path, _named(source), log, "dataset")
    name, commit = repo.name, repo.commit
    wanted = [name, commit, source.subset, source.split]
    origins: dict[str, Origin] = {source.path: (("commit", commit),)}
    label = re.sub(r"[^\w.-]+", "-", "-".join(w for w in wanted if w))
    # The label is for people. It is not unique: train[:50%] and train[:50], or a-b/c and a/b-c, share one.
    copy = cache / f"{label}-{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]}.parquet"
    if copy.exists():
        return {source.path: copy}, origins
    with hub.reaching(_named(source)):
        import datasets  # start-up: takes seconds, and only sources on the hub need it

        rows = datasets.load_dataset(name, source.subset or None, split=source.split, revision=commit)
    cache.mkdir(parents=True, exist_ok=True)
    with new_file(copy) as out:
        rows.to_parquet(out, batch_size=1000)
    return {source.path: copy}, origins


def _named(source: Source) -> str:
    return f"[prepare] sources: {source.path} (split {source.split!r})"


def _gs(path: str, cache: Path, log: Callable[[str], None]) -> tuple[dict[str, Path], dict[str, Origin]]:
    """An object, or the row files under a prefix, as verified copies in the cache. Content names the copies."""
    folder, _, last = path.rstrip("/").rpartition("/")
    single = inputs.kind(last) is not None
    where = folder if single else path.rstrip("/")
    remote = storage.open_storage(where)
    if single:
        listed = {last: entry} if (entry := remote.find(last)) else {}
    else:
        listed = {
            name: entry for name, entry in remote.list().items() if inputs.kind(name) and not inputs.is_ignored(name)
        }
    if not listed:
        raise SftError(
            f"[prepare] sources: {path}: no object, or no {', '.join(inputs.ROWS)} under it; next: correct the path"
        )
    log(
        f"warning: {path}: a change in the bucket will not make the stage stale; dataset.json records the checksum and generation of"
        " each object that was read"
    )
    copies, found = [], {}
    origins: dict[str, Origin] = {}
    for name, entry in sorted(listed.items(), key=lambda item: item[0].split("/")):
        content = f"{entry.crc32c or 0:08x}-{entry.bytes}/{where.removeprefix('gs://')}/{name}"
        copies.append(FileCopy(name, content, entry.bytes, crc32c=entry.crc32c))
        found[f"{where}/{name}"] = cache / content
        origins[f"{where}/{name}"] = (("crc32c", f"{entry.crc32c or 0:08x}"), ("generation", str(entry.generation)))
    storage.transfer(copies, remote, storage.open_storage(str(cache)), log)
    return found, origins


def cut(file: InputFile) -> list[Chunk]:
    """The chunks of a file. They depend on its content alone. Raises SftError for a broken file."""
    if file.kind == "jsonl":
        size = _chunk_bytes(file.bytes)
        starts = range(0, file.bytes, size)
        return [
            Chunk(file, i, s, min(s + size, file.bytes), min(s + size, file.bytes) - s) for i, s in enumerate(starts)
        ]
    with reading(file):
        sizes = _parquet_sizes(file) if file.kind == "parquet" else [b.nbytes for b in arrow_batches(file)]
    chunks: list[Chunk] = []
    start, total, least = 0, 0, _chunk_bytes(sum(sizes))
    for i, size in enumerate(sizes):
        total += size
        if total >= least or i + 1 == len(sizes):
            chunks.append(Chunk(file, len(chunks), start, i + 1, total))
            start, total = i + 1, 0
    return chunks


def _chunk_bytes(size: int) -> int:
    return max(MIN_CHUNK_BYTES, min(CHUNK_BYTES, size // CHUNKS))


def _parquet_sizes(file: InputFile) -> list[int]:
    import pyarrow.parquet as pq  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    with pq.ParquetFile(file.path) as f:
        return [f.metadata.row_group(g).total_byte_size for g in range(f.metadata.num_row_groups)]


def arrow_batches(file: InputFile) -> Iterator[Any]:
    """Record batches of an Arrow stream, as `datasets` writes it, or of an Arrow file. They are mapped: skipping is free."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    with pa.memory_map(file.path) as mapped:
        try:
            stream = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(mapped)
            yield from (opened.get_batch(i) for i in range(opened.num_record_batches))
            return
        yield from stream


class reading:
    """A context that turns pyarrow's errors into an SftError that names the file."""

    def __init__(self, file: InputFile):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

        if isinstance(error, (pa.ArrowException, UnicodeDecodeError)) or (
            isinstance(error, OSError) and error.errno is None
        ):
            reason = str(error).strip().splitlines()[0][:300]
            raise SftError(
                f"{self.file.name}: broken {self.file.kind} file ({reason}); next: fetch or write it again"
            ) from None
