"""Schedule, AdamW, clipping and the guard."""

import copy
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import training
from sft.checkpoint.step_folder import DcpReader
from sft.formats.metrics import TrainMetrics
from sft.recipe.schema import Train
from sft.training.optim import Guard, build_adamw, clip, learning_rate
from training import run_folder


def rates(**fields: object) -> list[float]:
    train = Train(**({"lr": 1.0, "warmup_fraction": 0.1} | fields))  # type: ignore[arg-type]
    return [learning_rate(step, 100, train) for step in range(1, 101)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_in_a_line_to_its_peak_and_never_above(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(found) == found[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


def test_decay_ends_at_zero_one_step_after_the_last_so_that_every_step_learns() -> None:
    linear, cosine = rates(schedule="linear"), rates(schedule="cosine")
    assert linear[-1] == pytest.approx(1 / 90)
    assert cosine[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert cosine[55] == pytest.approx(0.5)
    assert rates(schedule="constant")[-1] == 1.0


def test_no_warm_up_starts_at_the_peak_and_all_warm_up_ends_there() -> None:
    assert rates(warmup_fraction=0.0)[0] == 1.0
    assert rates(warmup_fraction=1.0)[-1] == 1.0


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def test_steps_equal_a_plain_adamw() -> None:
    train = Train(lr=1e-2, weight_decay=0.1)
    ours, theirs = model(), model()
    optimizer = build_adamw(ours, train)
    plain = torch.optim.AdamW(
        theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    guard = Guard(0, torch.device("cpu"))
    for step in range(5):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for m in (ours, theirs):
            m.zero_grad()
            m(x).square().sum().backward()
        guard.step(optimizer, torch.tensor(1.0), torch.tensor(1.0))
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_clipping_scales_to_the_norm_and_zero_leaves_gradients_alone() -> None:
    for limit, expected in ((0.5, 0.5), (0.0, None), (1e9, None)):
        m = model()
        m(torch.ones(2, 6)).square().sum().backward()
        before = math.sqrt(sum(p.grad.square().sum().item() for p in m.parameters()))  # type: ignore[union-attr]
        assert clip(m.parameters(), limit).item() == pytest.approx(before)
        after = math.sqrt(sum(p.grad.square().sum().item() for p in m.parameters()))  # type: ignore[union-attr]
        assert after == pytest.approx(expected or before, rel=1e-4)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.nan, math.nan)])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(loss: float, norm: float) -> None:
    m = model()
    optimizer = build_adamw(m, Train(lr=1e-2))
    m(torch.ones(2, 6)).sum().backward()
    guard = Guard(0, torch.device("cpu"))
    assert guard.step(optimizer, torch.tensor(1.0), torch.tensor(1.0)).item() == 0
    weights, moments = copy.deepcopy(list(m.parameters())), copy.deepcopy(list(optimizer.state.values()))
    for p in m.parameters():
        p.grad.fill_(math.nan)  # type: ignore[union-attr]
    assert guard.step(optimizer, torch.tensor(loss), torch.tensor(norm)).item() == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, m.parameters(), strict=True))
    for before, after in zip(moments, optimizer.state.values(), strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)


def spiky(guard: Guard, losses: list[float], targets: Sequence[list[float]] | None = None) -> list[int]:
    """Which steps are skipped. `targets`: the trained tokens of each source in each step."""
    m = model()
    optimizer = build_adamw(m, Train())
    m(torch.ones(2, 6)).sum().backward()
    counts = [None if targets is None else torch.tensor(t) for t in targets or losses]  # type: ignore[arg-type]
    steps = zip(losses, counts, strict=True)
    return [int(guard.step(optimizer, torch.tensor(x), torch.tensor(1.0), n).item()) for x, n in steps]


QUIET = [1.0 + 0.01 * (i % 5) for i in range(64)]


def rare(losses: list[float]) -> list[int]:
    """Steps that are skipped of a source that comes once in eight steps with these losses. Other steps are quiet."""
    every = [*QUIET, *(x for loss in losses for x in [*QUIET[:7], loss])]
    counts = [[10.0, 0.0]] * 64 + ([[10.0, 0.0]] * 7 + [[10.0, 5.0]]) * len(losses)
    return spiky(Guard(6.0, torch.device("cpu"), 2), every, counts)[64 + 7 :: 8]


