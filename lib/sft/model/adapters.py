"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen model, whose matrices may be quantised (QLoRA, arXiv 2305.14314).

In:  a Transformer on the meta device and the names of the matrices that get an adapter (sft.model.trained).
Out: the same model, whose matrices compute x W^T + scale (x A^T) B^T. Only A and B have gradients. All other parameters have
     the compute dtype; A and B are fp32, and FSDP2 casts them as every parameter.

Quantised matrices are no parameters: every rank holds all of them, where FSDP2 divides the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft.formats.adapter import Adapter
from sft.model.hf import DECAYS
from sft.model.noise import dropped, named_generator
from sft.model.parallel import set_parameter
from sft.model.quantised import Codes, dequantise, quantise, quantised_linear
from sft.model.trained import LORA_A, LORA_B

FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Dropout:
    """What all adapters of a model share. `keys` [T]: of the tokens of the microbatch (sft.model.noise); None in validation."""

    rate: float
    keys: Tensor | None = None


class LoraLinear(nn.Linear):
    """A frozen matrix with an adapter. `codes` take the place of `weight` where the base has fewer bits."""

    weight: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, base: nn.Linear, adapter: Adapter) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, base.weight.device)
        self.scale = adapter.scale
        empty = partial(torch.empty, device=base.weight.device, dtype=torch.float32)
        self.lora_a = nn.Parameter(empty(adapter.rank, base.in_features))
        self.lora_b = nn.Parameter(empty(base.out_features, adapter.rank))
        self.base_dtype = adapter.base_dtype
        self.codes: Codes = ()
        self.dropout: Dropout | None = None
        self.salt: Tensor | None = None
        if self.base_dtype not in FLOATS:
            self.weight = None

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is not None:
            base = F.linear(input, self.weight, self.bias)
        else:
            base = quantised_linear(input, self.codes)
            base = base if self.bias is None else base + self.bias
        x = input
        if self.dropout is not None and self.dropout.keys is not None and self.salt is not None:
            x = dropped(input, self.dropout.keys, self.salt, self.dropout.rate)
        return base + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    def load_base(self, value: Tensor) -> None:
        """Quantises the complete fp32 matrix on this module's device."""
        self.codes = quantise(value.to(self.lora_a.device), self.base_dtype)


def rounded_base(value: Tensor, base_dtype: str) -> Tensor:
    """What training computes with in place of a base's matrix, in fp32."""
    if base_dtype in FLOATS:
        return value.to(FLOATS[base_dtype]).float()
    return dequantise(quantise(value, base_dtype), value.shape[1], torch.float32)


def add_adapters(model: nn.Module, targets: Iterable[str], adapter: Adapter, frozen: torch.dtype) -> None:
    """Freezes the model, whose parameters but a Gated DeltaNet's decays get the dtype `frozen`, and puts an adapter on the matrices that `targets` name."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = torch.float32 if f".{name}" in DECAYS else frozen
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False))
    for target in targets:
        parent, _, name = target.removesuffix(".weight").rpartition(".")
        owner = model.get_submodule(parent)
        made = LoraLinear(owner.get_submodule(name), adapter)  # type: ignore[arg-type]
        for base in (p for n, p in made.named_parameters() if n not in (LORA_A, LORA_B)):
            base.requires_grad_(False).data = base.data.to(frozen)
        setattr(owner, name, made)


def add_dropout(model: nn.Module, rate: float, device: torch.device) -> Dropout | None:
    """Gives all adapters their dropout; None for a rate of 0. A tensor for each place, as a number would be compiled in."""
    if not rate:
        return None
    shared = Dropout(rate)
    for number, module in enumerate(m for m in model.modules() if isinstance(m, LoraLinear)):
        module.dropout, module.salt = shared, torch.tensor(number, device=device)
    return shared


def freeze(model: nn.Module, trained: Iterable[str]) -> None:
    """Lets no step change the other parameters."""
    trained = set(trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def store_in_bf16(model: nn.Module) -> None:
    """Gives all parameters but a Gated DeltaNet's decays the dtype bfloat16."""
    for name, parameter in model.named_parameters():
        if not name.endswith(DECAYS):
            parameter.data = parameter.data.to(torch.bfloat16)


def has_adapters(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLinear) for module in model.modules())


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a checkpoint: all of them, or the adapters alone."""
    every = dict(model.named_parameters())
    return {n: p for n, p in every.items() if p.requires_grad} if has_adapters(model) else every


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer changes."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def set_base(model: nn.Module, name: str, value: Tensor) -> None:
    """Copies a complete tensor, which every rank has, into the model. Nothing is sent."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, LoraLinear) and module.weight is None and leaf == "weight":
        module.load_base(value)
    else:
        set_parameter(dict(module.named_parameters(recurse=False))[leaf], value)


def start_adapters(model: nn.Module, seed: int) -> None:
    """A is uniform within 1 / sqrt(columns) (Kaiming, as PEFT has it), from a generator for each (seed, name); B is zero, so
    that training starts from the base's own outputs. No rank and no order of modules changes them."""
    for name, parameter in model.named_parameters():
        if name.endswith(f".{LORA_B}"):
            set_parameter(parameter, torch.zeros(parameter.shape))
        elif name.endswith(f".{LORA_A}"):
            generator = named_generator(seed, name)
            bound = 1 / math.sqrt(parameter.shape[1])
            set_parameter(parameter, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
