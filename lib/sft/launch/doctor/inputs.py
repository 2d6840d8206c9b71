"""The doctor's checks of a stage's inputs: data, base weights, tokenizer and storage, for this machine and for jobs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.common import paths
from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.common.hashcache import HashCache
from sft.formats.elsewhere import Elsewhere
from sft.launch.doctor.context import NOTE, OK, RED, SKIPPED, Context, Row, amount, red
from sft.recipe import inputs, mounts
from sft.recipe.architecture import summary
from sft.recipe.base_config import Base
from sft.recipe.presets import SOURCES
from sft.recipe.resolve import named_changes, resolve, supported_length
from sft.runner import models, plan


def data(context: Context) -> Iterator[Row]:
    """Sources, tokenizer and base weights exist, and jobs can read them."""
    r = context.recipe
    remote = [s.path for s in r.prepare.sources if inputs.is_elsewhere(s.path)]
    if context.needs("prepare"):
        yield from _named_files(context, "prepare", "data", remote)
    if context.needs("sync"):
        yield from _named_files(context, "sync", "base weights", [r.model.base] if r.model.base else [])


def eval_template(context: Context) -> Iterator[Row]:
    """A template file that convert will read: also before a training, not after it."""
    name = context.recipe.convert.eval_template
    if inputs.is_template_file(name):
        what = f"{context.recipe.file}: [convert] eval_template"
        inputs.read_template(paths.find(context.place.roots, name, what))
        yield Row(OK, "eval_template", name)


def other_model(context: Context) -> Iterator[Row]:
    """[convert] model is there, for the stage that reads it."""
    r, place = context.recipe, context.place
    if not r.convert.model:
        return
    models.check(r, "evaluate", place.runs, place.roots, context.cluster, place.cluster)
    far = mounts.in_jobs(r.convert.model, context.cluster)
    if far or inputs.is_remote(r.convert.model):
        where = "checked in the job" if far else "not checked, evaluate fetches it"
        yield Row(SKIPPED, "other model", f"{r.convert.model}: {where}")
        if r.convert.model.startswith("hf://") and "@" not in r.convert.model:
            yield Row(
                NOTE,
                "other model",
                f"{r.convert.model} has no revision: it may change on the hub",
                f"MODEL={r.convert.model}@<commit>",
            )
    else:
        models.inputs(place.runs, place.roots, context.cluster, r, HashCache(place.cache))
        yield Row(OK, "other model", r.convert.model)


def _named_files(context: Context, stage: str, what: str, named: Sequence[str]) -> Iterator[Row]:
    """The files that a stage's tables name. `named`: the paths that may be remote."""
    try:
        files = plan.named_files(context.place, context.recipe, stage)
    except SftError as e:
        yield Row(RED, what, str(e).partition(": ")[2].partition("; next: ")[0], str(e).partition("; next: ")[2])
        return
    disks = [path for _, path in mounts.named(context.recipe, stage)]
    for field, path in mounts.named(context.recipe, stage):
        mounts.require(path, stage, context.cluster, context.place.cluster, field)
        yield Row(SKIPPED, what, f"{path}: checked in the job")
    named = [path for path in named if path not in disks]
    unchecked = Row(SKIPPED, what, f"{', '.join(named)}: not checked, {stage} reads it")
    if files:
        yield Row(OK, what, f"{len(files)} files, {amount(sum(file.stat().st_size for _, file in files))}")
        if stage == "prepare" and named:
            yield unchecked
        local = [n for n, f in files if not f.resolve().is_relative_to(plan.REPO / "recipes")]
        if context.far and stage in context.cluster.stages and local and not context.cluster.data:
            then = f'name the folder that they see, data = "/…" in {context.file}, or use ' * context.reads("data")
            yield Row(RED, what, f"{local[0]} is a file of this machine: jobs on {context.place.cluster} cannot read it",
                      f"{then}gs:// or hf:// paths")  # fmt: skip
    elif named:
        yield unchecked
    elif not disks:
        yield Row(NOTE, what, "random weights: no [model] base")
    for path in named:
        if path.startswith("hf://") and "@" not in path:
            yield Row(NOTE, what, f"{path} has no revision: it may change on the hub", f"{path}@<commit>")


