"""make extend: lets a finished training go on after its epochs, its steps or its patience were raised. Standard library only.

    found = find(place, recipe)          what differs and from which step it would go on; None if there is nothing to extend
    extend(found)                        from now on `make train` continues that folder, with its optimizer state and data position

In:  runs/<run>/train of the options before. Out: the same folder, whose manifest is kept as .finished-step<N>.json and whose mark
     names the new options. Nothing that was trained is moved. The data must be the same: training checks its position.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.elsewhere import Elsewhere
from sft.formats.identity import write_identity
from sft.formats.manifest import Manifest
from sft.recipe import recipe
from sft.runner import plan, references
from sft.runner.listing import span

LENGTH = ("epochs", "steps", "early_stopping_patience", "early_stopping_threshold", "validate_every")
"""The fields of [train] that may differ: they say how long it trains, and with it the schedule of the learning rate.
`validate_every` is in the key only where early stopping counts validations."""


@dataclass(frozen=True)
class Extension:
    """A finished training of `step` steps that could go on. `differences`: "epochs 1.0 -> 2.0"."""

    folder: Path
    step: int
    differences: tuple[str, ...]
    identity: str
    cost: str = ""  # of the ways to go on, as far as the manifest tells

    @property
    def line(self) -> str:
        return f"{self.folder}: {'; '.join(self.differences)}; it has finished {self.step} steps"


def find(place: plan.Place, r: recipe.Recipe) -> Extension | None:
    """The finished training of this run that differs from the recipe in its length only; None otherwise."""
    state = plan.states(place, r)["train"]
    folder, made = place.runs / r.run / "train", state.manifest
    if made is None or made.key == state.key or made.version != plan.VERSIONS["train"] or folder.is_symlink():
        return None
    step = made.metrics.get("final_step")
    if _apart_from_length(state.config) != _apart_from_length(made.config) or not isinstance(step, int):
        return None
    try:
        ready, inputs = plan.consumed(place, r, "train")
    except SftError:
        return None  # its data is to be made again
    if list(made.inputs) != inputs:
        return None
    lines = plan.differences(made.config, state.config)
    return Extension(folder, step, tuple(lines), plan.identity(ready.key, inputs), _cost(made, r, step))


def _apart_from_length(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in LENGTH}


def _cost(made: Manifest, r: recipe.Recipe, step: int) -> str:
    """The steps and the hours of training from step 0 and from the last step, at the speed so far; "" if it is not known."""
    try:
        steps, epochs = int(made.metrics["data"]["steps"]), float(made.metrics["data"]["epochs"])
        hours = float(made.metrics["tokens"]) / float(made.metrics["tokens_per_s"]) / 3600 / step
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return ""
    total = r.train.steps or round(steps * r.train.epochs / epochs)

    def text(count: int) -> str:
        return f"about {count:,} steps, {span(3600 * hours * count)}"

    return f"from step 0: {text(total)}; going on: {text(max(0, total - step))}"


def refuse(found: Extension, r: recipe.Recipe) -> SftError:
    """What make train says instead of moving the finished training away and starting from step 0."""
    return SftError(
        f"{found.line}, and make train would set them aside and start from step 0{f' ({found.cost})' if found.cost else ''}; next: make extend RECIPE={r.name}"
        f" goes on from step {found.step}, make train RECIPE={r.name} RETRAIN=1 starts from step 0"
    )


def extend(found: Extension) -> None:
    """Lets the next make train continue the folder. Raises SftError where its files are on another machine."""
    if Elsewhere.of(found.folder).outputs:
        raise SftError(
            f"{found.folder}: its steps are elsewhere; next: make fetch them, or start a new run with [model] base"
        )
    if not (found.folder / f"step{found.step}" / manifest.NAME).is_file():
        raise SftError(f"{found.folder}/step{found.step}: not there, so nothing can go on from it; next: RETRAIN=1")
    write_identity(found.folder, found.identity)
    os.rename(found.folder / manifest.NAME, found.folder / f".finished-step{found.step}.json")


def referred(found: Extension) -> list[str]:
    """The runs that refer to this training, and would then refer to one that is not finished."""
    return [link.parent.name for link in references.referrers(found.folder.parent).get("train", [])]
