"""Noise that depends on which token it is for, and not on the rank, microbatch or order in which it is made.

In:  numbers of tokens, a seed. Out: values in (-1, 1) from a hash of (seed, token, column).
     A tensor's own random numbers come from a generator that its name and the seed choose.

Dropout of adapters is such a mask. NEFTune (arXiv 2310.05914) adds such values times alpha / sqrt(tokens of the document x width) to the embeddings in training.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROWS = 1024  # tokens whose hashes, 8 bytes a value, are in memory at once


def mixed(x: Tensor) -> Tensor:
    """A hash of the low 32 bits (lowbias32), in int64: products overflow, and their low bits are right."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def token_keys(tokens_T: Tensor, seed: int) -> Tensor:
    """int64 [T]: a hash of each token and the seed. `tokens_T`: int64, not negative."""
    start = mixed(torch.tensor((seed ^ (seed >> 32)) & MASK)).item()
    return mixed(mixed((tokens_T & MASK) ^ start) ^ (tokens_T >> 32))


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that (seed, name) chooses. What it gives depends neither on the number of ranks nor on the order of tensors."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def uniform(tokens_T: Tensor, columns: int, seed: int) -> Tensor:
    """fp32 [T, columns] between -1 and 1."""
    keys = token_keys(tokens_T, seed)
    column = mixed(torch.arange(1, columns + 1, device=keys.device))
    rows = [(mixed(part[:, None] ^ column).float() + 0.5) * 2.0**-31 - 1 for part in keys.split(ROWS)]
    return torch.cat(rows) if rows else torch.empty(0, columns, device=keys.device)


def dropped(x_TD: Tensor, keys_T: Tensor, salt: Tensor, rate: float) -> Tensor:
    """Dropout whose mask is a function of `token_keys`, the column and `salt`, a number of the place in the model."""
    column = mixed(torch.arange(1, x_TD.shape[1] + 1, device=x_TD.device) ^ mixed(salt))
    keep_mask = mixed(keys_T[:, None] ^ column) >= int(rate * (MASK + 1))
    return torch.where(keep_mask, x_TD * (1 / (1 - rate)), torch.zeros((), dtype=x_TD.dtype, device=x_TD.device))


def neftune(tokens_T: Tensor, lengths_T: Tensor, columns: int, alpha: float, seed: int) -> Tensor:
    """fp32 [T, columns]: NEFTune's noise for tokens of documents with these lengths."""
    return uniform(tokens_T, columns, seed) * (alpha / (lengths_T * columns).sqrt())[:, None]
