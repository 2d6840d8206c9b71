"""The files that prepare's processes leave in the cache for each other. Standard library only.

plan-<digest>-<part>-of-<parts>.json   the chunks that SHARD=<part>/<parts> encoded: {"format": 1, "chunks": [{"file",
                                       "bytes", "sha256"}]}
<chunk>.tok.json                       the rows of a chunk that repeat an evaluation text: {"hits": [[row, text], …]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sft.formats.record import Record, to_json


@dataclass(frozen=True)
class ChunkFile:
    """A file of the token cache."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PartManifest(Record):
    """The chunks that one part of the encoding wrote."""

    NEXT: ClassVar[str] = "encode this part again"
    ASCII: ClassVar[bool] = True
    END: ClassVar[str] = ""
    chunks: tuple[ChunkFile, ...]

    def to_value(self) -> dict[str, Any]:
        return {"format": self.VERSION, **to_json(self)}


@dataclass(frozen=True)
class ScreenHits(Record):
    """(row, text): the row counts from 0 inside the chunk, the text is its number in the screen."""

    NEXT: ClassVar[str] = "remove the file and make prepare again"
    INDENT: ClassVar[int | None] = None
    ASCII: ClassVar[bool] = True
    END: ClassVar[str] = ""
    hits: tuple[tuple[int, int], ...]
