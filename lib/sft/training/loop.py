"""The training loop: steps, validation, reports and checkpoints of a run that sft.training.train has built.

In:  a `Run` and the number of finished steps.
Out: step folders and metrics records; `Requeue` after saving when a signal asked for an end. Every rank runs the same lines;
     only rank 0 holds a `Metrics`.

Nothing here waits for a GPU inside a step: the loss, the norm and whether the step was skipped are read one step later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sft.checkpoint import step_folder
from sft.model.parallel import SharedError, World
from sft.model.utilisation import mfu
from sft.packing.loader import Loader, Microbatch
from sft.packing.steps import StepPlan
from sft.recipe.schema import Train
from sft.runner.stage import Stage
from sft.training.metrics import Metrics, read
from sft.training.optim import Guard, clip, learning_rate
from sft.training.saving import Best, Saver
from sft.training.stopwatch import Mark, Stopwatch, between, mark


class Requeue(Exception):
    """A signal asked for an end; the state is saved."""


@dataclass
class Run:
    """What the loop works on."""

    stage: Stage
    world: World
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    guard: Guard
    plan: StepPlan
    loader: Callable[[int], Loader]  # from the number of finished steps
    validation: Loader | None
    sources: list[str]
    saver: Saver
    stopwatch: Stopwatch | None = None  # with more than one rank
    peak_tflops: float = 0.0  # of one GPU; 0 = not known, or none
    marks_best: bool = False  # the step with the lowest validation loss is named in BEST
    tokens: int = 0  # consumed so far, padding excluded
    skipped: int = 0  # steps in a row


def forward(run: Run, batch: Microbatch, loss_denominator: float) -> tuple[Tensor, Tensor]:
    """(loss, statistics [1 + 2S] float64: the loss, then the summed loss and the number of labels of every source)."""
    b = batch.to(run.world.device)
    loss, rows = run.model(
        b.input_ids,
        b.positions,
        b.cu_seqlens,
        b.max_len,
        b.target_rows,
        b.target_ids,
        loss_denominator,
        run.stage.recipe.train.z_loss,
    )
    count = len(run.sources)
    sums = torch.zeros(1 + 2 * count, dtype=torch.float64, device=rows.device)
    sums[0] = loss.detach()
    sums[1 : 1 + count].index_add_(0, b.target_sources, rows.double())
    sums[1 + count :].index_add_(0, b.target_sources, (b.target_ids >= 0).double())
    return loss, sums


def accumulate(run: Run, step: int, batches: Sequence[Microbatch]) -> Tensor:
    """Adds up the gradients of this rank's microbatches of a step; returns the sum of their statistics."""
    loss_denominator, total = float(run.plan.num_targets(step)), None
    for number, batch in enumerate(batches, 1):
        if isinstance(run.model, FSDPModule):  # copies of the weights (shard_degree) agree once a step
            run.model.set_requires_all_reduce(number == len(batches))
        loss, sums = forward(run, batch, loss_denominator)
        loss.backward()
        total = sums if total is None else total.add_(sums)
    assert total is not None
    return total


def optimizer_step(run: Run, step: int, batches: Sequence[Microbatch]) -> tuple[Tensor, float]:
    """One update. Returns (norm, skipped, then the statistics of `forward` over the global batch) on the device, and lr."""
    train = run.stage.recipe.train
    lr = learning_rate(step + 1, run.plan.steps, train)
    run.optimizer.param_groups[0]["lr"] = lr
    total = accumulate(run, step, batches)
    if run.world.size > 1:
        dist.all_reduce(total)
    norm = clip(run.model.parameters(), train.max_grad_norm)
    skipped = run.guard.step(run.optimizer, total[0], norm)
    run.optimizer.zero_grad(set_to_none=True)
    return torch.cat((norm.double().view(1), skipped.double().view(1), total)), lr


