"""Matrices of few bits that training only reads: int8 and fp8 with a scale for each row, nf4 with one for 64 values (QLoRA,
arXiv 2305.14314).

In:  a matrix and the name of the dtype. Out: `Codes`, the tensors that stand for it; `dequantise`, and x W^T with its gradient.

torchao chooses the codes. They are plain tensors here and turned into values by plain operations, which torch.compile fuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sft.common.errors import SftError
from sft.model.torchao_import import importing_torchao

Codes = tuple[Tensor, ...]
"""int8 and fp8: codes [rows, columns] and scales [rows, 1]. nf4: two codes in a byte [values / 2], their blocks' scales in 8 bits,
the scales' own scales, the scales' mean, the table of 16 values."""
BLOCK = 64  # values of nf4 that share a scale
SCALES = 256  # scales of nf4 that share one, as far as they divide


def quantise(value: Tensor, dtype: str) -> Codes:
    """The codes of a matrix, on its device. Raises SftError without torchao, and for a matrix that nf4 cannot divide."""
    with importing_torchao(f"base_dtype {dtype!r}", "base_dtype=compute"):
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow  # start-up: torchao takes a second
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
    value = value.float()
    if dtype != "nf4":
        made = (Int8Tensor if dtype == "int8" else Float8Tensor).from_hp(value, granularity=PerRow())
        return made.qdata, made.scale.view(-1, 1).float()
    if value.numel() % BLOCK:
        raise SftError(
            f"[train] base_dtype 'nf4': a matrix of {tuple(value.shape)} is not a multiple of {BLOCK} values; next:"
            " base_dtype=int8, or lora_targets without it"
        )
    found = to_nf4(value, BLOCK, math.gcd(value.numel() // BLOCK, SCALES))
    return (
        found.quantized_data,
        found.quantized_scalers,
        found.quantization_factor.float(),
        found.scaler_mean.float(),
        found.nf4.float(),
    )


def dequantise(codes: Codes, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, columns] that the codes stand for: computed in fp32, then rounded to `dtype`."""
    if len(codes) == 2:
        return (codes[0].float() * codes[1]).to(dtype)
    pairs, scales, factors, mean, table = codes
    scale = (scales.view(len(factors), -1) / factors[:, None] + mean).view(-1, 1, 1)
    index = torch.stack((pairs >> 4, pairs & 15), dim=-1).int()
    values = table[index].view(-1, BLOCK // 2, 2) * scale
    return values.view(-1, columns).to(dtype)


class _QuantisedLinear(torch.autograd.Function):
    """x W^T. W is made from its codes again for the backward pass, so that no layer keeps it in full precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *codes: Tensor) -> Tensor:
        ctx.save_for_backward(*codes)
        ctx.columns = x.shape[-1]
        return x @ dequantise(codes, x.shape[-1], x.dtype).T

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        codes = ctx.saved_tensors
        gradient = outputs[0] @ dequantise(codes, ctx.columns, outputs[0].dtype)
        return (gradient, *(None for _ in codes))


def quantised_linear(x: Tensor, codes: Codes) -> Tensor:
    apply: Callable[..., Tensor] = _QuantisedLinear.apply
    return apply(x, *codes)
