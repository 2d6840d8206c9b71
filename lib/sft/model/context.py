"""Context parallelism: several ranks share one row of tokens (Ulysses, arXiv 2309.14509).

In:  the queries, keys and values of this rank's tokens [T / n, H, D], rank i of the group holding the i-th part of the row.
Out: those of the whole row for this rank's heads [T, H / n, D], and back. Everything but attention works on tokens alone, so
     it needs no exchange; document edges are those of the whole row. One exchange for queries, keys and values together.

Key/value heads fewer than the ranks are repeated, each for the ranks whose query heads it serves. A group is
named, not passed, so that torch.compile takes it for a constant. Gradients flow back through the same exchanges. An exchange moves values and computes none: hidden states are bitwise those of one rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives


def gather_tokens(q: Tensor, k: Tensor, v: Tensor, group: Any, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T / n, H, D] of this rank's tokens to [T, H / n, D] of this rank's heads."""
    if k.shape[1] < ranks:
        k, v = (x.repeat_interleave(ranks // x.shape[1], dim=1) for x in (k, v))
    heads = [q.shape[1] // ranks, k.shape[1] // ranks, v.shape[1] // ranks]
    parts = [x.view(len(x), ranks, -1, x.shape[-1]) for x in (q, k, v)]
    by_rank = torch.cat(parts, dim=2).transpose(0, 1)  # [rank, T / n, heads of that rank, D]
    whole = exchange(by_rank, group).flatten(0, 1)
    mine = whole.split(heads, dim=1)
    return mine[0], mine[1], mine[2]


def gather_heads(out: Tensor, group: Any, ranks: int) -> Tensor:
    """[T, H / n, D] of this rank's heads to [T / n, H, D] of this rank's tokens."""
    by_rank = exchange(out.view(ranks, -1, *out.shape[1:]), group)  # [rank, T / n, heads of that rank, D]
    return by_rank.transpose(0, 1).flatten(1, 2)


def exchange(x: Tensor, group: Any) -> Tensor:
    """Part i of the first dimension goes to rank i of the group, whose part for this rank comes back in its place."""
    return collectives.all_to_all_single_autograd(x.contiguous(), None, None, group)
