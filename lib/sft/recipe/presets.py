"""Model architectures by name, and their number of parameters. Standard library only.

A preset is for random weights, and for planning before a base is at hand. A base's own config.json is what counts
(sft.recipe.resolve). SOURCES says where the figures of each preset stand. tests/test_model.py compares them with OLMo-core's.
"""

from __future__ import annotations

from dataclasses import replace

from sft.recipe.architecture import GatedDelta, Llama3Rope, ModelConfig, Yarn

_OLMO2_7B = ModelConfig(32, 4096, 32, 32, 128, 11008, 100352)
_OLMO3_7B = replace(_OLMO2_7B, window=4096, rope_scaling=Yarn())
_QWEN3_8B = ModelConfig(
    36, 4096, 32, 8, 128, 12288, 151936, rope_theta=1e6, prenorm=True, qk_norm="head"
)  # fmt: skip
_LLAMA3_8B = ModelConfig(
    32, 4096, 32, 8, 128, 14336, 128256, norm_eps=1e-5, prenorm=True, qk_norm="", rope_scaling=Llama3Rope()
)  # fmt: skip
_HYBRID_7B = ModelConfig(
    32, 3840, 30, 30, 128, 11008, 100352, rope_layers=(False,), gated_delta=GatedDelta(30, 30, 96, 192)
)  # fmt: skip
PRESETS = {
    "olmo2-1b": ModelConfig(16, 2048, 16, 16, 128, 8192, 100352),
    "olmo2-7b": _OLMO2_7B,
    "olmo2-13b": ModelConfig(40, 5120, 40, 40, 128, 13824, 100352),
    "olmo2-32b": ModelConfig(64, 5120, 40, 8, 128, 27648, 100352),
    "olmo3-7b": _OLMO3_7B,
    "olmo3-32b": ModelConfig(64, 5120, 40, 8, 128, 27648, 100352, window=4096, rope_scaling=Yarn()),
    "olmo-hybrid-7b": _HYBRID_7B,
    "qwen3-0.6b": replace(_QWEN3_8B, n_layers=28, d_model=1024, n_heads=16, intermediate_size=3072, tied=True),
    "qwen3-1.7b": replace(_QWEN3_8B, n_layers=28, d_model=2048, n_heads=16, intermediate_size=6144, tied=True),
    "qwen3-4b": replace(_QWEN3_8B, d_model=2560, intermediate_size=9728, tied=True),
    "qwen3-8b": _QWEN3_8B,
    "llama3.1-8b": _LLAMA3_8B,
    "llama3.2-1b": replace(
        _LLAMA3_8B,
        n_layers=16,
        d_model=2048,
        head_dim=64,
        intermediate_size=8192,
        tied=True,
        rope_scaling=Llama3Rope(factor=32.0),
    ),
    # Tiny models for laptops. A vocab_size of 0 means the tokenizer's size, padded to a multiple of 128.
    "olmo2-tiny": ModelConfig(4, 128, 4, 4, 32, 384, 0),
    "olmo3-tiny": ModelConfig(4, 128, 4, 2, 32, 384, 0, window=64),
    "olmo-hybrid-tiny": replace(
        _HYBRID_7B,
        n_layers=4,
        d_model=128,
        n_heads=4,
        n_kv_heads=4,
        head_dim=32,
        intermediate_size=384,
        vocab_size=0,
        gated_delta=GatedDelta(4, 4, 24, 48),
    ),
    "qwen3-tiny": replace(
        _QWEN3_8B,
        n_layers=4,
        d_model=128,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        intermediate_size=384,
        vocab_size=0,
        tied=True,
    ),
    "llama3-tiny": replace(
        _LLAMA3_8B, n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, intermediate_size=384, vocab_size=0
    ),
}

_OLMO_CORE = "ai2-olmo-core 3.0.0 (PyPI), olmo_core/nn/transformer/config.py"
_COPIES = "github.com/citsjtu2020/LLM-Prof at 8434c8d19c396b2f95d92a67845a7c0a0e0dd512, sglang/Model_Config.md"
_YARN = "YaRN: github.com/allenai/OLMo-core at 66f768b, src/scripts/official/OLMo3/OLMo-3-1025-7B-long-context.py; 32B alike"
SOURCES = {
    "olmo2-1b": f"{_OLMO_CORE}, olmo2_1B_v2",
    "olmo2-7b": f"{_OLMO_CORE}, olmo2_7B",
    "olmo2-13b": f"{_OLMO_CORE}, olmo2_13B; config.json of allenai/OLMo-2-1124-13B, a copy in"
    " github.com/mauer4/Attention-From-Scratch at 381a295f1d0697f36e21decfafef5ed74006ae94",
    "olmo2-32b": f"{_OLMO_CORE}, olmo2_32B",
    "olmo3-7b": f"{_OLMO_CORE}, olmo3_7B; {_YARN}",
    "olmo3-32b": f"{_OLMO_CORE}, olmo3_32B; {_YARN}",
    "olmo-hybrid-7b": "defaults of OlmoHybridConfig in transformers 5.23.0, which names allenai/Olmo-Hybrid-7B; without"
    " positions as src/scripts/train/sft/Olmo-3-Hybrid-7B-SFT.py in github.com/allenai/OLMo-core",
    "qwen3-0.6b": f"{_OLMO_CORE}, qwen3_0_6B",
    "qwen3-1.7b": f"{_OLMO_CORE}, qwen3_1_7B",
    "qwen3-4b": f"{_OLMO_CORE}, qwen3_4B; config.json of Qwen/Qwen3-4B, a copy in {_COPIES}",
    "qwen3-8b": f"{_OLMO_CORE}, qwen3_8B; config.json of Qwen/Qwen3-8B, a copy in {_COPIES}",
    "llama3.1-8b": f"config.json of meta-llama/Llama-3.1-8B, a copy in {_COPIES}",
    "llama3.2-1b": "config.json of meta-llama/Llama-3.2-1B at 4e20de362430cd3b72f300e6b0f18e50e7166e08, a copy in"
    " github.com/kevinstephano/thunder_model_blocks, hf_llama/llama_config.py",
}
"""Where the figures of each published architecture were read. Tiny presets are this project's own."""
