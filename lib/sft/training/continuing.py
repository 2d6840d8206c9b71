"""[train] continue: what a training takes over from a step of another run.

In:  the step that the recipe names, the model and the optimizer of this run.
Out: the step's folder, verified and of the same architecture, tokenizer and optimizer state; or SftError.

`sft.runner.continuation` has what is known before training starts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from sft.checkpoint import olmo_core, step_folder
from sft.checkpoint.dcp_reader import DcpReader
from sft.checkpoint.lora_step import adapter_of, require_base
from sft.common.errors import SftError
from sft.formats.adapter import Adapter
from sft.formats.dataset import DatasetInfo
from sft.model.adapters import saved_parameters
from sft.model.parallel import World
from sft.recipe.architecture import ModelConfig, differing_fields
from sft.recipe.differences import Difference, mismatch
from sft.recipe.schema import Train
from sft.runner import continuation
from sft.runner.continuation import FIELD, WEIGHTS_ONLY
from sft.runner.stage import Stage
from sft.sync.base_check import check_base_tokenizer


def open_origin(
    stage: Stage,
    world: World,
    config: ModelConfig,
    dataset: tuple[Path, DatasetInfo],
    adapter: Adapter | None,
    base: Path | None,
) -> tuple[Path, float]:
    """The folder of the step that the recipe names, verified, and its learning rate (0 if no record has it). `dataset`: the
    folder of this run's data, and what it says. Every rank calls this. Raises SftError."""
    found = continuation.named(stage.recipe, stage.place.runs)
    assert found is not None
    step = found.folder
    if problems := [line for part in world.on_all_ranks(partial(step_folder.damage, step, world)) for line in part]:
        raise SftError(f"{FIELD}: {problems[0]}; next: restore it from a backup, or choose another step")
    continuation.check_options(found, stage.recipe)
    _check_method(step, adapter, base)
    saved = olmo_core.config_of_step(step / "config.json")
    rows = [
        Difference(name, repr(getattr(saved, name)), repr(getattr(config, name)))
        for name in differing_fields(saved, config, ignore=("init_std", "family"))
    ]
    if rows:
        problem = f"{FIELD} = {found.name!r}: [model] is another architecture"
        raise SftError(mismatch(problem, rows, "correct [model], or choose another step", ("field", "step", "recipe")))
    try:
        check_base_tokenizer(dataset[0], dataset[1].facts, step)
    except SftError as error:
        raise SftError(f"{FIELD} = {found.name!r} is the base here: {error}") from error
    return step, world.on_rank0(lambda: continuation.rate(found) or 0.0)


def _check_method(step: Path, adapter: Adapter | None, base: Path | None) -> None:
    """Raises SftError where one of step and recipe has adapters and the other has none, and for other adapters."""
    if adapter is not None:
        check_adapter(step, adapter, base, "choose another step")
    elif adapter_of(step) is not None:
        raise SftError(
            f"{step}: holds LoRA adapters, and method = 'full' continues from a complete model; next: method = 'lora', or train its"
            " merged export (make export) with [model] base"
        )


def check_adapter(step: Path, adapter: Adapter, base: Path | None, otherwise: str) -> None:
    """Raises SftError for a step whose adapters have another base or another form than those of this run. `otherwise`: the
    alternative, for the message."""
    found = adapter_of(step)
    if found is None:
        raise SftError(
            f"{step}: holds a complete model, and method = 'lora' continues from adapters; next: method = 'full', or {otherwise}"
        )
    require_base(step, found.base, adapter.base, base)
    if found != adapter:
        raise SftError(f"{step}: adapters of {found}, the recipe has {adapter}; next: correct [train], or {otherwise}")


def check_state(step: Path, model: nn.Module, optimizer: torch.optim.Optimizer, train: Train) -> None:
    """Raises SftError where the step's tensors are others than those of this run's model and optimizer."""
    for prefix, what, ours in (
        ("model.", "weights", set(saved_parameters(model))),
        ("optim.state.", "optimizer state", set(step_folder.optimizer_tensors(model, optimizer))),
    ):
        theirs = set(DcpReader(step, prefix, adapters=True))
        if theirs != ours:
            here, there = sorted(ours - theirs), sorted(theirs - ours)
            raise SftError(
                f"{step}: other {what} than this run has: {_some(there)} only there, {_some(here)} only here (optimizer ="
                f" {train.optimizer!r}, method = {train.method!r}); next: train the same parameters with the same optimizer, or take"
                f" {WEIGHTS_ONLY}"
            )


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:2])}{', …' * (len(names) > 2)})" if names else "none"
