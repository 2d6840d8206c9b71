"""The files of a tokenizer folder that are published."""

from __future__ import annotations

import shutil
from pathlib import Path

PUBLISHED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""The files of a tokenizer folder that prepare writes and that an export has. What prepare reads is in `sft.recipe.inputs.TOKENIZER_FILES`."""


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copies the published files that exist, byte for byte. `target` must exist."""
    for name in PUBLISHED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def tokenizer_beside(step: Path) -> Path | None:
    """The tokenizer folder of a step: in it, or beside it as train writes it."""
    return next((t for t in (step / "tokenizer", step.parent / "tokenizer") if (t / "tokenizer.json").is_file()), None)
