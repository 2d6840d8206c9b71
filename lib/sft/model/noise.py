"""Noise that depends on which token it is for, and not on the rank, microbatch or order in which it is made.

In:  numbers of tokens, a seed. Out: values in (-1, 1) from a hash of (seed, token, column).

NEFTune (arXiv 2310.05914) adds such values times alpha / sqrt(tokens of the document x width) to the embeddings in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROWS = 1024  # tokens whose hashes, 8 bytes a value, are in memory at once


def _mixed(x: Tensor) -> Tensor:
    """A hash of the low 32 bits (lowbias32), in int64: products overflow, and their low bits are right."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def uniform(tokens_T: Tensor, columns: int, seed: int) -> Tensor:
    """fp32 [T, columns] between -1 and 1. `tokens_T`: int64, not negative."""
    start = _mixed(torch.tensor((seed ^ (seed >> 32)) & MASK)).item()
    keys = _mixed(_mixed((tokens_T & MASK) ^ start) ^ (tokens_T >> 32))
    column = _mixed(torch.arange(1, columns + 1, device=keys.device))
    rows = []
    for part in keys.split(ROWS):
        rows.append((_mixed(part[:, None] ^ column).float() + 0.5) * 2.0**-31 - 1)
    return torch.cat(rows) if rows else torch.empty(0, columns, device=keys.device)


def neftune(tokens_T: Tensor, lengths_T: Tensor, columns: int, alpha: float, seed: int) -> Tensor:
    """fp32 [T, columns]: NEFTune's noise for tokens of documents with these lengths."""
    return uniform(tokens_T, columns, seed) * (alpha / (lengths_T * columns).sqrt())[:, None]