def test_of_a_source_no_more_than_a_few_steps_in_a_row_are_skipped() -> None:
    rising = [10.0**i for i in range(1, 11)]  # each one is a spike, whatever the history
    assert rare(rising) == [1, 1, 1, 1, 0, 1, 1, 1, 1, 0]
    assert rare([*rising[:3], math.nan, math.inf, math.nan, 1e4]) == [
        1,
        1,
        1,
        1,
        1,
        1,
        0,
    ]  # never one that is not finite


def test_spikes_without_a_trained_step_between_stay_skipped() -> None:
    """Training itself is ill then, and max_skipped ends it."""
    found = spiky(Guard(6.0, torch.device("cpu"), 2), [*QUIET, *(10.0**i for i in range(1, 11))], [[10.0, 5.0]] * 74)
    assert found[64:] == [1] * 10


def test_the_steps_in_a_row_survive_a_reload() -> None:
    guard, again = (Guard(6.0, torch.device("cpu"), 2) for _ in range(2))
    losses, counts = [*QUIET, 9.0, 1.0, 90.0, 1.0], [*[[10.0, 0.0]] * 64, *([[10.0, 5.0], [10.0, 0.0]] * 2)]
    assert spiky(guard, losses, counts)[64:] == [1, 0, 1, 0]
    again.load(guard.state())
    assert again.in_row.tolist() == [0, 0, 2]
    again.load({k: v for k, v in guard.state().items() if k != "in_row"})  # of an earlier version


def test_a_spike_is_skipped_once_enough_steps_are_known() -> None:
    quiet = [1.0 + 0.01 * (i % 7) for i in range(200)]
    assert spiky(Guard(6.0, torch.device("cpu")), [*quiet[:63], 9.0])[-1] == 0
    assert spiky(Guard(6.0, torch.device("cpu")), [*quiet[:64], 9.0])[-1] == 1
    assert not any(spiky(Guard(6.0, torch.device("cpu")), quiet))
    assert not any(spiky(Guard(0.0, torch.device("cpu")), [*quiet, 9.0]))


def test_harder_data_is_trained_after_a_few_skipped_steps() -> None:
    """A source whose loss is far above the others' comes once in eight steps: skipped values raise the bound."""
    mixed = [9.0 if i % 8 == 7 else 1.0 + 0.01 * (i % 5) for i in range(320)]
    easy = [1.0 + 0.01 * (i % 5) for i in range(64)]
    skipped = spiky(Guard(6.0, torch.device("cpu")), [*easy, *mixed])
    assert skipped[64 + 7] == 1  # a first one is a spike
    assert 1 <= sum(skipped) <= 8
    assert not any(skipped[192:])


def test_a_loss_that_hardly_varies_makes_no_spike_of_a_small_change() -> None:
    assert not any(spiky(Guard(6.0, torch.device("cpu")), [*([1.0] * 80), 1.5, 1.0]))
    assert spiky(Guard(6.0, torch.device("cpu")), [*([1.0] * 80), 1.7])[-1] == 1


def test_values_that_are_not_finite_do_not_enter_the_history() -> None:
    guard = Guard(6.0, torch.device("cpu"))
    assert spiky(guard, [*([1.0] * 70), math.inf, math.nan, 1.0])[-3:] == [1, 1, 0]
    assert bool(guard.history.isfinite().all())


def test_the_history_survives_a_reload() -> None:
    quiet = [1.0 + 0.01 * (i % 7) for i in range(150)]
    guard = Guard(6.0, torch.device("cpu"))
    assert spiky(guard, [*quiet, 9.0])[-1] == 1
    again = Guard(6.0, torch.device("cpu"))
    again.load(guard.state())
    assert torch.equal(again.history, guard.history)
    assert spiky(again, [9.0, 1.0]) == [1, 0]


