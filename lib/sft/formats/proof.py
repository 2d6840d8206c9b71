"""proof.json: what prepare checked about every document, and the rows that it rejected. Standard library only.

{"format": 3,
 "claims": [{"claim": "the last token that is trained is a terminator", "true": 4212, "of": 4212}],
 "written": {"data": {"documents", "tokens", "labels", …}},
 "sources": [{"path", "rows", "rejected", "encoded": {…}, "fields": {"read": {…}, …}, "reasons": {…}, "examples": [{…}]}]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sft.formats.record import Record, to_json
from sft.formats.rejects import RejectedRow

NAME = "proof.json"


@dataclass(frozen=True)
class Claim:
    """A statement about all documents. It holds when `true` (documents for which it was found true) equals `of`."""

    claim: str
    true: int
    of: int


@dataclass(frozen=True)
class WrittenSplit:
    """Counts of a split as its tokens went to disk. `labels` counts trained tokens; the last three count documents."""

    documents: int
    tokens: int
    labels: int
    documents_with_a_trained_token_that_is_not_the_first: int
    documents_ending_with_a_trained_terminator: int
    documents_ending_with_their_only_eos: int | None = None


@dataclass(frozen=True)
class SourceFields:
    """Columns, and <column>.<field> of messages, by what became of them: in how many rows each held something."""

    read: dict[str, int]
    ignored: dict[str, int]
    harmless: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class SourceProof:
    """One source: its rows, the encoder's counts, its fields, and its rejected rows by reason, with examples."""

    path: str
    rows: int
    rejected: int
    encoded: dict[str, int]
    fields: SourceFields = SourceFields({}, {}, {})
    """Empty in format 2."""
    reasons: dict[str, int]
    examples: tuple[RejectedRow, ...]


@dataclass(frozen=True)
class Proof(Record):
    """proof.json."""

    VERSION: ClassVar[int] = 3
    OLDEST: ClassVar[int] = 2
    NEXT: ClassVar[str] = "make prepare again"
    claims: tuple[Claim, ...]
    written: dict[str, WrittenSplit]
    sources: tuple[SourceProof, ...]

    def to_value(self) -> dict[str, Any]:
        return {"format": self.VERSION, **to_json(self)}
