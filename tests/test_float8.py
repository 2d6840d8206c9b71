"""Bases whose weights are 8-bit floats with scales are read as the values that they stand for; other quantisation is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bases
from sft.checkpoint.hf_folder import HfFolder
from sft.common.errors import SftError
from sft.export.convert import about_quantisation
from sft.recipe.base_config import BaseFacts, read_base, read_hf_config
from sft.recipe.schema import Convert

E4M3 = torch.float8_e4m3fn
FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 16],
}
WEIGHTS: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}


def compressed(**weights: Any) -> dict[str, Any]:
    """The quantization_config that llm-compressor writes."""
    group = {"targets": ["Linear"], "weights": WEIGHTS | weights, "output_activations": None,
             "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
            "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}, "version": "0.12.2"}  # fmt: skip


def spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """The scale of every value, in fp64."""
    return torch.kron(scales.double(), torch.ones(block, dtype=torch.float64))[: shape[0], : shape[1]]


def quantise(value: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """8-bit floats and their scales, one for each block; 0 means all rows or columns."""
    height, width = block[0] or value.shape[0], block[1] or value.shape[1]
    rows = [[part.abs().max() / 448 for part in band.split(width, 1)] for band in value.split(height)]
    scales = torch.stack([torch.stack(row) for row in rows]).to(dtype)
    return (value.double() / spread(scales, tuple(value.shape), (height, width))).to(E4M3), scales


def write(
    folder: Path, config: dict[str, Any], block: tuple[int, int], suffix: str = "_inv", scale_shape: str = "grid",
    dtype: torch.dtype = torch.float32, name: str = "llama2",
) -> dict[str, Tensor]:  # fmt: skip
    """A base whose projections are quantised. Returns the values that they stand for, computed in fp64."""
    from safetensors.torch import load_file, save_file

    bases.write(folder, name)
    made, meant = {}, {}
    for key, value in load_file(folder / "model.safetensors").items():
        made[key] = meant[key] = value
        if "_proj" in key:
            made[key], scales = quantise(value, block, dtype)
            height, width = block[0] or value.shape[0], block[1] or value.shape[1]
            meant[key] = (made[key].double() * spread(scales, tuple(value.shape), (height, width))).float()
            made[f"{key}_scale{suffix}"] = {"grid": scales, "row": scales[:, 0], "one": scales[0, 0]}[
                scale_shape
            ].clone()
    save_file(made, folder / "model.safetensors")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return meant


def check(folder: Path, meant: dict[str, Tensor]) -> list[str]:
    """Every tensor is what it stands for, whole and in parts. Returns the notes."""
    base = read_base(folder)
    assert base is not None
    weights = HfFolder(folder)
    weights.check(base.config)
    for name, value in meant.items():
        parts = [weights[ours] for ours in weights.family.parts(name)]
        assert torch.equal(torch.cat(parts), value), name
        assert torch.equal(weights.rows(weights.family.ours(name), 5, 19), value[5:19]), name
    return weights.notes


@pytest.mark.parametrize(
    ("config", "block", "options", "note"),
    [
        (FP8, (16, 16), {}, "28 tensors of 8-bit floats dequantised to fp32 (fp8, a scale for each block of 16 x 16)"),
        (FP8 | {"weight_block_size": [32, 20]}, (32, 20), {}, "block of 32 x 20"),  # the last blocks are smaller
        (FP8 | {"scale_fmt": "ue8m0"}, (16, 16), {"dtype": torch.float8_e8m0fnu}, "block of 16 x 16"),
        (FP8 | {"weight_block_size": None}, (0, 0), {"scale_shape": "one"}, "a scale for each tensor"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, (0, 0), {"suffix": "", "scale_shape": "row"}, "each tensor"),
        (compressed(), (1, 0), {"suffix": ""}, "(compressed-tensors, a scale for each row)"),
        (compressed(), (1, 0), {"suffix": "", "dtype": torch.bfloat16, "scale_shape": "row"}, "a scale for each row"),
        (compressed(strategy="tensor"), (0, 0), {"suffix": "", "scale_shape": "row"}, "a scale for each tensor"),
        (compressed(strategy="block", block_structure=[16, 16]), (16, 16), {"suffix": ""}, "block of 16 x 16"),
        (compressed(strategy="group", group_size=16), (1, 16), {"suffix": ""}, "block of 1 x 16"),
    ],
)  # fmt: skip
def test_weights_are_the_products_of_values_and_scales(
    tmp_path: Path, config: dict[str, Any], block: tuple[int, int], options: dict[str, Any], note: str
) -> None:
    notes = check(tmp_path, write(tmp_path, config, block, **options))
    assert any(note in line for line in notes), notes
    assert "11 tensors are not quantised" in notes


def test_a_fused_matrix_is_dequantised_before_it_is_divided(tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, FP8 | {"weight_block_size": [32, 16]}, (32, 16), name="phi3"))


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_transformers_own_dequantisation(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    """compressed-tensors is no package of this project: put a folder with it on the path."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        write(tmp_path, compressed(), (1, 0), suffix="", dtype=dtype)
        how: Any = CompressedTensorsConfig(dequantize=True)
    else:
        write(tmp_path, FP8, (16, 16))
        how = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=how).eval()
    weights = HfFolder(tmp_path)
    found = {name: value.detach() for name, value in theirs.named_parameters()}
    for name, value in found.items():
        assert torch.equal(weights[weights.family.ours(name)].to(dtype), value.to(dtype)), name
    assert len(found) == len(weights)
    weights.close()


