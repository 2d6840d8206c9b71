"""JSONL files: one record a line, in UTF-8. Standard library only.

A process that is killed while it appends leaves a line cut short, and the next attempt appends behind it.
Such a line is not JSON, and `read_lines` skips it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from sft.formats.record import Record

R = TypeVar("R", bound=Record)


def read_lines(cls: type[R], file: Path) -> list[R]:
    """The records of a file; none when it is missing. Raises SftError, with the line's number, for a wrong record."""
    records = []
    for number, line in enumerate(file.read_bytes().split(b"\n") if file.is_file() else (), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        records.append(cls.from_value(value, f"{file}:{number}"))
    return records


def to_lines(records: Iterable[Record]) -> bytes:
    """The content of a file. A value that JSON does not know, such as a date, is written as its text."""
    return "".join(json.dumps(r.to_value(), ensure_ascii=False, default=str) + "\n" for r in records).encode()
