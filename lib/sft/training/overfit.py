"""Trains one batch until its loss is near 0: make overfit RECIPE=x. It says whether mask, loss and optimizer work at all.

In:  a run with a finished sync. The batch is one microbatch for each rank, the rate that of the recipe after ten steps of warm-up.
Out: lines on the terminal. Raises SftError, with the reason, where the loss does not fall below the bound.

Beside the loss of the trained tokens it measures that of the untrained ones, which no step lowers on purpose.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from sft.common.errors import SftError
from sft.model.loss import IGNORED
from sft.model.parallel import World
from sft.packing.loader import Microbatch
from sft.recipe.schema import Hardware, Train
from sft.runner.cli import RunOptions
from sft.training.trials import Measured, Trial, open_trial

WARMUP = 10
SAME = 1e-4
"""A relative change of the loss below this is none."""


def one_batch(train: Train, hardware: Hardware, world: World) -> Train:
    """[train] with a global batch of one microbatch for each rank or context group, without noise and decay."""
    tokens = (hardware.microbatch_tokens or train.seq_len) * max(1, world.size // hardware.context_degree)
    return dataclasses.replace(
        train, global_batch_tokens=tokens, steps=1, neftune_alpha=0.0, lora_dropout=0.0, weight_decay=0.0
    )


def untrained(batch: Microbatch) -> Microbatch:
    """The microbatch with the tokens as targets that are not: each but the first of its document, padding excluded."""
    used = min(batch.num_tokens, len(batch.input_ids))
    is_target = batch.positions > 0
    is_target[used:] = False
    is_target[batch.target_rows[: batch.num_targets] + 1] = False
    rows = is_target.nonzero().flatten() - 1
    ids = batch.input_ids[rows + 1].clone()
    if not len(rows):
        rows, ids = torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORED)
    return dataclasses.replace(
        batch, target_rows=rows, target_ids=ids, target_sources=torch.zeros_like(ids), num_targets=len(rows)
    )


def why(steps: Sequence[Measured], bound: float) -> str:
    """What is probably wrong where the loss did not fall below the bound."""
    first, last = steps[0], steps[-1]
    if not math.isfinite(first.loss):
        return "the first loss is not finite: the first weights or the base are broken; next: make doctor, or precision=fp32"
    if not math.isfinite(last.loss) or last.loss > 2 * first.loss:
        return f"the loss diverged at a rate of {last.lr:.1e}; next: lower [train] lr, make lr-range finds one"
    if first.grad_norm == 0:
        return "no gradient reaches a trained parameter; next: check [train] freeze, train_only and the mask (make preview)"
    if abs(last.loss - first.loss) < SAME * first.loss:
        return (
            f"the optimizer does not change the loss: the rate {last.lr:.1e} is too small, or what is trained does nothing;"
            " next: raise [train] lr (make lr-range), or check freeze, train_only and lr_factors"
        )
    if last.loss < 0.5 * first.loss:
        return f"the loss falls, and did not reach {bound:g} yet; next: raise STEPS= or [train] lr"
    return (
        "the loss falls too slowly; next: raise [train] lr (make lr-range finds one) or STEPS=, or train more: a larger lora_rank,"
        " less in freeze"
    )


def overfit(options: RunOptions, bound: float, steps: int) -> None:
    """Trains the batch, on every rank. Raises SftError where its loss is not below `bound` (nats a token) after `steps` steps."""
    if bound <= 0 or steps < 1:
        raise SftError(f"BOUND={bound:g} STEPS={steps}: both must be above 0; next: correct it")
    with open_trial("overfit", options, steps, one_batch) as trial:
        number, batches = next(trial.batches())
        others = [untrained(batch) for batch in batches] if trial.stage.hardware.context_degree == 1 else []
        before = trial.mean_loss(others)
        tokens, targets = trial.run.plan.tokens(number), trial.run.plan.num_targets(number)
        trial.say(f"one batch of {tokens:,} tokens, {targets:,} of them trained ({targets / tokens:.0%})")
        done: list[Measured] = []
        while len(done) < steps and not (done and done[-1].loss < bound):
            lr = trial.run.stage.recipe.train.lr * min(1.0, (len(done) + 1) / WARMUP)
            done.append(trial.step(number, batches, lr))
            if not math.isfinite(done[-1].loss):
                break
            if len(done) == 1 or len(done) % 10 == 0 or done[-1].loss < bound:
                trial.progress(done[-1])
        first, last = done[0], done[-1]
        if not last.loss < bound:
            raise SftError(
                f"one batch was not learned: its loss went from {first.loss:.4f} to {last.loss:.4f} in {len(done)} steps, not below"
                f" {bound:g}: {why(done, bound)}"
            )
        _report(trial, first, last, len(done), before, trial.mean_loss(others))


def _report(trial: Trial, first: Measured, last: Measured, steps: int, before: float, after: float) -> None:
    trial.say(f"loss and optimizer work: {first.loss:.4f} to {last.loss:.4f} in {steps} steps on the trained tokens")
    if math.isnan(before):
        trial.say("mask: no untrained token was measured")
    elif after < last.loss + 0.1 * before:
        trial.say(
            f"warning: mask: the untrained tokens were learned as well, {before:.4f} to {after:.4f}: they may repeat the trained"
            " ones; make preview shows what is trained"
        )
    else:
        trial.say(f"mask works: the loss of the untrained tokens went from {before:.4f} to {after:.4f}")