def model(context: Context) -> Iterator[Row]:
    """The base's architecture and the preset's, one below the other, and the context length that the base supports."""
    asked = context.recipe.model
    try:
        base = context.base
        if base is not None:
            yield Row(OK, "model", f"base: {summary(base.config)}")
        elif asked.base:
            yield Row(
                SKIPPED, "model", f"base: {asked.base} says it in its config.json, which sync brings and compares"
            )
        if asked.preset:
            preset = resolve(dataclasses.replace(asked, base=""))
            changed = " with the recipe" if base is None else ""
            source = f"; from {SOURCES[asked.preset]}" if asked.preset in SOURCES else ""
            yield Row(OK, "model", f"preset {asked.preset}{changed}: {summary(preset)}{source}")
        if base is not None:
            yield from _from_base(context, base)
    except SftError as e:
        yield red("model", e)


def _from_base(context: Context, base: Base) -> Iterator[Row]:
    """What the recipe changes about its base. Raises SftError where it contradicts it."""
    config = resolve(context.recipe.model, 0, base)
    for line in named_changes(context.recipe.model, base):
        yield Row(NOTE, "model", line)
    supported, seq_len = supported_length(config, base.facts), context.recipe.train.seq_len
    if supported and seq_len > supported:
        yield Row(NOTE, "model", f"seq_len = {seq_len:,}, but the base supports {supported:,} tokens with its rotary scaling",
                  'rope_scaling in [model], or a smaller seq_len')  # fmt: skip


def tokenizer(context: Context) -> Iterator[Row]:
    """Data and base weights have the same tokenizer."""
    name, base = context.recipe.prepare.tokenizer, context.recipe.model.base
    if not base:
        return
    if name == base:
        yield Row(OK, "tokenizer", f"the base's own ({name})")
    elif inputs.is_elsewhere(name) or inputs.is_elsewhere(base):
        yield Row(NOTE, "tokenizer", f"sync will compare {name} and {base}")
    else:
        files = [paths.find(context.place.roots, f, context.recipe.file) / "tokenizer.json" for f in (name, base)]
        if not all(f.is_file() for f in files):
            yield Row(NOTE, "tokenizer", f"{files[1].parent} has no tokenizer.json to compare with")
        elif hash_file(files[0]) != hash_file(files[1]):
            yield Row(RED, "tokenizer", f"{files[0]} and {files[1]} differ",
                      f"[prepare] tokenizer = \"{base}\", and make prepare again")  # fmt: skip
        else:
            yield Row(OK, "tokenizer", "data and base have the same tokenizer.json")


def storage(context: Context) -> Iterator[Row]:
    """Which stages are done, and whether the storage can be used."""
    where = context.place.storage(context.cluster)
    states = plan.states(context.place, context.recipe, HashCache(context.place.cache))
    done = [s for s, state in states.items() if not state.stale]
    elsewhere = sorted({at for s in done if (at := Elsewhere.of(context.run / s).where)})
    yield Row(
        OK, "stages done", (", ".join(done) or "none") + (f"; made in {', '.join(elsewhere)}" if elsewhere else "")
    )
    if "://" in where:
        yield Row(SKIPPED, "storage", f"{where}: not checked, sync uses it")
    elif context.far:
        yield from _storage_of_jobs(context, where)
    else:
        parent = next(p for p in (Path(where), *Path(where).absolute().parents) if p.exists())
        writable = parent.is_dir() and os.access(parent, os.W_OK)
        yield Row(OK if writable else RED, "storage", where + ("" if writable else f": cannot write to {parent}"),
                  "" if writable else f"correct storage in {context.file}, or the folder's permissions")  # fmt: skip


def _storage_of_jobs(context: Context, where: str) -> Iterator[Row]:
    """A storage folder on disks that only jobs see: on one of their mounts; mounted here where sync runs here."""
    if not context.reads("mounts"):
        yield Row(SKIPPED, "storage", f"{where}: not checked, it is on the disks of jobs")
        return
    mounts = [m.partition(":")[2] for m in context.cluster.mounts]
    holding = [m for m in mounts if where == m or where.startswith(m + "/")]
    if holding:
        yield Row(OK, "storage", where)
    else:
        found = f"{where} is on none of the mounts: {', '.join(mounts) or 'none'}"
        yield Row(RED, "storage", found, f"correct storage or mounts in {context.file}")
    if "sync" not in context.cluster.stages and context.needs("sync") and not any(Path(m).is_dir() for m in holding):
        found = f"sync runs on this machine, where {where} is not mounted"
        yield Row(RED, "storage", found, f'put "sync" among stages in {context.file}')
