"""The memory estimate against what torch allocates, as its own trackers count it, and the choice of recomputation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker

from sft.common.errors import SftError
from sft.model import attention
from sft.model import model as modules
from sft.model.compute_copies import ComputeCopies
from sft.model.memory import LIBRARIES, activation_bytes, layer_modes, plan, require
from sft.model.model import Block, Transformer
from sft.model.parallel import World, shard
from sft.recipe.architecture import ModelConfig
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Hardware, Train
from sft.training.optim import build_adamw, clip

SMALL = ModelConfig(
    n_layers=4, d_model=256, n_heads=4, n_kv_heads=2, head_dim=64, intermediate_size=640, vocab_size=1024
)
TOKENS = 256


@pytest.fixture
def no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def inputs(tokens: int) -> dict[str, Any]:
    ids = torch.arange(tokens) % SMALL.vocab_size
    return {
        "input_ids": ids,
        "positions": torch.arange(tokens),
        "cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32),
        "max_len": tokens,
        "target_rows": torch.arange(tokens - 1),
        "target_ids": ids[1:],
        "loss_denominator": 1.0,
    }


def build(config: ModelConfig, modes: tuple[str, ...]) -> Transformer:
    model = Transformer(config)
    for block, mode in zip(model.blocks, modes, strict=True):
        block.recompute = mode  # type: ignore[union-attr,assignment]
    return model


@pytest.mark.seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("mode", "family"),
    [("none", {}), ("selected", {}), ("full", {})]
    + [("none", {"prenorm": True, "qk_norm": norm, "tied": norm == "head"}) for norm in ("head", "")],
)
def test_a_layer_keeps_the_bytes_that_the_plan_says(mode: str, family: dict[str, Any], dtype: torch.dtype) -> None:
    config = replace(SMALL, **family)

    def alive(layers: int) -> int:
        model = build(replace(config, n_layers=layers), (mode,) * layers).to(dtype)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            loss, _ = model(**inputs(TOKENS))
            [found] = tracker.get_tracker_snapshot("current").values()
        del loss
        return int(found["Total"]) - sum(p.numel() * p.element_size() for p in model.parameters())

    width = 2 if dtype == torch.bfloat16 else 4
    wanted = activation_bytes(config, TOKENS, mode, width, Hardware(compile="never"))
    if mode == "none":  # the CPU's loop over documents joins their outputs in a new tensor
        wanted += width * TOKENS * SMALL.n_heads * SMALL.head_dim
    assert (alive(5) - alive(2)) / 3 == pytest.approx(wanted, rel=0.001)


@pytest.mark.compile
@pytest.mark.parametrize("preset", ["olmo3-32b", "qwen3-8b"])
def test_a_compiled_layer_keeps_the_bytes_that_the_plan_says(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the size it is trained in, on the meta device: what torch.compile's partitioner saves around the fused kernel."""
    config = PRESETS[preset]
    monkeypatch.setattr(modules, "attention", attention._fused)
    saved: dict[int, int] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        alive.append(x)
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    torch._dynamo.reset()
    with torch.device("meta"):
        block = Block(config, 0).bfloat16()
        x = torch.empty(TOKENS, config.d_model, dtype=torch.bfloat16, requires_grad=True)
        table, edges = torch.empty(TOKENS, 1, config.head_dim), torch.empty(64, dtype=torch.int32)
    block.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):  # dynamo would trace torch.device's Python, too
        block(x, (table, table), edges, TOKENS)
    for held in (*block.parameters(), table):
        saved.pop(held.untyped_storage()._cdata, None)
    assert activation_bytes(config, TOKENS, "none", 2, Hardware(compile="always")) == pytest.approx(
        sum(saved.values()), rel=0.001
    )


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("precision", "keep"),
    [("fp32", "none"), *(pytest.param("bf16", keep, marks=pytest.mark.slow) for keep in ("none", "weights"))],
)
@pytest.mark.parametrize("mode", ["none", "budget", "selected", "full"])
def test_the_peak_is_within_an_eighth_of_what_torch_counts(
    precision: str, keep: str, mode: str, no_group: None
) -> None:
    train = Train(seq_len=512, precision=precision)
    hardware = Hardware(recompute=mode, compile="never", keep_gathered=keep)
    world = World(0, 1, 0, torch.device("cpu"))
    model = shard(build(SMALL, layer_modes(SMALL.n_layers, mode, 0.5)), world, precision, 0, keep)
    optimizer = build_adamw(model, train)
    copies = ComputeCopies(model, optimizer).copies if keep == "weights" else []
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as from the second microbatch on
    sharded = precision == "bf16" and keep == "none"
    tracker: Any = FSDPMemTracker(model, optimizer) if sharded else MemTracker()
    batch = inputs(train.seq_len)
    tracker.track_inputs((batch,)) if sharded else tracker.track_external(model, optimizer, *copies)
    with tracker:
        loss, _ = model(**batch)
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        [peak] = tracker.get_tracker_snapshot("peak").values()
    found = plan(SMALL, train, hardware, 1, 0)
    assert found.total - found.parts[LIBRARIES] == pytest.approx(peak["Total"], rel=0.125)


