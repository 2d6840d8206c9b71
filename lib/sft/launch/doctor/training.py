"""The doctor's checks of training: batch, intervals, memory of a GPU, hours, checkpoints on disk.

Memory and hours need NumPy; the table skips them without it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from sft.common import paths
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.elsewhere import Elsewhere
from sft.formats.metrics import Attempt, StepRecord, read_metrics
from sft.launch.doctor.context import NOTE, OK, RED, SKIPPED, Context, Row, amount, hours_text, red
from sft.recipe import schema
from sft.recipe.resolve import resolve
from sft.runner.precision import check_precision

ASSUMED_MFU = (0.25, 0.40, 0.55)
"""Low, middle, high, where no earlier run on this type of GPU has measured one."""
MEASURED_BAND = 0.15
"""Relative uncertainty of a measured MFU: another sequence length or cluster load changes it by about that much."""


def batch(context: Context) -> Iterator[Row]:
    """The global batch divides into packs, ranks and microbatches."""
    train, hardware, ranks = context.recipe.train, context.training, context.ranks
    micro = hardware.microbatch_tokens or train.seq_len
    groups = max(1, ranks // hardware.context_degree)
    for name, then in (("context_degree", "1"), ("shard_degree", "0")):
        degree = getattr(hardware, name)
        if degree > 0 and ranks % degree:
            where = f"[on.{context.place.cluster}.train] {name} = {degree}"
            yield Row(
                RED,
                "batch",
                f"{where} does not divide the {ranks} processes",
                f"{name}={then}, or a divisor of {ranks}",
            )
            return
    packs = train.global_batch_tokens // train.seq_len
    machines = f"{hardware.nodes} node{'s' * (hardware.nodes > 1)} x {ranks // hardware.nodes} processes"
    text = f"{packs} packs of {train.seq_len:,} tokens in a step, {machines}"
    if train.global_batch_tokens % (micro * groups):
        yield Row(RED, "batch", f"{text}: {train.global_batch_tokens:,} tokens are not a multiple of {groups} x {micro:,}",
                  f"global_batch_tokens={max(1, round(train.global_batch_tokens / (micro * groups))) * micro * groups}, or other nodes, processes or microbatch_tokens")  # fmt: skip
    else:
        yield Row(OK, "batch", f"{text}, {train.global_batch_tokens // (micro * groups)} microbatches each")
    if (context.run / "prepare" / "data").is_dir() and not Elsewhere.of(context.run / "prepare").outputs:
        try:
            from sft.packing.arithmetic import check  # start-up: NumPy, which may be absent

            runs = context.place.runs
            found = check(context.run / "prepare", context.recipe, hardware, context.cluster, context.base, runs)
            left = (
                f", {found.steps.steps - found.done:,} of them after {train.continue_from}" if found.continues else ""
            )
            yield Row(OK, "steps", f"{found.steps.steps:,}{left}, {found.steps.warmup_steps:,} of them warm-up")
        except SftError as e:
            yield red("steps", e)
        except ImportError:
            pass
    elif context.steps:
        yield Row(OK, "steps", f"{context.steps:,}" + ("" if train.steps else ", roughly, before packing"))
    else:
        yield Row(SKIPPED, "steps", "unknown before prepare", f"make prepare RECIPE={context.recipe.name}")


def precision(context: Context) -> Iterator[Row]:
    """The GPUs, and the sizes of the matrices, allow the precision."""
    train, hardware, cluster = context.recipe.train, context.training, context.cluster
    found = check_precision(train, hardware, cluster, f"CLUSTER={context.place.cluster}")
    if not found:
        return
    if context.model is not None:
        from sft.model.fp8 import require_sizes  # start-up: NumPy, which may be absent

        require_sizes(context.model, train, hardware)
    yield Row(OK if hardware.gpu or cluster.gpu else SKIPPED, "precision", found)


def trained(context: Context) -> Iterator[Row]:
    """Every pattern of [train] names parameters. Their names do not depend on the rows of the vocabulary."""
    r, base = context.recipe, context.base
    if base is not None or r.model.preset:
        from sft.model.trained import selection_lines  # start-up: NumPy, which may be absent

        lines = selection_lines(
            resolve(r.model, context.prepared.facts.vocab_size if context.prepared else 1, base), r.train
        )
        if lines:
            yield Row(OK, "trained", "; ".join(lines) if context.model else f"{len(lines)} patterns name parameters")


def unread(context: Context) -> Iterator[Row]:
    """Options that other options turn off, by name: a sweep may turn them on again."""
    r, h = context.recipe, context.training
    train, decayed = r.train, r.train.continue_schedule == "decayed"
    rows: list[tuple[Any, str, bool, str]] = [
        (train, "epochs", not train.steps, "steps = 0"),
        (train, "decay_fraction", train.schedule == "wsd", "schedule = 'wsd'"),
        (train, "decay_shape", train.schedule == "wsd" or decayed, "schedule = 'wsd'"),
        (train, "final_lr_fraction", train.schedule != "constant" or decayed, "a schedule that decays"),
        (r.prepare, "near_duplicate_similarity", r.prepare.near_duplicates != "ignore", "near_duplicates"),
        (r.prepare, "decontaminate_ngram", bool(r.prepare.decontaminate), "decontaminate"),
        (r.prepare, "decontaminate_overlap", bool(r.prepare.decontaminate), "decontaminate"),
        (h, "recompute_budget", h.recompute == "budget", "recompute = 'budget'"),
        *((r.evaluate, name, bool(r.evaluate.every), "every") for name in ("every_limit", "every_device", "best")),
    ]
    for table, name, is_read, by in rows:
        default = next(f.default for f in dataclasses.fields(table) if f.name == name)
        if (value := getattr(table, name)) != default and not is_read:
            yield Row(NOTE, "not read", f"{name} = {value}: only {by} reads it")


def intervals(context: Context) -> Iterator[Row]:
    """Saves, validations and evaluations happen as often as the recipe says; the warm-up ends before training does."""
    train, steps = context.recipe.train, context.steps
    if train.ephemeral_every and train.ephemeral_every >= train.save_every:
        yield Row(NOTE, "intervals", f"ephemeral_every = {train.ephemeral_every} is not below save_every = {train.save_every}: it has no effect",
                  "ephemeral_every=0, or a smaller one")  # fmt: skip
    elif train.ephemeral_every and train.save_every % train.ephemeral_every:
        yield Row(NOTE, "intervals", f"save_every = {train.save_every} is not a multiple of ephemeral_every = {train.ephemeral_every}:"
                  " some saves follow each other closely", f"ephemeral_every={train.save_every // 2 or 1}")  # fmt: skip
    if train.validate_every and not context.recipe.prepare.validation_fraction:
        yield Row(
            NOTE,
            "validation",
            "there is no validation split, so no validation loss",
            "[prepare] validation_fraction = 0.01",
        )
    every = context.recipe.evaluate.every
    if every and every < train.save_every:
        yield Row(NOTE, "intervals", f"[evaluate] every = {every} is below save_every = {train.save_every}: only kept steps are evaluated",
                  f"save_every={every}")  # fmt: skip
    for name in ("save_every", "validate_every") if steps else ():
        value = getattr(train, name)
        if steps and value > steps:
            yield Row(
                NOTE,
                "intervals",
                f"{name} = {value} is greater than the number of steps, {steps}: it happens at the end only",
            )
    yield _warmup(context)


def _warmup(context: Context) -> Row:
    fraction, steps = context.recipe.train.warmup_fraction, context.steps
    if fraction >= 1:
        found = "warmup_fraction = 1: the peak learning rate is never reached"
        return Row(RED, "warm-up", found, "warmup_fraction=0.03")
    if fraction > 0.5:
        return Row(NOTE, "warm-up", f"{fraction:.0%} of the steps are warm-up", "warmup_fraction=0.03")
    if not steps:
        return Row(OK, "warm-up", f"{fraction:.0%} of the steps")
    if fraction and not round(fraction * steps):
        return Row(NOTE, "warm-up", f"{fraction:.0%} of {steps} steps is no step", "warmup_fraction=0")
    return Row(OK, "warm-up", f"{round(fraction * steps)} of {steps:,} steps")


def memory(context: Context) -> Iterator[Row]:
    """The memory of one GPU is enough for training."""
    model, limit = context.model, context.cluster.gpu_memory_gb
    if model is None:
        yield Row(SKIPPED, "memory", "unknown before prepare, which reads the vocabulary")
        return
    from sft.model import memory  # start-up: NumPy, which may be absent

    found = memory.plan(model, context.recipe.train, context.training, context.ranks, limit)
    most = sorted(found.parts.items(), key=lambda p: -p[1])[:3]
    text = f"{found.total / 1e9:.1f} GB per GPU ({', '.join(f'{n} {b / 1e9:.1f}' for n, b in most)}), recompute {found.recompute}{found.sharding(context.ranks)}"
    if not limit:
        asked = context.cluster.launcher != "local" and (context.cluster.gpus_per_node or context.training.gpus > 0)
        then = f'its type, [on.{context.place.cluster}.train] gpu = "A100 80GB", or gpu_memory_gb in {context.file}'
        text += "; the memory of the GPUs is unknown" if asked else ""
        yield Row(NOTE if asked else SKIPPED, "memory", text, then if asked else "")
        return
    try:
        memory.require(found, model, context.recipe.train, context.training, context.ranks)
    except SftError as e:
        row = red("memory", e)
        yield dataclasses.replace(row, found=row.found.replace("<cluster>", context.place.cluster))
    else:
        yield Row(
            OK,
            "memory",
            f"{text}, of {memory.SHARE:.0%} of {limit:g} GB"
            + (f" ({context.cluster.gpu})" if context.cluster.gpu else ""),
        )


def hours(context: Context) -> Iterator[Row]:
    """How long training takes, from its FLOPs and a share (MFU) of the GPUs' peak."""
    model, steps = context.model, context.steps
    if model is None or not steps:
        yield Row(SKIPPED, "hours", "unknown before prepare")
        return
    from sft.model import utilisation  # start-up: NumPy, which may be absent

    peak = context.cluster.gpu_tflops or utilisation.peak_tflops(context.cluster.gpu)
    train = context.recipe.train
    mean = context.prepared.lengths.mean if context.prepared else train.seq_len
    per_token = utilisation.flops_per_token(model, (min(mean, train.seq_len) + 1) / 2)
    total = per_token * steps * train.global_batch_tokens
    if not peak:
        yield Row(
            SKIPPED, "hours", f"{total:.2g} FLOPs; the GPU's peak is unknown", f"gpu and gpu_tflops in {context.file}"
        )
        return
    measured = measured_mfu(context.place.runs, context.recipe.model, context.cluster.gpu, train.precision)
    low, middle, high = (
        (measured * (1 - MEASURED_BAND), measured, measured * (1 + MEASURED_BAND)) if measured else ASSUMED_MFU
    )
    one = total / (context.ranks * peak * 1e12) / 3600
    text = f"{hours_text(one / middle)} ({hours_text(one / high)} to {hours_text(one / low)}), {one / middle * context.ranks:,.1f} GPU hours"
    yield Row(
        OK, "hours", f"{text}, at an MFU of {middle:.0%} {'measured in an earlier run' if measured else 'assumed'}"
    )


