"""Stochastic rounding of updated weights to bfloat16 (arXiv 2010.06192).

An update of a weight is often smaller than half of the step between neighbouring bfloat16 values, and rounding to the nearest value loses
it. Here a value is rounded up or down with the probability that makes its mean exact: of two neighbours, the nearer one is the
likelier.

The random bits are a hash of (seed, the parameter's name, the number of the update, the place of the value in the whole parameter). So they
do not depend on ranks or parts, and a resume repeats them.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sft.model.noise import MASK, mixed


class Place(NamedTuple):
    """The position of a part of a parameter in the whole."""

    salt: Tensor  # int64 []: of the seed and the parameter's name
    first: Tensor  # int64 []: the number of the first value in the whole parameter, row by row


def place_of(parameter: Tensor, name: str, seed: int) -> Place:
    """The place of this rank's part of a parameter, which FSDP2 divides by rows."""
    salt = int.from_bytes(hashlib.sha256(f"rounding/{seed}/{name}".encode()).digest()[:4], "little")
    first, device = 0, parameter.device
    if isinstance(parameter, DTensor):
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        first = offset[0] * parameter[0].numel() if parameter.dim() > 1 else offset[0]
    return Place(torch.tensor(salt, device=device), torch.tensor(first, device=device))


def bits(place: Place, update: Tensor, values: Tensor) -> Tensor:
    """int32 of the shape of `values`: 16 random bits for each. `update` []: the number of the update."""
    number = torch.arange(values.numel(), device=place.first.device).view(values.shape) + place.first
    key = mixed(mixed(update.long() & MASK) ^ place.salt)
    hashed = mixed(mixed((number & MASK) ^ key) ^ (number >> 32))
    return (hashed & 0xFFFF).int()


def round_to_bf16(value: Tensor, random: Tensor) -> Tensor:
    """A fp32 tensor in bfloat16. The lower 16 bits of fp32 are what bfloat16 lacks: as a share of 2^16 they are the
    probability to round away from zero. `random`: of `bits`."""
    raised = value.contiguous().view(torch.int32) + random
    return (raised & -0x10000).view(torch.float32).bfloat16()
