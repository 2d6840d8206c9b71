"""TODO sft.evaluation.files"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.common.files import write_atomic

SAY_EVERY = 15.0  # seconds between lines of progress


def refuse_not_finite(value: Any, where: str = "results") -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_not_finite(inner, f"{where}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise SftError(f"{where}: {value} is not a score")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a task counts as finished when its file is there."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    write_atomic(path, "".join(line + "\n" for line in lines).encode())
