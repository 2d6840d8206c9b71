"""The quantization_config of a base: which 8-bit floats with scales are read, and which form their scales have. Standard library only.

    read_quantisation(config)       # None for a base that is not quantised

Two forms are read: transformers' `fp8` (DeepSeek, Qwen 3), with one scale for each block of a matrix, and `compressed-tensors`
(vLLM's llm-compressor) where its weights are 8-bit floats. A weight is its 8-bit value times its scale. Everything else is
refused with its value. How activations are quantised says nothing about the weights, and training does not do it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft.recipe.config_reader import ConfigReader

_KEY = "quantization_config"
_ANOTHER = "choose the base whose weights are not quantised, or write a dequantised copy of it first"
_FORMATS = ("float-quantized", "naive-quantized")
WHOLE = (0, 0)
"""The block of a matrix that has a single scale."""
_USUAL = (128, 128)


@dataclass(frozen=True)
class Float8:
    """8-bit floats with scales. `blocks`: the rows and columns that share a scale, in every form that a tensor may have; 0 is all of them."""

    method: str
    blocks: tuple[tuple[int, int], ...]


def read_quantisation(config: ConfigReader) -> Float8 | None:
    """How the weights of a config are quantised. Raises SftError for a form that is not read."""
    found = config.get(_KEY)
    if found is None:
        return None
    method = found.get("quant_method", found) if isinstance(found, dict) else found
    if method not in ("fp8", "compressed-tensors"):
        config.refuse(
            _KEY, method, "unquantised weights, or 8-bit floats of the methods fp8 and compressed-tensors", _ANOTHER
        )
    table = config.nested(_KEY)
    table.get("quant_method")
    return _fp8(table) if method == "fp8" else _compressed(table)


def _fp8(table: ConfigReader) -> Float8:
    """transformers' FineGrainedFP8Config. Folders that AutoFP8 wrote have no weight_block_size, and one scale for a tensor."""
    _one_of(table, "fmt", (None, "e4m3", "e5m2"))
    _one_of(table, "scale_fmt", (None, "float", "ue8m0"))
    _one_of(table, "expert_dtype", (None, "fp8"))
    size = table.get("weight_block_size")
    if size is None:
        blocks = (WHOLE,) if "weight_block_size" in table.data else (WHOLE, _USUAL)
    else:
        blocks = (_block(table, "weight_block_size"),)
    table.refuse_rest(
        ("activation_scheme", "dequantize", "ignored_layers", "kv_cache_scheme", "modules_to_convert", "modules_to_not_convert")
    )  # fmt: skip
    return Float8("fp8", blocks)


def _compressed(table: ConfigReader) -> Float8:
    """The config of compressed-tensors. Every group of layers must have 8-bit floats, or weights that are not quantised."""
    _one_of(table, "format", _FORMATS)
    _one_of(table, "quantization_status", (None, "compressed", "frozen"))
    for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        value = table.get(name)
        dense = name == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"
        if value and not dense:
            table.refuse(name, value, "none: these weights are not the ones that the model computes with", _ANOTHER)
    groups = table.nested("config_groups")
    blocks = [block for name in groups.data if (block := _group(groups.nested(name))) is not None]
    if not blocks:
        table.refuse(
            "config_groups", groups.data, "a group with quantised weights", "remove quantization_config from it"
        )
    table.refuse_rest(("global_compression_ratio", "ignore", "kv_cache_scheme", "version"))
    return Float8("compressed-tensors", tuple(dict.fromkeys(blocks)))


def _group(group: ConfigReader) -> tuple[int, int] | None:
    """The block of a group's scales; None if its weights are not quantised."""
    _one_of(group, "format", (None, *_FORMATS))
    group.refuse_rest(("targets", "weights", "input_activations", "output_activations"))
    weights = group.table("weights")
    if weights is None:
        return None
    for name, wanted in (
        ("type", "float"),
        ("num_bits", 8),
        ("symmetric", True),
        ("dynamic", False),
        ("actorder", None),
    ):
        _one_of(weights, name, (wanted,) if name in ("type", "num_bits") else (wanted, None))
    strategy = _one_of(weights, "strategy", ("tensor", "channel", "group", "block"))
    weights.refuse_rest(("group_size", "block_structure", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"))
    if strategy == "block":
        return _block(weights, "block_structure")
    if strategy == "group":
        return 1, weights.whole("group_size")
    return WHOLE if strategy == "tensor" else (1, 0)


def _one_of(table: ConfigReader, name: str, allowed: tuple[object, ...]) -> str:
    value = table.get(name)
    if value not in allowed:
        named = " or ".join(repr(v) for v in allowed if v is not None) or "null"
        table.refuse(name, value, named, _ANOTHER)
    return str(value)


def _block(table: ConfigReader, name: str) -> tuple[int, int]:
    value = table.get(name)
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
        table.refuse(name, value, "two whole numbers above 0, rows and columns", "correct the base's config")
    return (value[0], value[1])
