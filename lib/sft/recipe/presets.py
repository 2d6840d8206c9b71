"""Model architectures by name. Standard library only.

A preset is for random weights, and for planning before a base is at hand. A base's own config.json is what counts
(sft.recipe.resolve). presets.json has the published ones with repository and revision. `python -m sft.sync.published` writes it
from their config.json files. The tiny ones, for laptops, are here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sft.common.files import read_json
from sft.recipe.architecture import GatedDelta, ModelConfig

TABLE = Path(__file__).with_name("presets.json")
_ROWS = read_json(TABLE)
SOURCES = {name: f"config.json of {row['repo']} at {row['revision']}" for name, row in _ROWS.items()}
"""Where the figures of each published architecture stand."""
_PUBLISHED = {name: ModelConfig.from_value(row["architecture"]) for name, row in _ROWS.items()}


def _tiny(preset: str, kv_heads: int = 2, **changes: object) -> ModelConfig:
    """A small model of a published one's family. A vocab_size of 0 means the tokenizer's size, padded."""
    small = ModelConfig(4, 128, 4, kv_heads, 32, 384, 0)
    sizes = {name: getattr(small, name) for name in _SIZES}
    return replace(_PUBLISHED[preset], **{**sizes, **changes})


_SIZES = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "intermediate_size", "vocab_size")
PRESETS = {
    **_PUBLISHED,
    "olmo2-tiny": _tiny("olmo2-7b", 4),
    "olmo3-tiny": _tiny("olmo3-7b", window=64, rope_scaling=None),
    "olmo-hybrid-tiny": _tiny("olmo-hybrid-7b", 4, gated_delta=GatedDelta(4, 4, 24, 48)),
    "qwen3-tiny": _tiny("qwen3-8b", tied=True),
    "llama3-tiny": _tiny("llama3.1-8b"),
}
