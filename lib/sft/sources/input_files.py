"""The files of a source on this machine, whatever stores them, and the chunks that they are cut into.

In:  one [[prepare.sources]] table.
Out: files with their sha256, each cut into chunks that depend on the content alone, not on the number of workers.
     sft.sources.blocks reads the rows of a chunk.

    files = resolve(source, stage.find, stage.cache, sha256).files
    for chunk in cut(files[0]):
        for batch in blocks.read(chunk): ...      # batch.rows, batch.numbers (from 0 inside the chunk), batch.rejects
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sft.common.errors import SftError
from sft.common.files import check_pointer, hash_file
from sft.common.paths import BUCKETS
from sft.common.strings import first_names
from sft.recipe import inputs
from sft.recipe.file_names import TEXT_FORMATS, row_format, stem
from sft.recipe.schema import Source
from sft.sources import remote
from sft.sources.remote import Origin
from sft.sources.unpack import check_text, csv_to_arrow, decompress, is_array, json_array, new_file

CHUNK_BYTES = 8 << 20
"""Input bytes of a chunk of a large file: the unit of work of a worker, and the work that a kill -9 can lose."""
UNPACKING = 3
"""Raise it where unpacked files get another content or more is refused: the copies in a cache have it in their names."""
MIN_CHUNK_BYTES = 1 << 20
CHUNKS = 64
"""Largest number of chunks of a smaller file: enough for many workers, so that few are idle at the end."""


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


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source: those to read, and the names of all others."""

    files: tuple[InputFile, ...]
    other_splits: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def found(self) -> int:
        """The number of all files."""
        return len(self.files) + len(self.other_splits) + len(self.ignored)


def resolve(
    source: Source,
    find: Callable[[str], Path],
    cache: Path,
    sha256: Callable[[Path], str] = hash_file,
    log: Callable[[str], None] = print,
    every_split: bool = False,
) -> SourceFiles:
    """The files of a source on this machine. Remote and compressed files are copied or unpacked into `cache`.

    every_split: the rows of all splits. Raises SftError for a path that does not exist or is not read completely.
    """
    wanted = inputs.EVERY_SPLIT if every_split else inputs.choice(source)
    origins: dict[str, Origin] = {}
    if source.path.startswith("hf://"):
        found, chosen, origins = remote.from_hub(source.path, wanted, cache / "hub", log)
    elif source.path.startswith(BUCKETS):
        found, chosen, origins = remote.from_bucket(source.path, wanted, cache / source.path[:2], log)
    elif inputs.is_remote(source.path):
        raise SftError(
            f"[prepare] sources: {source.path!r}: prepare reads local paths, gs://, s3:// and hf://; next: copy it to one of them"
        )
    else:
        found, chosen = inputs.dataset_files(find(source.path), source.path, wanted)
    files = [_plain(name, file, cache / "unpacked", sha256, origins.get(name, ())) for name, file in found.items()]
    _warn_of_copies(source.path, files, sha256, log)
    return SourceFiles(tuple(files), chosen.other_splits, chosen.ignored)


def _warn_of_copies(
    path: str, files: Sequence[InputFile], sha256: Callable[[Path], str], log: Callable[[str], None]
) -> None:
    """Warns of files with equal content, compressed or not, and of one name in two formats: all of their rows are read."""
    sizes = Counter(file.bytes for file in files)
    copies: dict[str, list[str]] = {}
    for file in files:
        if file.bytes and sizes[file.bytes] > 1:
            copies.setdefault(sha256(Path(file.path)), []).append(file.name)
    formats: dict[str, list[str]] = {}
    for file in files:
        formats.setdefault(stem(file.name), []).append(file.name)
    found = [(names, "have equal content") for names in copies.values()]
    found += [
        (names, "have names that differ in the format alone")
        for names in formats.values()
        if not any(set(names) <= set(same) for same in copies.values())
    ]
    for names, why in found:
        if len(names) > 1:
            log(
                f"warning: {path}: {len(names)} files {why}, and the rows of each are read: {first_names(names)}; next: add"
                " ignore_files for the copies"
            )


