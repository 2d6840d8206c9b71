"""runs/<run>/.jobs/evaluate-returned: what an AI2 harness returned, and what it was asked for. Standard library only.

    identity        the identity (sha256) of the evaluation that the results belong to
    asked.json      {"<task asked for>": "<folder of the results that hold it>", …}
    <folder>/…      the results of one Beaker task, in the harness's own layout

The launcher writes it when the experiment has ended. The evaluate stage reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sft.formats.record import Record, convert

RETURNED = "evaluate-returned"
ASKED = "asked.json"
IDENTITY = "identity"


@dataclass(frozen=True)
class AskedTasks(Record):
    """asked.json: for each requested task, the folder of its results."""

    NEXT: ClassVar[str] = "make evaluate again"
    INDENT: ClassVar[int | None] = None
    ASCII: ClassVar[bool] = True
    END: ClassVar[str] = ""
    folders: dict[str, str]

    @classmethod
    def parse(cls, value: Any) -> Self:
        return cls(convert(value, dict[str, str], "tasks"))

    def to_value(self) -> dict[str, Any]:
        return dict(self.folders)
