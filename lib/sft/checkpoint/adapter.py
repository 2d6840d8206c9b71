"""Merges a LoRA adapter of PEFT into the weights of its base: W + scale * B A.

In:  the base's folder, the adapter's (adapter_config.json and adapter_model.safetensors). Out: `Merged`, which reads tensors by our
     names a few rows at a time. Whatever the adapter has beyond plain LoRA is refused with its name and value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.checkpoint.hf_folder import HfFolder
from sft.checkpoint.weight_files import Stored, safetensors
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.recipe.config_reader import ConfigReader

_NEXT = "merge it with PEFT's merge_and_unload, and name the merged folder"
# How the adapter was trained, and notes. They do not change the merged weights. Some values of init_lora_weights (PiSSA, OLoRA, CorDA,
# LoftQ) change the base as well, so that W + scale * B A of the published base is another model.
_TRAINING = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
    "target_modules", "task_type", "runtime_config", "eva_config", "corda_config", "loftq_config", "exclude_modules", "qalora_group_size",
    "layers_to_transform", "layers_pattern", "ensure_weight_tying",
})  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alpha_pattern": ({},), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"), "bias": ("none",), "fan_in_fan_out": (False,), "lora_bias": (False,), "megatron_config": (),
    "megatron_core": ("megatron.core",), "modules_to_save": ([],), "rank_pattern": ({},), "trainable_token_indices": (),
    "use_dora": (False,), "use_qalora": (False,), "layer_replication": (), "target_parameters": ([],), "arrow_config": (),
}  # fmt: skip


def _scale(config: ConfigReader) -> float:
    """The factor of B A. Raises SftError for another kind of adapter."""
    if config.get("peft_type") != "LORA":
        config.refuse("peft_type", config.data.get("peft_type"), "'LORA'", _NEXT)
    rank, alpha = config.whole("r"), config.number("lora_alpha")
    scale = alpha / math.sqrt(rank) if config.flag("use_rslora", False) else alpha / rank
    config.refuse_rest(_TRAINING, _NEUTRAL, _NEXT)
    return scale


class Merged(Mapping[str, Tensor]):
    """The tensors of a base with an adapter, in fp32 where the adapter changes them."""

    def __init__(self, base: HfFolder, adapter: Path) -> None:
        self.base = base
        self.scale = _scale(
            ConfigReader(read_json(adapter / "adapter_config.json"), str(adapter / "adapter_config.json"))
        )
        self._product: tuple[str, Tensor] = ("", torch.empty(0))
        self._stack = ExitStack()
        file = adapter / "adapter_model.safetensors"
        if not file.is_file():
            raise SftError(f"{file}: missing; next: save the adapter as safetensors, or {_NEXT}")
        self.pairs = self._pairs(safetensors(file, self._stack), str(file))

    def _pairs(self, stored: Mapping[str, Stored], where: str) -> dict[str, tuple[Stored, Stored]]:
        """{our name: (A [r, in], B [out, r])}. Raises SftError for tensors that are no such pair."""
        found: dict[str, dict[str, Stored]] = {}
        for key, tensor in stored.items():
            match = re.fullmatch(r"(?:base_model\.model\.)?(.+?)\.lora_(A|B)(?:\.default)?\.weight", key)
            try:
                parts = self.base.family.parts(f"{match[1]}.weight") if match else ()
            except KeyError:
                parts = ()
            if match is None or len(parts) != 1:
                raise SftError(
                    f"{where}: tensor {key}: not LoRA of a matrix of {self.base.family.model_type}; next: {_NEXT}"
                )
            found.setdefault(parts[0], {})[match[2]] = tensor
        for name, pair in found.items():
            rows, columns = self.base.shape(name)
            a, b = (pair.get(part) for part in "AB")
            if a is None or b is None or a.shape[1] != columns or b.shape[0] != rows or a.shape[0] != b.shape[1]:
                shapes = {part: tensor.shape for part, tensor in pair.items()}
                raise SftError(f"{where}: {name}: LoRA of {shapes} for a matrix of {rows} x {columns}; next: {_NEXT}")
        if not found:
            raise SftError(f"{where}: no LoRA tensors; next: {_NEXT}")
        return {name: (pair["A"], pair["B"]) for name, pair in found.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor."""
        values = self.base.rows(name, start, stop)
        if name not in self.pairs:
            return values
        if self._product[0] != name:  # the complete product, so that rows have the same bits in blocks of any size
            a, b = self.pairs[name]
            self._product = (name, self.scale * (b.rows(0, b.shape[0]).float() @ a.rows(0, a.shape[0]).float()))
        return values.float() + self._product[1][start:stop]

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.pairs else self.base.dtype(name)

    def close(self) -> None:
        self._stack.close()
