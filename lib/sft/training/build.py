"""Builds what the training loop works on, and restores the newest step. Every rank runs the same lines.

In:  the stage and the process group. Out: a `Run` (sft.training.loop) and the number of finished steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import nn

from sft.checkpoint import disks, olmo_core, step_folder
from sft.checkpoint.lora_step import base_digest
from sft.common.errors import SftError
from sft.common.strings import distinct
from sft.data.dataset import Dataset
from sft.export.base_gate import check_base
from sft.export.core_gate import check_core_base
from sft.formats import manifest
from sft.formats.adapter import KEY, Adapter
from sft.formats.dataset import DatasetInfo
from sft.formats.elsewhere import UNLISTED
from sft.formats.out_of_memory import OutOfMemory
from sft.formats.packs import DataPosition
from sft.model import memory, utilisation
from sft.model.adapters import FLOATS, add_adapters, add_dropout, freeze, start_adapters, store_in_bf16
from sft.model.attention import choose_kernel
from sft.model.compute_copies import copy_once_a_step
from sft.model.fp8 import check_device, multiply_in_fp8, require_sizes
from sft.model.gated_delta import missing_kernels
from sft.model.model import Transformer, compile_blocks, missing_compiler
from sft.model.parallel import SharedError, World, context_group, make_deterministic, shard, transfer_s
from sft.model.trained import flops_change, lora_targets, selection_lines, trained_names, trained_shapes
from sft.packing.loader import Loader, Share, SpecialIds
from sft.packing.packs import PackIndex, pack_dataset
from sft.packing.steps import StepPlan, accumulation, context_groups
from sft.recipe.architecture import ModelConfig
from sft.recipe.base_config import Base, is_hf_folder, read_base
from sft.recipe.resolve import named_changes, resolve, supported_length, with_positions
from sft.recipe.schema import Hardware, Train
from sft.runner import continuation
from sft.runner.stage import Stage
from sft.sync.base_check import check_base_tokenizer
from sft.training import evaluations, initial_weights, out_of_memory
from sft.training.continuing import check_adapter, check_state, open_origin
from sft.training.loop import Run, TrainState
from sft.training.optim import Guard, Start, build_adamw
from sft.training.preflight import preflight
from sft.training.replay import Replay
from sft.training.saving import Saver
from sft.training.sources import before_training, repeated_choices, source_weights
from sft.training.stopping import Stopping
from sft.training.stopwatch import Stopwatch
from sft.training.stored_steps import FilesRead, StoredSteps, bring_step
from sft.training.telemetry import layer_groups
from sft.training.uploads import Uploads, destination


@dataclass(frozen=True)
class Setup:
    """What is known before anything is built."""

    stage: Stage
    world: World
    hardware: Hardware  # `compile` is "always" or "never"
    dataset: Path  # on this machine
    base: Path | None
    info: DatasetInfo
    config: ModelConfig
    published: Base | None = None  # what the base's config.json says

    def log(self, text: str) -> None:
        """Prints a line, on rank 0 only."""
        if self.world.is_rank0:
            self.stage.log(text)


@dataclass(frozen=True)
class Data:
    """The steps of the run, and what loads their microbatches."""

    documents: NDArray[Any]  # DOCUMENT
    plan: StepPlan
    loader: Callable[[StepPlan, int], Loader]  # from the number of finished steps
    validation: Loader | None


def build_run(stage: Stage, world: World, stored: StoredSteps | None = None) -> tuple[Run, int]:
    """Builds everything and restores the newest complete step. Returns the run and the number of finished steps. `stored`: steps
    in a bucket, of which this disk gets what its ranks read."""
    train = stage.recipe.train
    torch.manual_seed(train.data_seed)  # its state is in every step, whose bytes are then the same in every run
    if train.deterministic:
        make_deterministic()
    if stage.hardware.preflight == "always" or (stage.hardware.preflight == "auto" and world.device.type == "cuda"):
        preflight(stage.out, world, stage.log)
    if train.precision == "fp8":
        world.on_all_ranks(lambda: check_device(world.device))
    hardware, missing = resolve_compile(stage, world)
    setup, tokenizer_warning = read_inputs(stage, world, hardware)
    fused = world.device.type == "cuda" and train.precision != "fp32"
    if fused and (problem := missing_kernels(setup.config)):
        raise SftError(problem)
    config, info, published = setup.config, setup.info, setup.published
    data = build_data(setup)
    room, short = plan_memory(setup)
    adapter = build_adapter(setup)
    model = build_model(setup, room, adapter)
    sources = distinct([source.path for source in info.sources]) or ["data"]
    weights = source_weights(stage.recipe.loss_weights, sources)
    compiled = hardware.compile == "always"
    run = Run(
        stage=stage,
        world=world,
        model=model,
        optimizer=build_adamw(model, train, compiled),
        guard=Guard(train.skip_sigmas, world.device, len(sources)),
        plan=data.plan,
        loader=functools.partial(data.loader, data.plan),
        validation=data.validation,
        sources=sources,
        labels=before_training(sources, weights, data.documents, data.plan.index.segments),
        loss_weights=torch.tensor(weights, device=world.device) if stage.recipe.loss_weights else None,
        saver=Saver(
            stage.out,
            train,
            olmo_core.step_config(config, info.facts.ids, published.facts if published else None)
            | ({KEY: adapter.to_value()} if adapter else {}),
            world,
            setup.log,
            step_bytes=12 * sum(p.numel() for p in model.parameters()),  # fp32 weights and two moments
        ),
        # A compiled block would take the hooks into its graph.
        stopwatch=Stopwatch(model.get_submodule("blocks").children(), world)
        if world.size > 1 and not compiled
        else None,
        peak_tflops=peak(stage, world),
        width=config.d_model,
        dropout=add_dropout(model, train.lora_dropout, world.device),
        flops_change=flops_change(config, train),
        groups=layer_groups(model) if train.telemetry_every else {},
        replay=Replay(train.replay_every, train.deterministic, world) if train.replay_every else None,
        stopping=Stopping(train),
        marks_best=train.best_metric == "validation_loss" and not stage.recipe.evaluate.every,
        room=room,
        short=short,
    )
    if fused:
        setup.log(f"attention: {choose_kernel(world.device)}")
    for line in notes(setup, run, tokenizer_warning, missing):
        setup.log(line)
    if untrained := data.plan.index.losses.unlabelled_pieces:
        long = data.plan.index.losses.long_documents
        setup.log(
            f"warning: {untrained:,} documents lose every trained token to seq_len ({long:,} are longer); they are left out"
        )
    reads: FilesRead | None = None
    if stored is not None:
        reads = functools.partial(step_folder.files_read, model=model, optimizer=run.optimizer, world=world)
        bring_step(stored, stage.out, stage.cache, world, setup.log, reads)
    step = step_folder.latest(stage.out, world, lambda text: setup.log(f"warning: {text}"), reads)
    connect_saver(setup, run.saver)
    start, origin = resume(setup, run, step, data.loader, adapter)
    if world.size == 1 and room.keep_gathered != "none":
        copy_once_a_step(model, run.optimizer, train.precision)
    if run.saver.leads:
        run.saver.prune()  # a kill may have come between the last save and its retention
    plan, summary = run.plan, run.plan.describe()
    for line in repeated_choices(info.sources, summary.epochs):
        setup.log(line)
    setup.log(f"{counted(config, train)}, {origin}; {world.size} x {world.device.type}, {train.precision}")
    setup.log(
        f"{plan.steps} steps of {train.global_batch_tokens:,} tokens, {summary.epochs:.2f} epochs,"
        f" padding {summary.padding_fraction:.1%}, tokens lost to seq_len {summary.tokens_lost_fraction:.1%}"
    )
    return run, start


def read_inputs(stage: Stage, world: World, hardware: Hardware) -> tuple[Setup, str]:
    """The dataset, the base and the architecture. Returns also a warning about the base's tokenizer, or "". Raises SftError."""
    # Rank 0 hashes every byte before another rank reads it. Where the storage is a bucket, each machine then fetches
    # its own copy.
    count = world.on_rank0(lambda: sum(file.bytes for file in stage.remote.files))
    patient = world.with_own_group(transfer_s(count))
    patient.on_rank0(lambda: [stage.dataset, stage.base], share=False)
    dataset, base = patient.on_all_ranks(lambda: (stage.dataset, stage.base))[world.rank]
    info = DatasetInfo.of(dataset)
    published = read_base(base, stage.recipe.model.ignore_config) if base else None
    published = with_positions(published, stage.recipe.model) if published else None
    config = resolve(stage.recipe.model, info.facts.vocab_size, published)
    setup = Setup(stage, world, hardware, dataset, base, info, config, published)
    unchecked = stage.recipe.model.base_tokenizer == "unchecked"
    tokenizer_warning = check_base_tokenizer(dataset, info.facts, base, unchecked, stage.recipe.prepare.add_tokens)
    return setup, tokenizer_warning


