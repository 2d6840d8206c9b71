"""What the config.json files of published models say, without the keys that do not describe the model.

Written down from copies of the files. `python -m sft.sync.published` reads the hub's own; the sizes are compared with OLMo-core's
descriptions of the models, too (test_model.py).
"""

from __future__ import annotations

from typing import Any

_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0, "beta_slow": 1.0,
         "attention_factor": 1.2079441541679836}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip


def _config(kind: str, layers: int, d: int, heads: int, kv: int, hidden: int, rows: int, **rest: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": d,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": hidden,
        "vocab_size": rows,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        **rest,
    }


def _olmo2(layers: int, d: int, heads: int, kv: int, hidden: int) -> dict[str, Any]:
    return _config(
        "olmo2",
        layers,
        d,
        heads,
        kv,
        hidden,
        100352,
        max_position_embeddings=4096,
        rope_theta=500000,
        rope_scaling=None,
    )


def _olmo3(layers: int, d: int, heads: int, kv: int, hidden: int) -> dict[str, Any]:
    types = (["sliding_attention"] * 3 + ["full_attention"]) * (layers // 4)
    return _config(
        "olmo3", layers, d, heads, kv, hidden, 100278, max_position_embeddings=65536, rope_theta=500000,
        rope_scaling=dict(_YARN), sliding_window=4096, layer_types=types,
    )  # fmt: skip


def _qwen3(layers: int, d: int, heads: int, hidden: int, tied: bool) -> dict[str, Any]:
    return _config(
        "qwen3", layers, d, heads, 8, hidden, 151936, head_dim=128, max_position_embeddings=40960, rope_theta=1000000,
        rope_scaling=None, sliding_window=None, use_sliding_window=False, max_window_layers=layers, tie_word_embeddings=tied,
        bos_token_id=151643, eos_token_id=151645,
    )  # fmt: skip


def _llama3(layers: int, d: int, hidden: int, **rest: Any) -> dict[str, Any]:
    return _config(
        "llama", layers, d, 32, 8, hidden, 128256, max_position_embeddings=131072, rope_theta=500000.0, mlp_bias=False,
        rms_norm_eps=1e-5, bos_token_id=128000, eos_token_id=128001, **rest,
    )  # fmt: skip


PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "olmo2-1b": ("allenai/OLMo-2-0425-1B", "a1847dff35000b4271fa70afc5db10fd29fedbdf", _olmo2(16, 2048, 16, 16, 8192)),
    "olmo2-7b": ("allenai/OLMo-2-1124-7B", "7df9a82518afdecae4e8c026b27adccc8c1f0032", _olmo2(32, 4096, 32, 32, 11008)),
    "olmo2-13b": (
        "allenai/OLMo-2-1124-13B",
        "3fefddc1bf18a30e1d9b91000271630718f2aa8b",
        _olmo2(40, 5120, 40, 40, 13824),
    ),
    "olmo2-32b": (
        "allenai/OLMo-2-0325-32B",
        "cc9d3cf9c7230b86ee6b84607b37db1c01e3f1ed",
        _olmo2(64, 5120, 40, 8, 27648),
    ),
    "olmo3-7b": ("allenai/Olmo-3-1025-7B", "a81bae42db3975be1671e27b9c9a56da1a9f980f", _olmo3(32, 4096, 32, 32, 11008)),
    "olmo3-32b": (
        "allenai/Olmo-3-1125-32B",
        "c2b61dae89a1ad10e4ad5653d0e46b590902607b",
        _olmo3(64, 5120, 40, 8, 27648),
    ),
    "olmo-hybrid-7b": (
        "allenai/Olmo-Hybrid-7B",
        "4f1cc566f9fdf3ce68da2ab6a788a83d89896dcf",
        _config(
            "olmo_hybrid",
            32,
            3840,
            30,
            30,
            11008,
            100352,
            max_position_embeddings=65536,
            rope_parameters={"rope_theta": None},
            layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 8,
            linear_num_key_heads=30,
            linear_num_value_heads=30,
            linear_key_head_dim=96,
            linear_value_head_dim=192,
            linear_conv_kernel_dim=4,
            linear_allow_neg_eigval=True,
        ),
    ),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "c1899de289a04d12100db370d81485cdf75e47ca", _qwen3(28, 1024, 16, 3072, True)),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", _qwen3(28, 2048, 16, 6144, True)),
    "qwen3-4b": ("Qwen/Qwen3-4B", "1cfa9a7208912126459214e8b04321603b3df60c", _qwen3(36, 2560, 32, 9728, True)),
    "qwen3-8b": ("Qwen/Qwen3-8B", "b968826d9c46dd6066d109eabc6255188de91218", _qwen3(36, 4096, 32, 12288, False)),
    "llama3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
        _llama3(32, 4096, 14336, rope_scaling=dict(_LLAMA3)),
    ),
    "llama3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        "4e20de362430cd3b72f300e6b0f18e50e7166e08",
        _llama3(16, 2048, 8192, head_dim=64, rope_scaling=_LLAMA3 | {"factor": 32.0}, tie_word_embeddings=True),
    ),
}
"""{preset: (repository, revision, config.json)}"""
