"""Checks of a cluster's file that launchers share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

from sft.common import paths
from sft.common.errors import SftError
from sft.recipe.schema import Cluster

MEANINGS: dict[str, str] = {field.name: field.metadata["doc"] for field in fields(Cluster)}


def bad_names(cluster: Cluster, patterns: Mapping[str, str]) -> Iterator[str]:
    """A line for each value that does not have the form of its field's pattern, or leads out of a folder."""
    for field, pattern in patterns.items():
        value = getattr(cluster, field)
        for text in value if isinstance(value, tuple) else [value] * bool(value):
            if not re.fullmatch(pattern, paths.for_user(text)) or ".." in text:
                yield f"'{field}' = {text!r} is not of the form {pattern}: {MEANINGS[field]}"


def refuse(name: str, problems: Sequence[str]) -> None:
    """Raises SftError with all problems of env/<name>.toml, if there are any."""
    if problems:
        raise SftError("\n".join(f"env/{name}.toml: {p}" for p in problems) + f"\nnext: correct env/{name}.toml")
