"""Step folders: whole or absent, read without running anything, shared with OLMo-core in both directions."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver

from sft.checkpoint import olmo_core, step_folder
from sft.checkpoint.dcp_reader import DcpReader, read_metadata
from sft.checkpoint.hf_folder import HfFolder
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.dataset import TokenIds
from sft.model import hf
from sft.model.model import Transformer, initial_values
from sft.model.parallel import World
from sft.recipe.architecture import ModelConfig, Yarn
from sft.recipe.schema import Train
from sft.training import initial_weights
from sft.training.optim import build_adamw

CONFIG = ModelConfig(4, 32, 4, 2, 8, 48, 128, window=8, rope_scaling=Yarn(factor=4.0, old_context=32))
FACTS = TokenIds(120, 1, 0)
ALONE = World(0, 1, 0, torch.device("cpu"))


def trained(seed: int = 0, model_config: ModelConfig = CONFIG) -> tuple[Transformer, torch.optim.AdamW]:
    """A model after two steps, so that moments and step counts are not zero."""
    model = Transformer(model_config)
    model.load_state_dict(dict(initial_values(model, 0.1, seed)))
    optimizer = build_adamw(model, Train(lr=1e-2))
    for _ in range(2):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
    return model, optimizer


def save(out: Path, step: int = 3, seed: int = 0, ephemeral: bool = False) -> Path:
    model, optimizer = trained(seed)
    state = {"step": step}
    config = olmo_core.step_config(CONFIG, FACTS)
    return step_folder.save(
        out, step, step_folder.snapshot(model, optimizer), state, config, ALONE, ephemeral=ephemeral
    )


@pytest.mark.seconds
def test_a_step_reads_back_bitwise(tmp_path: Path) -> None:
    step = save(tmp_path)
    model, optimizer = trained()
    other, other_optimizer = trained(seed=9)
    assert step_folder.restore(step, other, other_optimizer, ALONE) == {"step": 3}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][name], other_optimizer.state[b][name])
    tensors = DcpReader(step)
    assert set(tensors) == set(dict(model.named_parameters()))
    assert tensors.shape("embeddings.weight") == (128, 32)
    files = {str(p.relative_to(step)) for p in step.rglob("*") if p.is_file()}
    expected = {"config.json", ".metadata.json", "manifest.json", "train/rank0.pt", "model_and_optim/.metadata"}
    assert files == expected | {"model_and_optim/__0_0.distcp"}
    assert step_folder.damage(step) == []


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    listed = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        listed.append(json.loads((save(tmp_path / name) / "manifest.json").read_text())["outputs"])
    assert listed[0] == listed[1]
    assert str(tmp_path).encode() not in (tmp_path / "a" / "step3" / "model_and_optim" / ".metadata").read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with step3 and step7, to copy from."""
    folder = tmp_path_factory.mktemp("saved")
    for number in (3, 7):
        save(folder, number)
    return folder


