"""Unpacks files that cannot be cut into chunks: compressed files, JSON arrays and CSV.

In:  a file.
Out: its rows (`json_array`), its text (`decompress`), or an Arrow stream (`csv_to_arrow`). `new_file` writes a file that gets its final name when it is complete.
     Memory: the largest row. A broken file raises SftError with its name.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import json
import lzma
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from sft.chat.values import refuse_repeats
from sft.common.errors import SftError

MAGIC = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\3\4": "a zip archive", b"PAR1": "Parquet",
    b"ARROW1": "Arrow", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
"""How files begin that are no UTF-8 text."""
MAX_ROW_BYTES = 64 << 20
"""A longer line is rejected, so that one row cannot exhaust the memory."""
UNNAMED = "unnamed"
"""The column of a CSV file without a name, as pandas writes its index."""
ARROW_ROWS = 4096
"""Rows of a record batch of a converted file."""


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[IO[bytes]]:
    """A context that writes a file under a temporary name and renames it when the block ends without an error."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def decompress(name: str, file: Path, compression: str, out: IO[bytes]) -> None:
    """Writes the content of a compressed file: gz, zst, xz or bz2. `name` opens the error message of a broken file."""
    try:
        if not file.stat().st_size:  # Python's gzip and pyarrow take no bytes for no rows
            raise EOFError("it is empty")
        if compression in ("bz2", "xz"):
            with file.open("rb") as packed:
                _write_streams(packed, bz2.BZ2Decompressor if compression == "bz2" else lzma.LZMADecompressor, out)
        else:
            with _opened(file, compression) as f:
                shutil.copyfileobj(f, out, 1 << 20)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise SftError(f"{name}: broken {compression} file ({e}); next: fetch it again") from None


def _write_streams(
    packed: IO[bytes], new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], out: IO[bytes]
) -> None:
    """Writes the content of all streams of a file. bz2.open and lzma.open pass over what follows the first one where it is damaged.

    Zeros may follow a stream. Raises EOFError, OSError or LZMAError for every other byte that no stream holds.
    """
    decompressor, data, found = None, b"", False
    while data := data or packed.read(1 << 20):
        if decompressor is None:
            if found:
                data = data.lstrip(b"\0")
                if not data:
                    continue
            decompressor, found = new(), True
        out.write(decompressor.decompress(data, 1 << 20))
        while not decompressor.eof and not decompressor.needs_input:
            out.write(decompressor.decompress(b"", 1 << 20))
        data = decompressor.unused_data
        if decompressor.eof:
            decompressor = None
    if decompressor is not None or not found:
        raise EOFError("it ends early")


def _opened(file: Path, compression: str) -> IO[bytes]:
    if compression == "gz":
        return cast(IO[bytes], gzip.open(file, "rb"))
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and only .zst needs it here

    return cast(IO[bytes], pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))


def check_text(name: str, file: Path) -> None:
    """Raises SftError for a file of text whose first bytes say that it is compressed, columnar, an archive, or UTF-16."""
    with file.open("rb") as f:
        first = f.read(6)
    for magic, what in MAGIC.items():
        if first.startswith(magic):
            raise SftError(
                f"{name}: its name says text, and its content is {what}; next: give it the right name, or convert it to UTF-8 text"
            )


def csv_to_arrow(name: str, file: Path, delimiter: str, out: IO[bytes]) -> None:
    """Writes the rows of a CSV or TSV file as an Arrow stream. Every value is a text; an empty one is null.

    The first line has the names of the columns. A quoted value may hold newlines. Memory: blocks of MAX_ROW_BYTES.
    Raises SftError for a broken file, which `name` names, and for text after a closing quote.
    """
    import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it
    import pyarrow.csv as pa_csv

    read = pa_csv.ReadOptions(block_size=MAX_ROW_BYTES, use_threads=False)
    parse = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        names = _header(name, file, delimiter)
        _check_quotes(name, file, delimiter)
        convert = pa_csv.ConvertOptions(
            column_types={column: pa.large_string() for column in names},
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
            null_values=[""],
        )
        schema = pa.schema([(column or UNNAMED, pa.large_string()) for column in names])
        with pa_csv.open_csv(str(file), read, parse, convert) as rows, pa.ipc.new_stream(out, schema) as stream:
            for batch in rows:
                batch = batch.rename_columns([column or UNNAMED for column in names])
                for start in range(0, batch.num_rows, ARROW_ROWS):
                    stream.write_batch(batch.slice(start, ARROW_ROWS))
    except pa.ArrowException as e:
        reason = str(e).strip().splitlines()[0][:300]
        raise SftError(
            f"{name}: broken CSV ({reason}); next: write a header, and as many values in each row, or convert it to .jsonl"
        ) from None


