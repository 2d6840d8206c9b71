"""Tiny bases of every family, as transformers writes them, with the settings that published configurations have."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.recipe.base_config import Base, read_hf_config

ROWS = 96
SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": ROWS, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": 3,
    "pad_token_id": 4,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
}  # fmt: skip
YARN_ALL = YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.8, "mscale_all_dim": 1.2, "truncate": False}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0],
        "original_max_position_embeddings": 64}  # fmt: skip
PHI = {
    "rope_parameters": LONG | {"partial_rotary_factor": 0.5, "rope_theta": 1e4},
    "original_max_position_embeddings": 64,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("olmo2", {}),
    "olmo2 biases": ("olmo2", {"attention_bias": True}),
    "olmo3": ("olmo3", {"sliding_window": 16}),
    "olmo3 yarn": ("olmo3", {"sliding_window": 16, "rope_parameters": {"full_attention": {**YARN, "rope_theta": 1e4},
                                                                       "sliding_attention": {"rope_theta": 1e4}}}),
    "olmo3 yarn everywhere": ("olmo3", {"sliding_window": 16, "rope_parameters": {
        "full_attention": {**YARN, "rope_theta": 5e5}, "sliding_attention": {**YARN, "rope_theta": 5e5}}}),
    "olmo3 other layers": ("olmo3", {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"] * 2}),
    "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5, "tie_word_embeddings": True}),
    "llama head_dim": ("llama", {"head_dim": 16, "rms_norm_eps": 1e-5}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64}),
    "llama longrope": ("llama", {"rope_scaling": LONG | {"short_factor": [1.0] * 6, "long_factor": [3.0] * 6}}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_theta": 1e5, "rope_scaling": None}),
    "smollm3": ("smollm3", {"rope_theta": 5e6}),
    "smollm3 windows": ("smollm3", {**WINDOWS, "no_rope_layers": [1, 0, 1, 1], "attention_bias": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2 windows": ("qwen2", {**WINDOWS, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 yarn": ("qwen3", {"head_dim": 16, "rope_scaling": YARN_ALL, "rope_theta": 1e6}),
    "qwen3 windows, yarn": ("qwen3", {"head_dim": 16, **WINDOWS, "max_window_layers": 1, "rope_scaling": YARN}),
    "olmo hybrid": ("olmo_hybrid", {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": None}}),
    "olmo hybrid, rope": ("olmo_hybrid", {"linear_num_key_heads": 2, "linear_allow_neg_eigval": False, "attention_bias": True,
                                          "linear_conv_kernel_dim": 3, "rope_parameters": YARN | {"rope_theta": 1e4},
                                          "layer_types": ["full_attention", "linear_attention"] * 2}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral window": ("mistral", {"sliding_window": 16}),
    "phi3": ("phi3", {"sliding_window": 16}),
    "phi4 mini": ("phi3", {**PHI, "tie_word_embeddings": True}),
}  # fmt: skip


def model(name: str, seed: int = 0) -> Any:
    """transformers' model of a case, with norms and biases off their initial values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **json.loads(json.dumps(SIZES | changes)))
        made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def give_olmo_core_kernels(patch: pytest.MonkeyPatch) -> None:
    """Gives OLMo-core, which needs Triton to build a Gated DeltaNet, transformers' versions in PyTorch of the kernels."""
    from olmo_core.nn import convolution
    from olmo_core.nn.attention import recurrent
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid as plain

    class Norm(plain.OlmoHybridRMSNormGated):  # type: ignore[misc]
        def __init__(self, size: int, eps: float, device: object) -> None:
            super().__init__(size, eps)

    def convolve(x: torch.Tensor, weight: torch.Tensor, activation: str, **_: object) -> list[torch.Tensor]:
        return [plain.causal_conv1d_fn(x.transpose(1, 2), weight, None, activation).transpose(1, 2).contiguous()]

    def rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: None, **rest: Any) -> Any:
        return [x if x is None else x.contiguous() for x in plain.torch_chunk_gated_delta_rule(q, k, v, **rest)]

    for name in ("fla", "fla.modules"):
        patch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fla.modules"].FusedRMSNormGated = Norm  # type: ignore[attr-defined]
    patch.setattr(recurrent, "has_fla", lambda: True)
    patch.setattr(recurrent, "dispatch_chunk_gated_delta_rule", rule)
    patch.setattr(convolution, "dispatch_causal_conv1d", convolve)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the two flat rotary keys of published models, where that form can express it."""
    rope = config.get("rope_parameters")
    if rope is None or "full_attention" in rope:
        return config
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    rest = {k: v for k, v in config.items() if k != "rope_parameters"}
    if "partial_rotary_factor" in rope:
        rest["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return rest | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
    }


def write(folder: Path, name: str, old_form: bool = False) -> None:
    """A case's model as transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in saved(name).items():
        (folder / file).write_bytes(content)
    if old_form:
        config = folder / "config.json"
        config.write_text(json.dumps(flat(json.loads(config.read_text()))))


@functools.cache
def saved(name: str) -> dict[str, bytes]:
    """The files of a case. Most tests need them, and transformers takes a tenth of a second to make them."""
    with tempfile.TemporaryDirectory() as folder:
        model(name).save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def read(**changes: Any) -> Base:
    """What the config.json LLAMA says with these changes."""
    return read_hf_config(LLAMA | changes, "base/config.json")
