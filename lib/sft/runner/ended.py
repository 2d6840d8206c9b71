"""A finished training that ended before its last step, and the best one of its steps. Standard library only.

reasons(made, r)         why a training that max_minutes ended goes on: the limit was raised or removed
best_inputs(train, r)    what identifies the step of [convert] checkpoint = "best": the file BEST
"""

from __future__ import annotations

from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.formats.manifest import Input, Manifest
from sft.formats.steps import BEST
from sft.recipe.recipe import Recipe


def reasons(made: Manifest, r: Recipe) -> list[str]:
    """Why a finished training goes on in its own folder: [train] max_minutes ended it, and the recipe now allows more."""
    before, now = made.metrics.get("max_minutes"), r.train.max_minutes
    if made.metrics.get("stopped") != "max_minutes" or not isinstance(before, int | float) or 0 < now <= before:
        return []
    limit = f"max_minutes is now {now:g}" if now else "there is no max_minutes now"
    return [f"it stopped at step {made.metrics.get('final_step')} after {before:g} minutes, and {limit}"]


def best_inputs(train: Path, r: Recipe) -> list[Input]:
    """The file BEST. Raises SftError where training has chosen no step."""
    file = train / BEST
    if not file.is_file():
        raise SftError(
            f"{r.file}: 'checkpoint' in [convert] = 'best': {file} is not there: no saved step was validated or scored; next:"
            " checkpoint = 'final', or a save_every that validate_every divides"
        )
    return [Input(file=f"train/{BEST}", bytes=file.stat().st_size, sha256=hash_file(file))]
