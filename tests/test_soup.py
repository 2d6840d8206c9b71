"""Souping: a NumPy mean of the weights, in the layout that a base, an export and OLMo-core read; unlike models are refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import made_data
from sft.checkpoint import olmo_core, step_folder
from sft.checkpoint.dcp_reader import DcpReader
from sft.common.files import hash_file
from sft.export import soup
from sft.formats.manifest import StepManifest
from sft.formats.soup import Soup
from sft.model.model import Transformer
from sft.sync import base_check
from sft.training import initial_weights
from test_checkpoint import ALONE, CONFIG, FACTS, core_model, trained


def step(out: Path, number: int, seed: int, config: Any = CONFIG, facts: Any = FACTS, tokenizer: str = "{}") -> Path:
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    (out / "tokenizer" / "tokenizer.json").write_text(tokenizer)
    state = step_folder.snapshot(*trained(seed, config))
    return step_folder.save(out, number, state, {}, olmo_core.step_config(config, facts), ALONE, ephemeral=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("runs")
    for run, number, seed in (("a", 100, 1), ("a", 200, 2), ("b", 300, 3)):
        step(top / run / "train", number, seed)
    return top


def made(runs: Path, target: Path, words: list[str], *options: str) -> dict[str, np.ndarray]:
    soup.main([str(target), *words, "--run", "a", "--runs", str(runs), *options])
    return {name: value.numpy() for name, value in DcpReader(target).items()}


def parts(runs: Path) -> list[dict[str, np.ndarray]]:
    folders = ("a/train/step100", "a/train/step200", "b/train/step300")
    return [{n: v.numpy() for n, v in DcpReader(runs / folder).items()} for folder in folders]


@pytest.mark.seconds
def test_the_soup_is_numpys_mean_of_every_tensor(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.export.step_writer.row_blocks", lambda shape: [(0, shape[0])])
    monkeypatch.setattr("sft.export.step_writer.CHUNK_BYTES", 1000)  # a few rows at a time
    found = made(runs, tmp_path / "soup", ["100", "200", "b/300"])
    theirs = parts(runs)
    assert found.keys() == theirs[0].keys()
    for name, value in found.items():
        expected = np.mean([p[name] for p in theirs], axis=0)
        assert value.dtype == np.float32
        assert np.array_equal(value, expected)
        assert not np.array_equal(value, theirs[0][name])


@pytest.mark.seconds
def test_weights_are_relative(runs: Path, tmp_path: Path) -> None:
    found = made(runs, tmp_path / "soup", ["100", "200", str(runs / "b" / "train" / "step300")], "--weights", "1 1 2")
    theirs = parts(runs)
    for name, value in found.items():
        expected = np.average([p[name] for p in theirs], axis=0, weights=[1, 1, 2])
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.seconds
def test_a_soup_is_a_base_and_a_step_that_olmo_core_reads(runs: Path, tmp_path: Path) -> None:
    found = made(runs, tmp_path / "soup", ["100", "200"])
    assert step_folder.damage(tmp_path / "soup") == []
    sources = Soup.read(tmp_path / "soup" / "soup.json").sources
    assert [(Path(s.step).name, s.weight) for s in sources] == [("step100", 1.0), ("step200", 1.0)]
    assert sources[0].files == StepManifest.read(runs / "a" / "train" / "step100" / "manifest.json").outputs
    model = Transformer(CONFIG)
    assert "OLMo-core checkpoint" in initial_weights.initialise(model, CONFIG, tmp_path / "soup", 0)
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), found[name])
    digest = hash_file(tmp_path / "soup" / "tokenizer" / "tokenizer.json")
    assert base_check.check_base_tokenizer(tmp_path, made_data.facts(*FACTS, digest), tmp_path / "soup") == ""
    theirs = core_model()
    from olmo_core.distributed.checkpoint import load_model_and_optim_state

    load_model_and_optim_state(tmp_path / "soup" / "model_and_optim", theirs)
    for name, parameter in theirs.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), found[name])


@pytest.mark.seconds
def test_memory_stays_that_of_a_few_rows(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    rows = DcpReader.rows

    def counted(self: DcpReader, name: str, start: int, stop: int) -> Any:
        value = rows(self, name, start, stop)
        asked.append(value.numel() * 4)
        return value

    monkeypatch.setattr(DcpReader, "rows", counted)
    monkeypatch.setattr("sft.export.step_writer.CHUNK_BYTES", 2000)
    monkeypatch.setattr("sft.export.blocks.BLOCK_ELEMENTS", 500)
    made(runs, tmp_path / "soup", ["100", "200"])
    assert max(asked) <= 2000


def refused(match: str, runs: Path, target: Path, *arguments: str) -> None:
    with pytest.raises(SystemExit) as error:
        soup.main([str(target), *arguments, "--run", "a", "--runs", str(runs)])
    assert match in str(error.value)
    assert not target.exists()


@pytest.mark.seconds
def test_what_cannot_be_averaged_is_refused(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "soup"
    other = tmp_path / "other" / "train"
    step(other, 1, 4, replace(CONFIG, intermediate_size=64))
    step(other, 2, 4, replace(CONFIG, window=16))
    twin = step(tmp_path / "twin" / "train", 3, 4, tokenizer='{"other": 1}')
    narrow = f"{other}/step1"
    refused("different models: blocks.0.feed_forward.w1.weight is (48, 32) and (64, 32)", runs, target, "100", narrow)
    refused("describe different models", runs, target, "100", f"{other}/step2")
    refused("different tokenizers: tokenizer.json sha256 44136fa3", runs, target, "100", str(twin))
    refused("a mean needs two steps", runs, target, "100")
    refused("a step is listed twice", runs, target, "100", "a/100")
    refused("no such step; there are 100 200", runs, target, "100", "250")
    refused("neither a step number", runs, target, "100", str(tmp_path / "nowhere"))
    refused("need as many numbers above zero", runs, target, "100", "200", "--weights", "1")
    refused("need as many numbers above zero", runs, target, "100", "200", "--weights", "1 -1")
    refused("not numbers", runs, target, "100", "200", "--weights", "1 x")
    copied = tmp_path / "copied"
    shutil.copytree(runs / "a" / "train" / "step200", copied)
    shard = next((copied / "model_and_optim").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused("sha256", runs, target, "100", str(copied))
    target.mkdir()
    with pytest.raises(SystemExit, match="exists already"):
        soup.main([str(target), "100", "200", "--run", "a", "--runs", str(runs)])
