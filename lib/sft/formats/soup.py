"""soup.json: which steps were averaged, with which weights. It is in the folder of the step that `make soup` writes.

{"sources": [{"step": "runs/x/train/step100", "weight": 1.0, "files": [{"path", "bytes", "sha256"}]}, …]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sft.formats.manifest import Output
from sft.formats.record import Record

NAME = "soup.json"


@dataclass(frozen=True)
class AveragedStep:
    """One averaged step. `files` are the outputs of its manifest, or None for a step without one (OLMo-core's)."""

    step: str
    weight: float
    files: tuple[Output, ...] | None


@dataclass(frozen=True)
class Soup(Record):
    """The averaged steps, in the order of the command line. The mean divides by the sum of the weights."""

    NEXT: ClassVar[str] = "make soup again"
    INDENT: ClassVar[int | None] = 2
    sources: tuple[AveragedStep, ...]
