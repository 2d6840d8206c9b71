"""sft.export.olmo_core_steps: OLMo-core's own checkpoints become folders that transformers loads, folders become its checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import tiny_export
from gcs_server import Server
from sft.checkpoint import olmo_core
from sft.checkpoint.dcp_reader import DcpReader
from sft.checkpoint.hf_folder import HfFolder
from sft.checkpoint.olmo_core import step_config
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.export import olmo_core_steps, step_writer
from sft.formats.dataset import TokenIds, TokenizerFacts
from sft.formats.steps import METADATA
from sft.model import hf
from sft.recipe.architecture import ModelConfig
from sft.recipe.base_config import longest_input
from sft.recipe.core_config import NamedTokens
from sft.recipe.schema import Convert
from tiny_export import LLAMA3, OLMO2, OLMO3, QWEN3

OLMO3 = replace(OLMO3, n_layers=4)
FAMILIES = pytest.mark.parametrize("config", [OLMO2, OLMO3], ids=["olmo2", "olmo3 with YaRN"])


def quiet(_: str) -> None:
    pass


def their_step(root: Path, config: ModelConfig) -> tuple[Path, TokenizerFacts]:
    """A step as OLMo-core's trainer writes it, its tokenizer beside it."""
    pytest.importorskip("olmo_core")
    from olmo_core.distributed.checkpoint import save_model_and_optim_state
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.train.checkpoint import CheckpointMetadata

    facts = tiny_export.tokenizer(root / "tokenizer")
    described = step_config(config, facts.ids)
    model = TransformerConfig.from_dict(described["model"]).build(init_device="cpu")
    model.load_state_dict(tiny_export.weights(config))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    step = root / "step7"
    save_model_and_optim_state(step / "model_and_optim", model, optimizer)
    (step / "config.json").write_text(json.dumps(described))
    (step / METADATA).write_text(json.dumps(CheckpointMetadata().as_config_dict()))
    return step, facts


@pytest.mark.seconds
@FAMILIES
def test_a_step_of_their_trainer_converts_to_what_their_converter_makes_bit_for_bit(
    tmp_path: Path, config: ModelConfig
) -> None:
    from olmo_core.nn.hf.convert_checkpoint import convert_checkpoint_to_hf, load_config
    from safetensors.torch import load_file

    step, _ = their_step(tmp_path, config)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    options = Convert(dtype="float32", max_position_embeddings=512)
    report = olmo_core_steps.to_hf(str(step), str(ours), options, "", "tokenizer", tmp_path / "cache", quiet)
    assert report.tensors.count == len(hf.shapes(config))
    described = load_config(str(step))
    assert described is not None
    convert_checkpoint_to_hf(
        original_checkpoint_path=step,
        output_path=theirs,
        transformer_config_dict=described["model"],
        tokenizer_config_dict=described["dataset"]["tokenizer"],
        max_sequence_length=512,
        validate=False,
    )
    a = load_file(ours / "model.safetensors")
    b = {k: v for file in theirs.glob("*.safetensors") for k, v in load_file(file).items()}
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.shape == b[name].shape and torch.equal(value, b[name].float()), name
    made, known = read_json(ours / "config.json"), read_json(theirs / "config.json")
    for field in ("model_type", "vocab_size", "sliding_window", "layer_types", "num_key_value_heads", "rms_norm_eps"):
        assert made.get(field) == known.get(field), field
    assert not list(ours.parent.glob(".ours*"))


@pytest.mark.seconds
@FAMILIES
def test_a_folder_becomes_a_step_that_olmo_core_loads_and_that_converts_back(
    tmp_path: Path, config: ModelConfig
) -> None:
    pytest.importorskip("olmo_core")
    from olmo_core.distributed.checkpoint import load_model_and_optim_state
    from olmo_core.nn.transformer import TransformerConfig

    step, _ = their_step(tmp_path / "a", config)
    folder, base, again = tmp_path / "hf", tmp_path / "step0", tmp_path / "again"
    options = Convert(dtype="float32", max_position_embeddings=512)
    cache = tmp_path / "cache"
    olmo_core_steps.to_hf(str(step), str(folder), options, "", "tokenizer", cache, quiet)
    olmo_core_steps.to_core(str(folder), str(base), cache, quiet)
    model = TransformerConfig.from_dict(read_json(base / "config.json")["model"]).build(init_device="cpu")
    load_model_and_optim_state(base / "model_and_optim", model)
    rows = read_json(folder / "config.json")["vocab_size"]
    for name, value in DcpReader(step).items():
        found = model.state_dict()[name]
        kept = rows if name in hf.VOCAB_ROWS else len(value)
        assert torch.equal(found[:kept], value[:kept]) and not found[kept:].any(), name
    olmo_core_steps.to_hf(str(base), str(again), options, "", "tokenizer", cache, quiet)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_pieces_of_a_step_are_read_by_torchs_own_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(tmp_path, OLMO2)
    monkeypatch.setattr(step_writer, "CHUNK_BYTES", 4096)
    olmo_core_steps.to_core(str(folder), str(tmp_path / "step0"), tmp_path / "cache", quiet)
    state = {"model": {name: torch.zeros(shape) for name, shape in hf.shapes(OLMO2).items()}}
    dcp.load(state, checkpoint_id=tmp_path / "step0" / "model_and_optim", no_dist=True)
    weights = HfFolder(folder)
    for name, value in state["model"].items():
        assert torch.equal(value[: weights.shape(name)[0]], weights[name])