@pytest.mark.parametrize(
    "file", ["model_and_optim/__0_0.distcp", "model_and_optim/.metadata", "train/rank0.pt", "config.json"]
)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_step_is_passed_over(tmp_path: Path, saved: Path, file: str, how: str) -> None:
    def place(number: int) -> Path:
        return shutil.copytree(saved / f"step{number}", tmp_path / f"step{number}")

    good = place(3)
    path = place(7) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(data if how == "flip" else data[: len(data) // 2])
    said: list[str] = []
    assert step_folder.latest(tmp_path, ALONE, said.append) == good
    assert len(said) == 1
    assert str(path) in said[0]
    aside = tmp_path / ".damaged-step7"
    assert f"renamed to {aside}" in said[0]
    assert (aside / file).is_file() == (how != "remove")
    assert [n for n, _ in step_folder.steps(tmp_path)] == [3]
    step_folder.mark_latest(place(7))  # trained again: with two to keep, the damaged one takes no place
    assert step_folder.prune(tmp_path, 2) == []
    (tmp_path / "step7" / "config.json").write_text("{}")
    assert step_folder.latest(tmp_path, ALONE, said.append) == good
    assert len(list(tmp_path.glob(".damaged-step7*"))) == 2


def test_an_unfinished_step_is_never_resumed_from(tmp_path: Path) -> None:
    good = save(tmp_path, 3)
    (save(tmp_path, 7) / "manifest.json").unlink()
    (tmp_path / ".saving-step9").mkdir()
    said: list[str] = []
    assert step_folder.latest(tmp_path, ALONE, said.append) == good
    assert "manifest.json is missing" in said[0]
    assert (tmp_path / "step7").is_dir()
    assert not (tmp_path / ".saving-step9").exists()
    assert step_folder.latest(tmp_path / "step3", ALONE, said.append) is None


def test_a_disk_that_is_full_leaves_the_earlier_step_and_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 3)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for target, name in ((state_dict_saver, "save"), (manifest, "describe"), (torch, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(
                SftError, match=r"step7: could not be saved \(.*No space left.*needs about [\d,]+ bytes"
            ):
                save(tmp_path, 7)
        assert [p.name for p in tmp_path.iterdir()] == ["step3"]
    assert step_folder.damage(good) == []


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch should-not-exist",))


@pytest.mark.parametrize("payload", [Evil(), {"a": Evil()}, print, Path, "just text", pickle.Pickler])
def test_a_metadata_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_and_optim").mkdir()
    (tmp_path / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(payload))
    with pytest.raises(SftError, match="metadata"):
        read_metadata(tmp_path)
    assert not Path("should-not-exist").exists()


@pytest.mark.seconds
@pytest.mark.parametrize("kind", ["TensorStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "_StorageInfo"])
def test_metadata_without_its_fields_is_refused(tmp_path: Path, kind: str) -> None:
    """A damaged name of a field in a pickle leaves an object without it."""
    found = read_metadata(step := save(tmp_path))
    entry = found.state_dict_metadata["model.embeddings.weight"]
    ((index, info), *_) = found.storage_data.items()
    for object_, field in ((entry, "properties"), (entry.chunks[0], "sizes"), (index, "fqn"), (info, "length")):
        if type(object_).__name__ == kind:
            object.__delattr__(object_, field)
    (step / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(SftError, match=r"\.metadata: not readable as checkpoint metadata: .*; next: fetch"):
        read_metadata(step)


@pytest.mark.seconds
@pytest.mark.parametrize("size", [[128, 31], [1 << 40, 1 << 20], [-1, 32]])
def test_chunks_that_are_not_the_tensor_are_refused_before_memory_is_taken(tmp_path: Path, size: list[int]) -> None:
    found = read_metadata(step := save(tmp_path))
    object.__setattr__(found.state_dict_metadata["model.embeddings.weight"], "size", torch.Size(size))
    (step / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(SftError, match=r"'model\.embeddings\.weight' of \(.*\) has chunks of 4096 values"):
        read_metadata(step)


def test_a_location_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    step = save(tmp_path)
    tensors = DcpReader(step)
    for info in tensors._storage.values():
        info.relative_path = "../../secret"
    with pytest.raises(SftError, match="unusable location"):
        tensors["embeddings.weight"]


def test_a_model_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    tensors = DcpReader(save(tmp_path))
    with pytest.raises(SftError, match=r"shape \(128, 32\), the model has \(64, 32\)"):
        tensors.read_into("embeddings.weight", torch.zeros(64, 32))
    with pytest.raises(SftError, match=r"no tensor model\.nothing"):
        tensors.read_into("nothing", torch.zeros(1))


def core_model() -> Any:
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    from olmo_core.nn.transformer import TransformerConfig

    return TransformerConfig.from_dict(olmo_core.step_config(CONFIG, FACTS)["model"]).build(init_device="cpu")


@pytest.mark.seconds
@pytest.mark.parametrize("kind", ["AdamW", "SkipStepAdamW"])
def test_olmo_core_loads_our_step_with_its_optimizer_state(tmp_path: Path, kind: str) -> None:
    theirs = core_model()
    from olmo_core import optim
    from olmo_core.distributed.checkpoint import load_model_and_optim_state

    step = save(tmp_path)
    model, optimizer = trained()
    theirs_optimizer = getattr(optim, f"{kind}Config")(lr=0.5).build(theirs)
    load_model_and_optim_state(step / "model_and_optim", theirs, theirs_optimizer, flatten_optimizer_state=True)
    found = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter)
        for state in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(theirs_optimizer.state[found[name]][state], optimizer.state[parameter][state])


@pytest.mark.seconds
def test_olmo_cores_checkpointer_loads_our_step_by_its_parent_path(tmp_path: Path) -> None:
    theirs = core_model()
    from olmo_core.train.checkpoint import Checkpointer
    from olmo_core.train.train_module import BasicTrainModule

    step = save(tmp_path / "out" if (tmp_path / "out").mkdir() is None else tmp_path)
    module = BasicTrainModule(theirs, torch.optim.AdamW(theirs.parameters()), rank_microbatch_size=8)
    assert Checkpointer.find_checkpoints(str(step.parent))
    checkpointer = Checkpointer(work_dir=tmp_path / "work")
    checkpointer.load(str(step), module, load_trainer_state=False, load_optim_state=False)
    model, _ = trained()
    found = dict(theirs.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())


def test_weights_come_from_an_olmo_core_checkpoint_and_nothing_else_does(tmp_path: Path) -> None:
    theirs = core_model()
    from olmo_core.distributed.checkpoint import save_model_and_optim_state

    theirs.init_weights(device=torch.device("cpu"))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=123.0, weight_decay=0.5)
    for p in theirs.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    save_model_and_optim_state(tmp_path / "step1" / "model_and_optim", theirs, optimizer)
    model = Transformer(CONFIG)
    ours = build_adamw(model, Train(lr=1e-2))
    said = initial_weights.initialise(model, CONFIG, tmp_path / "step1", 0)
    assert "OLMo-core checkpoint" in said
    found = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found[name])
        assert not ours.state[parameter]["exp_avg"].any()
    assert ours.param_groups[0]["lr"] == 1e-2
    assert ours.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.seconds
def test_olmo_cores_converter_accepts_our_step(tmp_path: Path) -> None:
    core_model()
    from olmo_core.nn.hf.convert_checkpoint import convert_checkpoint_to_hf, load_config

    config = replace(CONFIG, vocab_size=1152)
    facts = TokenIds(1024, 1020, 1023)
    step = step_folder.save(
        tmp_path,
        3,
        step_folder.snapshot(*trained(0, config)),
        {},
        olmo_core.step_config(config, facts),
        ALONE,
        ephemeral=False,
    )
    described = load_config(str(step))
    assert described is not None
    shutil.copytree(Path(__file__).parents[1] / "recipes" / "smoke" / "tokenizer", tmp_path / "tokenizer")
    out = tmp_path / "hf"
    convert_checkpoint_to_hf(
        original_checkpoint_path=step,
        output_path=out,
        transformer_config_dict=described["model"],
        tokenizer_config_dict=described["dataset"]["tokenizer"],
        max_sequence_length=64,
        validate=False,
    )
    folder = HfFolder(out)
    ours = DcpReader(step)
    rows = folder.config["vocab_size"]
    assert rows == 1024
    for name in folder:
        value: Tensor = folder[name]
        assert torch.equal(value.float(), ours[name][:rows] if name in hf.VOCAB_ROWS else ours[name])


@pytest.mark.parametrize("rows", [128, 120])
def test_weights_come_from_a_hugging_face_folder(tmp_path: Path, rows: int) -> None:
    from safetensors.torch import save_file

    source, _ = trained()
    values = {
        hf.family(CONFIG).theirs(n): (p.detach()[:rows] if n in hf.VOCAB_ROWS else p.detach()).contiguous()
        for n, p in source.named_parameters()
    }
    save_file(values, tmp_path / "model.safetensors")
    described = hf.hf_config(CONFIG, vocab_size=rows, max_position_embeddings=64, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(hf.config_json(described)))
    model = Transformer(CONFIG)
    assert "Hugging Face folder" in initial_weights.initialise(model, CONFIG, tmp_path, 0)
    for (name, a), b in zip(model.named_parameters(), source.parameters(), strict=True):
        kept = rows if name in hf.VOCAB_ROWS else len(b)
        assert torch.equal(a[:kept], b[:kept])
        assert not a[kept:].any()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    with torch.no_grad():
        model.lm_head.norm.weight[0] = float("nan")
    step = step_folder.save(
        tmp_path,
        1,
        step_folder.snapshot(model, optimizer),
        {},
        olmo_core.step_config(CONFIG, FACTS),
        ALONE,
        ephemeral=False,
    )
    with pytest.raises(SftError, match=r"lm_head.norm.weight has values that are not finite"):
        initial_weights.initialise(Transformer(CONFIG), CONFIG, step, 0)
