"""train/evaluations.jsonl: scores of checkpoints, measured while training runs. Standard library only.

    {"step": 200, "checkpoint": "<sha256 of the step's manifest.json>", "asked": "<16 hex>", "template_sha256": "…",
     "tasks": {"gsm8k": {"exact_match": {…}}}, "broken": {"ifeval": "reason"}, "validation": {…}, "seconds": 31.2}

A checkpoint without any score has "failed": "reason". One line for each step, in the order of the steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from sft.common.files import write_atomic
from sft.formats.lines import read_lines, to_lines
from sft.formats.record import Record
from sft.formats.results import Score, TextLoss, ValidationLoss

NAME = "evaluations.jsonl"


@dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    """The scores of one checkpoint.

    `settings` hashes what decides the scores: options, tasks and their data (the key `asked` in the file).
    `broken` has the reason for each task without a score. `failed` is the reason why the checkpoint has none.
    """

    NEXT: ClassVar[str] = "remove the file and make watch"
    step: int
    checkpoint: str
    settings: str
    template_sha256: str | None = None
    tasks: dict[str, dict[str, Score]]
    broken: dict[str, str] = field(default_factory=dict)
    validation: ValidationLoss | None = None
    plain_text: TextLoss | None = None
    seconds: float | None = None
    failed: str | None = None

    @classmethod
    def parse(cls, value: Any) -> Self:
        if isinstance(value, dict):
            value = {"settings" if k == "asked" else k: v for k, v in value.items()}
        return super().parse(value)

    def to_value(self) -> dict[str, Any]:
        return {"asked" if k == "settings" else k: v for k, v in super().to_value().items()}


def read(train: Path) -> list[Evaluation]:
    """The evaluations in training's folder, in the order of their steps. Raises SftError for a damaged record."""
    return read_lines(Evaluation, train / NAME)


def write(train: Path, evaluations: Iterable[Evaluation]) -> None:
    """Replaces the file atomically."""
    ordered: list[Evaluation] = sorted(evaluations, key=lambda e: e.step)
    write_atomic(train / NAME, to_lines(ordered))