def test_the_gate_compares_the_dequantised_base_with_transformers_class(tmp_path: Path) -> None:
    from sft.export.base_gate import check_base

    write(tmp_path, FP8, (16, 16))
    base = read_base(tmp_path)
    assert base is not None
    found = check_base(tmp_path, base, [list(range(5, 90))])
    assert found.max_difference < 1e-4 * found.max_logit


def test_an_export_is_not_quantised_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, FP8, (16, 16))
    base = read_base(tmp_path)
    assert base is not None and base.facts.quantised == "fp8"
    kept = BaseFacts(**base.facts.to_value())
    assert about_quantisation(Convert(), kept) == [
        "the base's weights were quantised (fp8) and dequantised for training: the export is bfloat16, and its config.json has"
        " no quantization_config"
    ]
    assert about_quantisation(Convert(), BaseFacts()) == [] and "quantised" not in BaseFacts().to_value()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config: 'gptq', expected unquantised weights, or 8-bit floats of"),
        ({"quant_method": "awq", "bits": 4}, "'awq', expected"),
        ({}, "quantization_config: {}, expected unquantised"),
        ({"quant_method": "mxfp4"}, "'mxfp4', expected"),
        ({"quant_method": "modelopt"}, "'modelopt', expected .*; next: choose the base whose weights are not quantised"),
        ({"load_in_8bit": True}, "{'load_in_8bit': True}, expected"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size: \[128\], expected two whole numbers above 0"),
        (FP8 | {"expert_dtype": "fp4"}, "quantization_config: expert_dtype: 'fp4', expected 'fp8'"),
        (FP8 | {"unheard_of": 1}, "quantization_config: unheard_of: 1, not supported"),
        (compressed(num_bits=4, type="int"), "group_0: weights: type: 'int', expected 'float'"),
        (compressed(num_bits=4), "num_bits: 4, expected 8"),
        (compressed(symmetric=False), "symmetric: False, expected True"),
        (compressed(strategy="token"), "strategy: 'token', expected 'tensor' or 'channel'"),
        (compressed() | {"format": "pack-quantized"}, "format: 'pack-quantized', expected 'float-quantized'"),
        (compressed() | {"format": "nvfp4-pack-quantized"}, "format: 'nvfp4-pack-quantized'"),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: .*sparse-24"),
        (compressed() | {"transform_config": {"config_groups": {"u": 1}}}, "transform_config: "),
        (compressed() | {"config_groups": {}}, "no field 'config_groups'"),
    ],
)  # fmt: skip
def test_other_quantisation_is_refused_with_key_and_value(config: dict[str, Any], message: str) -> None:
    data = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 100, "quantization_config": config}  # fmt: skip
    with pytest.raises(SftError, match=f"base/config.json: .*{message}"):
        read_hf_config(data, "base/config.json")


PROJECTION = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != f"{PROJECTION}_scale_inv"},
         f"{PROJECTION}: float8_e4m3fn without {PROJECTION}_scale_inv or"),
        (lambda t: t | {f"{PROJECTION}_scale_inv": torch.ones(2, 3)}, r"shape \[2, 3\], expected \[3, 3\] for a weight of \[48, 48\]"),
        (lambda t: t | {f"{PROJECTION}_scale": torch.ones(3, 3)}, "scale one weight"),
        (lambda t: t | {PROJECTION: torch.ones(48, 48)}, r"float32 \[48, 48\], expected a matrix of 8-bit floats"),
        (lambda t: {k: v for k, v in t.items() if k != PROJECTION}, "no file has the weight that it scales"),
        (lambda t: {k: v.float() for k, v in t.items() if "_scale" not in k}, "'fp8', but no tensor has 8-bit floats"),
        (lambda t: t | {f"{PROJECTION}_packed": torch.ones(2)}, "_packed: belongs to quantised weights"),
    ],
)  # fmt: skip
def test_scales_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    from safetensors.torch import load_file, save_file

    write(tmp_path, FP8, (16, 16))
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "changed.safetensors")
    (tmp_path / "changed.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(SftError, match=message):
        HfFolder(tmp_path)


def test_scales_of_activations_and_caches_are_ignored_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write(tmp_path, FP8 | {"activation_scheme": "static"}, (16, 16))
    more = {
        "model.layers.0.self_attn.q_proj.input_scale": torch.ones(1),
        "model.layers.1.self_attn.k_scale": torch.ones(1),
    }
    save_file(load_file(tmp_path / "model.safetensors") | more, tmp_path / "model.safetensors")
    notes = HfFolder(tmp_path).notes
    assert "1 tensors ignored: scales of activations, which training does not quantise" in notes
    assert "1 tensors ignored: scales of a key-value cache, which training does not have" in notes
