"""FLOPs of the forward pass, for balancing ranks and for MFU. No torch.

In:  an architecture and lengths of documents. Out: FLOPs; a multiply-add is two.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sft.recipe.architecture import ModelConfig


def attention_pairs(lengths: ArrayLike, window: int) -> NDArray[np.float64]:
    """(query, key) pairs of causal documents of these lengths: token i attends to min(i + 1, window) tokens, or to i +
    1 with window 0."""
    n = np.asarray(lengths, dtype=np.float64)
    full = n * (n + 1) / 2
    if not window:
        return full
    return np.where(n <= window, full, window * (window + 1) / 2 + (n - window) * window)


def attention_flops(lengths: ArrayLike, model: ModelConfig) -> NDArray[np.float64]:
    """Forward FLOPs of attention (QK^T and PV) over documents of these lengths, in all layers."""
    total = np.zeros(np.shape(lengths))
    for window, layers in Counter(model.windows).items():
        total += layers * attention_pairs(lengths, window)
    return 4 * model.n_heads * model.head_dim * total


def token_flops(model: ModelConfig) -> float:
    """Forward FLOPs of one token in all matrices except the output matrix."""
    q, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    return 2.0 * model.n_layers * model.d_model * (2 * q + 2 * kv + 3 * model.intermediate_size)


def head_flops(model: ModelConfig) -> float:
    """Forward FLOPs of the output matrix for one trained token. Other tokens do not reach it."""
    return 2.0 * model.d_model * model.vocab_size
