"""rejects.jsonl, contaminated.jsonl and near_duplicates.jsonl: input rows that prepare left out or compared, one record a line. Standard
library only.

{"source": "zoo.jsonl", "file": "zoo.jsonl", "row": 17, "reason": "not_json", "detail": "…", "example": "…"}
{"source": "zoo.jsonl", "file": "zoo.jsonl", "row": 21, "repeats": "test.jsonl:1"}
{"source": "zoo.jsonl", "file": "zoo.jsonl", "row": 22, "earlier_source": "zoo.jsonl", "earlier_file": "zoo.jsonl", "earlier_row": 3}
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from sft.formats.record import Record

REJECTS = "rejects.jsonl"
CONTAMINATED = "contaminated.jsonl"
NEAR_DUPLICATES = "near_duplicates.jsonl"


@dataclass(frozen=True)
class RejectedRow(Record):
    """A row that makes no document. `row` counts from 1 in `file`; `example` is the start of the row."""

    NEXT: ClassVar[str] = "make prepare again"
    source: str
    file: str
    row: int
    reason: str
    detail: str
    example: str


@dataclass(frozen=True)
class ContaminatedRow(Record):
    """A row that repeats an evaluation text. `repeats` is <file>:<row> of that text; rows count from 1."""

    NEXT: ClassVar[str] = "make prepare again"
    source: str
    file: str
    row: int
    repeats: str


@dataclass(frozen=True)
class NearRow(Record):
    """A row that nearly repeats an earlier one. Rows count from 1 in their files."""

    NEXT: ClassVar[str] = "make prepare again"
    source: str
    file: str
    row: int
    earlier_source: str
    earlier_file: str
    earlier_row: int


def to_lines(records: Iterable[Record]) -> bytes:
    """The records as JSONL."""
    return b"".join(json.dumps(record.to_value()).encode() + b"\n" for record in records)
