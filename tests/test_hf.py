"""sft.model.hf: names, configurations and weight folders, against transformers itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sft.checkpoint.hf_folder import HfFolder
from sft.common.errors import SftError
from sft.model import hf
from sft.recipe.architecture import ModelConfig, Yarn
from sft.recipe.base_config import read_hf_config
from sft.recipe.presets import PRESETS

TINY2 = replace(
    PRESETS["olmo2-tiny"],
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=256,
)
TINY3 = replace(TINY2, n_layers=4, window=8, rope_scaling=Yarn(old_context=64))


def build(config: ModelConfig, vocab: int = 200) -> object:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = hf.hf_config(
            config,
            vocab_size=vocab,
            max_position_embeddings=512,
            dtype="float32",
            eos_token_id=3,
            pad_token_id=4,
        )
        return AutoModelForCausalLM.from_config(made)


QWEN3 = replace(PRESETS["qwen3-tiny"], n_layers=2, d_model=32, head_dim=16, intermediate_size=48, vocab_size=256)
LLAMA3 = replace(PRESETS["llama3-tiny"], n_layers=2, d_model=32, head_dim=8, intermediate_size=48, vocab_size=256)


@pytest.mark.parametrize(
    "config", [TINY2, TINY3, replace(QWEN3, tied=False), LLAMA3], ids=["olmo2", "olmo3", "qwen3", "llama3"]
)
def test_our_names_and_shapes_are_those_transformers_writes(
    config: ModelConfig,
) -> None:
    theirs = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    ours = {hf.family(config).theirs(name): shape for name, shape in hf.shapes(config, 200).items()}
    assert theirs == ours
    assert all(hf.family(config).theirs(hf.family(config).ours(name)) == name for name in theirs)


@pytest.mark.parametrize(
    "preset",
    [
        "olmo2-1b",
        "olmo2-7b",
        "olmo2-13b",
        "olmo3-7b",
        "olmo3-32b",
        "qwen3-0.6b",
        "qwen3-8b",
        "llama3.1-8b",
        "llama3.2-1b",
    ],
)
def test_a_config_survives_the_round_trip(preset: str) -> None:
    config = PRESETS[preset]
    made = hf.hf_config(
        config,
        vocab_size=config.vocab_size,
        max_position_embeddings=65536,
        dtype="bfloat16",
    )
    data = hf.config_json(made)
    assert read_hf_config(data, "config.json").config == config
    assert data["max_position_embeddings"] == 65536
    assert data["model_type"] == re.sub("3[.]", "", preset)[:5]
    elements = sum(torch.Size(shape).numel() for shape in hf.shapes(config).values())
    assert elements == config.parameters


def test_yarn_is_on_the_full_layers_only() -> None:
    rope = hf.hf_config(TINY3, vocab_size=200, max_position_embeddings=512, dtype="float32").rope_parameters
    assert rope["sliding_attention"]["rope_type"] == "default"
    assert rope["full_attention"]["rope_type"] == "yarn"
    assert rope["full_attention"]["attention_factor"] == pytest.approx(1.20794, abs=1e-5)


def test_another_rope_theta_reaches_windowed_and_full_layers() -> None:
    from transformers import Olmo3Config

    config = replace(TINY3, rope_theta=8e6)
    data = hf.config_json(hf.hf_config(config, vocab_size=200, max_position_embeddings=512, dtype="float32"))
    loaded = Olmo3Config(**json.loads(json.dumps(data)))
    assert {rope["rope_theta"] for rope in loaded.rope_parameters.values()} == {8e6}
    assert data["rope_theta"] == 8e6 and data["rope_scaling"]["rope_type"] == "yarn"


@pytest.mark.parametrize("shard", ["10GB", "20KB"], ids=["one file", "many files"])
@pytest.mark.parametrize("config", [TINY3, QWEN3, LLAMA3], ids=["olmo3", "qwen3, tied", "llama3"])
def test_a_folder_that_transformers_wrote_reads_back_under_our_names(
    tmp_path: Path, config: ModelConfig, shard: str
) -> None:
    model = build(config)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    weights = HfFolder(tmp_path)
    weights.check(config)
    state = dict(model.named_parameters())
    assert len(weights) == len(state)
    for name in weights:
        assert torch.equal(weights[name], state[hf.family(config).theirs(name)])
        assert weights.shape(name) == tuple(state[hf.family(config).theirs(name)].shape)
    with pytest.raises(SftError, match="tied"):
        weights.check(replace(config, tied=not config.tied))


def test_a_tied_head_that_is_there_twice_is_read_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build(QWEN3).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    HfFolder(tmp_path).check(QWEN3)


def test_a_folder_with_another_geometry_names_field_and_both_values(
    tmp_path: Path,
) -> None:
    build(TINY3).save_pretrained(tmp_path)
    weights = HfFolder(tmp_path)
    with pytest.raises(
        SftError,
        match=r"config.json: the recipe's \[model\] is not the base's(.|\n)*intermediate_size +48 +64 +hidden = 48",
    ):
        weights.check(replace(TINY3, intermediate_size=64))
    with pytest.raises(SftError, match=r"vocab_size +200 +128 +vocab_size = 200"):
        weights.check(replace(TINY3, vocab_size=128))


def test_a_llama_base_under_an_olmo_preset_is_refused(tmp_path: Path) -> None:
    llama = replace(LLAMA3, rope_scaling=None)
    build(llama).save_pretrained(tmp_path)
    olmo = replace(llama, prenorm=False, qk_norm="full")
    with pytest.raises(SftError, match=r"prenorm +True +False +remove preset\nqk_norm +'' +'full' +remove preset"):
        HfFolder(tmp_path).check(olmo)
    with pytest.raises(SftError, match=r"qk_norm +'' +'full'"):
        HfFolder(tmp_path).check(replace(olmo, prenorm=True))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    build(TINY3).save_pretrained(tmp_path, max_shard_size="20KB")
    victim = sorted(tmp_path.glob("model-*.safetensors"))[2]
    victim.unlink()
    with pytest.raises(SftError, match=victim.name):
        HfFolder(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    build(TINY3).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SftError, match=r"model\.safetensors: not readable"):
        HfFolder(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    build(TINY3).save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = "../../etc/model.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(SftError, match="not the plain name"):
        HfFolder(tmp_path)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(SftError, match="model_type: 'mamba'"):
        read_hf_config({"model_type": "mamba"}, "config.json")
