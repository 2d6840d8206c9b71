"""The FLOPs that training needs, and their share of a GPU's peak (MFU). No torch.

    training FLOPs of a token = 6 M + 6 d V f + 12 h k sum over layers of a

M = weights of all matrices in the blocks, and what a Gated DeltaNet computes with its state, which depends on no length; d V = weights of the output matrix, for the share f of tokens that are
trained (no other token reaches it); h k = heads x head width; a = mean number of keys that a token attends to in that
layer: causal, inside its document, at most the layer's window. 6 = a multiply and an add, in the forward pass and twice
in the backward pass. Padding, recomputation, norms and the embedding count as zero, so MFU falls when they cost time.

    MFU = FLOPs of a step / (seconds x GPUs x dense bf16 peak of one GPU)

Peaks are from the vendors' data sheets, without sparsity. `gpu_tflops` in env/<cluster>.toml overrides them.
"""

from __future__ import annotations

import re

from numpy.typing import ArrayLike

from sft.model.flops import attention_pairs, head_flops, token_flops
from sft.recipe.architecture import ModelConfig

FORMULA = "(6 M + 6 d V f + 12 h k sum a) tokens / (seconds x GPUs x peak), see docs/train.md"

# Dense bf16 TFLOP/s by a pattern of the GPU's name, from CUDA or a cluster file. The first match counts.
PEAK_TFLOPS = (
    (r"GB[23]00", 2500.0),
    (r"B[23]00", 2250.0),
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.0),
    (r"G?H[12]00|H800", 989.4),
    (r"A[18]00", 312.0),
    (r"L40S", 362.0),
    (r"L4", 121.0),
    (r"A10", 125.0),
    (r"RTX 4090", 165.2),
    (r"A6000", 154.8),
)


def peak_tflops(gpu: str) -> float:
    """Dense bf16 TFLOP/s of a GPU by its name, e.g. "NVIDIA H100 80GB HBM3" or "h100"; 0 for an unknown one."""
    found = (
        peak for name, peak in PEAK_TFLOPS if re.search(rf"(?<![a-z0-9])(?:{name})(?![a-z0-9])", gpu, re.IGNORECASE)
    )
    return next(found, 0.0)


def mean_attended(lengths: ArrayLike, window: int = 0) -> float:
    """Mean number of keys that a token attends to, over documents of these lengths."""
    tokens = attention_pairs(lengths, 1).sum()
    return float(attention_pairs(lengths, window).sum() / tokens) if tokens else 0.0


def flops_per_token(
    model: ModelConfig, attended: float, windowed: float | None = None, trained_fraction: float = 1.0
) -> float:
    """Training FLOPs of a token. `attended`: `mean_attended` of the layers with full attention. `windowed`: of the
    layers with a window; None takes the smaller of the window and `attended`, an upper bound."""
    if windowed is None:
        windowed = min(attended, model.window)
    keys = sum(windowed if window else attended for window in model.windows)
    forward = token_flops(model) + head_flops(model) * trained_fraction + 4 * model.n_heads * model.head_dim * keys
    return 3 * forward


def mfu(step_flops: float, seconds: float, gpus: int, peak: float) -> float:
    """Model FLOPs utilisation, from 0 to 1. `peak` in TFLOP/s of one GPU."""
    return step_flops / (seconds * gpus * peak * 1e12)
