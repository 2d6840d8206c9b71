"""The training loop: steps, validation, metrics and checkpoints of a run that sft.training.train has built.

In:  a `Run` and the number of finished steps.
Out: step folders and metrics records. `Requeue` is raised after saving when a signal asked for the end. Every rank runs
     the same lines; only rank 0 has a `MetricsWriter`.

Nothing here waits for a GPU inside a step: the loss, the gradient norm and whether the step was skipped are read one
step later.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from sft.checkpoint import step_folder
from sft.formats.metrics import InitialValidation, SourceUse, StepRecord, read_steps
from sft.formats.out_of_memory import OutOfMemory
from sft.formats.steps import Best
from sft.model.adapters import Dropout, trained_parameters
from sft.model.memory import Plan
from sft.model.noise import neftune, token_keys
from sft.model.parallel import SharedError, World, begin_microbatch, reshard, sum_replicated_gradients
from sft.model.utilisation import mfu
from sft.packing.loader import Loader, Microbatch
from sft.packing.steps import StepPlan
from sft.runner.stage import Stage
from sft.training.hang import HangWatch
from sft.training.metrics import MetricsWriter
from sft.training.optim import Guard, Start, clip, learning_rate
from sft.training.replay import Replay
from sft.training.saving import Saver
from sft.training.sources import after_step
from sft.training.stopping import Due, Stopping, already_ended, clock, may_be_best
from sft.training.stopwatch import Lap, Mark, Stopwatch, between, mark
from sft.training.telemetry import Groups, Watched


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
    stopping: Stopping
    first: int = 0  # finished steps at which this run begins: 0, or those of the step that it continues from
    rate: Start | None = None  # of the learning rate, in a run that continues another one
    ended: str = ""  # why training ended before the last step of the plan
    last: int = 0  # the step that training ended with
    stopwatch: Stopwatch | None = None  # with more than one rank
    hang: HangWatch | None = None
    room: Plan | None = None  # of the GPU's memory
    short: OutOfMemory | None = None  # what ran out of memory in an earlier attempt, so that this one recomputes more
    peak_tflops: float = 0.0  # of one GPU; 0 = not known, or a CPU
    marks_best: bool = False  # the step with the lowest validation loss is named in BEST
    tokens: int = 0  # consumed so far, padding excluded
    skipped: int = 0  # steps in a row that the guard skipped
    width: int = 0  # of the model
    dropout: Dropout | None = None  # of adapters
    loss_weights: Tensor | None = None  # fp32 [S] on the device: factors on the losses of the sources
    flops_change: float = 0.0  # for each token: adapters' FLOPs, less the gradients of frozen matrices
    labels: list[SourceUse] = field(default_factory=list)  # of each source, so far
    groups: Groups = field(default_factory=dict)  # of layers, that telemetry_every watches; empty without it
    replay: Replay | None = None  # with replay_every

    def watched(self, step: int) -> Groups:
        """The groups of layers whose numbers the step after `step` finished ones records."""
        every = self.stage.recipe.train.telemetry_every
        return self.groups if every and (step + 1) % every == 0 else {}


class TrainState(TypedDict):
    """What a step folder stores for a resume besides model and optimizer, for each rank."""

    position: dict[str, Any]  # DataPosition
    tokens: int
    skipped: int
    guard: dict[str, Tensor]
    rng: Tensor
    ranks: int
    rng_cuda: NotRequired[Tensor]
    stopping: NotRequired[dict[str, float]]  # Stopping.state, unless it is empty
    start: NotRequired[dict[str, float]]  # Start, in a run that continues another one
    labels: NotRequired[list[tuple[int, int]]]  # seen and skipped of each source; early versions did not record it
    losses: NotRequired[list[tuple[float | None, float | None]]]  # the first and the last loss of each source so far


class Validation(NamedTuple):
    """Mean loss per trained token of the held-out split, and by source where there are several."""

    loss: float
    sources: dict[str, float] | None


@dataclass(frozen=True)
class StepFacts:
    """What the host knows of a step without asking the device."""

    step: int  # number of finished steps
    lr: float
    tokens: int  # consumed so far, padding excluded
    step_tokens: int
    padding: float  # share of the step's positions
    imbalance_expected: float
    flops: float  # of all ranks
    lap: Lap | None  # of the stopwatch
    groups: tuple[str, ...] = ()  # of layers, whose numbers the step has
    validation: Validation | None = None
    saved: bool = False  # a checkpoint of the step follows


class StepNumbers(NamedTuple):
    """What the device computed in a step. The sums have one entry per source."""

    grad_norm: float
    skipped: bool
    loss_sums: list[float]
    target_counts: list[float]
    grad_norms: dict[str, float]  # by group of layers, where the step was watched
    update_ratios: dict[str, float]

    @property
    def num_targets(self) -> float:
        return sum(self.target_counts)

    @property
    def loss(self) -> float:
        """Mean loss per trained token of the global batch."""
        return sum(self.loss_sums) / self.num_targets


class Readback:
    """A step's numbers on their way from the device, and the time at which the step ended. Reading them one step later
    keeps the GPU busy."""

    def __init__(self, values: Tensor, facts: StepFacts) -> None:
        """`values` [3 + 2 S + 2 G]: gradient norm, skipped, the statistics of `forward`, then gradient norms and update-to-weight
        ratios of the G groups of layers that `facts` names."""
        self.facts = facts
        self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self.host.copy_(values, non_blocking=True)
        self.ended = mark(values.device)

    def read(self) -> StepNumbers:
        if isinstance(self.ended, torch.cuda.Event):
            self.ended.synchronize()
        norm, skipped, _, *rest = [float(x) for x in self.host.tolist()]
        names = self.facts.groups
        end = len(rest) - 2 * len(names)
        grads, ratios = (dict(zip(names, values, strict=True)) for values in _halves(rest[end:]))
        return StepNumbers(norm, bool(skipped), *_halves(rest[:end]), grads, ratios)


def _halves(values: list[float]) -> tuple[list[float], list[float]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def forward(run: Run, batch: Microbatch, loss_denominator: float, step: int | None = None) -> tuple[Tensor, Tensor]:
    """(loss, statistics [1 + 2 S] float64: the loss, then for each of S sources the sum of losses, then the number of
    targets). `step`: in training, which noise depends on. The loss has the weights of the sources, the sums do not."""
    b = batch.to(run.world.device)
    set_dropout(run, b, step)
    loss, rows = run.model(
        b.input_ids,
        b.positions,
        b.cu_seqlens,
        b.max_len,
        b.target_rows,
        b.target_ids,
        loss_denominator,
        run.stage.recipe.train.z_loss,
        embedding_noise(run, b, step),
        None if run.loss_weights is None else run.loss_weights[b.target_sources],
    )
    count = len(run.sources)
    sums = torch.zeros(1 + 2 * count, dtype=torch.float64, device=rows.device)
    sums[0] = loss.detach()
    sums[1 : 1 + count].index_add_(0, b.target_sources, rows.double())
    sums[1 + count :].index_add_(0, b.target_sources, (b.target_ids >= 0).double())
    return loss, sums


def embedding_noise(run: Run, batch: Microbatch, step: int | None) -> Tensor | None:
    """NEFTune's noise, a function of seed, step and token; None in validation and without it."""
    train = run.stage.recipe.train
    if step is None or batch.token_numbers is None or batch.document_lengths is None or not train.neftune_alpha:
        return None
    seed = (train.data_seed << 32) + step
    return neftune(batch.token_numbers, batch.document_lengths, run.width, train.neftune_alpha, seed)