def warn_of_shared(sources: Sequence[Source], found: Sequence[SourceFiles], log: Callable[[str], None]) -> None:
    """Warns of sources that read the same content with the same names of columns: its rows are in the mix several times."""
    read: dict[tuple[str, str], dict[int, str]] = {}
    for number, (source, files) in enumerate(zip(sources, found, strict=True)):
        for file in files.files:
            read.setdefault((file.sha256, repr(sorted(source.columns.items()))), {})[number] = file.name
    shared: dict[tuple[int, ...], list[str]] = {}
    for names in read.values():
        if len(names) > 1:
            shared.setdefault(tuple(names), []).append(next(iter(names.values())))
    for numbers, same in shared.items():
        these = " and ".join(f"{number + 1} ({sources[number].path})" for number in numbers)
        log(
            f"warning: sources {these} read files of equal content, and the rows of each are used: {first_names(same)}; next: remove"
            " one, give it another weight, or set deduplicate = true"
        )


def _plain(name: str, file: Path, cache: Path, sha256: Callable[[Path], str], origin: Origin) -> InputFile:
    """The file, or its copy in the cache if it is compressed, one JSON array, or CSV, which cannot be cut."""
    check_pointer(file, name)
    digest = sha256(file)
    kind, _, compression = str(row_format(name) or row_format(file.name)).partition(".")
    if compression:
        packed = file
        file = _copy(
            cache, f"{digest}-{compression}-{UNPACKING}.{kind}", lambda out: decompress(name, packed, compression, out)
        )
    if kind in TEXT_FORMATS:
        check_text(name, file)
    if kind == "json" and is_array(name, file):
        array = file
        file = _copy(cache, f"{digest}-json.jsonl", lambda out: _write_lines(json_array(name, array), out))
    elif kind in ("csv", "tsv"):
        text, delimiter = file, "," if kind == "csv" else "\t"
        file = _copy(cache, f"{digest}-{kind}-{UNPACKING}.arrow", lambda out: csv_to_arrow(name, text, delimiter, out))
        kind = "arrow"
    kind = kind if kind in ("parquet", "arrow") else "jsonl"
    return InputFile(name, str(file), kind, digest, file.stat().st_size, origin)


def _copy(cache: Path, name: str, write: Callable[[IO[bytes]], None]) -> Path:
    """The file of this name in the cache, which `write` fills unless it is there."""
    copy = cache / name
    if not copy.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with new_file(copy) as out:
            write(out)
    return copy


def _write_lines(values: Iterator[Any], out: IO[bytes]) -> None:
    for value in values:
        out.write(json.dumps(value).encode() + b"\n")


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
        _refuse_repeated(file, f.schema_arrow)
        return [f.metadata.row_group(g).total_byte_size for g in range(f.metadata.num_row_groups)]


def arrow_batches(file: InputFile) -> Iterator[Any]:
    """Record batches of an Arrow stream, as `datasets` writes it, or of an Arrow file. They are mapped: skipping is free."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    with pa.memory_map(file.path) as mapped:
        try:
            stream = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(mapped)
            _refuse_repeated(file, opened.schema)
            yield from (opened.get_batch(i) for i in range(opened.num_record_batches))
            return
        _refuse_repeated(file, stream.schema)
        yield from stream


def _refuse_repeated(file: InputFile, fields: Any, top: str = "") -> None:
    """Raises SftError for two columns of one name, or two fields of a struct: a row would keep one of them.

    `fields` is a pyarrow.Schema, a struct or a list.
    """
    children = [fields.field(i) for i in range(len(fields) if hasattr(fields, "names") else fields.num_fields)]
    count = Counter(child.name for child in children)
    if repeated := [f"{top}{name}" for name, times in count.items() if times > 1]:
        raise SftError(
            f"{file.name}: several columns are named {first_names(repeated)}; next: rename or drop all but one"
        )
    for child in children:
        _refuse_repeated(file, child.type, f"{top}{child.name}.")


@contextlib.contextmanager
def reading(file: InputFile) -> Iterator[None]:
    """A context that turns pyarrow's errors into an SftError that names the file."""
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).strip().splitlines()[0][:300]
        raise SftError(f"{file.name}: broken {file.kind} file ({reason}); next: fetch or write it again") from None
