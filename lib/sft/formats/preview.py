"""preview.json: the first training documents as text, with the trained parts marked. Standard library only.

    [[{"text": "<|im_start|>", "trained": false, "special": true}, {"text": "Hi", …, "end": true}], …]

One list for each document. The report shows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sft.formats.record import Record, to_json

NAME = "preview.json"


@dataclass(frozen=True)
class Segment:
    """A run of text that is trained as a whole or not at all. A special token is a segment of its own.

    Only the last segment of a document has `end`: whether the document ends here, or the preview was cut.
    """

    text: str
    trained: bool
    special: bool
    end: bool | None = None


@dataclass(frozen=True)
class Preview(Record):
    """The first documents of a split, each as its segments. The file is a list without an object around it."""

    NEXT: ClassVar[str] = "make prepare again"
    documents: tuple[tuple[Segment, ...], ...]

    @classmethod
    def parse(cls, value: Any) -> Self:
        return super().parse({"documents": value})

    def to_bytes(self) -> bytes:
        return json.dumps(to_json(self.documents), indent=1, ensure_ascii=False).encode() + b"\n"