@pytest.mark.seconds
@pytest.mark.parametrize("config", [QWEN3, LLAMA3], ids=["qwen3", "llama3"])
def test_other_families_go_there_and_back_too(tmp_path: Path, config: ModelConfig) -> None:
    folder, step, again = export(tmp_path, config), tmp_path / "step0", tmp_path / "again"
    olmo_core_steps.to_core(str(folder), str(step), tmp_path / "cache", quiet)
    assert replace(olmo_core.config_of_step(step / "config.json"), init_std=config.init_std) == config
    options = Convert(dtype="float32", max_position_embeddings=512)
    olmo_core_steps.to_hf(str(step), str(again), options, "", "tokenizer", tmp_path / "cache", quiet)
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.seconds
def test_olmo_core_loads_the_step_of_a_tied_model(tmp_path: Path) -> None:
    pytest.importorskip("olmo_core")
    from olmo_core.distributed.checkpoint import load_model_and_optim_state
    from olmo_core.nn.transformer import TransformerConfig

    step = tmp_path / "step0"
    olmo_core_steps.to_core(str(export(tmp_path, QWEN3)), str(step), tmp_path / "cache", quiet)
    model = TransformerConfig.from_dict(read_json(step / "config.json")["model"]).build(init_device="cpu")
    load_model_and_optim_state(step / "model_and_optim", model)
    found = model.state_dict()
    assert found["lm_head.w_out.weight"].data_ptr() == found["embeddings.weight"].data_ptr()
    rows = read_json(tmp_path / "hf" / "config.json")["vocab_size"]
    assert torch.equal(found["embeddings.weight"][:rows], HfFolder(tmp_path / "hf")["embeddings.weight"])


