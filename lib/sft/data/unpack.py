"""Unpacks files that cannot be cut into chunks, gzip and JSON arrays, to lines of JSON.

In:  a file.
Out: its rows (`json_array`) or its text (`gunzip`). `new_file` writes a file that gets its final name when it is complete.
     Memory: the largest row. A broken file raises SftError with its name.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sft.common.errors import SftError

MAX_ROW_BYTES = 64 << 20
"""A longer line is rejected, so that one row cannot exhaust the memory."""


class new_file:
    """A context that writes a file under a temporary name and renames it when the block ends without an error."""

    def __init__(self, final: Path):
        self.final = final
        self.temporary = final.with_name(f".{final.name}.{os.getpid()}")

    def __enter__(self) -> IO[bytes]:
        self.file = self.temporary.open("wb")
        return self.file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.temporary, self.final)
        finally:
            self.file.close()
            self.temporary.unlink(missing_ok=True)


def gunzip(name: str, file: Path, out: IO[bytes]) -> None:
    """Decompresses a file into `out`. `name` opens the error message."""
    try:
        with gzip.open(file, "rb") as f:
            shutil.copyfileobj(f, out, 1 << 20)
    except (gzip.BadGzipFile, EOFError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise SftError(f"{name}: broken gzip file ({e}); next: fetch it again") from None


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
    decoder, text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
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
