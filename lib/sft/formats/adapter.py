"""What config.json of a step with LoRA adapters says about them, under the key "adapter". Standard library only.

    {"base": "sha256:…", "rank": 32, "alpha": 32.0, "rslora": false, "base_dtype": "bf16"}

Such a step holds the adapters and not the base. `base` identifies the weights that they were trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from sft.formats.record import Record

KEY = "adapter"


@dataclass(frozen=True)
class Adapter(Record):
    """`base_dtype`: how the matrices of the base were stored in training: bf16, fp32, int8, fp8 or nf4."""

    NEXT: ClassVar[str] = "train again"
    base: str
    rank: int
    alpha: float
    rslora: bool
    base_dtype: str

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
