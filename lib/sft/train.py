"""Training: the synced dataset and first weights to step folders.

In:  runs/<run> with a finished sync stage; torchrun's environment, or none for one process.
Out: runs/<run>/train/: stepN/ (OLMo-core's layout, see sft.checkpoint), tokenizer/, metrics.jsonl, manifest.json last.

    python -m sft.train runs/<run> [--cluster C] [field=value …]
    torchrun --nproc-per-node 8 -m sft.train runs/<run> [--cluster C] [field=value …]

Killed anywhere, the same command continues from the newest whole step. SIGTERM or SIGUSR1 saves and exits with status 75
(EX_TEMPFAIL), which tells a scheduler to run it again. Status 1 is an error with a message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sft import base, checkpoint, manifest, presets
from sft.data import Loader, Microbatch
from sft.dataset import Dataset
from sft.dist import SharedError, World, join, shard
from sft.errors import SftError
from sft.metrics import Metrics
from sft.model import Transformer
from sft.optim import Guard, build_adamw, clip, learning_rate
from sft.packing import pack_dataset
from sft.stage import Result, Stage, open_stage, report_errors
from sft.steps import StepPlan, accumulation

REQUEUE = 75
REQUEUE_MARK = ".requeue"


class Requeue(Exception):
    """A signal asked for an end; the state is saved."""


@dataclass
class Run:
    """What the loop works on."""

    stage: Stage
    world: World
    model: torch.nn.Module
    optimizer: torch.optim.AdamW
    guard: Guard
    plan: StepPlan
    loader: Callable[[int], Loader]  # from the number of finished steps
    validation: Loader | None
    sources: list[str]
    step_config: dict[str, Any]
    tokens: int = 0  # consumed so far, padding excluded
    skipped: int = 0  # steps in a row
    last_saved: Path | None = None


def forward(run: Run, batch: Microbatch, divisor: float) -> tuple[Tensor, Tensor]:
    """(loss, statistics [1 + 2S] float64: the loss, then the summed loss and the number of labels of every source)."""
    b = batch.to(run.world.device)
    loss, rows = run.model(
        b.input_ids,
        b.positions,
        b.cu_seqlens,
        b.max_len,
        b.label_rows,
        b.label_ids,
        divisor,
        run.stage.recipe.train.z_loss,
    )
    count = len(run.sources)
    sums = torch.zeros(1 + 2 * count, dtype=torch.float64, device=rows.device)
    sums[0] = loss.detach()
    sums[1 : 1 + count].index_add_(0, b.label_sources, rows.double())
    sums[1 + count :].index_add_(0, b.label_sources, (b.label_ids >= 0).double())
    return loss, sums


def optimizer_step(run: Run, step: int, batches: Sequence[Microbatch]) -> tuple[Tensor, float]:
    """One update. Returns (norm, skipped, then the statistics of `forward` over the global batch) on the device, and lr."""
    train = run.stage.recipe.train
    lr = learning_rate(step + 1, run.plan.steps, train)
    run.optimizer.param_groups[0]["lr"] = lr
    divisor = float(run.plan.labels(step))
    total = None
    for batch in batches:
        loss, sums = forward(run, batch, divisor)
        loss.backward()
        total = sums if total is None else total.add_(sums)
    assert total is not None
    if run.world.size > 1:
        dist.all_reduce(total)
    norm = clip(run.model.parameters(), train.max_grad_norm)
    skipped = run.guard.step(run.optimizer, total[0], norm)
    run.optimizer.zero_grad(set_to_none=True)
    return torch.cat((norm.double().view(1), skipped.double().view(1), total)), lr


class Readback:
    """Numbers on their way from the device. Reading them one step later leaves the GPU busy meanwhile."""

    def __init__(self, values: Tensor, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.event = None
        if values.is_cuda:
            self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = values

    def read(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return [float(x) for x in self.host.tolist()]


def loop(run: Run, start: int, metrics: Metrics | None, stop: Callable[[], bool]) -> None:
    """Steps start..plan.steps, with checkpoints, validation and reports. Raises Requeue after saving on a signal."""
    train, world, plan = run.stage.recipe.train, run.world, run.plan
    loader = run.loader(start)
    pending: Readback | None = None
    began = time.monotonic()
    for step, batches in loader:
        asked = world.sum_later(torch.tensor([float(stop())]))
        values, lr = optimizer_step(run, step, batches)
        run.tokens += plan.tokens(step)
        done = step + 1
        facts = {"step": done, "lr": lr, "tokens": run.tokens, "step_tokens": plan.tokens(step)}
        facts["padding"] = plan.padding(step) / (plan.padding(step) + plan.tokens(step))
        facts["imbalance"] = loader.idle(step)
        if pending is not None:
            began = report(run, metrics, pending, began)
        pending = Readback(values, facts)
        last = done == plan.steps
        ended = bool(asked().item()) and not last
        permanent = last or done % train.save_every == 0
        ephemeral = ended or (train.ephemeral_every > 0 and done % train.ephemeral_every == 0)
        validate_now = run.validation is not None and (
            last or (train.validate_every > 0 and done % train.validate_every == 0)
        )
        if not (permanent or ephemeral or validate_now or world.device.type == "cpu"):
            continue
        # The host must know this step's numbers before it saves: a step that stops the run is not worth keeping.
        if validate_now and not ended:
            paused = time.monotonic()
            pending.facts |= validate(run)
            began += time.monotonic() - paused
        began = report(run, metrics, pending, began)
        pending = None
        if permanent or ephemeral:
            save(run, done, ephemeral=not permanent)
            began = time.monotonic()
        if ended:
            raise Requeue


def report(run: Run, metrics: Metrics | None, pending: Readback, began: float) -> float:
    """Writes a finished step's record; stops the run after too many skipped steps in a row. Returns the time now."""
    norm, skipped, _, *sums = pending.read()
    now = time.monotonic()
    facts = pending.facts
    count = len(run.sources)
    labels = sum(sums[count:])
    run.skipped = run.skipped + 1 if skipped else 0
    if metrics is not None:
        seconds = now - began
        record: dict[str, Any] = {
            "step": facts["step"],
            "loss": sum(sums[:count]) / labels,
            "lr": facts["lr"],
            "grad_norm": norm,
            "labels": int(labels),
            "tokens": facts["tokens"],
            "tokens_per_s": facts["step_tokens"] / seconds,
            "padding": facts["padding"],
            "imbalance": facts["imbalance"],
            "seconds": seconds,
            **{k: v for k, v in facts.items() if k.startswith("validation")},
        }
        if skipped:
            record["skipped"] = True
        if count > 1:
            record["sources"] = by_source(run.sources, sums)
        if run.world.device.type == "cuda":
            record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        metrics.count(seconds)
        step, every = facts["step"], run.stage.recipe.train.log_every
        if step % every == 0 or step == run.plan.steps or skipped or "validation_loss" in record:
            metrics.write({k: finite(v) for k, v in record.items()})
            metrics.show(record)
    if run.skipped >= run.stage.recipe.train.max_skipped:
        good = run.last_saved or "none: no step was saved"
        raise SharedError(
            f"{run.stage.out}: step {facts['step']}: {run.skipped} steps in a row had a loss or gradient that was not finite or"
            f" a spike (last: loss {sum(sums[:count]) / labels}, gradient norm {norm}); last good checkpoint: {good};"
            " next: look at metrics.jsonl, lower [train] lr or raise skip_sigmas, and run train again"
        )
    return now


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
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