class Readback:
    """A step's numbers on their way from the device, and when it was done. Reading them one step later leaves the GPU busy meanwhile."""

    def __init__(self, values: Tensor, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self.host.copy_(values, non_blocking=True)
        self.ended = mark(values.device)

    def read(self) -> list[float]:
        if isinstance(self.ended, torch.cuda.Event):
            self.ended.synchronize()
        return [float(x) for x in self.host.tolist()]


def loop(run: Run, start: int, metrics: Metrics | None, stop: Callable[[], bool]) -> None:
    """Steps start..plan.steps, with checkpoints, validation and reports. Raises Requeue after saving on a signal."""
    train, world, plan, saver = run.stage.recipe.train, run.world, run.plan, run.saver
    if metrics is not None and start and (start % train.save_every == 0 or is_ephemeral(train, start)):
        again = [r for r in read(metrics.file) if r["step"] == start]
        if (best := find_best(run, again[-1] if again else {})) is not None:  # a kill may have come before BEST
            step_folder.mark_best(run.stage.out, start, best.metric, best.value, higher_is_better=False)
    loader = run.loader(start)
    pending: Readback | None = None
    began = mark(world.device)
    for step, batches in loader:
        asked = world.sum_async(torch.tensor([stop(), saver.requested(), saver.failed], dtype=torch.float32))
        if run.stopwatch is not None:
            run.stopwatch.lap()  # a validation in between does not count
        values, lr = optimizer_step(run, step, batches)
        run.tokens += plan.tokens(step)
        done = step + 1
        facts: dict[str, Any] = {"step": done, "lr": lr, "tokens": run.tokens, "step_tokens": plan.tokens(step)}
        facts["padding"] = plan.padding(step) / (plan.padding(step) + plan.tokens(step))
        facts["imbalance_expected"], facts["flops"] = loader.expected(step)
        facts["lap"] = run.stopwatch.lap() if run.stopwatch is not None else None
        if pending is not None:
            report(run, metrics, pending, began)
            began = pending.ended
        pending = Readback(values, facts)
        last = done == plan.steps
        ended, requested, failed = (flag > 0 for flag in asked().tolist())
        if failed:
            saver.wait()  # raises on every rank
        ended = ended and not last
        permanent = last or requested or done % train.save_every == 0
        regular = permanent or is_ephemeral(train, done)
        validate_now = run.validation is not None and (
            last or (train.validate_every > 0 and done % train.validate_every == 0)
        )
        if not (regular or ended or validate_now or world.device.type == "cpu"):
            continue
        # The host must know this step's numbers before it saves: a step that stops the run is not worth keeping.
        measured = validate(run) if validate_now else {}
        pending.facts |= measured
        report(run, metrics, pending, began)
        pending = None
        if regular or ended:
            # A step that only a signal saved would not be there in an uninterrupted run, and so cannot be the best.
            save(run, done, measured if regular else {}, ephemeral=not permanent)
        began = mark(world.device)  # neither is the next step's time
        if ended:
            saver.wait()
            raise Requeue
    saver.wait()


def is_ephemeral(train: Train, done: int) -> bool:
    """Whether the step gets an ephemeral checkpoint, unless it gets a permanent one."""
    return train.ephemeral_every > 0 and done % train.ephemeral_every == 0


def find_best(run: Run, measured: Mapping[str, Any]) -> Best | None:
    """What BEST may learn of a validated step."""
    value = measured.get("validation_loss")
    return (
        Best("validation_loss", value) if run.marks_best and isinstance(value, float) and math.isfinite(value) else None
    )


def report(run: Run, metrics: Metrics | None, pending: Readback, began: Mark) -> None:
    """Writes a finished step's record; stops the run after too many skipped steps in a row."""
    norm, skipped, _, *sums = pending.read()
    facts = pending.facts
    count = len(run.sources)
    labels = sum(sums[count:])
    run.skipped = run.skipped + 1 if skipped else 0
    measured = run.stopwatch.imbalance(facts["lap"]) if run.stopwatch is not None else None
    saved = run.saver.report()
    if metrics is not None:
        seconds = between(began, pending.ended)
        record: dict[str, Any] = {
            "step": facts["step"],
            "loss": sum(sums[:count]) / labels,
            "lr": facts["lr"],
            "grad_norm": norm,
            "labels": int(labels),
            "tokens": facts["tokens"],
            "tokens_per_s": facts["step_tokens"] / seconds,
            "padding": facts["padding"],
            "imbalance_expected": facts["imbalance_expected"],
            "seconds": seconds,
            **{k: v for k, v in facts.items() if k.startswith("validation")},
        }
        if measured is not None:
            record["imbalance"] = measured
        if skipped:
            record["skipped"] = True
        if count > 1:
            record["sources"] = by_source(run.sources, sums)
        if run.peak_tflops:
            record["mfu"] = mfu(facts["flops"], seconds, run.world.size, run.peak_tflops)
        if run.world.device.type == "cuda":
            record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            record["memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        if saved:
            record["checkpoint"] = saved
        metrics.count(seconds)
        step, every = facts["step"], run.stage.recipe.train.log_every
        if step % every == 0 or step == run.plan.steps or skipped or saved or "validation_loss" in record:
            metrics.write(finite(record))
            metrics.show(record)
    if run.skipped >= run.stage.recipe.train.max_skipped:
        good = run.saver.settled() or "none: no step was saved"
        raise SharedError(
            f"{run.stage.out}: step {facts['step']}: {run.skipped} steps in a row had a loss or gradient that was not finite or"
            f" a spike (last: loss {sum(sums[:count]) / labels}, gradient norm {norm}); last good checkpoint: {good};"
            " next: look at metrics.jsonl, lower [train] lr or raise skip_sigmas, and run train again"
        )


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words, at any depth."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and value - value != 0 else value


def by_source(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Mean loss of every source that had labels; `sums` = losses, then label counts."""
    count = len(names)
    return {n: sums[i] / sums[count + i] for i, n in enumerate(names) if sums[count + i]}


@torch.no_grad()
def validate(run: Run) -> dict[str, Any]:
    """Mean loss per label over the held-out split, and per source where there are several."""
    assert run.validation is not None
    total = torch.zeros(1 + 2 * len(run.sources), dtype=torch.float64, device=run.world.device)
    for _, batches in run.validation:
        for batch in batches:
            total += forward(run, batch, 1.0)[1]
    if isinstance(run.model, FSDPModule):
        run.model.reshard()  # the root keeps its weights whole for a backward pass, which does not come here
    if run.world.size > 1:
        dist.all_reduce(total)
    sums = total[1:].tolist()
    count = len(run.sources)
    facts: dict[str, Any] = {"validation_loss": sum(sums[:count]) / max(1.0, sum(sums[count:]))}
    if count > 1:
        facts["validation_sources"] = by_source(run.sources, sums)
    return facts


def save(run: Run, done: int, measured: dict[str, Any], *, ephemeral: bool) -> None:
    """Begins a checkpoint after `done` steps, unless a weight is not finite. `measured` = what validation found there."""
    bad = torch.stack([p.detach().isfinite().all().logical_not() for p in local(run.model.parameters())]).any()
    if run.world.any(bool(bad)):
        good = run.saver.settled() or "none"
        raise SharedError(
            f"{run.stage.out}/step{done}: not saved, weights are not finite; last good checkpoint: {good}"
        )
    state = {
        "position": run.plan.consumed(done).to_value(),
        "tokens": run.tokens,
        "skipped": run.skipped,
        "guard": run.guard.state(),
        "rng": torch.get_rng_state(),
        "ranks": run.world.size,
    }
    if run.world.device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state()
    run.saver.begin(done, run.model, run.optimizer, state, ephemeral=ephemeral, best=find_best(run, measured))


def local(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """This rank's part of every tensor."""
    return (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
