"""FLOPs and MFU against OLMo-core's count, torch's counter, and the loader's."""

from __future__ import annotations

import time
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import training
from sft.checkpoint import olmo_core
from sft.data.dataset import Dataset
from sft.formats.dataset import TokenIds
from sft.formats.metrics import SaveTimes, SourceUse, read_steps
from sft.model import hf, utilisation
from sft.model.flops import gated_delta_flops, head_flops, token_flops
from sft.model.model import Transformer
from sft.model.parallel import World
from sft.packing.loader import Loader, SpecialIds
from sft.packing.packs import pack_dataset
from sft.packing.steps import StepPlan
from sft.recipe.architecture import GatedDelta, ModelConfig
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Train
from sft.training import loop, metrics

TINY = ModelConfig(8, 32, 4, 2, 8, 48, 128, window=16)


@pytest.mark.parametrize("window", [0, 16, 4096])
@pytest.mark.parametrize("length", [1, 16, 333])
def test_a_document_costs_what_olmo_core_says(window: int, length: int) -> None:
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    from olmo_core.nn.transformer import TransformerConfig

    config = replace(TINY, window=window)
    theirs = TransformerConfig.from_dict(olmo_core.step_config(config, TokenIds())["model"]).build(init_device="meta")
    counted = ("q_norm", "k_norm", "lm_head.norm")
    norms = 6 * sum(p.numel() for name, p in theirs.named_parameters() if any(n in name for n in counted))
    ours = utilisation.flops_per_token(
        config, utilisation.mean_attended([length]), utilisation.mean_attended([length], window), trained_fraction=1.0
    )
    # They count these norms as matrices, and drop the fraction of a FLOP in every layer.
    assert ours + norms == pytest.approx(theirs.num_flops_per_token(length), abs=config.n_layers)


def test_a_token_costs_in_a_gated_delta_net_what_olmo_core_says() -> None:
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    from olmo_core.nn.attention.recurrent import GatedDeltaNet

    mixer = GatedDelta(2, 4, 6, 10)
    shapes = {
        n: s for n, s in hf.shapes(replace(TINY, gated_delta=mixer)).items() if n.startswith("blocks.0.attention.")
    }
    named = {n.split(".")[3]: SimpleNamespace(weight=torch.empty(s)) for n, s in shapes.items()}
    sizes = {"conv_size": 4, "key_dim": 12, "value_dim": 40, "n_v_heads": 4, "head_k_dim": 6, "head_v_dim": 10}
    theirs = GatedDeltaNet.num_flops_per_token(SimpleNamespace(**named, **sizes), 100)
    assert 3 * gated_delta_flops(mixer, TINY.d_model) == theirs
    dense = replace(TINY, gated_delta=None)
    hybrid = replace(TINY, gated_delta=mixer)
    attention = 2 * TINY.d_model * (2 * 32 + 2 * 16)
    assert token_flops(hybrid) == token_flops(dense) - 6 * attention + 6 * gated_delta_flops(mixer, TINY.d_model)
    # Only the layers with attention cost more for a longer document.
    one, two = (utilisation.flops_per_token(hybrid, attended, attended) for attended in (1.0, 101.0))
    assert two - one == 3 * 4 * 32 * 100 * 2


def test_matrices_cost_what_torch_counts_in_a_step() -> None:
    model = Transformer(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens, rows = 64, 16
    edges = torch.tensor([0, 40, 64], dtype=torch.int32)
    positions = torch.cat([torch.arange(40), torch.arange(24)])
    labels = torch.randint(0, 128, (rows,))
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(torch.randint(0, 128, (tokens,)), positions, edges, 40, torch.arange(rows), labels, 16.0, 0.0)
        loss.backward()
    operations = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in operations.items() if str(op).removeprefix("aten.") in ("mm", "addmm", "bmm"))
    # The gradient of the head's weights is added up in place (addmm_), which this counter does not see.
    assert matrices == 3 * token_flops(TINY) * tokens + 2 * head_flops(TINY) * rows