def set_dropout(run: Run, batch: Microbatch, step: int | None) -> None:
    """Tells the adapters which tokens come: their dropout is a function of seed, step and token. None drops in validation."""
    if run.dropout is not None:
        seed = ((run.stage.recipe.train.data_seed + 1) << 32) + (step or 0)
        numbers = batch.token_numbers if step is not None else None
        run.dropout.keys = None if numbers is None else token_keys(numbers, seed)


def keep_gathered(run: Run) -> str:
    """What the memory plan lets a rank keep over the microbatches of a step."""
    return run.room.keep_gathered if run.room is not None else "none"


def accumulate(run: Run, step: int, batches: Sequence[Microbatch]) -> Tensor:
    """Adds up the gradients of this rank's microbatches of a step. Returns the sum of their statistics."""
    loss_denominator, total = float(run.plan.num_targets(step)), None
    for number, batch in enumerate(batches, 1):
        mark_part(run, f"microbatch {number} of {len(batches)}")
        begin_microbatch(run.model, keep_gathered(run), last=number == len(batches))
        loss, sums = forward(run, batch, loss_denominator, step)
        loss.backward() if run.replay is None else run.replay.backward(number - 1, loss, sums)
        total = sums if total is None else total.add_(sums)
    sum_replicated_gradients(run.model, run.world)
    assert total is not None
    return total


