"""FLOPs of the forward pass, for balancing ranks and for MFU. No torch.

In:  an architecture and lengths of documents. Out: FLOPs; a multiply-add is two.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sft.recipe.architecture import GatedDelta, ModelConfig


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
    """Forward FLOPs of one token in all matrices except the output matrix, and in Gated DeltaNets."""
    q, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    attention = 2.0 * model.d_model * (2 * q + 2 * kv)
    mixers = sum(gated_delta_flops(mixer, model.d_model) if mixer else attention for mixer in model.mixers)
    return mixers + 2.0 * model.n_layers * model.d_model * 3 * model.intermediate_size


def gated_delta_flops(mixer: GatedDelta, d_model: int) -> float:
    """Forward FLOPs of one token in a Gated DeltaNet: projections, convolutions, and four products with each head's state
    (its decay, what it predicts, what is added, what is read), whatever the length of the document."""
    projections = d_model * (2 * mixer.keys + 3 * mixer.values + 2 * mixer.value_heads)
    convolutions = mixer.conv_width * (2 * mixer.keys + mixer.values)
    return 2.0 * (projections + convolutions + 4 * mixer.value_heads * mixer.key_dim * mixer.value_dim)


def head_flops(model: ModelConfig) -> float:
    """Forward FLOPs of the output matrix for one trained token. Other tokens do not reach it."""
    return 2.0 * model.d_model * model.vocab_size