def export(root: Path, config: ModelConfig) -> Path:
    from sft.export.write import Trained, export

    facts = tiny_export.tokenizer(root / "tok")
    options = Convert(dtype="float32", max_position_embeddings=512)
    trained = Trained(tiny_export.weights(config), config, facts, root / "tok")
    export(trained, tiny_export.TEMPLATE, options, root / "hf", quiet)
    return root / "hf"


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step of ours, with its tokenizer in it."""
    olmo_core_steps.to_core(str(export(tmp_path, OLMO3)), str(tmp_path / "step0"), tmp_path / "cache", quiet)
    return tmp_path / "step0"


def refuses(step: Path, match: str) -> None:
    out = step.parent / "out"
    with pytest.raises(SftError, match=match) as error:
        olmo_core_steps.to_hf(str(step), str(out), Convert(), "", "tokenizer", step.parent / "cache", quiet)
    assert "next: " in str(error.value)
    assert not out.exists() and not list(step.parent.glob(".out*"))


def test_a_missing_shard_is_named(step: Path) -> None:
    next((step / "model_and_optim").glob("*.distcp")).unlink()
    refuses(step, r"__0_0\.distcp: missing")


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_flipped_byte_is_found_by_the_files_own_checksums(step: Path, place: float) -> None:
    file = next((step / "model_and_optim").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    entries = [i for k, i in DcpReader(step)._storage.items() if "feed_forward.w" in k.fqn]
    at = entries[int(place * len(entries))]
    data[at.offset + at.length // 2] ^= 4
    file.write_bytes(data)
    refuses(step, r"__0_0\.distcp: model\.blocks\.\d+\.feed_forward\.w\d\.weight: .*CRC-32 differs")


def test_a_shard_that_ends_early_is_refused(step: Path) -> None:
    file = next((step / "model_and_optim").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-5000])
    refuses(step, r"__0_0\.distcp: model\..*not readable")


def edit(step: Path, change: Any) -> None:
    data = json.loads((step / "config.json").read_text())
    change(data["model"], data["dataset"]["tokenizer"])
    (step / "config.json").write_text(json.dumps(data))


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.update(d_model=128), r"config\.json|shape"),
        (
            lambda m, t: m.update(n_layers=8),
            r"layer 3: rope scaling is Yarn\(factor=8\.0.*, expected None, as in the last layer",
        ),
        (lambda m, t: m["block"].update(name="default"), r"layer 3: prenorm is False, expected True, as in layer 0"),
        (
            lambda m, t: m["block"]["sequence_mixer"]["sliding_window"].update(pattern=[48, -1, 48, -1]),
            r"layer 1: rope scaling is None, expected Yarn",
        ),
        (
            lambda m, t: m["block_overrides"]["3"]["sequence_mixer"]["rope"].update(theta=10000),
            r"layer 3: rope_theta is 10000\.0",
        ),
        (lambda m, t: m.pop("block"), "model: no field 'block'"),
        (lambda m, t: t.update(eos_token_id=7), r"dataset\.tokenizer\.eos_token_id: 7, the tokenizer has 0"),
    ],
)
def test_a_config_of_another_model_is_refused(step: Path, change: Any, message: str) -> None:
    edit(step, change)
    refuses(step, message)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("should-not-exist",))


def test_a_malicious_metadata_runs_nothing(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (step / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(Evil()))
    refuses(step, r"\.metadata: not readable as checkpoint metadata.*posix\.mkdir")
    assert not Path("should-not-exist").exists()


def test_a_step_without_a_tokenizer_says_how_to_name_one(step: Path) -> None:
    shutil.rmtree(step / "tokenizer")
    refuses(step, "no tokenizer/ in it or beside it; next: name its folder with TOKENIZER=")


def test_a_folder_that_is_there_is_left_alone(step: Path) -> None:
    with pytest.raises(SftError, match="exists already; next: name a new folder"):
        olmo_core_steps.to_hf(str(step), str(step), Convert(), "", "tokenizer", step.parent / "cache", quiet)


def test_infinity_in_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = export(tmp_path, OLMO2)
    values = load_file(folder / "model.safetensors")
    values["model.norm.weight"][2] = torch.inf
    save_file(values, folder / "model.safetensors")
    with pytest.raises(SftError, match=r"hf: lm_head\.norm\.weight: NaN or infinity from row 0"):
        olmo_core_steps.to_core(str(folder), str(tmp_path / "step0"), tmp_path / "cache", quiet)
    assert not (tmp_path / "step0").exists()


@pytest.mark.server
def test_steps_and_folders_may_lie_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    with Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        olmo_core_steps.to_core(str(export(tmp_path, OLMO2)), "gs://test/base/step0", cache, quiet)
        assert server.objects["base/step0/model_and_optim/.metadata"].data
        olmo_core_steps.to_hf("gs://test/base/step0", "gs://test/out/hf", Convert(dtype="float32", max_position_embeddings=512), "",
                   "tokenizer", cache, quiet)  # fmt: skip
        made = {
            name.removeprefix("out/hf/"): stored.data for name, stored in server.objects.items() if "out/hf/" in name
        }
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert made[name] == (tmp_path / "hf" / name).read_bytes()
    assert not list(cache.glob("convert-*"))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("x", "dataset: 'x', expected a table"),
        ({"tokenizer": "dolma2"}, "dataset: tokenizer: 'dolma2', expected a table"),
        ({"tokenizer": {"vocab_size": "x"}}, "vocab_size: 'x', expected a whole number"),
        ({"tokenizer": {"pad_token_id": -1}}, "pad_token_id: -1, expected a whole number of at least 0"),
        ({"tokenizer": {"identifier": 3}}, "identifier: 3, expected a string"),
    ],
)
def test_a_wrong_tokenizer_in_a_steps_config_is_refused(tmp_path: Path, dataset: object, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dataset": dataset}))
    with pytest.raises(SftError, match=message):
        olmo_core.named_tokens(tmp_path / "config.json")


def test_the_tokenizer_that_a_step_names_is_what_step_config_wrote(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(step_config(OLMO2, TokenIds(300, 2, 0))))
    assert olmo_core.named_tokens(file) == NamedTokens(vocab_size=300, eos_id=2, pad_id=0)
    file.write_text("{}")
    assert olmo_core.named_tokens(file) == NamedTokens()


@pytest.mark.parametrize("said", [{}, {"max_position_embeddings": "x"}, {"max_position_embeddings": 0}, [], "["])
def test_the_longest_input_of_an_export_is_a_whole_number(tmp_path: Path, said: object) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"max_position_embeddings": 512}))
    assert longest_input(file) == 512
    file.write_text("[" * 100_000 if said == "[" else json.dumps(said))
    with pytest.raises(SftError, match=str(file)):
        longest_input(file)