def optimizer_step(run: Run, step: int, batches: Sequence[Microbatch], lr: float | None = None) -> tuple[Tensor, float]:
    """One update, at the schedule's learning rate unless `lr` is another. Returns (gradient norm, skipped, the statistics
    of `forward` over the global batch, then the numbers of watched groups of layers) on the device, and lr."""
    train = run.stage.recipe.train
    lr = learning_rate(step + 1, run.plan.steps, train, run.rate) if lr is None else lr
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    total = accumulate(run, step, batches)
    if run.replay is not None:
        run.replay.check(run.stage.out, run.stage.log)
    mark_part(run, "update of the weights")
    if run.world.size > 1:
        dist.all_reduce(total)
    watched = Watched(groups) if (groups := run.watched(step)) else None
    norm = clip(run.model.parameters(), train.max_grad_norm)
    skipped = run.guard.step(run.optimizer, total[0], norm, total[1 + len(run.sources) :])
    run.optimizer.zero_grad(set_to_none=True)
    values = (norm.double().view(1), skipped.double().view(1), total, *([watched.numbers()] if watched else []))
    return torch.cat(values), lr


def begin_replay(run: Run, replay: Replay, loader: Loader, step: int) -> None:
    """Computes another rank's microbatch of a step that replay_every samples."""
    mark_part(run, "replay")
    begin_microbatch(run.model, keep_gathered(run), last=True)  # a sum that is put off would be part of the step's
    denominator = float(run.plan.num_targets(step))
    replay.begin(loader, step, lambda batch: forward(run, batch, denominator, step), run.model.zero_grad)


def loop(run: Run, start: int, metrics: MetricsWriter | None, stop: Callable[[], bool]) -> None:
    """Steps start..plan.steps, with checkpoints, validation and metrics. Raises Requeue after saving on a signal."""
    world, saver = run.world, run.saver
    begin(run, start, metrics)
    if run.ended:
        return
    loader = run.loader(start)
    pending: Readback | None = None
    began = mark(world.device)
    for step, batches in loader:
        flags = world.sum_async(
            torch.tensor([stop(), saver.requested(), saver.failed, *clock(run.stopping, world)], dtype=torch.float32)
        )
        values, facts = take_step(run, loader, step, batches)
        if pending is not None:
            report_step(run, metrics, pending, began)
            began = pending.ended
        pending = Readback(values, facts)
        stopping, requested, failed, timed, out_of_time = (flag > 0 for flag in flags().tolist())
        if run.hang is not None:
            run.hang.finish_step(facts.step)
        if failed:
            saver.wait()  # raises on every rank
        due = Due.after(
            facts.step,
            run.plan.steps,
            run.stage.recipe.train,
            held_out=run.validation is not None,
            stop=stopping,
            requested=requested,
            timed=timed,
            out_of_time=out_of_time,
        )
        if not (due.any or world.device.type == "cpu"):
            continue
        # The host must know this step's numbers before it saves: a step that stops the run is not worth keeping.
        validation = validate(run) if due.validation else None
        if validation is not None:
            due = due.validated(facts.step, run.plan.steps, run.stopping, validation.loss)
        pending.facts = replace(facts, validation=validation, saved=due.saves)
        report_step(run, metrics, pending, began)
        pending = None
        if due.saves:
            save_due(run, due, facts.step, validation, metrics)
        began = mark(world.device)  # saving is not part of the next step's time
        if due.stop:
            saver.wait()
            raise Requeue
        if due.ended:
            run.ended, run.last = due.ended, facts.step
            break
    else:
        run.last = run.plan.steps
    saver.wait()


def begin(run: Run, start: int, metrics: MetricsWriter | None) -> None:
    """What comes before the first step of this attempt. Sets `run.ended` where an earlier attempt has ended the run."""
    if metrics is not None:
        mark_restored(run, start, metrics)
    if start == run.first and run.validation is not None and run.stage.recipe.train.validate_start:
        before = validate(run)
        if metrics is not None:
            metrics.start(InitialValidation(before.loss, before.sources, start or None, run.tokens or None))
    run.stopping.begin()
    if run.first < start < run.plan.steps and (ended := already_ended(run.stopping, run.world)):
        run.ended, run.last = ended, start


