"""TODO sft.export.rows"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Everything a tokenizer folder may hold; nothing else of train's folder is published.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_PIECE_ELEMENTS = 1 << 20  # values that are read, cast and written at once: they stay in the processor's cache


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Stretches of rows with about _PIECE_ELEMENTS values each."""
    step = max(1, _PIECE_ELEMENTS // max(1, torch.Size(shape[1:]).numel()))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def finite(values: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity. The extremes tell, and need no second tensor."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def write_json(path: Path, data: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
