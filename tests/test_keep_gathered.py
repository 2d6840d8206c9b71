"""What a rank keeps over the microbatches of a step: the same bits or gradients, fewer exchanges, and a plan that fits."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import training
from sft.model.adapters import set_base
from sft.model.compute_copies import ComputeCopies
from sft.model.memory import SHARE, Plan, plan
from sft.model.model import Transformer, initial_values
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Hardware, Train
from training import run_folder

FIELDS: dict[str, Any] = {"precision": "bf16", "steps": 3, "save_every": 2, "ephemeral_every": 0, "validate_every": 2}
SEVEN = PRESETS["olmo2-7b"]


def hardware(keep: str, **others: Any) -> dict[str, Any]:
    return {"hardware": {"microbatch_tokens": 64, "keep_gathered": keep, **others}}


def run(folder: Path, action: Any, **fields: Any) -> Path:
    process = training.SERVER.Process(target=training.run, args=(folder, fields, action))
    process.start()
    training.finish(process, folder)
    return folder


# --- one rank

ONE: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "bf16 gradients, 8-bit moments, a replay": {"gradients": "bf16", "optimizer": "adamw8bit", "replay_every": 1},
    "bf16 weights": {"gradients": "bf16", "weights": "bf16"},
    "LoRA": {"method": "lora", "lora_rank": 4},
    "recomputed, some frozen": {"freeze": ("embeddings", "blocks.0"), **hardware("", recompute="full")},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ONE)
def test_one_rank_with_copies_trains_to_the_bits_of_fsdp(way: str, tmp_path: Path, dataset: Path) -> None:
    options = {**FIELDS, **hardware("none"), **ONE[way]}
    folders, hardware_numbers = [], options.pop("hardware")
    words = {"none": "gathered layer by layer for each pass", "auto": "copied to the compute dtype once a step"}
    for keep, said in words.items():
        folder = run_folder(tmp_path / keep, dataset)
        assert f"weights: {said}" in training.train(
            folder, **options, hardware=hardware_numbers | {"keep_gathered": keep}
        )
        folders.append(folder / "train/step3")
    training.assert_same_bits(*folders)
    assert training.curve(tmp_path / "none") == training.curve(tmp_path / "auto")
    shutil.rmtree(folders[1])
    folder = tmp_path / "auto"
    assert "continuing from" in training.train(
        folder, **options, hardware=hardware_numbers | {"keep_gathered": "weights"}
    )
    training.assert_same_bits(*folders)


def small() -> Transformer:
    config = replace(PRESETS["olmo3-tiny"], n_layers=1, vocab_size=64)
    model = Transformer(config)
    model.load_state_dict(dict(initial_values(model, 0.02, 0)))
    return model


def inputs() -> dict[str, Any]:
    ids = torch.arange(32)
    edges = torch.tensor([0, 32], dtype=torch.int32)
    return {
        "input_ids": ids, "positions": ids, "cu_seqlens": edges, "max_len": 32, "target_rows": ids[:-1], "target_ids": ids[1:],
    }  # fmt: skip


def test_parameters_keep_their_names_dtypes_and_hooks() -> None:
    model = small()
    names = list(model.state_dict())
    copies = ComputeCopies(model, torch.optim.AdamW(model.parameters()))
    assert list(model.state_dict()) == names and {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(copies.copies) == len(names) and {p.dtype for p in copies.copies} == {torch.bfloat16}
    called = list[torch.Tensor]()
    model.lm_head.norm.weight.register_post_accumulate_grad_hook(called.append)
    model(**inputs())[0].backward()
    assert called == [model.lm_head.norm.weight] and all(p.grad is None for p in copies.copies)
    set_base(model, "lm_head.norm.weight", torch.zeros(model.config.d_model))
    assert not model.state_dict()["lm_head.norm.weight"].any()


def test_copies_are_made_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    copy = torch._foreach_copy_

    def counted(*args: Any) -> Any:
        nonlocal made
        made += 1
        return copy(*args)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    copies = ComputeCopies(model, optimizer)
    for step in (1, 2):
        for _ in range(3):
            model(**inputs())[0].backward()
        assert made == step
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        assert all(torch.equal(m.bfloat16(), c) for m, c in zip(copies.masters, copies.copies, strict=True))
        optimizer.step()
        optimizer.zero_grad()


# --- several ranks


FUNCTIONS = {
    "gathered": ("all_gather_single", "all_gather_into_tensor"),
    "reduced": ("reduce_scatter_single", "reduce_scatter_tensor"),
}
"""What FSDP2 calls, by its name in newer and in older versions of torch."""


def exchanges(folder: Path, fields: dict[str, Any]) -> int:
    """The gradients of the first step in each of the ways, with the number of gatherings and reductions, into gradients.pt."""
    counts: Counter[str] = Counter()
    for kind, names in FUNCTIONS.items():
        name = next(name for name in names if hasattr(torch.distributed, name))
        original = getattr(torch.distributed, name)

        def counted(*args: Any, kind: str = kind, original: Any = original, **options: Any) -> Any:
            counts[kind] += 1
            return original(*args, **options)

        setattr(torch.distributed, name, counted)
    found = training._gradients

    def counted_way(stage: training.FakeStage, world: Any) -> dict[str, Any]:
        counts.clear()
        return found(stage, world) | {"exchanges": dict(counts)}

    training._gradients = counted_way
    return training.gradients(folder, fields)


@pytest.mark.processes
@pytest.mark.slow
def test_ranks_gather_and_reduce_once_a_step(tmp_path: Path, dataset: Path) -> None:
    """Two microbatches a rank, two blocks and the rest of the model: three groups of weights."""
    groups, folder = 3, run_folder(tmp_path / "run", dataset)
    ways = {keep: hardware(keep) for keep in ("none", "weights", "gradients")}
    run(folder, exchanges, ranks=2, precision="bf16", steps=1, validate_every=0, ways=ways)
    made = torch.load(folder / "gradients.pt")
    counts = {keep: way["exchanges"] for keep, way in made.items()}
    found = {keep: way["steps"][0] for keep, way in made.items()}
    # Without, the blocks are gathered in the forward pass and in the backward pass of each microbatch.
    assert counts["none"]["gathered"] == 2 * (2 * (groups - 1) + 1)
    assert counts["weights"]["gathered"] == counts["gradients"]["gathered"] == groups
    assert counts["none"]["reduced"] == counts["weights"]["reduced"] == 2 * groups
    assert counts["gradients"]["reduced"] == groups
    for name, gradient in found["none"].items():
        assert torch.equal(found["weights"][name], gradient), name
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.processes
@pytest.mark.slow
def test_a_validation_between_steps_reads_the_new_weights_and_leaves_none_behind(tmp_path: Path, dataset: Path) -> None:
    folders = [run_folder(tmp_path / keep, dataset) for keep in ("none", "weights")]
    for folder in folders:
        options = {**FIELDS, "validate_every": 1, "replay_every": 2, "save_every": 1}
        said = training.train(folder, ranks=2, **options, **hardware(folder.name))
    assert "weights: gathered once a step" in said
    assert training.curve(folders[0]) == training.curve(folders[1])
    for step in (1, 2, 3):
        training.assert_same_bits(folders[0] / f"train/step{step}", folders[1] / f"train/step{step}")


# --- the plan


def planned(gpus: int, gb: float, train: Train | None = None, **changed: Any) -> Plan:
    train = train or Train(global_batch_tokens=4 * 16384 * gpus)
    return plan(SEVEN, train, Hardware(**({"compile": "always"} | changed)), gpus, gb)


@pytest.mark.seconds
def test_auto_keeps_weights_where_they_cost_no_recomputation_and_never_changes_a_sum() -> None:
    kept = [planned(64, gb).keep_gathered for gb in (40, 60, 80, 95, 110, 141, 1000)]
    assert kept == sorted(kept) and set(kept) == {"none", "weights"}
    for gb in (40, 60, 80, 95, 110, 141):
        ours, least = planned(64, gb), planned(64, gb, keep_gathered="none")
        assert (ours.recompute, ours.recompute_budget) == (least.recompute, least.recompute_budget)
        assert ours.fits == least.fits and (not ours.fits or ours.total <= SHARE * ours.limit)
    assert planned(64, 0).keep_gathered == "none", "the memory of several ranks is not known"
    assert planned(1, 0).keep_gathered == "weights"


def test_the_plan_counts_what_is_kept() -> None:
    parts = {
        keep: planned(64, 0, keep_gathered=keep, recompute="none").parts for keep in ("none", "weights", "gradients")
    }
    assert parts["weights"]["gathered weights"] == parts["gradients"]["gathered weights"] == 2 * SEVEN.parameters
    assert parts["none"]["gathered weights"] < 0.5 * SEVEN.parameters
    assert parts["gradients"]["unreduced gradients"] == 4 * SEVEN.parameters
    one = planned(1, 0, keep_gathered="weights").parts
    assert one["gathered weights"] == 2 * SEVEN.parameters
    bf16 = Train(weights="bf16", gradients="bf16")
    assert planned(1, 0, bf16, keep_gathered="weights").parts["gathered weights"] == 0


@pytest.mark.compile
def test_compiled_blocks_read_the_copies_and_not_the_parameters() -> None:
    """Also after a step, and recomputed."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = small()
        model.blocks[0].recompute = "full"  # type: ignore[assignment]
        if compiled:
            model.blocks[0].compile(backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ComputeCopies(model, optimizer)
        losses = []
        for _ in range(3):
            loss, _ = model(**inputs())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        found.append((losses, [p.grad for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3) and len(set(found[1][0])) == 3
    for eager, traced in zip(found[0][1], found[1][1], strict=True):
        assert eager is not None and traced is not None and traced.dtype == torch.float32
        assert torch.cosine_similarity(eager.flatten(), traced.flatten(), dim=0) > 0.99
