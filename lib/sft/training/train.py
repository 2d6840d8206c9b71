"""Training: the synced dataset and first weights to step folders.

In:  runs/<run> with a finished sync stage; torchrun's environment, or none for one process.
Out: runs/<run>/train/: stepN/ (OLMo-core's layout, see sft.checkpoint.step_folder), tokenizer/, metrics.jsonl, manifest.json last.

    python -m sft.training.train runs/<run> [--cluster C] [field=value …]
    torchrun --nproc-per-node 8 -m sft.training.train runs/<run> [--cluster C] [field=value …]

Killed anywhere, the same command continues from the newest whole step. SIGTERM or SIGUSR1 saves and exits with status 75
(EX_TEMPFAIL), which tells a scheduler to run it again. Status 1 is an error with a message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sft.checkpoint import olmo_core, step_folder
from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.common.process import report_errors
from sft.data.dataset import Dataset
from sft.formats import manifest
from sft.formats import metrics as metrics_format
from sft.formats.dataset import DatasetInfo
from sft.formats.metrics import Attempt, TrainMetrics, UploadSummary, read_attempts, read_steps
from sft.formats.packs import DataPosition
from sft.model import memory, utilisation
from sft.model.model import Transformer, compile_blocks, missing_compiler
from sft.model.parallel import SharedError, World, context_group, join, make_deterministic, shard
from sft.packing.loader import Loader
from sft.packing.packs import PackIndex, pack_dataset
from sft.packing.steps import StepPlan, accumulation, context_groups
from sft.recipe import presets
from sft.recipe.schema import Hardware
from sft.runner.cli import parse_run
from sft.runner.stage import Result, Stage, open_stage
from sft.training import evaluations, initial_weights, logs
from sft.training.loop import Requeue, Run, loop
from sft.training.metrics import MetricsWriter
from sft.training.optim import Guard, build_adamw
from sft.training.saving import Saver
from sft.training.stopwatch import Stopwatch
from sft.training.trackers import Trackers
from sft.training.uploads import Uploads, bring_checkpoint, destination
from sft.training.watcher import Watcher, start_watcher

REQUEUE = 75
REQUEUE_MARK = ".requeue"


def prepare(stage: Stage, world: World) -> tuple[Run, int]:
    """Builds everything and restores the newest whole step. Returns the run and the number of finished steps."""
    train = stage.recipe.train
    if train.deterministic:
        make_deterministic()
    hardware, lacking = resolve_compile(stage, world)
    # Rank 0 hashes every byte before anyone reads it; where the storage is a bucket, each machine then brings its own copy.
    world.on_rank0(lambda: [stage.dataset, stage.base], share=False)
    dataset_folder, base_folder = world.on_all_ranks(lambda: (stage.dataset, stage.base))[world.rank]
    info = DatasetInfo.of(dataset_folder)
    facts = info.facts
    config = presets.resolve(stage.recipe.model, facts.vocab_size)
    unchecked = stage.recipe.model.base_tokenizer == "unchecked"
    warning = initial_weights.check_tokenizer(dataset_folder, facts, base_folder, unchecked)

    identity = manifest.load(dataset_folder / manifest.NAME).digest

    def packed(name: str) -> tuple[Dataset, PackIndex]:
        dataset = Dataset.open(dataset_folder / name)

        def pack() -> PackIndex:
            return pack_dataset(dataset, train.seq_len, train.long_documents, stage.cache / "packs", identity)

        mine = world.on_rank0(pack, share=False)  # the others read what rank 0 has written
        return dataset, pack() if mine is None else mine

    dataset, index = packed("data")
    plan = StepPlan.build(index, train)
    groups = context_groups(config, train, hardware, world.size)
    _, packs_each = accumulation(plan.batch_packs, train.seq_len, groups, hardware.microbatch_tokens)
    workers = hardware.threads or (1 if world.device.type == "cpu" else 2)

    def loader(plan: StepPlan, dataset: Dataset, start: int) -> Loader:
        return Loader(
            plan, dataset, facts.eos_id, facts.pad_id, config, world.rank // hardware.context_degree, groups,
            packs_each * train.seq_len, start, workers, part=(world.rank % hardware.context_degree, hardware.context_degree),
        )  # fmt: skip

    validation = None
    if (dataset_folder / "validation" / "documents.npy").is_file():
        held_out, held_out_index = packed("validation")
        if len(held_out_index):
            validation = loader(StepPlan.once(held_out_index, groups * packs_each), held_out, 0)

    room = memory.plan(config, train, hardware, world.size, min(world.gather(world.memory_gb)))
    if hardware.recompute == "auto":
        memory.require(room, config, train, hardware, world.size)
    with torch.device("meta"):
        model: torch.nn.Module = Transformer(config)
    modes = memory.layer_modes(config.n_layers, room.recompute, room.recompute_budget)
    together = context_group(world, hardware.context_degree)
    for block, mode in zip(model.get_submodule("blocks").children(), modes, strict=True):
        block.recompute = mode  # type: ignore[assignment]
        block.attention.context = together  # type: ignore[union-attr]
    compiled = hardware.compile == "always"
    if compiled:
        compile_blocks(model, world.device, train.precision)
    model = shard(model, world, train.precision, hardware.shard_degree).to_empty(device=world.device)
    optimizer = build_adamw(model, train, compiled)

    def log(text: str) -> None:
        if world.is_rank0:
            stage.log(text)

    run = Run(
        stage=stage,
        world=world,
        model=model,
        optimizer=optimizer,
        guard=Guard(train.skip_sigmas, world.device),
        plan=plan,
        loader=lambda start: loader(plan, dataset, start),
        validation=validation,
        sources=[source.path for source in info.sources] or ["data"],
        saver=Saver(stage.out, train, olmo_core.step_config(config, facts.ids), world, log),
        # A compiled block would take the hooks into its graph.
        stopwatch=Stopwatch(model.get_submodule("blocks").children(), world)
        if world.size > 1 and not compiled
        else None,
        peak_tflops=peak(stage, world),
        marks_best=train.best_metric == "validation_loss" and not stage.recipe.evaluate.every,
    )
    if warning:
        log(f"warning: {warning}")
    if lacking:
        log(
            f"warning: not compiled, which costs a quarter of the speed: {lacking} is not there; next: install it (Debian: gcc python3-dev),"
            " or compile=never"
        )
    if train.deterministic and world.device.type == "cuda":
        log("deterministic: every sum in one order, which costs time (attention's backward pass most)")
    if not room.fits:
        log(
            f"warning: {room.total / 1e9:.1f} GB per GPU estimated, {room.limit / 1e9:.1f} GB there; recompute=auto may fit"
        )
    if hardware.recompute == "auto" and room.limit:
        log(
            f"recomputation: {room.recompute}"
            + (f", {room.recompute_budget:.0%} of the layers keep everything" if room.recompute == "budget" else "")
        )
    step = step_folder.latest(stage.out, world, lambda text: log(f"warning: {text}"))
    run.saver.uploads = start_uploads(stage, world)  # what is damaged was set aside
    if every := stage.recipe.evaluate.every:
        run.saver.waiting = functools.partial(evaluations.held, stage.out, every)
    if step is None:
        origin = initial_weights.initialise(model, config, base_folder, train.seed)
        start = 0
    else:
        state = step_folder.restore(step, model, optimizer, world)
        start = plan.check(DataPosition.from_value(state["position"], f"{step}: position"))
        run.tokens, run.skipped, run.saver.last = state["tokens"], state["skipped"], step
        run.guard.load(state["guard"])
        torch.set_rng_state(state["rng"])
        if "rng_cuda" in state and world.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"])
        origin = f"continuing from {step}"
    described = plan.describe()
    log(
        f"{config.parameters:,} parameters, {origin}; {world.size} x {world.device.type}, {train.precision};"
        f" {plan.steps} steps of {train.global_batch_tokens:,} tokens, {described.epochs:.2f} epochs,"
        f" padding {described.padding_fraction:.1%}, tokens lost to seq_len {described.tokens_lost_fraction:.1%}"
    )
    return run, start


def resolve_compile(stage: Stage, world: World) -> tuple[Hardware, str]:
    """The hardware numbers with `compile` decided, and what 'auto' lacked for it on one of the machines."""
    hardware, lacking = stage.hardware, ""
    if hardware.compile == "auto":
        fused = world.device.type == "cuda" and stage.recipe.train.precision == "bf16"
        lacking = next(filter(None, world.gather(missing_compiler() if fused else "")), "")
        hardware = replace(hardware, compile="always" if fused and not lacking else "never")
    return hardware, lacking


def start_uploads(stage: Stage, world: World) -> Uploads | None:
    """Rank 0 of a cluster whose storage is a bucket sends the steps there."""
    where = destination(stage.storage, stage.recipe.run, stage.identity)
    return Uploads(stage.out, where, stage.cache, stage.log) if world.is_rank0 and where else None


def peak(stage: Stage, world: World) -> float:
    """Dense bf16 TFLOP/s of one GPU: the cluster's word, or what is known of this one; 0 on the CPU."""
    if world.device.type != "cuda":
        return 0.0
    return stage.cluster.gpu_tflops or utilisation.peak_tflops(torch.cuda.get_device_name())