def save(run: Run, done: int, *, ephemeral: bool) -> None:
    """Saves after `done` steps, unless a weight is not finite. Earlier ephemeral steps go once the new one is whole."""
    bad = sum(int((~p.detach().isfinite()).any()) for p in local(run.model.parameters()))
    if run.world.any(bad > 0):
        raise SharedError(
            f"{run.stage.out}/step{done}: not saved, weights are not finite; last good checkpoint: {run.last_saved or 'none'}"
        )
    state = {
        "position": run.plan.consumed(done),
        "tokens": run.tokens,
        "skipped": run.skipped,
        "guard": run.guard.state(),
        "rng": torch.get_rng_state(),
        "ranks": run.world.size,
    }
    if run.world.device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state()
    out = run.stage.out
    run.last_saved = checkpoint.save(
        out, done, run.model, run.optimizer, state, run.step_config, run.world, ephemeral=ephemeral
    )
    if run.world.leader:
        checkpoint.drop_ephemeral(out, run.last_saved)
        run.stage.say(f"saved {run.last_saved}")


def local(tensors: Any) -> Any:
    """This rank's part of every tensor."""
    return (t.to_local() if hasattr(t, "to_local") else t for t in tensors)


def prepare(stage: Stage, world: World) -> tuple[Run, int]:
    """Builds everything and restores the newest whole step. Returns the run and the number of finished steps."""
    train, hardware = stage.recipe.train, stage.hardware
    dataset_folder = stage.dataset
    facts = json.loads((dataset_folder / "dataset.json").read_bytes())
    config = presets.resolve(stage.recipe.model, int(facts["vocab_size"]))
    warning = base.check_tokenizer(dataset_folder, facts, stage.base)

    def packed(name: str) -> tuple[Dataset, Any]:
        dataset = Dataset.open(dataset_folder / name)
        return dataset, pack_dataset(dataset, train.seq_len, train.long_documents)

    dataset, index = packed("data")
    plan = StepPlan.build(index, train)
    _, packs_each = accumulation(plan.batch_packs, train.seq_len, world.size, hardware.microbatch_tokens)
    workers = hardware.threads or (1 if world.device.type == "cpu" else 2)

    def loader(plan: StepPlan, dataset: Dataset, start: int) -> Loader:
        return Loader(
            plan, dataset, facts["eos_id"], facts["pad_id"], config, world.rank, world.size,
            packs_each * train.seq_len, start, workers,
        )  # fmt: skip

    validation = None
    if (dataset_folder / "validation" / "documents.npy").is_file():
        held_out, held_out_index = packed("validation")
        if len(held_out_index):
            validation = loader(StepPlan.once(held_out_index, world.size * packs_each), held_out, 0)

    with torch.device("meta"):
        model: torch.nn.Module = Transformer(config)
    for block in model.get_submodule("blocks").children():
        block.recompute = hardware.recompute  # type: ignore[assignment]
        if hardware.compile:
            block.compile(fullgraph=world.device.type == "cuda")
    model = shard(model, world, train.precision, hardware.shard_degree).to_empty(device=world.device)
    optimizer = build_adamw(model, train)
    run = Run(
        stage=stage,
        world=world,
        model=model,
        optimizer=optimizer,
        guard=Guard(train.skip_sigmas, world.device),
        plan=plan,
        loader=lambda start: loader(plan, dataset, start),
        validation=validation,
        sources=[str(s["path"]) for s in facts["sources"]] or ["data"],
        step_config=base.step_config(config, facts),
    )

    def say(text: str) -> None:
        if world.leader:
            stage.say(text)

    if warning:
        say(f"warning: {warning}")
    step = checkpoint.latest(stage.out, world, lambda text: say(f"warning: {text}"))
    if step is None:
        origin = base.initialise(model, config, stage.base, train.seed)
        start = 0
    else:
        state = checkpoint.restore(step, model, optimizer, world)
        start = plan.check(state["position"])
        run.tokens, run.skipped, run.last_saved = state["tokens"], state["skipped"], step
        run.guard.load(state["guard"])
        torch.set_rng_state(state["rng"])
        if "rng_cuda" in state and world.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"])
        origin = f"continuing from {step}"
    described = plan.describe()
    say(
        f"{config.parameters:,} parameters, {origin}; {world.size} x {world.device.type}, {train.precision};"
        f" {plan.steps} steps of {train.global_batch_tokens:,} tokens, {described['epochs']:.2f} epochs,"
        f" padding {described['padding_fraction']:.1%}, tokens lost to seq_len {described['tokens_lost_fraction']:.1%}"
    )
    return run, start


