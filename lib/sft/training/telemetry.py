"""Gradient norms and update-to-weight ratios by group of layers, every `telemetry_every` steps.

In:  the model's trained parameters, plain or sharded, before and after a step of the optimizer.
Out: two numbers for each group, over all ranks: the norm of its gradient before clipping, and |new - old| / |old| of its
     weights. Nothing waits for a device.

A group's name is a pattern of [train]: `freeze = ["blocks.0-3"]` means the parameters of the group blocks.0-3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from sft.model.adapters import trained_parameters

BLOCK_GROUPS = 6
"""The most groups of consecutive blocks. With the embeddings and the head there are eight curves."""
Groups = Mapping[str, Sequence[nn.Parameter]]


def layer_groups(model: nn.Module) -> Groups:
    """The trained parameters of the embeddings, of up to BLOCK_GROUPS runs of consecutive blocks, and of the head with its norm."""
    blocks = len(list(model.get_submodule("blocks").children()))
    names = block_groups(blocks)
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model).items():
        top, number, *_ = name.split(".")
        found.setdefault(names[int(number)] if top == "blocks" else top, []).append(parameter)
    return found


def block_groups(blocks: int) -> list[str]:
    """The name of each block's group. For 8 blocks: blocks.0-1, blocks.0-1, blocks.2, blocks.3-4, …"""
    count = min(BLOCK_GROUPS, blocks)
    numbers = [number * count // blocks for number in range(blocks)]
    members = [[i for i, number in enumerate(numbers) if number == group] for group in range(count)]
    spans = [f"blocks.{m[0]}-{m[-1]}" if len(m) > 1 else f"blocks.{m[0]}" for m in members]
    return [spans[number] for number in numbers]


class Watched:
    """One step of the optimizer. Make it when all gradients are there and not clipped yet, and read `numbers` after the step.

    It holds a copy of this rank's part of the weights until then.
    """

    def __init__(self, groups: Groups) -> None:
        self.parameters = [(number, p) for number, group in enumerate(groups.values()) for p in group]
        self.count = len(groups)
        self.before = [_local(p.detach()).clone() for _, p in self.parameters]
        self.grads = [_square(_local(p.grad)) if p.grad is not None else None for _, p in self.parameters]

    @torch.no_grad()
    def numbers(self) -> Tensor:
        """[2 G] float64: the gradient norms of the G groups, then their update-to-weight ratios. Every rank has the same."""
        device = self.before[0].device
        total = torch.zeros(3, self.count, dtype=torch.float64, device=device)
        sharded, mesh = torch.zeros_like(total), None
        for (number, p), before, grad in zip(self.parameters, self.before, self.grads, strict=True):
            sums = sharded if isinstance(p, DTensor) else total
            if isinstance(p, DTensor):
                mesh = (p.device_mesh, [Partial() if where.is_shard() else Replicate() for where in p.placements])
            if grad is not None:
                sums[0, number] += grad
            sums[1, number] += _square(before)
            sums[2, number] += _square(before.sub_(_local(p)))
        if mesh is not None:
            total += DTensor.from_local(sharded, *mesh, run_check=False).full_tensor()
        grads, weights, updates = total.sqrt()
        return torch.cat((grads, updates / weights))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _square(tensor: Tensor) -> Tensor:
    """The sum of squares, in float64."""
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32)
    return norm.double().square()
