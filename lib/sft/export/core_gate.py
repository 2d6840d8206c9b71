"""Compares an OLMo-core base, as training reads it, with the model that OLMo-core builds from the step's own config.json.

In:  the step folder, its architecture as this project reads it, documents of the training data. Out: `LogitCheck`, or in words
     why the base cannot be compared; SftError if the logits differ.

It runs before the first step where the package ai2-olmo-core is installed, over a sample of layers, on the CPU in fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.checkpoint.dcp_reader import DcpReader
from sft.common.files import read_json
from sft.export.base_gate import pack_documents
from sft.export.logits import Pack, differences, native_logits, sample_layers
from sft.formats.gate import LogitCheck
from sft.recipe.base_config import Base

_FAILURE = (
    "this project does not compute the base as OLMo-core does; next: report it with the step's config.json, or convert the"
    " base with OLMo-core to a Hugging Face folder"
)
_PLAIN: dict[str, dict[Any, Any]] = {
    "backend": {},
    "use_flash": {True: False},
    "dtype": {"bfloat16": "float32", "float16": "float32"},
    "name": {"fused": "default", "fused_rms": "rms", "cute_rms": "rms"},
    "float8_config": {},
}
"""Keys of implementations and precisions, with the values that a CPU computes in fp32. A key without values is left out."""


def check_core_base(step: Path, base: Base, documents: Iterable[Sequence[int]]) -> LogitCheck | str:
    """Compares the logits of a base. Returns the reason if OLMo-core cannot build the model here."""
    data = read_json(step / "config.json")
    if "model" not in data:
        return f"{step / 'config.json'} has no description of OLMo-core's"
    layers = sample_layers(base.config.n_layers)
    weights = DcpReader(step)
    try:
        try:
            oracle = _build(data["model"], layers, weights)
        except ImportError:
            return "the package ai2-olmo-core is not installed; next: .venv/bin/pip install -e '.[interop]' to compare"
        except Exception as error:  # its builder raises many kinds of errors, such as for a missing kernel
            return f"it does not build the model here: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        packed = pack_documents(documents, base)
        pack = Pack.of(packed)
        config = replace(base.config, vocab_size=weights.shape("embeddings.weight")[0])
        native = native_logits(config, weights, pack, layers)
        theirs = _logits(oracle, pack)
    finally:
        weights.close()
    difference, largest, agreement = differences(native, theirs, pack, str(step), config.window, _FAILURE)
    return LogitCheck(
        max_difference=difference,
        max_logit=largest,
        rounding_kl=None,
        argmax_agreement=agreement,
        documents=tuple(len(d) for d in packed),
        tokens=sum(len(d) for d in packed),
        rows=len(pack.compared),
        layers=len(layers),
        which=tuple(layers),
    )


def _build(described: dict[str, Any], layers: Sequence[int], weights: DcpReader) -> nn.Module:
    """OLMo-core's model with some of its layers, in fp32."""
    from olmo_core.nn.transformer import TransformerConfig  # start-up: the package takes seconds, and may be missing

    model: Any = TransformerConfig.from_dict(_plain(described)).build(init_device="meta")
    for key in set(model.blocks) - {str(layer) for layer in layers}:
        del model.blocks[key]
    model = model.to_empty(device="cpu").float()
    stored = {name: weights[name].float() for name in model.state_dict() if name in weights}
    if "lm_head.w_out.weight" not in stored:
        stored["lm_head.w_out.weight"] = stored["embeddings.weight"]
    model.load_state_dict(stored)
    made: nn.Module = model.eval()
    return made


def _plain(described: Any) -> Any:
    """A description without what needs a GPU."""
    if isinstance(described, list):
        return [_plain(value) for value in described]
    if not isinstance(described, dict):
        return described
    found = {}
    for name, value in described.items():
        if name in _PLAIN and not isinstance(value, dict | list):
            if not _PLAIN[name]:
                continue
            value = _PLAIN[name].get(value, value)
        found[name] = _plain(value)
    return found


@torch.inference_mode()
def _logits(model: nn.Module, pack: Pack) -> Tensor:
    """fp32 logits [R, V], every document alone: OLMo-core needs a GPU's kernel for packed ones."""
    found, edges = [], pack.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(edges):
        rows = pack.compared[(pack.compared >= start) & (pack.compared < stop)] - start
        found.append(model(pack.ids[None, start:stop])[0][rows])
    return torch.cat(found)
