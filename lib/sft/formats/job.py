"""runs/<run>/.jobs/<stage>.json: the job that makes a stage. Standard library only.

    {"job": "01JQ…", "identity": "<sha256>", "cluster": "ai2-jupiter", "command": ["stages/train.sh", "runs/<run>", …],
     "submitted": "2026-01-31T12:00:00+00:00", "ended": "", "attempts": 0}

A launcher writes it on submission and again when the job has ended. Every later make, `make jobs`, `make cancel` and
`make collect` read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sft.formats.record import FormatError, Record

FOLDER = ".jobs"
"""The folder of a run with these records and with the launchers' other files."""


@dataclass(frozen=True)
class JobRecord(Record):
    """A submitted job. `identity` is the sha256 of what it makes; `submitted` is a time in ISO 8601, in UTC.

    `ended` is how the job ended, as it was reported; it is empty while the end was not reported. `attempts` is how many
    times the job had started by then.
    """

    NEXT: ClassVar[str] = "remove it and run the same make again"
    ASCII: ClassVar[bool] = True
    job: str
    identity: str
    cluster: str
    command: tuple[str, ...]
    submitted: str
    ended: str = ""
    attempts: int = 0

    @classmethod
    def parse(cls, value: Any) -> Self:
        made = super().parse(value)
        if not made.job:
            raise FormatError("job: the id of a job is expected, not ''")
        return made
