"""Writes the table of presets, lib/sft/recipe/presets.json, from the config.json files of published models.

    python -m sft.sync.published                                  # every preset again, at the revision that the table names
    python -m sft.sync.published qwen3-8b=Qwen/Qwen3-8B@<commit>     # adds or replaces one

In:  the table, and config.json of each repository at its revision, from the hub or the hub client's cache (HF_HUB_CACHE is a
     folder of them, HF_HUB_OFFLINE=1 asks no network). Out: the table. A config.json that a base could not have is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from sft.common.errors import SftError
from sft.common.files import read_json, write_atomic
from sft.recipe.base_config import read_hf_config
from sft.recipe.presets import TABLE
from sft.recipe.resolve import padded, with_positions
from sft.runner.cli import program
from sft.storage import hub


def entry(repo: str, revision: str, config: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: the repository, its revision, and the architecture with the rows that training gives the embedding."""
    made = with_positions(read_hf_config(config, f"{repo}@{revision}/config.json")).config
    made = replace(made, vocab_size=padded(made.vocab_size))
    return {"repo": repo, "revision": revision, "architecture": made.to_value()}


def written(table: dict[str, dict[str, Any]]) -> bytes:
    """The bytes of the table."""
    return (json.dumps(table, indent=1) + "\n").encode()


def generate(file: Path, asked: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The table in `file` with the presets that `asked` names as name=org/name@commit. Raises SftError."""
    table = {name: (row["repo"], row["revision"]) for name, row in read_json(file).items()}
    for text in asked:
        name, separator, source = text.partition("=")
        repo, _, revision = source.partition("@")
        if not separator or not hub.COMMIT.fullmatch(revision):
            raise SftError(f"{text!r} is not preset=org/name@<40 digits of a commit>; next: correct it")
        table[name] = (repo, revision)
    return {name: entry(repo, revision, _config(repo, revision)) for name, (repo, revision) in table.items()}


def _config(repo: str, revision: str) -> dict[str, Any]:
    url = f"hf://{repo}@{revision}"
    return read_json(hub.cached(url, url, print, ["config.json"]) / "config.json")


def main(presets: Sequence[str]) -> int:
    try:
        table = generate(TABLE, presets)
    except SftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_atomic(TABLE, written(table))
    print(f"{TABLE}: {len(table)} presets")
    return 0


@program("presets", "python -m sft.sync.published", signals=False)
@click.argument("presets", nargs=-1, metavar="[NAME=ORG/NAME@COMMIT]...")
def command(presets: tuple[str, ...]) -> int:
    """Writes the table of presets from the config.json files of published models."""
    return main(presets)


if __name__ == "__main__":
    sys.exit(command())