def take_step(run: Run, loader: Loader, step: int, batches: Sequence[Microbatch]) -> tuple[Tensor, StepFacts]:
    """Starts one step on the device. Returns the statistics of `optimizer_step`, which are still on the device."""
    if run.replay is not None:
        begin_replay(run, run.replay, loader, step)
    if run.stopwatch is not None:
        run.stopwatch.lap()  # a validation or a replay in between does not count
    values, lr = optimizer_step(run, step, batches)
    return values, step_facts(run, loader, step, lr)


def save_due(run: Run, due: Due, step: int, validation: Validation | None, metrics: MetricsWriter | None) -> None:
    """Saves a step that is due."""
    # A step that only a signal saved would not be there in an uninterrupted run, and so cannot be the best.
    best = find_best(run, step, validation.loss) if validation and due.scheduled else None
    if metrics is not None:
        metrics.seal(step)
    with run.hang.paused() if run.hang is not None else contextlib.nullcontext():
        save(run, step, best, ephemeral=not due.permanent)


def mark_part(run: Run, what: str) -> None:
    """Notes what this rank does next, for the report of a hang."""
    if run.hang is not None:
        run.hang.mark(what)


def mark_restored(run: Run, start: int, metrics: MetricsWriter) -> None:
    """Names the restored step in BEST where it is the best: a kill may have come between the step and BEST. Rank 0
    only."""
    train = run.stage.recipe.train
    if start == run.first or not may_be_best(train, start):
        return
    losses = [r.validation_loss for r in read_steps(metrics.file) if r.step == start and r.validation_loss is not None]
    if losses and (best := find_best(run, start, losses[-1])):
        step_folder.mark_best(run.stage.out, start, best.metric, best.value, higher_is_better=False)


def find_best(run: Run, step: int, validation_loss: float) -> Best | None:
    """The entry that BEST gets if this validated step is the best so far; None where BEST does not follow the
    validation loss."""
    if not run.marks_best or not math.isfinite(validation_loss):
        return None
    return Best(step, "validation_loss", validation_loss)


def step_facts(run: Run, loader: Loader, step: int, lr: float) -> StepFacts:
    """What the host knows of the step after it was started. Counts its tokens as consumed."""
    plan = run.plan
    tokens, padding = plan.tokens(step), plan.padding(step)
    run.tokens += tokens
    imbalance, flops = loader.expected(step)
    return StepFacts(
        step=step + 1,
        lr=lr,
        tokens=run.tokens,
        step_tokens=tokens,
        padding=padding / (padding + tokens),
        imbalance_expected=imbalance,
        flops=flops + run.flops_change * tokens,
        lap=run.stopwatch.lap() if run.stopwatch is not None else None,
        groups=tuple(run.watched(step)),
    )


