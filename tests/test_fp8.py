"""Products in 8-bit floats, on the CPU by torchao's own emulation: near bf16's, the same files, a resume repeats them, and what cannot
compute in fp8 is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import training
from sft.checkpoint.step_folder import DcpReader
from sft.common.errors import SftError
from sft.model import fp8
from sft.model.memory import plan
from sft.model.model import Transformer
from sft.recipe import schema
from sft.recipe.presets import PRESETS
from sft.recipe.rules import check
from sft.recipe.schema import Cluster, Hardware, Train
from sft.runner import precision
from training import run_folder

FIELDS: dict[str, Any] = {"steps": 4, "save_every": 2, "ephemeral_every": 0, "validate_every": 0, "lr": 2e-3}


def emulated(folder: Path, fields: dict[str, Any]) -> int:
    fp8.EMULATED = True
    return training.train_here(folder, fields)


def emulated_gradients(folder: Path, fields: dict[str, Any]) -> int:
    fp8.EMULATED = True
    return training.gradients(folder, fields)


def run(folder: Path, action: Callable[[Path, dict[str, Any]], int], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    process = training.SERVER.Process(target=training.run, args=(folder, fields, action))
    process.start()
    training.finish(process, folder)
    return folder


@pytest.mark.slow
def test_its_losses_are_near_those_of_bf16_and_a_resume_repeats_the_bits(tmp_path: Path, dataset: Path) -> None:
    bf16, folder = (run_folder(tmp_path / name, dataset) for name in ("bf16", "fp8"))
    for place, name in ((bf16, "bf16"), (folder, "fp8")):
        run(place, emulated, precision=name, **FIELDS)
    ours, theirs = ([r.loss for r in training.records(place)] for place in (folder, bf16))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert ours[-1] < ours[0]
    last, kept = folder / "train/step4", tmp_path / "kept"
    mine, other = DcpReader(last), DcpReader(bf16 / "train/step4")
    assert list(mine) == list(other)
    assert {mine.dtype(name) for name in mine} == {torch.float32}
    shutil.copytree(last, kept)
    shutil.rmtree(last)
    (folder / "train/manifest.json").unlink(missing_ok=True)
    run(folder, emulated, precision="fp8", **FIELDS)
    training.assert_same_bits(last, kept)


HYBRID = PRESETS["olmo-hybrid-tiny"]
assert HYBRID.gated_delta is not None
WAYS: dict[str, dict[str, Any]] = {
    "compiled, some frozen": {
        "model_n_layers": 2, "freeze": ("embeddings", "blocks.0"), "hardware": {"microbatch_tokens": 64, "compile": "always", "recompute": "selected"},
    },
    "sharded, stored in bf16": {
        "model_n_layers": 2, "weights": "bf16", "gradients": "bf16", "ranks": 2, "hardware": {"microbatch_tokens": 64, "recompute": "full"},
    },
    "hybrid, context": {
        "config": replace(HYBRID, vocab_size=training.VOCAB, n_layers=2, gated_delta=replace(HYBRID.gated_delta, layers=(True, False))),
        "ranks": 2, "hardware": {"context_degree": 2},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_near_those_of_bf16(way: str, tmp_path: Path, dataset: Path) -> None:
    ways = {name: {"precision": name} for name in ("bf16", "fp8")}
    folder = run(run_folder(tmp_path / "run", dataset), emulated_gradients, steps=1, ways=ways, **WAYS[way])
    exact, ours = (found["steps"][0] for found in torch.load(folder / "gradients.pt").values())
    assert exact.keys() == ours.keys()
    assert float(ours.pop("loss")) == pytest.approx(float(exact.pop("loss")), rel=1e-2)
    assert sum(not torch.equal(exact[name], ours[name]) for name in ours) > len(ours) // 2
    near = {
        n: float(torch.cosine_similarity(ours[n].float().flatten(), g.float().flatten(), dim=0))
        for n, g in exact.items()
    }
    assert min(near.values()) > 0.9, near


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "EMULATED", True)


def test_only_the_matrices_of_the_blocks_multiply_in_fp8(emulation: None) -> None:
    from torchao.float8.float8_linear import Float8Linear

    for preset in ("olmo3-tiny", "olmo-hybrid-tiny"):
        config = replace(PRESETS[preset], vocab_size=128)
        with torch.device("meta"):
            model = Transformer(config)
        names = list(model.state_dict())
        fp8.multiply_in_fp8(model)
        found = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Float8Linear)}
        assert found == set(fp8.fp8_matrices(config))
        assert not any(name.endswith(("w_a.weight", "w_b.weight")) for name in found)
        assert list(model.state_dict()) == names


def test_sizes_that_the_kernels_cannot_read_are_refused() -> None:
    config = replace(PRESETS["olmo3-tiny"], vocab_size=100)
    train = Train(precision="fp8", seq_len=64)
    fp8.require_sizes(config, train, Hardware())
    odd = replace(config, intermediate_size=200)
    with pytest.raises(
        SftError, match=r"blocks\.0\.feed_forward\.w1\.weight is 200 x \d+.*multiples of 16; next: precision=bf16"
    ):
        fp8.require_sizes(odd, train, Hardware())
    fp8.require_sizes(odd, replace(train, precision="bf16"), Hardware())
    with pytest.raises(SftError, match=r"a rank has 24 tokens of a microbatch.*next: another seq_len"):
        fp8.require_sizes(config, train, Hardware(microbatch_tokens=192, context_degree=8))
    for name, preset in PRESETS.items():
        fp8.require_sizes(preset, train, Hardware()) if not name.endswith("-tiny") else None


@pytest.mark.parametrize(
    ("gpu", "count", "said"),
    [
        ("", 0, "CLUSTER=x trains on a CPU.*next: precision=bf16, or CLUSTER="),
        ("A100 80GB", 8, "the GPUs of CLUSTER=x are A100 80GB.*capability 9.0.*next: precision=bf16"),
        ("L40S", 8, "are L40S"),
    ],
)
def test_a_plan_for_other_devices_is_refused(gpu: str, count: int, said: str) -> None:
    cluster = Cluster(launcher="slurm", storage="/s", gpu=gpu, gpus_per_node=count)
    with pytest.raises(SftError, match=said):
        precision.check_precision(Train(precision="fp8"), Hardware(), cluster, "CLUSTER=x")
    assert not precision.check_precision(Train(), Hardware(), cluster, "CLUSTER=x")


@pytest.mark.parametrize("gpu", ["H100", "NVIDIA H200", "GH200 120GB", "nvidia_b200", "GB300"])
def test_a_plan_for_these_gpus_is_taken(gpu: str) -> None:
    cluster = Cluster(launcher="slurm", storage="/s", gpu=gpu, gpus_per_node=8)
    assert precision.check_precision(Train(precision="fp8"), Hardware(), cluster, "x") == f"fp8 on {gpu}"
    unknown = replace(cluster, gpu="")
    assert "unknown here" in precision.check_precision(Train(precision="fp8"), Hardware(), unknown, "x")
    assert precision.check_precision(Train(precision="fp8"), Hardware(gpu=gpu), replace(cluster, gpu="A100"), "x")


@pytest.mark.seconds
def test_a_device_without_these_products_is_refused_at_the_start(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = training.train(run_folder(tmp_path / "run", dataset), status=1, precision="fp8", steps=1)
    assert "[train] precision = 'fp8': this process has a CPU" in said and "next: precision=bf16" in said
    for capability, refused in (((8, 0), True), ((8, 9), True), ((9, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "L40S")
        if refused:
            with pytest.raises(SftError, match=r"the L40S has 8\.\d, and products in fp8.*need compute capability 9.0"):
                fp8.check_device(torch.device("cuda"))
        else:
            fp8.check_device(torch.device("cuda"))


def test_adapters_are_refused_by_name() -> None:
    values = {
        "model": schema.Model(preset="olmo3-tiny"),
        "prepare": schema.Prepare(tokenizer="t", sources=()),
        "train": Train(precision="fp8", method="lora"),
        "convert": schema.Convert(),
        "evaluate": schema.Evaluate(),
    }
    (problem,) = check(values, {})
    assert "'precision' in [train] = 'fp8': method = 'lora'" in problem and "base_dtype = 'fp8'" in problem


def test_the_plan_counts_the_rounded_operands() -> None:
    """w1 of the 7B model: inputs of 4,096 and outputs of 11,008 for a token."""
    config, tokens = PRESETS["olmo2-7b"], 16384
    hardware = Hardware(compile="always", recompute="none")
    bf16, ours = (
        plan(config, Train(precision=name, seq_len=tokens), hardware, 8, 0).parts["activations"]
        for name in ("bf16", "fp8")
    )
    assert ours - bf16 == 2 * tokens * 11008 + tokens * 4096 + 4096 * 11008


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs an H100 or newer"
)
def test_a_gpu_has_nearly_the_losses_of_bf16(tmp_path: Path, dataset: Path) -> None:
    losses = []
    for name in ("bf16", "fp8"):
        folder = run_folder(tmp_path / name, dataset)
        training.train(folder, device="cuda", precision=name, **FIELDS)
        losses.append([r.loss for r in training.records(folder)])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
