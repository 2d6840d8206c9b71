"""Steps that OLMo-core's own trainer saved, by one, two and four ranks: our export of them against its converter, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_export
import training
from patience import PATIENCE
from sft.checkpoint import olmo_core
from sft.checkpoint.dcp_reader import DcpReader
from sft.checkpoint.hf_folder import HfFolder
from sft.checkpoint.olmo_core import step_config
from sft.common.files import read_json
from sft.export import olmo_core_steps
from sft.recipe.architecture import ModelConfig
from sft.recipe.schema import Convert

pytestmark = pytest.mark.processes

MODELS = {
    "olmo2": tiny_export.OLMO2,
    "olmo3": replace(tiny_export.OLMO3, n_layers=4),
    "qwen3": tiny_export.QWEN3,  # tied
    "llama3": tiny_export.LLAMA3,
}
RANKS = {"olmo2": (2,), "olmo3": (1, 4), "qwen3": (1,), "llama3": (1,)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<model>/<ranks>/step2, the tokenizer beside it."""
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    root = tmp_path_factory.mktemp("trainer")
    for name, config in MODELS.items():
        for ranks in RANKS[name]:
            facts = tiny_export.tokenizer(root / name / str(ranks) / "tokenizer")
            described = json.dumps(step_config(config, facts.ids))
            (root / name / str(ranks) / "config.json").write_text(described)
    import core_trainer

    process = training.SERVER.Process(target=core_trainer.main, args=(root,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, root.with_suffix(".log").read_text()[-6000:]
    return root


def export(step: Path, out: Path, dtype: str = "bfloat16") -> dict[str, Any]:
    options = Convert(dtype=dtype, max_position_embeddings=9000)
    return olmo_core_steps.to_hf(str(step), str(out), options, "", "tokenizer", out.parent / "cache", lambda _: None)


def values(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype == torch.bfloat16, name
        assert torch.equal(value.view(torch.int16), theirs[name].view(torch.int16)), name


@pytest.mark.parametrize(("name", "ranks"), [("olmo2", 2), ("olmo3", 1), ("olmo3", 4)])
def test_our_bf16_export_of_a_sharded_step_is_theirs_bit_for_bit(
    trained: Path, tmp_path: Path, name: str, ranks: int
) -> None:
    from olmo_core.config import DType
    from olmo_core.nn.hf.convert_checkpoint import convert_checkpoint_to_hf, load_config

    step = trained / name / str(ranks) / "step2"
    assert len(list((step / "model_and_optim").glob("*.distcp"))) >= ranks
    report = export(step, tmp_path / "ours")
    assert report.summary.rounding_kl > 0
    described = load_config(str(step))
    assert described is not None
    convert_checkpoint_to_hf(
        original_checkpoint_path=step,
        output_path=tmp_path / "theirs",
        transformer_config_dict=described["model"],
        tokenizer_config_dict=described["dataset"]["tokenizer"],
        dtype=DType.bfloat16,
        max_sequence_length=9000,
        validate=False,
    )
    same(values(tmp_path / "ours"), values(tmp_path / "theirs"))
    made, known = (read_json(tmp_path / who / "config.json") for who in ("ours", "theirs"))
    for field in known.keys() - {"transformers_version", "rope_parameters", "rope_scaling", "eos_token_id"}:
        assert made.get(field) == known[field], field


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_other_families_steps_have_the_names_and_bits_of_their_state_converter(
    trained: Path, tmp_path: Path, name: str
) -> None:
    """OLMo-core's whole converter knows no configuration of these; its conversion of states does."""
    from olmo_core.nn.hf.convert import convert_state_to_hf
    from transformers import AutoConfig

    step = trained / name / str(*RANKS[name]) / "step2"
    export(step, tmp_path / "ours")
    state = {key: value.bfloat16() for key, value in DcpReader(step).items()}
    theirs = convert_state_to_hf(AutoConfig.from_pretrained(tmp_path / "ours"), state)
    rows = HfFolder(tmp_path / "ours").config["vocab_size"]
    theirs = {k: v[:rows] if k in ("model.embed_tokens.weight", "lm_head.weight") else v for k, v in theirs.items()}
    if MODELS[name].tied:
        assert torch.equal(theirs.pop("lm_head.weight"), theirs["model.embed_tokens.weight"])
    same(values(tmp_path / "ours"), theirs)


def test_the_number_of_ranks_leaves_no_trace_in_an_export(trained: Path, tmp_path: Path) -> None:
    """The same weights, saved by one rank and by four."""
    four = trained / "olmo3" / "4" / "step2"
    export(four, tmp_path / "four", "float32")
    olmo_core_steps.to_core(str(tmp_path / "four"), str(tmp_path / "step0"), tmp_path / "cache", lambda _: None)
    export(tmp_path / "step0", tmp_path / "one", "float32")
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "four" / file).read_bytes()


@pytest.mark.parametrize(
    ("theirs", "preset"),
    [("olmo2_1B_v2", "olmo2-1b"), ("olmo2_7B", "olmo2-7b"), ("olmo2_13B", "olmo2-13b"), ("olmo2_32B", "olmo2-32b"),
     ("olmo3_7B", "olmo3-7b"), ("olmo3_32B", "olmo3-32b"), ("qwen3_0_6B", "qwen3-0.6b"), ("qwen3_8B", "qwen3-8b"),
     ("llama3_8B", "llama3.1-8b")],
)  # fmt: skip
def test_their_own_description_of_a_model_is_read_as_our_preset(tmp_path: Path, theirs: str, preset: str) -> None:
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    from olmo_core.nn.transformer import TransformerConfig

    from sft.recipe.presets import PRESETS

    wanted = PRESETS[preset]
    made = getattr(TransformerConfig, theirs)(vocab_size=wanted.vocab_size).as_config_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model": made}))
    found = olmo_core.config_of_step(tmp_path / "config.json")
    scaled = ("rope_scaling", "init_std")  # of a finetuned model's context, which a factory does not know

    def plain(config: ModelConfig) -> ModelConfig:
        return replace(config, **{name: getattr(wanted, name) for name in scaled})

    assert plain(found) == plain(wanted)
