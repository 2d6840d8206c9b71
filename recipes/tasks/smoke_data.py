"""Rows of a smoke task, for lm-eval's `custom_dataset`: reads <name>.jsonl beside this file.

lm-eval looks for a task's local data files in the working directory; this finds them wherever it was started.
"""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, DatasetDict


def load(name: str, **_: object) -> DatasetDict:
    """The one split of a task; other arguments are lm-eval's own metadata."""
    if not name.replace("_", "").isalnum():
        raise ValueError(f"task data {name!r}: letters, digits and underscores only")
    text = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8")
    return DatasetDict({"test": Dataset.from_list([json.loads(line) for line in text.splitlines()])})