def train_stage(stage: Stage, world: World, stop: Callable[[], bool]) -> Result:
    """The whole stage on every rank. Raises Requeue when `stop` says so and the state is saved."""
    if world.leader:
        (stage.out / REQUEUE_MARK).unlink(missing_ok=True)
    run, start = prepare(stage, world)
    metrics = None
    if world.leader:
        copy_tokenizer(stage)
        metrics = Metrics(stage.out, start, run.plan.steps, stage.say)
        train = stage.recipe.train
        if train.wandb_project:
            options = {"model": dataclasses.asdict(stage.recipe.model), "train": dataclasses.asdict(train)}
            metrics.open_wandb(train.wandb_project, stage.recipe.run, stage.identity, options, stage.out)
    try:
        loop(run, start, metrics, stop)
    except Requeue:
        if world.leader:
            manifest.write_atomic(stage.out / REQUEUE_MARK, b"")
        raise
    finally:
        if metrics is not None:
            metrics.close()
    final = stage.out / f"step{run.plan.steps}"
    return Result([final.name, "tokenizer", "metrics.jsonl"], summary(stage.out, run, final) if world.leader else {})


def copy_tokenizer(stage: Stage) -> None:
    """The tokenizer folder beside the step folders, where OLMo-core's converter and ours look for it."""
    source, target = stage.dataset / "data" / "tokenizer", stage.out / "tokenizer"
    work = stage.out / ".tokenizer"
    for folder in (work, target):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, work)
    work.rename(target)


