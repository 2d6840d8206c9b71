"""Which checkpoints are due for evaluation during training, so that retention keeps them until they have scores.

In:  train/stepN and train/evaluations.jsonl (sft.formats.evaluations). Out: folders of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sft.checkpoint import step_folder
from sft.common.files import hash_file
from sft.formats import evaluations, manifest
from sft.formats.steps import is_ephemeral


class DueStep(NamedTuple):
    """A checkpoint to be evaluated: its step, its folder and the sha256 of its manifest."""

    step: int
    folder: Path
    digest: str


def held(train: Path, every: int) -> list[Path]:
    """Steps that retention keeps until they have been scored or marked as unscorable."""
    done = {(e.step, e.checkpoint) for e in evaluations.read(train)}
    return [due.folder for due in chosen(train, every) if (due.step, due.digest) not in done]


def chosen(train: Path, every: int, last: bool = False) -> Iterator[DueStep]:
    """The first kept step at or after each multiple of `every`; with `last`, also the newest one.

    A step that was evaluated and then removed counts as the first one after its multiple.
    """
    kept = {}
    for step, folder in step_folder.steps(train):
        try:
            if not is_ephemeral(folder):
                kept[step] = DueStep(step, folder, hash_file(folder / manifest.NAME))
        except FileNotFoundError:  # not complete yet, or retention has just removed it
            continue
    before = 0
    for step in sorted({*kept, *(e.step for e in evaluations.read(train))}):
        if step // every > before // every or (last and step == max(kept, default=None)):
            before = step
            if step in kept:
                yield kept[step]
