"""Causal attention over packed documents: a fused kernel on CUDA, a loop over documents elsewhere.

In:  q [T, Hq, D], k and v [T, Hkv, D] (Hq a multiple of Hkv), cu_seqlens int32 [N + 1] with the document edges (repeats
     of the last edge are empty documents, which pad it to a bucket size), max_len >= the longest document, window in
     tokens with the token itself included (0 = unlimited).
Out: [T, Hq, D]. A token attends to itself and to the window - 1 tokens before it, of its own document only.

Without a fused kernel every document is one call, so a packed document gives bitwise the same result as the document
alone.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention.varlen import varlen_attn

# Rows of a windowed document in one masked call. Longer documents are computed block by block, so that the mask and the
# scores are O(block * (block + window)) and not O(length^2).
BLOCK = 512
FLASH_3, FLASH_3_TORCH = "flash_attn_interface", (2, 13)
"""The module of the package flash-attn-3, and the first version of torch that is taken with it."""
_HAS_ENABLE_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int = 0) -> Tensor:
    """Attention over packed documents; shapes as in the module's docstring."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _fused(q, k, v, cu_seqlens, max_len, window)
    return _documents(q, k, v, cu_seqlens, window)


def choose_kernel(device: torch.device) -> str:
    """Takes flash attention 3 for the fused kernel where it can be: on Hopper, with torch 2.13 or newer, whose backward pass hands it the
    window, and the package flash-attn-3. Call it before the first attention. Returns the kernel's name for the log."""
    if device.type != "cuda":
        return "a loop over documents"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if not hopper or version < FLASH_3_TORCH:
        return "flash attention 2"
    if importlib.util.find_spec(FLASH_3) is None:
        return (
            "flash attention 2; this GPU runs flash attention 3 with the package flash-attn-3, which is not installed"
        )
    try:
        torch_attention.activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:  # a build for another torch
        return f"flash attention 2; {FLASH_3} is installed and cannot be used ({error})"
    return "flash attention 3"


def _fused(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int) -> Tensor:
    # The kernel counts the tokens to the left of the token itself; (-1, 0) means causal. torch 2.11 accepts grouped
    # key/value heads without enable_gqa, which it does not have.
    options: dict[str, Any] = {"window_size": (window - 1, 0) if window else (-1, 0)}
    if q.shape[1] != k.shape[1] and _HAS_ENABLE_GQA:
        options["enable_gqa"] = True
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, **options)
    assert isinstance(out, Tensor)
    return out


def _by_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    """One SDPA call per document. The backward pass of `split` is a single concatenation, unlike that of slices."""
    lengths = [n for n in cu_seqlens.diff().tolist() if n]
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_document(*part, window) for part in parts])


_documents: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] = torch.compiler.disable(_by_document)


def _document(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    length = q.shape[0]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, L, D]
    gqa = q.shape[1] != k.shape[1]
    if not window or length <= window:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return out.squeeze(0).transpose(0, 1)
    rows = max(BLOCK, window)
    outs = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        first = max(0, start - window + 1)
        mask = _window_mask(end - start, end - first, start - first, window, q.dtype, q.device)
        block = (q[:, :, start:end], k[:, :, first:end], v[:, :, first:end])
        outs.append(F.scaled_dot_product_attention(*block, attn_mask=mask, enable_gqa=gqa))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return out.squeeze(0).transpose(0, 1)


@lru_cache(maxsize=256)
def _window_mask(rows: int, keys: int, offset: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [rows, keys]. Row i is key `offset + i`, and attends to `window` keys up to itself."""
    with torch.inference_mode(False), torch.no_grad():
        distance = torch.arange(offset, offset + rows, device=device)[:, None] - torch.arange(keys, device=device)
        masked = (distance < 0) | (distance >= window)
        return torch.zeros(rows, keys, dtype=dtype, device=device).masked_fill_(masked, float("-inf"))
