"""TODO sft.common.jsonl"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The whole records of a JSONL file; a last line that a kill cut short is dropped, a missing file is empty."""
    records = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [r for r in records if isinstance(r, dict)]