def measured_mfu(runs: Path, model: schema.Model, gpu: str, precision: str) -> float | None:
    """The median MFU of the latest run of this preset, or of this base, that measured one in this precision on this type of GPU."""
    wanted = set(re.findall(r"\w+", gpu.upper()))
    files = sorted(runs.glob("[a-z0-9]*/train/metrics.jsonl"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in files[:20]:
        try:
            config = manifest.load(file.parent / manifest.NAME).config
            name = "preset" if model.preset else "base"
            same = config.get("train", {}).get("precision", schema.Train.precision) == precision
            if config["model"][name] != getattr(model, name) or not same:
                continue
            records = read_metrics(file, last=200)
            device = [r.device for r in records if isinstance(r, Attempt)][-1:]  # the last attempt's
            if not device or not wanted or not wanted <= set(re.findall(r"\w+", device[0].upper())):
                continue
            values = [r.mfu for r in records if isinstance(r, StepRecord) and r.mfu and r.mfu > 0]
        except (OSError, ValueError, KeyError, TypeError, SftError):
            continue
        if values:
            return median(values)
    return None


def disk(context: Context) -> Iterator[Row]:
    """The disk has room for the checkpoints."""
    model, train, steps = context.model, context.recipe.train, context.steps
    if model is None:
        yield Row(SKIPPED, "checkpoints", "unknown before prepare, which reads the vocabulary")
        return
    from sft.model import memory  # start-up: NumPy, which may be absent

    one = memory.step_bytes(model, train)
    if steps is None:
        yield Row(SKIPPED, "checkpoints", f"{amount(one)} each; how many is unknown before prepare")
        return
    permanent = math.ceil(steps / train.save_every)
    count = (min(permanent, train.keep) if train.keep else permanent) + (1 if train.ephemeral_every else 0)
    text = f"{count} of {amount(one)}, {amount(count * one)} in all"
    if train.keep and context.recipe.evaluate.every:
        text += ", and those that wait for evaluation"
    if context.far and "train" in context.cluster.stages:
        yield Row(
            SKIPPED, "checkpoints", f"{text}, in {paths.for_user(context.cluster.runs) or 'storage'}: not measured"
        )
        return
    folder = next(p for p in (context.run, *context.run.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    # The checkpoints of a run that resumes are part of those that it will keep.
    there = sum(f.stat().st_size for f in (context.run / "train").glob("step*/**/*") if f.is_file())
    fits = free + there > 1.05 * count * one
    saved = f", {amount(there)} of them saved already" if there else ""
    yield Row(OK if fits else RED, "checkpoints", f"{text}{saved}; {amount(free)} free in {folder}",
              "" if fits else "keep=2, a larger save_every, or RUNS= on another disk")  # fmt: skip
