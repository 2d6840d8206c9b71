"""Blocks of rows: what export reads, casts, compares and writes at a time, so that memory does not grow with the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BLOCK_ELEMENTS = 1 << 20
"""Values in a block: it stays in the processor's cache."""


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of rows of a tensor, each with about BLOCK_ELEMENTS values.

    A tensor of shape (5, 524288) has the blocks (0, 2), (2, 4), (4, 5).
    """
    rows = max(1, BLOCK_ELEMENTS // max(1, torch.Size(shape[1:]).numel()))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def all_finite(values: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity. Looking at minimum and maximum needs no second tensor."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())
