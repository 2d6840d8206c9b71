"""Reads the rows of a source: JSONL, JSON, Parquet, Arrow, Hugging Face datasets, local or on gs://.

In: one [[prepare.sources]] table. Out: files with their sha256, each cut into chunks that depend on the content alone
(never on the number of workers), and for a chunk its rows in batches of bounded size. A line that is no row becomes a
`BadRow` with its number; only a file that cannot be read at all stops the stage.

    files = resolve(source, stage.find, stage.cache, sha256)
    for chunk in cut(files[0]):
        for batch in read(chunk): ...      # batch.rows, batch.numbers (0-based inside the chunk), batch.bad
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft import inputs
from sft.data import unpack
from sft.data.compiled import WORD
from sft.data.unpack import gunzip, is_array, json_array, new_file
from sft.errors import SftError
from sft.manifest import hash_file
from sft.schema import Source
from sft.storage import hub

try:  # three times faster than json, and optional: what it refuses, json decides
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

CHUNK_BYTES = 8 << 20
"""Input bytes in a chunk of a large file: the unit of work of a worker and of what a kill -9 can lose."""
MIN_CHUNK_BYTES = 1 << 20
CHUNKS = 64
"""Chunks of a smaller file, at most: enough for many workers, and few of them idle while the last ones are encoded."""
BATCH_BYTES = 4 << 20
"""Input bytes that a worker has as Python objects at a time. What a batch costs however small it is weighs more than caches:
4 MiB take a tenth less time than 1 MiB."""
BATCH_ROWS = 4096
EXAMPLE_CHARS = 200
NEWLINE = 10
_LONG_NUMBER = re.compile(rb"[0-9]{19}")


Origin = tuple[tuple[str, str], ...]


class BadRow(NamedTuple):
    row: int
    reason: str
    detail: str
    example: str


@dataclass(frozen=True)
class InputFile:
    """A file of rows on this machine. `name` is what the recipe and messages call it."""

    name: str
    path: str
    kind: str
    sha256: str
    bytes: int
    origin: Origin = ()
    """What named the content where it came from: the commit on the hub, the crc32c in a bucket."""


@dataclass(frozen=True)
class Chunk:
    """Bytes [start, stop) of a JSONL file, or row groups / record batches of a Parquet / Arrow file."""

    file: InputFile
    index: int
    start: int
    stop: int
    bytes: int


@dataclass
class Batch:
    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    count: int = 0
    """Rows read so far in the chunk, blank lines of a JSONL file included: the number of the next one."""


@dataclass(frozen=True)
class Block:
    """Lines of a chunk, each with its newline; `first` is the number of the first one."""

    padded: NDArray[np.uint8]
    """The lines, and WORD bytes behind them that may be read and mean nothing."""
    first: int
    too_long: bool = False
    """It stands for one line of more than MAX_ROW_BYTES, which is not read."""

    @classmethod
    def of(cls, lines: bytes, first: int = 0, too_long: bool = False) -> Block:
        return cls(
            np.frombuffer(bytearray(lines) + bytes(WORD), dtype=np.uint8), first, too_long
        )  # writable, as a chunk is

    @property
    def lines(self) -> bytes:
        return self.padded[:-WORD].tobytes()

    @functools.cached_property
    def ends(self) -> NDArray[np.int64]:
        """Where the newline of each line is."""
        return np.flatnonzero(self.padded[:-WORD] == NEWLINE)

    @property
    def count(self) -> int:
        return 1 if self.too_long else len(self.ends)

    def batch(self, wanted: Sequence[int] | None = None) -> Batch:
        """The rows of all lines, or of those that are wanted, by their numbers in the block."""
        made = Batch(count=self.first + self.count)
        if self.too_long:
            made.bad.append(BadRow(self.first, "row_too_long", f"more than {unpack.MAX_ROW_BYTES} bytes", ""))
        if self.too_long or (wanted is not None and not wanted):
            return made
        data = self.lines
        lines = data.split(b"\n")[:-1]
        numbers = list(range(len(lines))) if wanted is None else list(wanted)
        if wanted is not None:
            lines = [lines[i] for i in numbers]
        long_numbers = _has_long_number(data)
        rows = None if long_numbers else _parse_plain(lines)
        if rows is not None:
            made.rows, made.numbers = rows, [self.first + n for n in numbers]
            return made
        for number, line in zip(numbers, lines, strict=True):
            _read_line(line, self.first + number, made, long_numbers)
        return made


def resolve(
    source: Source,
    find: Callable[[str], Path],
    cache: Path,
    sha256: Callable[[Path], str] = hash_file,
    say: Callable[[str], None] = print,
) -> list[InputFile]:
    """The files of a source on this machine, fetched or unpacked into `cache` where they are not plain local files."""
    origins: dict[str, Origin] = {}
    if source.path.startswith("hf://"):
        found, origins = _hub(source, cache / "hub", say)
    elif source.path.startswith("gs://"):
        found, origins = _gs(source.path, cache / "gs", say)
    elif inputs.is_remote(source.path):
        raise SftError(
            f"[prepare] sources: {source.path!r}: prepare reads local paths, gs:// and hf://; next: copy it to one of them"
        )
    else:
        found = inputs.members(find(source.path), source.path)
    return [_plain(name, file, cache / "unpacked", sha256, origins.get(name, ())) for name, file in found.items()]


def _plain(name: str, file: Path, cache: Path, sha256: Callable[[Path], str], origin: Origin) -> InputFile:
    """The file itself, or its JSONL copy in the cache when it is compressed or one JSON array (neither can be cut)."""
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


def _hub(source: Source, cache: Path, say: Callable[[str], None]) -> tuple[dict[str, Path], dict[str, Origin]]:
    """A Hugging Face dataset as one Parquet file in the cache, and the commit it is of."""
    repo = hub.resolve(source.path, _named(source), say, "dataset")
    name, commit = repo.name, repo.commit
    wanted = [name, commit, source.subset, source.split]
    origins: dict[str, Origin] = {source.path: (("commit", commit),)}
    label = re.sub(r"[^\w.-]+", "-", "-".join(w for w in wanted if w))
    # The label is for people: train[:50%] and train[:50], or a-b/c and a/b-c, have the same one.
    copy = cache / f"{label}-{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]}.parquet"
    if copy.exists():
        return {source.path: copy}, origins
    with hub.reaching(_named(source)):
        import datasets

        rows = datasets.load_dataset(name, source.subset or None, split=source.split, revision=commit)
    cache.mkdir(parents=True, exist_ok=True)
    with new_file(copy) as out:
        rows.to_parquet(out, batch_size=1000)
    return {source.path: copy}, origins


def _named(source: Source) -> str:
    return f"[prepare] sources: {source.path} (split {source.split!r})"


def _gs(path: str, cache: Path, say: Callable[[str], None]) -> tuple[dict[str, Path], dict[str, Origin]]:
    """An object, or the row files under a prefix, as verified copies in the cache that are named by their content."""
    from sft.storage import transfer as storage
    from sft.storage.files import Job

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
    say(
        f"warning: {path}: what a bucket holds may change, which no run would notice; dataset.json records checksum and generation of what"
        " was read"
    )
    jobs, found = [], {}
    origins: dict[str, Origin] = {}
    for name, entry in sorted(listed.items(), key=lambda item: item[0].split("/")):
        content = f"{entry.crc32c or 0:08x}-{entry.bytes}/{where.removeprefix('gs://')}/{name}"
        jobs.append(Job(name, content, entry.bytes, crc32c=entry.crc32c))
        found[f"{where}/{name}"] = cache / content
        origins[f"{where}/{name}"] = (("crc32c", f"{entry.crc32c or 0:08x}"), ("generation", str(entry.generation)))
    storage.transfer(jobs, remote, storage.open_storage(str(cache)), say)
    return found, origins


def cut(file: InputFile) -> list[Chunk]:
    """The chunks of a file, decided by its content alone."""
    if file.kind == "jsonl":
        size = max(MIN_CHUNK_BYTES, min(CHUNK_BYTES, file.bytes // CHUNKS))
        starts = range(0, file.bytes, size)
        return [
            Chunk(file, i, s, min(s + size, file.bytes), min(s + size, file.bytes) - s) for i, s in enumerate(starts)
        ]
    with _reading(file):
        sizes = _parquet_sizes(file) if file.kind == "parquet" else [b.nbytes for b in _arrow_batches(file)]
    chunks: list[Chunk] = []
    start, total = 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total >= CHUNK_BYTES or i + 1 == len(sizes):
            chunks.append(Chunk(file, len(chunks), start, i + 1, total))
            start, total = i + 1, 0
    return chunks


def _parquet_sizes(file: InputFile) -> list[int]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file.path) as f:
        return [f.metadata.row_group(g).total_byte_size for g in range(f.metadata.num_row_groups)]


def _arrow_batches(file: InputFile) -> Iterator[Any]:
    """Record batches of an Arrow stream (what `datasets` writes) or Arrow file, mapped, so that skipping one costs nothing."""
    import pyarrow as pa

    with pa.memory_map(file.path) as mapped:
        try:
            stream = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(mapped)
            yield from (opened.get_batch(i) for i in range(opened.num_record_batches))
            return
        yield from stream


class _reading:
    """Turns what pyarrow raises into an error that names the file."""

    def __init__(self, file: InputFile):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        import pyarrow as pa

        if isinstance(error, (pa.ArrowException, UnicodeDecodeError)) or (
            isinstance(error, OSError) and error.errno is None
        ):
            reason = str(error).strip().splitlines()[0][:300]
            raise SftError(
                f"{self.file.name}: broken {self.file.kind} file ({reason}); next: fetch or write it again"
            ) from None


def read(chunk: Chunk) -> Iterator[Batch]:
    """The rows of a chunk in batches of bounded size; the last batch may be empty."""
    for piece in pieces(chunk):
        yield piece.batch() if isinstance(piece, Block) else piece


def pieces(chunk: Chunk) -> Iterator[Block | Batch]:
    """The same, where the rows of a JSONL file are still lines."""
    return _blocks(chunk) if chunk.file.kind == "jsonl" else _read_columns(chunk)


def _read_columns(chunk: Chunk) -> Iterator[Batch]:
    with _reading(chunk.file):
        if chunk.file.kind == "parquet":
            yield from _from_arrow(_parquet_batches(chunk))
        else:
            wanted = (b for i, b in enumerate(_arrow_batches(chunk.file)) if chunk.start <= i < chunk.stop)
            yield from _from_arrow(wanted)


def _parquet_batches(chunk: Chunk) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(chunk.file.path, pre_buffer=False) as f:
        for group in range(chunk.start, chunk.stop):
            meta = f.metadata.row_group(group)
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size)))
            yield from f.iter_batches(batch_size=rows, row_groups=[group], use_threads=False)


def without_nulls(value: Any) -> Any:
    """A columnar file gives every object every field of any object, filled with nulls: here a null is an absent field."""
    if type(value) is dict:
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if type(value) is list else value


def _from_arrow(batches: Iterator[Any]) -> Iterator[Batch]:
    import pyarrow as pa

    count = 0
    for arrow in batches:
        nested = [field.name for field in arrow.schema if pa.types.is_nested(field.type)]
        step = max(1, min(BATCH_ROWS, BATCH_BYTES * arrow.num_rows // max(1, arrow.nbytes)))
        for start in range(0, arrow.num_rows, step):
            piece = arrow.slice(start, step)
            batch = Batch(count=count + piece.num_rows)
            try:
                batch.rows = piece.to_pylist()
                batch.numbers = list(range(count, batch.count))
            except (UnicodeDecodeError, ValueError):  # one bad string must not take its neighbours with it
                for i in range(piece.num_rows):
                    try:
                        batch.rows.append(piece.slice(i, 1).to_pylist()[0])
                        batch.numbers.append(count + i)
                    except (UnicodeDecodeError, ValueError) as e:
                        batch.bad.append(BadRow(count + i, "unreadable_value", str(e)[:EXAMPLE_CHARS], ""))
            for row in batch.rows:
                for name in nested:
                    row[name] = without_nulls(row[name])
            count = batch.count
            yield batch


def _parse_plain(lines: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """Rows when every line is one, and no number needs more than 64 bits, which orjson would round; else None."""
    if orjson is None:
        return None
    try:
        rows = list(map(orjson.loads, lines))
    except ValueError:
        return None
    return rows if set(map(type, rows)) <= {dict} else None


def _read_line(line: bytes, number: int, batch: Batch, long_numbers: bool) -> None:
    try:
        row = parse(line, long_numbers)
    except ValueError as e:
        reason, _, detail = str(e).partition(": ")
        example = line[:EXAMPLE_CHARS].decode("utf-8", "replace")
        batch.bad.append(BadRow(number, reason, detail[:EXAMPLE_CHARS], example))
        return
    if row is not None:
        batch.rows.append(row)
        batch.numbers.append(number)


def parse(line: bytes, long_numbers: bool = True) -> dict[str, Any] | None:
    """One row; None for a blank line; ValueError("reason: detail") for anything else.

    `long_numbers`: the line may hold integers that need more than 64 bits. orjson would round them, json does not.
    """
    if orjson is not None and not (long_numbers and _LONG_NUMBER.search(line)):
        try:
            value = orjson.loads(line)
            if isinstance(value, dict):
                return value
        except ValueError:
            pass
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"not_utf8: {e.reason} at byte {e.start}") from None
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("not_json: nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"not_json: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"not_an_object: the line holds a {type(value).__name__}")
    return value


def _has_long_number(data: bytes) -> bool:
    """Whether 19 digits stand in a row somewhere, at a fraction of a nanosecond a byte.

    Such a number covers 8 bytes at a multiple of 8, all of them digits; only where that is so does a search look closer.
    """
    words = np.frombuffer(data, dtype="<u8", count=len(data) // 8)
    high, digits = np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(0x3030303030303030)
    found = ((words & high) == digits) & (((words + np.uint64(0x0606060606060606)) & high) == digits)
    return any(_LONG_NUMBER.search(data, max(0, 8 * i - 18), 8 * i + 26) for i in np.flatnonzero(found).tolist())


def _blocks(chunk: Chunk) -> Iterator[Block]:
    """Lines that begin inside the chunk, about BATCH_BYTES at a time; the last may end beyond it."""
    number = 0
    for block in _unnumbered(chunk):
        numbered = dataclasses.replace(block, first=number)
        number += numbered.count
        yield numbered
    if not number:
        yield Block.of(b"")


def _unnumbered(chunk: Chunk) -> Iterator[Block]:
    """Blocks that lie in one copy of the chunk, then the line that it begins and does not end."""
    with open(chunk.file.path, "rb") as f:
        f.seek(max(0, chunk.start - 1))
        data = bytearray(chunk.stop - f.tell() + WORD)
        size = f.readinto(memoryview(data)[:-WORD])
        if chunk.start == 0:
            first = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
        else:
            first = data.find(b"\n", 0, size) + 1
            if first in (0, size):
                return  # one long line of an earlier chunk fills this one
        whole = max(first, data.rfind(b"\n", 0, size) + 1)
        count = max(1, round((whole - first) / BATCH_BYTES))
        cuts = (data.find(b"\n", first + i * (whole - first) // count) + 1 for i in range(1, count))
        padded = np.frombuffer(data, dtype=np.uint8)
        for begin, end in itertools.pairwise([first, *cuts, whole]):
            if begin < end:
                yield Block(padded[begin : end + WORD], 0)
        last = bytes(data[whole:size])
        if not last:
            return  # the chunk ends with a line
        while b"\n" not in (more := f.read(1 << 20)):
            if not more:
                break
            last += more
            if len(last) > unpack.MAX_ROW_BYTES:
                yield Block.of(b"", too_long=True)
                return
        last += more[: more.find(b"\n")] if more else b""
        too_long = len(last) > unpack.MAX_ROW_BYTES
        yield Block.of(b"" if too_long else last + b"\n", too_long=too_long)


def read_row(files: Sequence[InputFile], row: int) -> tuple[str, int, dict[str, Any]]:
    """Row number `row` (from 1), counted on through the files: (file name, row in that file, row). Used by previews."""
    passed = 0
    for file in files:
        before = 0
        for chunk in cut(file):
            count = 0
            for batch in read(chunk):
                count = batch.count
                for number, value in zip(batch.numbers, batch.rows, strict=True):
                    if passed + before + number + 1 == row:
                        return file.name, row - passed, value
                for bad in batch.bad:
                    if passed + before + bad.row + 1 == row:
                        raise SftError(f"{file.name}: row {row - passed}: {bad.reason}: {bad.detail}")
            before += count
        passed += before
    raise SftError(f"{', '.join(f.name for f in files[:8])}: no row {row}; there are {passed}")