def report_step(run: Run, metrics: MetricsWriter | None, pending: Readback, began: Mark) -> None:
    """Writes a finished step's record. Raises SharedError after too many skipped steps in a row."""
    numbers, facts = pending.read(), pending.facts
    run.skipped = run.skipped + 1 if numbers.skipped else 0
    run.labels = after_step(run.labels, numbers.loss_sums, numbers.target_counts, numbers.skipped)
    imbalance = run.stopwatch.imbalance(facts.lap) if run.stopwatch is not None and facts.lap is not None else None
    saved = run.saver.finished()
    if metrics is not None:
        for line in run.stopwatch.warnings(facts.step) if run.stopwatch is not None else ():
            run.stage.log(line)
        seconds = between(began, pending.ended)
        cuda, validation = run.world.device.type == "cuda", facts.validation
        record = StepRecord(
            step=facts.step,
            loss=numbers.loss,
            lr=facts.lr,
            grad_norm=numbers.grad_norm,
            labels=int(numbers.num_targets),
            tokens=facts.tokens,
            tokens_per_s=facts.step_tokens / seconds,
            padding=facts.padding,
            imbalance_expected=facts.imbalance_expected,
            seconds=seconds,
            validation_loss=validation.loss if validation else None,
            validation_sources=validation.sources if validation else None,
            imbalance=imbalance,
            skipped=numbers.skipped or None,
            sources=by_source(run.sources, numbers.loss_sums, numbers.target_counts),
            weighted_loss=weighted_loss(run, numbers),
            mfu=mfu(facts.flops, seconds, run.world.size, run.peak_tflops) if run.peak_tflops else None,
            memory_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
            memory_reserved_gb=torch.cuda.max_memory_reserved() / 1e9 if cuda else None,
            checkpoint=saved,
            grad_norms=numbers.grad_norms or None,
            update_ratios=numbers.update_ratios or None,
        )
        metrics.count(seconds)
        logged = facts.step % run.stage.recipe.train.log_every == 0 or facts.step == run.plan.steps
        if logged or numbers.skipped or saved or validation or facts.groups or facts.saved:
            metrics.write(record)
            metrics.show(record)
    if run.skipped >= run.stage.recipe.train.max_skipped:
        good = run.saver.newest_complete() or "none: no step was saved"
        raise SharedError(
            f"{run.stage.out}: step {facts.step}: {run.skipped} steps in a row had a loss or gradient that was not finite"
            f" or a spike (last: loss {numbers.loss}, gradient norm {numbers.grad_norm}); last good checkpoint: {good};"
            " next: look at metrics.jsonl, lower [train] lr or raise skip_sigmas, and run train again"
        )


def weighted_loss(run: Run, numbers: StepNumbers) -> float | None:
    """The loss with the weights of the sources, over the number of trained tokens; None where all weights are 1."""
    if run.loss_weights is None:
        return None
    weighted = [use.loss_weight * loss for use, loss in zip(run.labels, numbers.loss_sums, strict=True)]
    return sum(weighted) / numbers.num_targets


def by_source(
    names: Sequence[str], loss_sums: Sequence[float], target_counts: Sequence[float]
) -> dict[str, float] | None:
    """Mean loss of every source that had targets; None for a single source."""
    if len(names) < 2:
        return None
    return {n: loss / count for n, loss, count in zip(names, loss_sums, target_counts, strict=True) if count}


@torch.no_grad()
def validate(run: Run) -> Validation:
    """The loss of the held-out split."""
    assert run.validation is not None
    mark_part(run, "validation")
    total = torch.zeros(1 + 2 * len(run.sources), dtype=torch.float64, device=run.world.device)
    for _, batches in run.validation:
        for batch in batches:
            total += forward(run, batch, 1.0)[1]
            if run.hang is not None:
                run.hang.finish_step(run.hang.step)  # a validation may take as long as many steps
    reshard(run.model)  # gathered weights are kept for a backward pass, which does not come here
    if run.world.size > 1:
        dist.all_reduce(total)
    sums, count = total[1:].tolist(), len(run.sources)
    return Validation(
        sum(sums[:count]) / max(1.0, sum(sums[count:])), by_source(run.sources, sums[:count], sums[count:])
    )


def save(run: Run, done: int, best: Best | None, *, ephemeral: bool) -> None:
    """Starts a checkpoint after `done` steps. `best`: what BEST gets if the step is the best. Raises SharedError, on
    every rank, when a weight is not finite."""
    trained = local(trained_parameters(run.model).values())
    bad = torch.stack([p.detach().isfinite().all().logical_not() for p in trained]).any()
    if run.world.any(bool(bad)):
        good = run.saver.newest_complete() or "none"
        raise SharedError(
            f"{run.stage.out}/step{done}: not saved, weights are not finite; last good checkpoint: {good}"
        )
    state: TrainState = {
        "position": run.plan.consumed(done).to_value(),
        "tokens": run.tokens,
        "skipped": run.skipped,
        "guard": run.guard.state(),
        "rng": torch.get_rng_state(),
        "ranks": run.world.size,
        "labels": [(use.seen, use.skipped) for use in run.labels],
        "losses": [(use.first_loss, use.last_loss) for use in run.labels],
    }
    if stopping := run.stopping.state():
        state["stopping"] = stopping
    if run.rate is not None:
        state["start"] = run.rate.to_value()
    if run.world.device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state()
    run.stopping.saved()
    run.saver.begin(done, run.model, run.optimizer, state, ephemeral=ephemeral, best=best)


def local(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """This rank's part of every tensor."""
    return (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
