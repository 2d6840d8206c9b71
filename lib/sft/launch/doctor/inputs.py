"""Data, base weights, tokenizer and storage: what is there, for this machine and for jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sft.common import paths
from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.common.hashcache import HashCache
from sft.formats.elsewhere import Elsewhere
from sft.launch.doctor.context import NOTE, OK, RED, SKIPPED, Context, Row, amount
from sft.recipe import inputs
from sft.runner import plan


def data(context: Context) -> Iterator[Row]:
    """Sources, tokenizer and base are there, for this machine and for jobs."""
    r = context.recipe
    remote = [s.path for s in r.prepare.sources if inputs.is_remote(s.path)]
    for stage, what in (("prepare", "data"), ("sync", "base weights")):
        if not context.needs(stage):
            continue
        named = r.model.base if stage == "sync" else ", ".join(remote)
        try:
            files = plan.named_files(context.place, r, stage)
        except SftError as e:
            yield Row(RED, what, str(e).partition(": ")[2].partition("; next: ")[0], str(e).partition("; next: ")[2])
            continue
        size = sum(file.stat().st_size for _, file in files)
        if files:
            yield Row(OK, what, f"{len(files)} files, {amount(size)}")
            if stage == "prepare" and remote:
                yield Row(SKIPPED, what, f"{named}: not asked, read where {stage} runs")
            local = [n for n, f in files if not f.resolve().is_relative_to(plan.REPO / "recipes")]
            if context.far and stage in context.cluster.stages and local and not context.cluster.data:
                yield Row(RED, what, f"{local[0]} is a file of this machine: jobs on {context.place.cluster} do not see it",
                          f"say where they see DATA with data = \"/…\" in {context.file}, or name gs:// or hf://")  # fmt: skip
        elif named:
            yield Row(SKIPPED, what, f"{named}: not asked, read where {stage} runs")
        else:
            yield Row(NOTE, what, "random weights: no [model] base")
        for path in [*(remote if stage == "prepare" else [named])]:
            if path.startswith("hf://") and "@" not in path:
                yield Row(NOTE, what, f"{path} names no revision: what the hub has on that day", f"{path}@<commit>")


def tokenizer(context: Context) -> Iterator[Row]:
    """Data and base weights are of one tokenizer."""
    name, base = context.recipe.prepare.tokenizer, context.recipe.model.base
    if not base:
        return
    if name == base:
        yield Row(OK, "tokenizer", f"the base's own ({name})")
    elif inputs.is_remote(name) or inputs.is_remote(base):
        yield Row(NOTE, "tokenizer", f"{name} and {base} are compared when sync has both")
    else:
        files = [paths.find(context.place.roots, f, context.recipe.file) / "tokenizer.json" for f in (name, base)]
        if not all(f.is_file() for f in files):
            yield Row(NOTE, "tokenizer", f"{files[1].parent} has no tokenizer.json to compare with")
        elif hash_file(files[0]) != hash_file(files[1]):
            yield Row(RED, "tokenizer", f"{files[0]} and {files[1]} differ",
                      f"[prepare] tokenizer = \"{base}\", and make prepare again")  # fmt: skip
        else:
            yield Row(OK, "tokenizer", "the same tokenizer.json in data and base")


def storage(context: Context) -> Iterator[Row]:
    """What is done of the run, and where its dataset is."""
    where = context.place.storage(context.cluster)
    states = plan.states(context.place, context.recipe, HashCache(context.place.cache))
    done = [s for s, state in states.items() if not state.stale]
    away = sorted({at for s in done if (at := Elsewhere.of(context.run / s).where)})
    yield Row(OK, "stages done", (", ".join(done) or "none") + (f"; made in {', '.join(away)}" if away else ""))
    if "://" in where:
        yield Row(SKIPPED, "storage", f"{where}: not asked, sync does")
    elif context.far:
        mounted = [m.partition(":")[2] for m in context.cluster.mounts]
        seen = any(where == m or where.startswith(m + "/") for m in mounted)
        yield Row(OK if seen else RED, "storage", where + ("" if seen else f" is on none of the mounts: {', '.join(mounted) or 'none'}"),
                  "" if seen else f"correct storage or mounts in {context.file}")  # fmt: skip
        here = [s for s in ("sync",) if s not in context.cluster.stages and context.needs("sync")]
        if here and not any(Path(m).is_dir() for m in mounted if where == m or where.startswith(m + "/")):
            yield Row(
                RED,
                "storage",
                f"sync runs here, where {where} is not mounted",
                f'put "sync" among stages in {context.file}',
            )
    else:
        parent = next(p for p in (Path(where), *Path(where).absolute().parents) if p.exists())
        able = parent.is_dir() and os.access(parent, os.W_OK)
        yield Row(OK if able else RED, "storage", f"{where}" + ("" if able else f": {parent} cannot be written"),
                  "" if able else f"correct storage in {context.file}, or the folder's permissions")  # fmt: skip
