"""Context parallelism: several ranks share one row of tokens (Ulysses, arXiv 2309.14509).

In:  queries, keys and values of this rank's tokens [T / n, H, D]; rank i of the group has the i-th part of the row.
     A Gated DeltaNet's decays and step sizes, too.
Out: those of the complete row for this rank's heads [T, H / n, D], and back.

Only attention and Gated DeltaNet need an exchange: everything else works on each token alone. Document edges are those of the complete
row. Attention's queries are sent while keys and values are projected, and keys while values are; the backward pass does the reverse: it
receives the gradients of the queries while the projections of values and keys compute theirs. If there are fewer key/value heads than
ranks, each head is repeated for the ranks whose query heads use it. A group is passed by name, so that torch.compile treats it as a
constant. Gradients flow back through the same exchanges. An exchange moves values and computes none, so hidden states
are bitwise those of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group


def send_tokens(x: Tensor, group: str, ranks: int) -> Tensor:
    """Starts to send [T / n, H, D] of this rank's tokens to the ranks that have these heads. `receive_tokens` waits for what comes: nothing
    may read the result before."""
    if x.shape[1] < ranks:
        x = x.repeat_interleave(ranks // x.shape[1], dim=1)
    by_rank = x.view(len(x), ranks, -1, x.shape[-1]).transpose(0, 1)  # [rank, T / n, heads of that rank, D]
    sent: Tensor = _Send.apply(by_rank, group)  # type: ignore[no-untyped-call]
    return sent


def receive_tokens(sent: Tensor, group: str) -> Tensor:
    """[T, H / n, D] of this rank's heads, from `send_tokens`."""
    received: Tensor = _Receive.apply(sent, group)  # type: ignore[no-untyped-call]
    return received.flatten(0, 1)


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


class _Send(torch.autograd.Function):
    """Starts an exchange. Its backward pass waits for the exchange of gradients that `_Receive` has started."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return start_exchange(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return end_exchange(gradient), None


class _Receive(torch.autograd.Function):
    """Waits for an exchange. Its backward pass starts that of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return end_exchange(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return start_exchange(gradient, ctx.group), None


def start_exchange(x: Tensor, group: str) -> Tensor:
    """As `exchange`, without a gradient. The result is filled when `end_exchange` returns."""
    equal = [1] * len(x)  # the first dimension has a part for each rank
    sent: Tensor = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), equal, equal, group)
    return sent


def end_exchange(sent: Tensor) -> Tensor:
    received: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
    return received


def exchange(x: Tensor, group: Any) -> Tensor:
    """Sends part i of the first dimension to rank i of the group, and puts that rank's part for this rank in its
    place."""
    received: Tensor = _Receive.apply(_Send.apply(x, group), group)  # type: ignore[no-untyped-call]
    return received
