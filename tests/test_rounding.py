"""Weights in bfloat16 with stochastic rounding: unbiased, torchao's rule, the same on any ranks, and a resume repeats it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import training
from sft.checkpoint.step_folder import DcpReader
from sft.formats import metrics
from sft.model.memory import plan, step_bytes
from sft.recipe import schema
from sft.recipe.presets import PRESETS
from sft.recipe.rules import check
from sft.recipe.schema import Hardware, Train
from sft.training import adamw8bit
from sft.training.adamw8bit import LowMemoryAdamW
from sft.training.rounding import Place, bits, place_of, round_to_bf16
from training import run_folder

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def place(name: str = "w", seed: int = 0, size: int = 1) -> Place:
    return place_of(torch.zeros(size), name, seed)


def step(number: int) -> torch.Tensor:
    return torch.tensor(float(number))


def test_its_mean_over_many_updates_is_the_value_itself() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-5, 5).repeat(200)
    count = 400
    made = torch.stack([round_to_bf16(values, bits(place(), step(i), values)) for i in range(count)])
    below = (values.view(torch.int32) & -0x10000).view(torch.float32)
    gap = (values.view(torch.int32).add(0x10000) & -0x10000).view(torch.float32).double() - below.double()
    assert ((made.float() == below) | (made.double() == below.double() + gap)).all(), "a value has two neighbours"
    share = (values.double() - below.double()) / gap
    error = (made.double().mean(0) - values.double()) / gap
    deviation = (share * (1 - share) / count).sqrt()
    assert (error.abs() < 5 * deviation + 1e-9).all()
    assert abs((error / deviation.clamp(min=1e-6)).mean()) < 5 / 2000**0.5


def test_it_is_torchaos_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.optim import quant_utils

    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    random = bits(place(), step(3), values)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: 0xFFFF - random)
    assert torch.equal(round_to_bf16(values, random), quant_utils._fp32_to_bf16_sr(values))


def test_the_bits_are_uniform_and_depend_on_seed_name_update_and_place_alone() -> None:
    many = bits(place(), step(1), torch.empty(1 << 16)).double()
    assert abs(many.mean() - 0x7FFF) < 5 * 18918 / 256 and many.max() > 65500 and many.min() < 36
    others = (place("v"), 1), (place(seed=1), 1), (place(), 2), (Place(place().salt, torch.tensor(1 << 33)), 1)
    for where, number in others:
        found = bits(where, step(number), many).double()
        assert abs(torch.corrcoef(torch.stack((many, found)))[0, 1]) < 0.02
    part = Place(place().salt, torch.tensor(1000))
    assert torch.equal(bits(part, step(1), torch.empty(4, 25)).flatten(), many[1000:1100].int())


def adamw(p: torch.nn.Parameter, **options: Any) -> LowMemoryAdamW:
    places = {p: place_of(p, "w", 0)} if p.dtype == torch.bfloat16 else {}
    return LowMemoryAdamW([p], **HYPER, eight_bit=False, places=places, **options)


def test_small_updates_count_as_in_fp64() -> None:
    """Each update is a 25th of the step between neighbouring bfloat16 values, and rounding to the nearest would lose all of them."""
    ours = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    exact = torch.nn.Parameter(torch.ones(4096, dtype=torch.float64))
    mine, theirs = adamw(ours), torch.optim.AdamW([exact], **HYPER)
    for group in (*mine.param_groups, *theirs.param_groups):
        group["lr"] = 1.6e-4
    for _ in range(60):
        ours.grad, exact.grad = torch.ones_like(ours), torch.ones_like(exact)
        mine.step()
        theirs.step()
    moved = 1 - exact.mean()
    assert (ours.double().mean() - exact.mean()).abs() < 0.03 * moved
    assert mine.state[ours]["exp_avg"].dtype == torch.float32


@pytest.mark.compile
def test_parts_and_the_compiled_update_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    start = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    traced = torch.compile(adamw8bit.update, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(adamw8bit, "_compiled_update", lambda: traced)
    found = []
    for chunk, compiled in ((1 << 24, False), (100, False), (1 << 24, True)):
        monkeypatch.setattr(adamw8bit, "CHUNK", chunk)
        p = torch.nn.Parameter(start.clone())
        optimizer = adamw(p, compiled=compiled)
        for number in range(4):
            p.grad = torch.randn(40, 48, generator=torch.Generator().manual_seed(number)).bfloat16()
            optimizer.found_inf = torch.tensor(float(number == 2))
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], start)


BF16: dict[str, Any] = {
    "weights": "bf16", "gradients": "bf16", "precision": "bf16", "steps": 4, "save_every": 2, "validate_every": 0,
}  # fmt: skip


@pytest.mark.slow
def test_training_resumes_with_the_same_bits_and_goes_on_alike_on_other_ranks(tmp_path: Path, dataset: Path) -> None:
    folder, exact = run_folder(tmp_path / "run", dataset), run_folder(tmp_path / "exact", dataset)
    training.train(folder, ranks=2, **BF16)
    kept = tmp_path / "kept"
    shutil.copytree(folder / "train" / "step4", kept)
    assert DcpReader(kept).dtype("blocks.0.attention.w_q.weight") == torch.bfloat16
    assert DcpReader(kept, "optim.state.").dtype("blocks.0.attention.w_q.weight.exp_avg") == torch.float32
    shutil.rmtree(folder / "train" / "step4")
    assert "continuing from" in training.train(folder, ranks=2, **BF16)
    training.assert_same_bits(folder / "train" / "step4", kept)
    two = training.records(folder)
    shutil.rmtree(folder / "train" / "step4")
    training.train(folder, ranks=1, **BF16)
    training.train(exact, **(BF16 | {"weights": "fp32"}))
    for one, other, fp32 in zip(training.records(folder), two, training.records(exact), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-2)
        assert one.loss == pytest.approx(fp32.loss, rel=3e-2)
    assert metrics.read_attempts(folder / "train/metrics.jsonl")[0].options["weights"] == "bf16"  # type: ignore[index]


@pytest.mark.processes
def test_a_shard_has_the_bits_of_its_rows(tmp_path: Path) -> None:
    """Rows that three ranks do not share evenly."""
    process = training.SERVER.Process(target=training.run, args=(tmp_path, {"ranks": 3}, sharded_updates))
    process.start()
    training.finish(process, tmp_path)
    whole, parts = (torch.load(tmp_path / name) for name in ("whole.pt", "parts.pt"))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def sharded_updates(folder: Path, _: dict[str, Any]) -> int:
    """Three updates of a matrix and a vector, whole and in shards, into whole.pt and parts.pt."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from sft.model.parallel import join

    world = join(threads=1)
    mesh = init_device_mesh("cpu", (world.size,))
    for name in ("whole.pt", "parts.pt"):
        made = []
        for shape in ((10, 48), (7,)):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
            if name == "parts.pt":
                value, gradient = (distribute_tensor(x, mesh, [Shard(0)]) for x in (value, gradient))
            p = torch.nn.Parameter(value)
            optimizer = adamw(p)
            for _ in range(3):
                p.grad = gradient
                optimizer.step()
            made.append(p.full_tensor().detach() if name == "parts.pt" else p.detach())  # type: ignore[attr-defined]
        if world.is_rank0:
            torch.save(made, folder / name)
    world.close()
    return 0