def _header(name: str, file: Path, delimiter: str) -> list[str]:
    """The names of the columns. Raises SftError for two columns of one name, and for an empty file."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as f:
        names = next(csv.reader(f, delimiter=delimiter), [])
    if not any(names) or len(set(names)) < len(names):
        raise SftError(
            f"{name}: its first line must name each column once, and holds {names[:8]}; next: write a header"
        )
    return names


def _check_quotes(name: str, file: Path, delimiter: str) -> None:
    """Raises SftError for text after a closing quote and for a quote that is not closed. pyarrow reads both as it likes."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as f:
        rows, start = csv.reader(f, delimiter=delimiter, strict=True), 1
        try:
            for _ in rows:
                start = rows.line_num + 1
        except csv.Error as e:
            raise SftError(
                f"{name}: line {rows.line_num}: broken CSV ({e}) in the row that starts at line {start}; next: put a value with a quote"
                " into quotes and double the quotes in it, or convert the file to .jsonl"
            ) from None


def is_array(name: str, file: Path) -> bool:
    """True for one JSON array, False for one row per line in a .json file. Raises SftError for everything else."""
    with file.open("rb") as f:
        head = f.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
        if head[:1] == b"[":
            return True
        f.seek(0)
        first = f.readline(MAX_ROW_BYTES).removeprefix(codecs.BOM_UTF8).strip() or b"{}"
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        raise SftError(
            f"{name}: neither a JSON array of rows nor one row per line; next: write one JSON object per line"
        ) from None
    return False


def json_array(name: str, file: Path, block: int = 1 << 20) -> Iterator[Any]:
    """Yields the elements of a JSON array. Needs memory for the largest element only. Raises SftError for a broken array."""
    decoder, text = json.JSONDecoder(object_pairs_hook=refuse_repeats), codecs.getincrementaldecoder("utf-8-sig")()
    skip = re.compile(r"[ \t\r\n]*")
    buffer, at, row, state, end_of_file = "", 0, 0, "start", False

    def broken(why: str) -> SftError:
        return SftError(
            f"{name}: broken JSON array after row {row} ({why}); next: fix it or write one JSON object per line"
        )

    with file.open("rb") as f:

        def more() -> None:
            nonlocal buffer, at, end_of_file
            data = f.read(max(block, len(buffer) - at))  # doubles, so that a long element is parsed few times
            end_of_file = not data
            try:
                buffer = buffer[at:] + text.decode(data, end_of_file)
            except UnicodeDecodeError as e:
                raise broken(f"not UTF-8: {e.reason}") from None
            at = 0

        while True:
            at = skip.match(buffer, at).end()  # type: ignore[union-attr]
            if at == len(buffer):
                if end_of_file:
                    if state != "end":
                        raise broken("it ends early")
                    return
                more()
            elif state == "start":
                at, state = at + 1, "first"
            elif state == "end":
                raise broken("text after the closing bracket")
            elif buffer[at] == "]" and state != "value":
                at, state = at + 1, "end"
            elif state == "comma":
                if buffer[at] != ",":
                    raise broken(f"expected a comma, found {buffer[at]!r}")
                at, state = at + 1, "value"
            else:
                try:
                    value, end = decoder.raw_decode(buffer, at)
                except RecursionError:
                    raise broken("nested too deeply") from None
                except ValueError as e:
                    if end_of_file or len(buffer) - at > MAX_ROW_BYTES:
                        raise broken(str(e)) from None
                    more()
                    continue
                if end == len(buffer) and not end_of_file:
                    more()  # a number may continue in the next block
                    continue
                at, state, row = end, "comma", row + 1
                yield value
