"""TODO sft.common.elsewhere"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.common.errors import SftError

NAME = "elsewhere.json"
BESIDE = ("metrics.jsonl", "LATEST", "BEST", "evaluations.jsonl")
"""Small files that a manifest does not list and people look at."""


def elsewhere(folder: Path) -> tuple[str, set[str]]:
    """(where a stage's folder is, the outputs that are only there); ("", nothing) for a stage that was made here."""
    try:
        data = json.loads((folder / NAME).read_bytes())
        return str(data["where"]), {str(name) for name in data["outputs"]}
    except FileNotFoundError:
        return "", set()
    except (ValueError, KeyError, TypeError) as e:
        raise SftError(
            f"{folder / NAME}: cannot be read ({e}); next: remove the folder and make the stage again"
        ) from None


def here(folder: Path, made: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without the outputs that are elsewhere: what can be verified on this machine."""
    _, absent = elsewhere(folder)
    return {**made, "outputs": [e for e in made["outputs"] if e["path"] not in absent]}
