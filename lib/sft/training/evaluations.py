"""TODO sft.training.evaluations"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.common.files import hash_file
from sft.formats import manifest

NAME = "evaluations.jsonl"


def held(train: Path, every: int) -> list[Path]:
    """Steps that retention leaves until they have been evaluated, or found to have no scores."""
    done = {(r["step"], r["checkpoint"]) for r in records(train)}
    return [folder for number, folder, digest in chosen(train, every) if (number, digest) not in done]


def chosen(train: Path, every: int, last: bool = False) -> Iterator[tuple[int, Path, str]]:
    """(number, folder, digest of its manifest) of the kept steps that `every` means; one that was removed has had its turn."""
    from sft.checkpoint import step_folder

    kept = {}
    for number, folder in step_folder.steps(train):
        try:
            if not step_folder.is_ephemeral(folder):
                kept[number] = (folder, hash_file(folder / manifest.NAME))
        except FileNotFoundError:  # not whole yet, or retention has just removed it
            continue
    before = 0
    for number in sorted({*kept, *(r["step"] for r in records(train))}):
        if number // every > before // every or (last and number == max(kept, default=None)):
            before = number
            if number in kept:
                yield (number, *kept[number])


def records(train: Path) -> list[dict[str, Any]]:
    """The evaluations so far, in the order of their steps."""
    file = train / NAME
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
