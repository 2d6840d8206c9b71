"""Compares the merged weights of a LoRA step with the trained model, which adds the adapters to the base in every forward pass.

In:  the merged weights (sft.checkpoint.lora_step), documents as token ids, layers. Out: `MergeCheck`; SftError if the logits
     differ by more than rounding. Both are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sft.checkpoint.lora_step import Merged
from sft.export.logits import Pack, differences, native_logits
from sft.formats.gate import MergeCheck
from sft.model.adapters import add_adapters
from sft.model.model import Transformer


class Apart:
    """The tensors of a step with adapters, without adding them up."""

    def __init__(self, merged: Merged) -> None:
        self.merged = merged

    def __iter__(self) -> Iterator[str]:
        return iter([*self.merged, *self.merged.factors])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.merged.factors.shape(name) if name in self.merged.factors else self.merged.shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.merged.factors:
            return self.merged.factors.rows(name, start, stop)
        if name in self.merged.targets:
            return self.merged.trained_base(name)[start:stop]
        return self.merged.rows(name, start, stop)


def check_merge(merged: Merged, documents: Sequence[Sequence[int]], layers: Sequence[int], where: str) -> MergeCheck:
    """Compares the logits over the given layers. Raises SftError."""
    pack = Pack.of(documents)
    adapter = replace(merged.adapter, base_dtype="fp32")  # the base that is read is rounded already

    def with_adapters(model: Transformer) -> None:
        own = {f"blocks.{layer}.": f"blocks.{i}." for i, layer in enumerate(layers)}
        prefixes = ((name, ".".join(name.split(".")[:2]) + ".") for name in merged.targets)
        targets = [own[prefix] + name.removeprefix(prefix) for name, prefix in prefixes if prefix in own]
        add_adapters(model, targets, adapter, torch.float32)

    ours = native_logits(merged.config, Apart(merged), pack, layers, with_adapters)
    theirs = native_logits(merged.config, merged, pack, layers)
    failure = (
        "the merged model is not the one that was trained; next: report this, and serve the adapter beside its base"
    )
    difference, largest, _ = differences(ours, theirs, pack, where, merged.config.window, failure)
    return MergeCheck(difference, largest, len(merged.targets))
