"""train/.out-of-memory: the step of a training that ran out of a GPU's memory. Standard library only.

While training has the same hardware numbers, every later start recomputes more than the one that failed
(`sft.training.out_of_memory`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sft.formats.record import Record
from sft.formats.steps import OUT_OF_MEMORY


@dataclass(frozen=True)
class OutOfMemory(Record):
    """What ran out of memory, and what it had planned."""

    NEXT: ClassVar[str] = f"remove train/{OUT_OF_MEMORY} and run train again"
    step: int  # the one that was running, from 1 on
    rank: int
    recompute: str  # the recomputation in words
    planned: int  # bytes of a GPU
    hardware: Mapping[str, Any]  # the hardware numbers and the ranks
    error: str  # its first line

    def __str__(self) -> str:
        return f"step {self.step} ran out of memory on rank {self.rank} with recomputation: {self.recompute} ({self.error})"
