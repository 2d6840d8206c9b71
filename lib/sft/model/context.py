"""Context parallelism: several ranks share one row of tokens (Ulysses, arXiv 2309.14509).

In:  queries, keys and values of this rank's tokens [T / n, H, D]; rank i of the group has the i-th part of the row.
     A Gated DeltaNet's decays and step sizes, too.
Out: those of the complete row for this rank's heads [T, H / n, D], and back.

Only attention and Gated DeltaNet need an exchange: everything else works on each token alone. Document edges are those of the complete
row. Queries, keys and values are exchanged together. If there are fewer key/value heads than ranks, each head is
repeated for the ranks whose query heads use it. A group is passed by name, so that torch.compile treats it as a
constant. Gradients flow back through the same exchanges. An exchange moves values and computes none, so hidden states
are bitwise those of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group


def gather_tokens(q: Tensor, k: Tensor, v: Tensor, group: Any, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T / n, H, D] of this rank's tokens to [T, H / n, D] of this rank's heads."""
    if k.shape[1] < ranks:
        k, v = (x.repeat_interleave(ranks // x.shape[1], dim=1) for x in (k, v))
    heads = [q.shape[1] // ranks, k.shape[1] // ranks, v.shape[1] // ranks]
    parts = [x.view(len(x), ranks, -1, x.shape[-1]) for x in (q, k, v)]
    by_rank = torch.cat(parts, dim=2).transpose(0, 1)  # [rank, T / n, heads of that rank, D]
    row = exchange(by_rank, group).flatten(0, 1)
    mine = row.split(heads, dim=1)
    return mine[0], mine[1], mine[2]


def gather_parts(parts: Sequence[Tensor], group: Any, ranks: int) -> list[Tensor]:
    """[T / n, C] of this rank's tokens to [T, C / n] of this rank's channels, for several tensors at once."""
    by_rank = torch.cat([x.view(len(x), ranks, -1) for x in parts], dim=2).transpose(0, 1)
    row = exchange(by_rank, group).flatten(0, 1)
    return list(row.split([x.shape[1] // ranks for x in parts], dim=1))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def rank_in(group: str) -> int:
    """This rank's place in a group."""
    return dist.get_rank(_resolve_process_group(GroupName(group)))


def gather_heads(out: Tensor, group: Any, ranks: int) -> Tensor:
    """[T, H / n, D] of this rank's heads to [T / n, H, D] of this rank's tokens."""
    by_rank = exchange(out.view(ranks, -1, *out.shape[1:]), group)  # [rank, T / n, heads of that rank, D]
    return by_rank.transpose(0, 1).flatten(1, 2)


def exchange(x: Tensor, group: Any) -> Tensor:
    """Sends part i of the first dimension to rank i of the group, and puts that rank's part for this rank in its
    place."""
    return collectives.all_to_all_single_autograd(x.contiguous(), None, None, group)