def train_stage(stage: Stage, world: World, stop: Callable[[], bool], attempt: int = 1) -> Result:
    """The whole stage on every rank. Raises Requeue when `stop` says so and the state is saved."""
    if world.is_rank0:
        (stage.out / REQUEUE_MARK).unlink(missing_ok=True)
    run, start = prepare(stage, world)
    metrics = None
    if world.is_rank0:
        copy_tokenizer(stage)
        train = stage.recipe.train
        options = {"model": dataclasses.asdict(stage.recipe.model), "train": dataclasses.asdict(train)}
        trackers = Trackers.start(train, stage.recipe.run, stage.identity, options, stage.out, start, stage.log)
        device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
        header = Attempt(attempt, start, world.size, device, run.peak_tflops or None, utilisation.FORMULA)
        metrics = MetricsWriter(stage.out, start, run.plan.steps, stage.log, header, trackers)
    try:
        loop(run, start, metrics, stop)
        uploaded = run.saver.send()
    except Requeue:
        if world.local_rank == 0:  # on every node: each may have a disk of its own
            write_atomic(stage.out / REQUEUE_MARK, b"")
        raise
    finally:
        run.saver.close()
        if metrics is not None:
            metrics.close()
    final = stage.out / f"step{run.plan.steps}"
    found = summary(stage.out, run, final, uploaded).to_value() if world.is_rank0 else {}
    return Result([final.name, "tokenizer", metrics_format.NAME], found)


