"""run.json: which recipe and which overrides make a run. The planner reads it, so it needs the standard library only.

{"recipe": "smoke", "overrides": ["train.lr=1e-4"]}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

from sft.formats.record import Record

NAME = "run.json"


@dataclass(frozen=True)
class RunFile(Record):
    """The recipe's name and the overrides of its fields, as typed on the command line."""

    NEXT: ClassVar[str] = "remove it; the next make with the same words writes it again"
    recipe: str
    overrides: tuple[str, ...]

    def to_bytes(self) -> bytes:
        return json.dumps(self.to_value()).encode() + b"\n"