def summary(out: Path, run: Run, final: Path) -> dict[str, Any]:
    """Figures for the manifest."""
    from sft.metrics import read

    records = read(out / "metrics.jsonl")
    timed = records[1:] or records
    seconds = sum(r["seconds"] for r in timed)
    result = {
        "final_step": run.plan.steps,
        "checkpoint": final.name,
        "loss": records[-1]["loss"],
        "first_loss": records[0]["loss"],
        "tokens": records[-1]["tokens"],
        "tokens_per_s": sum(r["tokens_per_s"] * r["seconds"] for r in timed) / seconds if seconds else 0.0,
        "skipped_steps": sum(1 for r in records if r.get("skipped")),
        "data": run.plan.describe(),
    }
    validated = [r for r in records if "validation_loss" in r]
    if validated:
        result["validation_loss"] = validated[-1]["validation_loss"]
        result["first_validation_loss"] = validated[0]["validation_loss"]
    return result


def main(argv: Sequence[str] | None = None) -> int:
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGUSR1, ask)
    torch.set_float32_matmul_precision("high")
    world = join()
    began = time.monotonic()
    stage: Stage | None = None
    try:
        with report_errors("train") if world.leader else quiet(), contextlib.ExitStack() as stack:
            # Rank 0 first: it takes the lock and moves a folder of other inputs aside before anyone looks at it.
            opened = world.leader_first(
                lambda: [stack.enter_context(open_stage("train", argv, in_place=True))], share=False
            )
            stage = (
                opened[0] if opened else stack.enter_context(open_stage("train", argv, in_place=True, follower=True))
            )
            if stage.hardware.threads and world.device.type == "cpu":
                torch.set_num_threads(stage.hardware.threads)
            result = train_stage(stage, world, lambda: asked)
            if world.leader:
                stage.finish(result)
        if world.leader:
            stage.say(f"done in {time.monotonic() - began:.1f} s: {stage.out / manifest.NAME}")
    except Requeue:
        if world.leader and stage is not None:
            stage.say(f"stopped by a signal and saved; exit status {REQUEUE} asks to be run again")
        return REQUEUE
    finally:
        world.close()
    return 0


@contextlib.contextmanager
def quiet() -> Any:
    """On ranks other than 0: says only what rank 0 does not know."""
    try:
        yield
    except SharedError:
        sys.exit(1)
    except SftError as error:
        sys.exit(f"[train] error: {error}")


if __name__ == "__main__":
    sys.exit(main())
