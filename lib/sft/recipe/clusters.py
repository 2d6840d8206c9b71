"""Finds the file of a cluster by its name, or by the name that a scheduler has for it. Standard library only.

find_cluster(Path("env"), "ai2/jupiter-cirrascale-2")     raises: did you mean CLUSTER=ai2-jupiter?
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sft.common.errors import SftError
from sft.recipe import recipe


def find_cluster(folder: Path, name: str) -> Path:
    """The file of a cluster, by its name. Raises SftError, with the file that has the scheduler's name for it."""
    names = sorted(p.stem for p in folder.glob("*.toml"))
    if name in names or not (near := _alias(folder, names, name)):
        return recipe.find(folder, name, "cluster")
    raise SftError(f"CLUSTER={name}: no file env/{name}.toml; did you mean CLUSTER={near}? next: correct the name")


def _alias(folder: Path, names: Sequence[str], name: str) -> str:
    """The cluster's file for a name such as ai2/jupiter-cirrascale-2 or jupiter, or "" if there is none."""
    plain = name.lower().replace("/", "-").replace("_", "-")
    for stem in names:
        listed = re.search(
            r"^clusters\s*=\s*\[(.*?)\]", (folder / f"{stem}.toml").read_text(encoding="utf-8"), re.M | re.S
        )
        if listed and f'"{name}"' in listed[1]:
            return stem
    for stem in names:
        if (
            plain == stem
            or plain.startswith(f"{stem}-")
            or stem.endswith(f"-{plain}")
            or plain.startswith(f"{stem.partition('-')[2]}-")
        ):
            return stem
    return ""