@pytest.mark.parametrize("steps", [7, 100, 333])
@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.1])
def test_rates_are_olmo_cores_at_every_step(steps: int, fraction: float) -> None:
    """In the warm-up and on the plateau of the same step; in the decay of the step before (theirs ends at a rate of 0)."""
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    from olmo_core.optim import WSD, ConstantWithWarmup, CosWithWarmup, LinearWithWarmup

    rising = round(fraction * steps)
    theirs = {
        ("linear", 0.0): LinearWithWarmup(alpha_f=0.0, warmup=rising),
        ("linear", 0.1): LinearWithWarmup(alpha_f=0.1, warmup=rising),
        ("cosine", 0.0): CosWithWarmup(alpha_f=0.0, warmup=rising),
        ("cosine", 0.1): CosWithWarmup(alpha_f=0.1, warmup=rising),
        ("wsd", 0.0): WSD(decay=max(1, round(0.2 * steps)), decay_fraction=None, warmup=rising),
        ("wsd", 0.1): WSD(
            decay=max(1, round(0.2 * steps)), decay_fraction=None, decay_min_lr=0.1 * 2e-4, warmup=rising
        ),
        ("constant", 0.0): ConstantWithWarmup(warmup=rising),
    }
    for (schedule, final), oracle in theirs.items():
        train = Train(lr=2e-4, schedule=schedule, warmup_fraction=fraction, decay_fraction=0.2, final_lr_fraction=final)
        for step in range(1, steps + 1):
            expected = oracle.get_lr(2e-4, step if step <= rising else step - 1, steps) if step - 1 != rising else 2e-4
            assert learning_rate(step, steps, train) == pytest.approx(expected, rel=1e-12), (schedule, step)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_wsd_stays_at_the_peak_and_decays_over_the_last_steps_in_its_shape(shape: str) -> None:
    found = rates(schedule="wsd", decay_fraction=0.2, decay_shape=shape, final_lr_fraction=0.5)
    assert found[9:81] == [1.0] * 72
    done = [i / 20 for i in range(20)]
    left = {
        "linear": [1 - d for d in done],
        "cosine": [0.5 * (1 + math.cos(math.pi * d)) for d in done],
        "sqrt": [1 - math.sqrt(d) for d in done],
    }[shape]
    assert found[80:] == pytest.approx([0.5 + 0.5 * x for x in left])


@pytest.mark.slow
def test_the_recipe_decides_how_far_gradients_are_clipped_and_what_a_spike_is(tmp_path: Path, dataset: Path) -> None:
    def run(name: str, **fields: Any) -> Path:
        folder = run_folder(tmp_path / name, dataset)
        training.train(folder, validate_every=0, ephemeral_every=0, warmup_fraction=0.0, **fields)
        return folder

    def moved(folder: Path) -> float:
        name = "blocks.0.feed_forward.w1.weight"
        first, last = (DcpReader(folder / "train" / f"step{n}")[name] for n in (1, 3))
        return float((last - first).abs().max())

    # Gradients far below AdamW's epsilon move nothing; unclipped, every step moves by about the rate.
    fields = {"steps": 3, "save_every": 1, "lr": 1e-2, "schedule": "constant"}
    assert moved(run("clipped", max_grad_norm=1e-12, **fields)) < 1e-5
    assert moved(run("free", max_grad_norm=0.0, **fields)) > 1e-2
    # Once 64 steps are known, everything above the mean counts as a spike; 0 turns that off. A step of one pack.
    small = {"steps": 72, "lr": 1e-6, "global_batch_tokens": 64, "hardware": {"microbatch_tokens": 64}}
    nervous = run("nervous", skip_sigmas=1e-9, **small)
    skipped = [r for r in training.records(nervous) if r.skipped]
    assert skipped and min(r.step for r in skipped) > 64
    uses = TrainMetrics.from_value(json.loads((nervous / "result.json").read_text()), "result.json").sources or ()
    assert sum(use.skipped for use in uses) == sum(r.labels for r in skipped) < sum(use.seen for use in uses)
    assert not any(r.skipped for r in training.records(run("calm", skip_sigmas=0.0, **small)))