def test_the_plan_counts_two_bytes_for_a_weight() -> None:
    seven, small = PRESETS["olmo2-7b"], {"optimizer": "adamw8bit", "gradients": "bf16"}
    fp32, bf16 = (Train(**small, weights=w) for w in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert plan(seven, bf16, Hardware(), 8, 0).parts["parameters"] == 2 * seven.parameters // 8
    assert step_bytes(seven, fp32) - step_bytes(seven, bf16) == 2 * seven.parameters
    for keep, copies in (("none", 0), ("weights", 2)):  # bf16 copies of fp32 weights, which bf16 weights do not need
        hardware = Hardware(keep_gathered=keep)
        freed = plan(seven, fp32, hardware, 1, 0).total - plan(seven, bf16, hardware, 1, 0).total
        assert freed == (2 + copies) * seven.parameters


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "needs gradients = 'bf16', and it is 'fp32'"),
        ({"gradients": "bf16", "precision": "fp32"}, "needs precision = 'bf16' or 'fp8', and it is 'fp32'"),
        ({"gradients": "bf16", "method": "lora"}, "method = 'lora' stores the frozen base as base_dtype says"),
        ({"gradients": "bf16"}, ""),
    ],
)
def test_what_it_needs_is_said(options: dict[str, str], why: str) -> None:
    values = {
        "model": schema.Model(preset="olmo3-tiny"),
        "prepare": schema.Prepare(tokenizer="t", sources=()),
        "train": Train(weights="bf16", **options),  # type: ignore[arg-type]
        "convert": schema.Convert(),
        "evaluate": schema.Evaluate(),
    }
    problems = check(values, {})
    assert why in problems[0] if why else not problems
