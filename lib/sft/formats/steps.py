"""Small files of train's folder that name and describe step folders. Standard library only.

LATEST                 step300                                    the newest complete step
BEST                   step200\\nvalidation_loss 0.61               the best step, its metric and value
stepN/.metadata.json   {"ephemeral": false, "version": "3.0.0"}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sft.common.errors import SftError
from sft.common.files import read_file, write_atomic
from sft.formats.record import Record

LATEST, BEST, METADATA = "LATEST", "BEST", ".metadata.json"
LAYOUT_VERSION = "3.0.0"  # the OLMo-core release whose layout a step folder has
STEP = re.compile(r"step(\d+)")
DAMAGED = ".damaged-"
"""Before the name of a step folder whose bytes differ from its manifest."""

REQUEUE, RESTARTS, HANGS, OUT_OF_MEMORY = ".requeue", ".restarts", ".hangs", ".out-of-memory"
"""In the training folder: a request to run it again, the restarts since the last step, the first steps of attempts that hung, and the
step that ran out of a GPU's memory."""
TRACKERS = ("tensorboard", "wandb", "comet", "trackio")
"""Folders of trackers in the training folder."""
BESIDE = (
    "step*", LATEST, BEST, "evaluations.jsonl", ".identity", ".metrics", ".steps.lock", REQUEUE, RESTARTS, HANGS,
    OUT_OF_MEMORY, "SAVE", "logs", *TRACKERS, ".tokenizer", ".saving-step*", ".finished-step*", ".damaged-*", ".trash-*",
)  # fmt: skip
"""Patterns of the names that training keeps in its folder and that its manifest does not list. Each step has a manifest of its own."""


@dataclass(frozen=True)
class StepMetadata(Record):
    """.metadata.json of a step folder. An ephemeral step is deleted when a newer step is complete."""

    ASCII: ClassVar[bool] = True
    ephemeral: bool = False
    version: str = LAYOUT_VERSION


@dataclass(frozen=True)
class Best:
    """The file BEST: a step, and the metric and value that make it the best one."""

    step: int
    metric: str
    value: float

    @classmethod
    def read(cls, train: Path) -> Best | None:
        """BEST of train's folder, or None where it is missing or damaged."""
        try:
            return cls.from_bytes(read_file(train / BEST))
        except OSError:
            return None

    @classmethod
    def from_bytes(cls, data: bytes) -> Best | None:
        """None for a damaged file."""
        try:
            step, rest = data.decode().splitlines()[:2]
            metric, value = rest.rsplit(" ", 1)
            match = STEP.fullmatch(step)
            return cls(int(match[1]), metric, float(value)) if match else None
        except ValueError:
            return None

    def write(self, train: Path) -> None:
        write_atomic(train / BEST, f"step{self.step}\n{self.metric} {self.value!r}\n".encode())


def write_latest(step: Path) -> None:
    """Makes LATEST name a step folder, which is in train's folder."""
    write_atomic(step.parent / LATEST, f"{step.name}\n".encode())


def named_step(train: Path, name: str) -> Path | None:
    """The step folder that LATEST or BEST (`name`) points to, or None."""
    try:
        step = read_file(train / name).decode("latin-1").split("\n", 1)[0].strip()
    except OSError:
        return None
    return train / step if STEP.fullmatch(step) else None


def holds_steps(train: Path) -> bool:
    """Whether train's folder has a step folder, also a damaged one."""
    names = [p.name for p in train.iterdir() if p.is_dir()] if train.is_dir() else []
    return any(STEP.fullmatch(name.removeprefix(DAMAGED)) or name.startswith(f"{DAMAGED}step") for name in names)


def is_ephemeral(step: Path) -> bool:
    """Whether a step folder says that it is ephemeral; False where its .metadata.json is missing or damaged."""
    try:
        return StepMetadata.read(step / METADATA).ephemeral
    except (OSError, SftError):
        return False