def test_a_step_of_the_loader_costs_the_sum_of_its_documents(tmp_path: Path) -> None:
    training.write_split(tmp_path / "data", 120, 1)
    dataset = Dataset.open(tmp_path / "data")
    index = pack_dataset(dataset, 64)
    plan = StepPlan.build(index, Train(seq_len=64, global_batch_tokens=256, steps=3))
    loader = Loader(plan, dataset, SpecialIds(training.EOS, training.PAD), TINY)
    for step in range(3):
        lengths = np.concatenate([index.pack(int(p))["length"] for p in plan.packs(step)])
        each = utilisation.flops_per_token(
            TINY,
            utilisation.mean_attended(lengths),
            utilisation.mean_attended(lengths, 16),
            trained_fraction=plan.num_targets(step) / plan.tokens(step),
        )
        assert loader.expected(step)[1] == pytest.approx(each * plan.tokens(step))


def test_the_estimate_without_windows_is_never_below_the_count() -> None:
    lengths = [3, 40, 500]
    exact = utilisation.flops_per_token(
        TINY, utilisation.mean_attended(lengths), utilisation.mean_attended(lengths, 16)
    )
    assert exact <= utilisation.flops_per_token(TINY, utilisation.mean_attended(lengths))
    assert utilisation.mean_attended([]) == 0.0
    assert utilisation.mean_attended([7]) == 4.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.4), ("h100", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA B200", 2250.0), ("NVIDIA GB200", 2500.0), ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA GeForce RTX 4090", 165.2), ("Tesla V100", 0.0),
        ("NVIDIA A1000", 0.0), ("H1000", 0.0), ("", 0.0),
    ],
)  # fmt: skip
def test_peaks_by_the_names_that_cuda_gives(name: str, peak: float) -> None:
    assert utilisation.peak_tflops(name) == peak


def test_mfu_is_the_share_of_all_gpus_peak() -> None:
    olmo = PRESETS["olmo3-7b"]
    each = utilisation.flops_per_token(olmo, 2048.5, 1024.0)
    assert each == pytest.approx(6 * 7e9, rel=0.1)
    assert utilisation.mfu(each * 20_000 * 8, 1.0, 8, 989.4) == pytest.approx(each * 20_000 / 989.4e12)


def test_a_record_tells_mfu_where_a_peak_is_known_and_the_checkpoint_that_ended(tmp_path: Path) -> None:
    stage = types.SimpleNamespace(recipe=types.SimpleNamespace(train=Train()), out=tmp_path)
    saved = [SaveTimes(4, 2.0, 0.1), None]
    run: Any = types.SimpleNamespace(
        labels=[SourceUse("a", 100, 0, 0, 0)], loss_weights=None, stage=stage, world=World(0, 2, 0, torch.device("cpu")), sources=["a"], stopwatch=None, skipped=0,
        saver=types.SimpleNamespace(finished=lambda: saved.pop(0)), plan=types.SimpleNamespace(steps=9), peak_tflops=50.0,
    )  # fmt: skip
    facts = loop.StepFacts(5, 1e-4, 900, 100, padding=0.0, imbalance_expected=0.0, flops=2e13, lap=None)
    values = torch.tensor([1.5, 0.0, 2.0, 200.0, 100.0], dtype=torch.float64)
    said: list[str] = []
    writer = metrics.MetricsWriter(tmp_path, 0, 9, said.append)
    for peak in (50.0, 0.0):
        run.peak_tflops = peak
        loop.report_step(run, writer, loop.Readback(values, facts), time.monotonic() - 4.0)
    writer.close()
    first, second = read_steps(tmp_path / "metrics.jsonl")
    assert first.mfu == pytest.approx(2e13 / (4.0 * 2 * 50e12), rel=0.05)
    assert first.checkpoint == SaveTimes(4, 2.0, 0.1)
    assert "MFU 5%" in said[0]
    assert second.mfu is None and second.checkpoint is None
