"""run.json: which recipe and which overrides make a run. The planner reads it, so it needs the standard library only.

{"recipe": "smoke", "overrides": ["train.lr=1e-4"]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sft.formats.record import Record

NAME = "run.json"


@dataclass(frozen=True)
class RunFile(Record):
    """The recipe's name and the overrides of its fields, as typed on the command line."""

    NEXT: ClassVar[str] = "make STAGE RECIPE=… with the run's overrides; the next stage that runs writes the file again"
    INDENT: ClassVar[int | None] = None
    ASCII: ClassVar[bool] = True
    recipe: str
    overrides: tuple[str, ...]