def copy_tokenizer(stage: Stage) -> None:
    """The tokenizer folder beside the step folders, where OLMo-core's converter and ours look for it."""
    source, target = stage.dataset / "data" / "tokenizer", stage.out / "tokenizer"
    work = stage.out / ".tokenizer"
    for folder in (work, target):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, work)
    work.rename(target)


def summary(out: Path, run: Run, final: Path, uploaded: UploadSummary | None) -> TrainMetrics:
    """The metrics of the manifest. The first step includes start-up, so it counts for no speed."""
    steps = read_steps(out / metrics_format.NAME)
    timed = steps[1:] or steps
    seconds = sum(r.seconds for r in timed)
    used = [(r.mfu, r.seconds) for r in timed if r.mfu is not None]
    validation = [r.validation_loss for r in steps if r.validation_loss is not None]
    return TrainMetrics(
        final_step=run.plan.steps,
        checkpoint=final.name,
        loss=steps[-1].loss,
        first_loss=steps[0].loss,
        tokens=steps[-1].tokens,
        tokens_per_s=sum(r.tokens_per_s * r.seconds for r in timed) / seconds if seconds else 0.0,
        skipped_steps=sum(1 for r in steps if r.skipped),
        attempts=len(read_attempts(out / metrics_format.NAME)),
        data=run.plan.describe(),
        mfu=sum(mfu * s for mfu, s in used) / sum(s for _, s in used) if used else None,
        validation_loss=validation[-1] if validation else None,
        first_validation_loss=validation[0] if validation else None,
        remote=uploaded,
    )


def main(argv: Sequence[str] | None = None) -> int:
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGUSR1, ask)
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse_run("train", words)
    world = join()
    began = time.monotonic()
    stage: Stage | None = None
    watcher: Watcher | None = None
    try:
        with report_errors("train") if world.is_rank0 else quiet(), contextlib.ExitStack() as stack:
            # Rank 0 first: it takes the lock and moves a folder of other inputs aside before anyone looks at it.
            opened = world.on_rank0(
                lambda: [stack.enter_context(open_stage("train", options, in_place=True))], share=False
            )
            stage = (
                opened[0] if opened else stack.enter_context(open_stage("train", options, in_place=True, follower=True))
            )
            if stage.hardware.threads and world.device.type == "cpu":
                torch.set_num_threads(stage.hardware.threads)
            if kept := os.environ.get("SFT_STAGE_ADDRESS"):  # this disk ends with the job
                bring_checkpoint(stage.out, kept, stage.cache, world, stage.log if world.is_rank0 else lambda _: None)
            attempt = world.on_rank0(functools.partial(logs.next_attempt, stage.out))
            logs.record(stage.out, attempt, world.rank)
            if world.is_rank0:
                watcher = start_watcher(stage, words)
            result = train_stage(stage, world, lambda: asked, attempt)
            if world.is_rank0:
                stage.finish(result)
        if world.is_rank0:
            stage.log(f"done in {time.monotonic() - began:.1f} s: {stage.out / manifest.NAME}")
        if watcher is not None:
            watcher.finish(lambda: asked)
    except Requeue:
        if world.is_rank0 and stage is not None:
            stage.log(f"stopped by a signal and saved; exit status {REQUEUE} asks to be run again")
        return REQUEUE
    finally:
        if watcher is not None:
            watcher.stop()  # nothing, where it has finished
        world.close()
    return 0


@contextlib.contextmanager
def quiet() -> Any:
    """On ranks other than 0: says only what rank 0 does not."""
    try:
        yield
    except SharedError:
        sys.exit(1)
    except SftError as error:
        # Most errors meet every rank alike. Where rank 0 has said it, torchrun ends this rank before it repeats it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
        sys.exit(f"[train] error on rank {os.environ.get('RANK')}: {error}")


if __name__ == "__main__":
    sys.exit(main())
