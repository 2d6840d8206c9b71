"""Writes the adapters of a step in PEFT's format, which peft and vLLM load beside the base.

In:  a step's adapters (sft.checkpoint.lora_step), the name of its base. Out: adapter_config.json and adapter_model.safetensors.

A base whose matrices transformers joins (Phi 3's q, k and v are one) has no such adapter: three of ours would be one of rank
3 r. The merged model has them all the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sft.checkpoint.lora_step import Merged
from sft.common.files import write_json
from sft.model import hf
from sft.model.trained import LORA_A, LORA_B

FOLDER = "adapter"
_PREFIX = "base_model.model."
_HUB = re.compile(r"hf://(?P<name>[^@]+)(@(?P<revision>.+))?")


def write_adapter(weights: Merged, base: str, target: Path) -> str:
    """Writes the folder `target`. Returns why there is none, or "". `base` is the recipe's [model] base."""
    family = hf.family(weights.config)
    theirs = {name: family.theirs(name) for name in weights.targets}
    whole = {part for parts in family.joined.values() for part in parts}
    joined = [
        n for n, t in theirs.items() if len(family.parts(t)) > 1 or re.sub(r"blocks\.\d+\.|\.weight", "", n) in whole
    ]
    if joined:
        return f"transformers' {family.model_type} joins {joined[0]} with other matrices"
    tensors: dict[str, torch.Tensor] = {}
    for name, published in theirs.items():
        module = _PREFIX + published.removesuffix("weight")
        for factor, value in zip((LORA_A, LORA_B), weights.pair(name), strict=True):
            tensors[f"{module}{factor[:-1]}{factor[-1].upper()}.weight"] = value.contiguous()
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    write_json(target / "adapter_config.json", adapter_config(weights, base, list(theirs.values())))
    return ""


def adapter_config(weights: Merged, base: str, published: list[str]) -> dict[str, Any]:
    """adapter_config.json. Modules are named by the end of their names where every layer has the same ones."""
    modules = [name.removesuffix(".weight") for name in published]
    ends = sorted({name.rpartition(".")[2] for name in modules})
    everywhere = len(modules) == len(ends) * weights.config.n_layers
    hub, alpha = _HUB.fullmatch(base), weights.adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub["name"] if hub else base or None,
        "revision": hub["revision"] if hub else None,
        "r": weights.adapter.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": weights.adapter.rslora,
        "use_dora": False,
        "target_modules": ends if everywhere else modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