def test_what_stays_is_exact_on_any_number_of_gpus() -> None:
    seven = PRESETS["olmo2-7b"]
    found = plan(seven, Train(), Hardware(), 8, 0).parts
    assert found["parameters"] == found["gradients"] == 4 * seven.parameters // 8
    assert found["optimizer state"] == 8 * seven.parameters // 8
    # Three ranks: rows are rounded up on the first of them. Eight-bit moments: one byte each and a scale for 256.
    assert 0 < plan(seven, Train(), Hardware(), 3, 0).parts["parameters"] - 4 * seven.parameters / 3 < 4_000_000
    small = plan(seven, Train(optimizer="adamw8bit", gradients="bf16"), Hardware(), 8, 0).parts
    assert small["gradients"] == found["gradients"] // 2
    assert small["optimizer state"] == pytest.approx(2 * (1 + 4 / 256) * seven.parameters / 8, rel=1e-3)
    # Two copies of four ranks each hold twice as much as one copy of eight.
    assert plan(seven, Train(), Hardware(shard_degree=4), 8, 0).parts["parameters"] == 2 * found["parameters"]


@pytest.mark.seconds
def test_auto_takes_the_least_recomputation_that_fits() -> None:
    def auto(gb: float, **changed: Any) -> Any:
        return plan(PRESETS["olmo2-7b"], Train(), Hardware(**({"compile": "never"} | changed)), 8, gb)

    assert auto(0).recompute == "none"
    assert auto(200).recompute == "none"
    found = auto(80)
    assert found.recompute == "budget" and found.fits
    more = replace(Hardware(recompute="budget", compile="never"), recompute_budget=found.recompute_budget + 1 / 32)
    assert not plan(PRESETS["olmo2-7b"], Train(), more, 8, 80).fits
    work = [
        {"none": 1.0, "budget": f.recompute_budget, "selected": 0.0, "full": -1.0}[f.recompute]
        for f in map(auto, range(35, 200, 5))
    ]
    assert work == sorted(work)
    assert {1.0, -1.0} < set(work)
    assert not auto(20).fits
    # A compiled layer keeps less, and two ranks that share a pack keep half of it each.
    assert auto(80, compile="always").recompute_budget > found.recompute_budget
    halves = [plan(PRESETS["olmo2-7b"], Train(), Hardware(context_degree=n), 8, 0).parts["activations"] for n in (1, 2)]
    assert halves[1] == pytest.approx(halves[0] / 2, rel=0.01)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("preset", "gpus", "gb", "hardware", "next_step"),
    [
        ("olmo2-7b", 8, 80, {"recompute": "none"}, "next: recompute=auto$"),
        ("olmo2-7b", 8, 80, {"microbatch_tokens": 16384 * 8}, "next: recompute=auto microbatch_tokens=16384$"),
        ("olmo2-13b", 16, 60, {"shard_degree": 2}, "next: recompute=auto shard_degree=0$"),
        ("olmo2-7b", 8, 31, {}, r"next: recompute=auto context_degree=2$"),
        ("olmo3-32b", 8, 80, {"context_degree": 8}, r"next: recompute=auto shard_degree=0 on 16 GPUs \(nodes=2\)$"),
        ("olmo3-32b", 8, 2, {}, "next: GPUs with more memory"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers_and_what_would(
    preset: str, gpus: int, gb: float, hardware: dict[str, Any], next_step: str
) -> None:
    hard = Hardware(**({"compile": "never"} | hardware))
    found = plan(PRESETS[preset], Train(), hard, gpus, gb)
    with pytest.raises(
        SftError,
        match=rf"GB per GPU are needed on {gpus} GPUs of {gb}.0 GB, of which a plan may use 92% \(parameters .*{next_step}",
    ):
        require(found, PRESETS[preset], Train(), hard, gpus)


def test_the_layers_of_a_budget_that_keep_everything_are_the_last() -> None:
    assert layer_modes(4, "budget", 0.5) == ("selected", "selected", "none", "none")
    assert layer_modes(3, "budget", 1.0) == ("none",) * 3
    assert layer_modes(3, "budget", 0.0) == ("selected",) * 3
    assert [layer_modes(6, "budget", k / 6).count("none") for k in range(7)] == list(range(7))
    assert layer_modes(2, "full", 0.5) == ("full", "full")


def test_the_table_adds_up() -> None:
    for name, mode in itertools.product(("olmo2-1b", "olmo3-32b"), ("none", "auto")):
        found = plan(PRESETS[name], Train(), Hardware(recompute=mode), 8, 80)
        assert sum(found.parts.values()) == found.total
        assert all(size >= 0 for size in found.parts.values())
        words = dict(found.table())
        assert ("DOES NOT FIT" in words["total"]) == (not found.fits)