def resolve_compile(stage: Stage, world: World) -> tuple[Hardware, str]:
    """The hardware numbers with compile = "auto" decided, and what 'auto' did not find on one of the machines."""
    hardware, missing = stage.hardware, ""
    if hardware.compile == "auto":
        fused = world.device.type == "cuda" and stage.recipe.train.precision != "fp32"
        missing = next(filter(None, world.gather(missing_compiler() if fused else "")), "")
        hardware = replace(hardware, compile="always" if fused and not missing else "never")
    return hardware, missing


def build_data(setup: Setup) -> Data:
    """Packs the dataset (rank 0 does, the others read its packs) and plans the steps."""
    stage, world, hardware, train = setup.stage, setup.world, setup.hardware, setup.stage.recipe.train
    identity = manifest.load(setup.dataset / manifest.NAME).digest

    def packed(name: str) -> tuple[Dataset, PackIndex]:
        dataset = Dataset.open(setup.dataset / name)

        def pack() -> PackIndex:
            return pack_dataset(dataset, train.seq_len, train.long_documents, stage.cache / "packs", identity)

        mine = world.on_rank0(pack, share=False)  # the others read what rank 0 has written
        return dataset, pack() if mine is None else mine

    dataset, index = packed("data")
    plan = StepPlan.build(index, train)
    groups = context_groups(setup.config, train, hardware, world.size)
    require_sizes(setup.config, train, hardware)
    _, packs_each = accumulation(plan.batch_packs, train.seq_len, groups, hardware.microbatch_tokens)
    workers = hardware.threads or (1 if world.device.type == "cpu" else 2)
    facts, degree = setup.info.facts, hardware.context_degree
    share = Share(world.rank // degree, groups, world.rank % degree, degree)

    def loader(plan: StepPlan, dataset: Dataset, start: int) -> Loader:
        return Loader(
            plan,
            dataset,
            SpecialIds(facts.eos_id, facts.pad_id),
            setup.config,
            share,
            packs_each * train.seq_len,
            start,
            workers,
            numbers=bool(train.neftune_alpha or train.lora_dropout),
        )

    validation = None
    if (setup.dataset / "validation" / "documents.npy").is_file():
        held_out, held_out_index = packed("validation")
        for problem in held_out_problems(held_out_index, train):
            setup.log(problem)
        if len(held_out_index):
            validation = loader(StepPlan.once(held_out_index, groups * packs_each), held_out, 0)
    return Data(dataset.documents, plan, lambda plan, start: loader(plan, dataset, start), validation)


def held_out_problems(index: PackIndex, train: Train) -> list[str]:
    """Warnings about validation documents that lose every trained token to seq_len. Raises SftError where all of them do, and an
    option needs the validation loss."""
    losses = index.losses
    if len(index) and not losses.unlabelled_pieces:
        return []
    lost = losses.documents if not len(index) else losses.unlabelled_pieces
    text = (
        f"{lost:,} of {losses.documents:,} validation documents lose every trained token to seq_len {train.seq_len:,}"
    )
    needs = [name for name in ("early_stopping_patience", "save_best_only") if getattr(train, name)]
    if not len(index) and needs:
        raise SftError(
            f"[train] {text}, so there is no validation loss, which {needs[0]} needs; next: raise [train] seq_len"
        )
    return [f"warning: {text}; {'there is no validation loss' if not len(index) else 'they are left out'}"]


def counted(config: ModelConfig, train: Train) -> str:
    """The number of parameters in words."""
    trained = trained_shapes(config, train)
    count = sum(math.prod(shape) for shape in trained.values())
    if train.method == "full":
        return f"{config.parameters:,} parameters" + (
            f", {count:,} trained" if train.freeze or train.train_only else ""
        )
    return (
        f"{config.parameters:,} parameters, frozen; {count:,} in {len(trained) // 2} adapters of rank {train.lora_rank}"
    )


def build_adapter(setup: Setup) -> Adapter | None:
    """What a step says about its adapters; None where all weights are trained. Raises SftError for a base without rows for
    all of the tokenizer's ids: they would never be trained."""
    stage, train = setup.stage, setup.stage.recipe.train
    if train.method != "lora":
        return None
    ids, published = setup.info.facts.vocab_size, setup.published
    if published is not None and ids > published.config.vocab_size:
        raise SftError(
            f"[train] method = 'lora': the tokenizer has {ids:,} ids, the base {published.config.vocab_size:,} rows of the"
            " embedding, and new rows would stay as they are; next: method = 'full', or the base's tokenizer"
        )
    base = setup.world.on_rank0(lambda: base_digest(setup.base, setup.config, train.seed, stage.sha256))
    dtype = train.precision if train.base_dtype == "compute" else train.base_dtype
    return Adapter(base, train.lora_rank, train.lora_alpha, train.lora_rslora, dtype)


def plan_memory(setup: Setup) -> tuple[memory.Plan, OutOfMemory | None]:
    """What this attempt recomputes, and the earlier step that ran out of memory, after which it is more. Raises SftError for
    recompute = "auto" where nothing fits."""
    config, train, hardware, world = setup.config, setup.stage.recipe.train, setup.hardware, setup.world
    memory_gb = min(world.gather(world.memory_gb))
    if short := out_of_memory.earlier(setup.stage, world):
        return memory.plan_again(config, train, hardware, world.size, memory_gb, short.planned), short
    room = memory.plan(config, train, hardware, world.size, memory_gb)
    if hardware.recompute == "auto":
        memory.require(room, config, train, hardware, world.size)
    return room, None


def build_model(setup: Setup, room: memory.Plan, adapter: Adapter | None) -> nn.Module:
    """The sharded model on its device, with memory that is not initialised. `room` says what is recomputed."""
    hardware, world, train = setup.hardware, setup.world, setup.stage.recipe.train
    with torch.device("meta"):
        model: nn.Module = Transformer(setup.config)
    if adapter:
        add_adapters(model, lora_targets(setup.config, train), adapter, FLOATS[train.precision])
    else:
        freeze(model, trained_names(setup.config, train))
    if train.weights == "bf16":
        store_in_bf16(model)
    if train.precision == "fp8":
        multiply_in_fp8(model)
    modes = memory.layer_modes(setup.config.n_layers, room.recompute, room.recompute_budget)
    group = context_group(world, hardware.context_degree)
    for block, mode in zip(model.get_submodule("blocks").children(), modes, strict=True):
        block.recompute = mode  # type: ignore[assignment]
        block.attention.context = group  # type: ignore[union-attr]
    if hardware.compile == "always":
        compile_blocks(model, world.device, train.precision)
    sharded = shard(
        model, world, train.precision, room.shard_degree, room.keep_gathered, prefetch_layers=hardware.prefetch_layers
    )
    return sharded.to_empty(device=world.device)


def notes(setup: Setup, run: Run, tokenizer_warning: str, missing: str) -> Iterator[str]:
    """The lines that are logged before training starts."""
    assert run.room is not None
    room = run.room
    yield from selection_lines(setup.config, setup.stage.recipe.train)
    if setup.published is not None:
        yield from named_changes(setup.stage.recipe.model, setup.published)
        supported, seq_len = supported_length(setup.config, setup.published.facts), setup.stage.recipe.train.seq_len
        if supported and seq_len > supported:
            yield f"warning: seq_len = {seq_len:,}, but the base supports {supported:,} tokens with its rotary scaling"
    elif setup.base is not None:
        yield f"warning: {setup.base} has no config.json: the preset says what tensor shapes do not show"
    if tokenizer_warning:
        yield f"warning: {tokenizer_warning}"
    if missing:
        yield (
            f"warning: not compiled, which costs a quarter of the speed: {missing} is missing;"
            " next: install it (Debian: gcc python3-dev), or compile=never"
        )
    if setup.stage.recipe.train.deterministic and setup.world.device.type == "cuda":
        yield "deterministic: every sum has one order, which costs time (attention's backward pass most)"
    if not room.fits:
        yield (
            f"warning: {room.total / 1e9:.1f} GB per GPU estimated, of {room.limit / 1e9:.1f} GB, of which a plan may use"
            f" {memory.SHARE:.0%}; recompute=auto may fit"
        )
    if setup.world.size > 1 or setup.stage.recipe.train.precision != "fp32":
        yield f"weights: {room.gathering(setup.world.size)}{room.sharding(setup.world.size)}"
    if run.short is not None:
        yield f"warning: {run.short}; recomputation is now: {room.mode}"
    elif setup.hardware.recompute == "auto" and room.limit:
        yield f"recomputation: {room.mode}"


def connect_saver(setup: Setup, saver: Saver) -> None:
    """Starts uploads and makes retention wait for evaluations. Call it after `step_folder.latest`, which sets damaged
    steps aside. Every rank calls this.

    Nodes without a common disk upload the parts of a step that they have. Raises SharedError where no bucket takes them.
    """
    stage, world = setup.stage, setup.world
    where = destination(stage.storage, stage.recipe.run, stage.identity)
    # Evaluations beside training run on rank 0's node. What it lacks of a step comes from the bucket.
    every = stage.recipe.evaluate.every if world.is_rank0 else 0
    if any(other_disk := disks.other_disks(stage.out, world)):
        if not where:
            raise no_common_disk(setup, other_disk.index(True))
        saver.leave_on_nodes(other_disk)
    if where and saver.leads:
        saver.uploads = Uploads(stage.out, where, stage.cache, stage.log, UNLISTED if world.is_rank0 else ())

    def waiting() -> list[Path]:
        held = evaluations.held(stage.out, every) if every else ()
        return [*held, *continuation.steps_in_use(stage.out)]

    saver.waiting = waiting


def no_common_disk(setup: Setup, rank: int) -> SharedError:
    """The error of a training whose steps would be on several disks, and no attempt could read them."""
    place = setup.stage.place
    return SharedError(
        f"{setup.stage.out}: rank {rank} runs on a node where this is another disk, and storage = {setup.stage.storage!r} is no"
        f" bucket, so that no step could be continued; next: `runs` of env/{place.cluster}.toml on a disk that all nodes share,"
        ' or storage = "gs://…" or "s3://…"'
    )


def resume(
    setup: Setup, run: Run, step: Path | None, loader: Callable[[StepPlan, int], Loader], adapter: Adapter | None = None
) -> tuple[int, str]:
    """Fills model, optimizer, guard, counters and random generators from a step: the newest one of this run, or the one of
    another run that it continues; or the model from its first weights. A step with adapters has no base, which is read again.
    Returns the number of finished steps and the origin of the weights in words. Raises SftError."""
    train, origin, lr = setup.stage.recipe.train, "", 0.0
    other = step is None and bool(train.continue_from)
    if other:
        data = (setup.dataset, setup.info)
        step, lr = open_origin(setup.stage, setup.world, setup.config, data, adapter, setup.base)
        check_state(step, run.model, run.optimizer, train)
    elif step is None:
        check_published(setup)
    elif adapter:
        check_adapter(step, adapter, setup.base, f"remove {step}")
    if step is None or adapter:
        seed, ids = train.seed, setup.info.facts.vocab_size
        added = len(setup.stage.recipe.prepare.add_tokens)
        origin = initial_weights.initialise(run.model, setup.config, setup.base, seed, ids, setup.log, added)
    if step is None:
        start_adapters(run.model, train.seed)
        return 0, origin
    state = cast(TrainState, step_folder.restore(step, run.model, run.optimizer, run.world))
    position = DataPosition.from_value(state["position"], f"{step}: position")
    run.saver.last = step
    torch.set_rng_state(state["rng"])
    if "rng_cuda" in state and run.world.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng_cuda"])
    on_base = f" on {origin}" if origin else ""
    if other and position.plan != run.plan.digest:
        run.rate = Start(0, lr)
        return 0, (
            f"weights and optimizer state of {step}{on_base}; the data or their order differ from that run's, so training starts at the"
            " beginning of the data, and steps count from 0"
        )
    run.plan = run.plan.goes_on(position, train)
    run.loader = functools.partial(loader, run.plan)
    run.tokens, run.skipped = state["tokens"], state["skipped"]
    if len(counts := state.get("labels", [])) == len(run.labels):
        losses = state.get("losses") or [(None, None)] * len(counts)
        run.labels = [
            replace(use, seen=seen, skipped=skipped, first_loss=first, last_loss=last)
            for use, (seen, skipped), (first, last) in zip(run.labels, counts, losses, strict=True)
        ]
    run.guard.load(state["guard"])
    if other:
        if position.step >= run.plan.steps:
            raise run.plan.nothing_left(position, train)
        run.rate = Start(position.step, lr)
    else:
        run.rate = Start.of(state["start"]) if "start" in state else None
        if "stopping" in state:
            run.stopping.load(state["stopping"])
    run.first = run.rate.step if run.rate else 0
    return position.step, f"continuing from {step}" + on_base


def check_published(setup: Setup) -> None:
    """Compares a base with the model that its own library builds from its config.json. Raises SftError if they differ.

    Says so where the base cannot be compared.
    """
    base, folder = setup.published, setup.base
    if base is None or folder is None:
        return

    def check() -> None:
        documents = (ids.tolist() for ids, _ in Dataset.open(setup.dataset / "data"))
        if is_hf_folder(folder):
            found, whose = check_base(folder, base, documents), f"transformers' {base.config.family or 'class'}"
        elif isinstance(answer := check_core_base(folder, base, documents), str):
            setup.log(f"warning: base: not compared with OLMo-core: {answer}")
            return
        else:
            found, whose = answer, "OLMo-core's model"
        setup.log(
            f"base: logits of {found.rows} positions agree with {whose} to"
            f" {found.max_difference:.1e} of {found.max_logit:.1f}, over layers {', '.join(map(str, found.which))} of"
            f" {base.config.n_layers}, {found.tokens} packed tokens, window {base.config.window}"
        )

    setup.world.on_rank0(check, share=False)


def peak(stage: Stage, world: World) -> float:
    """Dense bf16 TFLOP/s of one GPU: from the cluster's file, or from the GPU's name; 0 on the CPU."""
    if world.device.type != "cuda":
        return 0.0
    return stage.cluster.gpu_tflops or utilisation.peak_tflops(torch.cuda.get_device_name())
