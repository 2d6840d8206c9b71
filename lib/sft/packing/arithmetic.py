"""Epoch and batch arithmetic of a run before anything is launched: python -m sft.packing.arithmetic runs/<run> [field=value …]

In:  runs/<run>/prepare and the recipe's [train] and [on.<cluster>.train] numbers.
Out: a table: packs, steps, warm-up, padding, trained tokens of a step, the tokens lost to long documents, the share of each
     rank, and the memory of one GPU by part.

It refuses, with the numbers, a dataset smaller than one batch, a batch without a trained token, a remainder, and a model
that does not fit the cluster's GPUs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from sft.common.process import until_reader_stops
from sft.data.dataset import Dataset
from sft.formats.dataset import DatasetInfo
from sft.model import memory
from sft.model.fp8 import require_sizes
from sft.packing.origin import position_of
from sft.packing.packs import pack_dataset
from sft.packing.steps import StepPlan, accumulation, context_groups
from sft.recipe.base_config import Base
from sft.recipe.recipe import Recipe
from sft.recipe.resolve import resolve
from sft.recipe.schema import Cluster, Hardware
from sft.runner import continuation
from sft.runner.bases import find_base
from sft.runner.cli import RunOptions, program, run_options
from sft.runner.processes import processes


@dataclass(frozen=True)
class Check:
    """The arithmetic of a run, as training will use it."""

    steps: StepPlan
    ranks: int
    groups: int  # ranks, or groups of ranks that share the tokens of a microbatch
    microbatches: int  # per step and group
    packs_each: int  # packs of a microbatch
    memory: memory.Plan
    done: int = 0  # steps of another run that this one goes on from, with the same data
    continues: str = ""  # that run's step, as the recipe names it


def check(
    prepared: Path,
    recipe: Recipe,
    hardware: Hardware,
    cluster: Cluster | None = None,
    base: Base | None = None,
    runs: Path | None = None,
) -> Check:
    """The arithmetic of a prepared run. `base`: what its base's config.json says. `runs`: the folder of runs, for a recipe that
    continues a step of another one.

    Raises SftError where training would: for batches, for context groups, and for a GPU that is known to be too small.
    """
    train = recipe.train
    steps = StepPlan.build(pack_dataset(Dataset.open(prepared / "data"), train.seq_len, train.long_documents), train)
    origin = continuation.named(recipe, runs) if runs is not None else None
    position = position_of(origin.folder) if origin else None
    done = 0
    if position is not None and position.plan == steps.digest:
        steps, done = steps.goes_on(position, train), position.step
        if done >= steps.steps:
            raise steps.nothing_left(position, train)
    ranks = hardware.nodes * processes(hardware, cluster)[0]
    model = resolve(recipe.model, DatasetInfo.of(prepared).facts.vocab_size, base)
    groups = context_groups(model, train, hardware, ranks)
    require_sizes(model, train, hardware)
    found = memory.plan(model, train, hardware, ranks, cluster.gpu_memory_gb if cluster else 0.0)
    if hardware.recompute == "auto":  # for a chosen mode training only warns: the estimate has an error margin
        memory.require(found, model, train, hardware, ranks)
    each = accumulation(steps.batch_packs, train.seq_len, groups, hardware.microbatch_tokens)
    return Check(steps, ranks, groups, *each, found, done, origin.name if origin and position else "")


def rows(found: Check) -> list[tuple[str, str]]:
    """The table as (what, value)."""
    summary = found.steps.describe()
    who = (
        f"{found.ranks} ranks"
        if found.groups == found.ranks
        else f"{found.groups} groups of {found.ranks // found.groups} ranks"
    )
    step = summary.trained_tokens_per_step
    continued = (
        f"{found.continues}: {found.done:,} of {summary.steps:,} steps are done, {summary.steps - found.done:,} are left"
        if found.done
        else f"{found.continues}, with other data or another order of them: all steps are to be done"
    )
    return [
        ("documents", f"{summary.documents:,}, {summary.documents_per_pack:.1f} in a pack"),
        ("longer than seq_len", f"{summary.long_documents:,}, policy {summary.long_documents_policy}"),
        (
            "lost to seq_len",
            f"{summary.tokens_lost_fraction:.2%} of tokens, {summary.trained_tokens_lost_fraction:.2%} of trained",
        ),
        ("packs", f"{summary.packs:,} of {summary.seq_len:,} tokens, {summary.fill:.1%} full"),
        ("steps", f"{summary.steps:,} of {summary.packs_per_batch:,} packs, {summary.epochs:.2f} epochs"),
        *([("continues", continued)] if found.continues else []),
        ("warm-up", f"{summary.warmup_steps:,} steps"),
        ("tokens", f"{summary.tokens:,}, and {summary.padding_fraction:.1%} padding"),
        (
            "trained tokens",
            f"{summary.trained_tokens:,}; in a step {step.min:,} to {step.max:,}, mean {step.mean:,.0f}",
        ),
        ("on each of", f"{who}: {found.microbatches} microbatches of {found.packs_each} packs in a step"),
        ("memory", "per GPU, estimated, at the moment that needs most"),
        *((f"  {part}", size) for part, size in found.memory.table()),
    ]


@program("steps", "python -m sft.packing.arithmetic")
@run_options
def main(options: RunOptions) -> None:
    """Prints packs, steps, padding, trained tokens of a step and the memory of one GPU, before anything is launched."""
    recipe, cluster = options.load_recipe(), options.place.load_cluster()
    base = find_base(options.place.roots, options.run, recipe)
    hardware = recipe.hardware(options.cluster, "train")
    found = check(options.run / "prepare", recipe, hardware, cluster, base, options.place.runs)
    with until_reader_stops():
        for what, value in rows(found):
            print(f"{what:27} {value}")


if __name__ == "__main__":
    sys.exit(main())
