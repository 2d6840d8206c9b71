"""Compares a Hugging Face base, as training reads it, with transformers' class built from the base's own folder.

In:  the base's folder, its architecture as this project reads it, documents of the training data (token ids in the trained
     template). Out: `LogitCheck`; SftError if the logits differ.

It runs before the first step, over a sample of four layers that are streamed from the disk, and on a pack whose first
document is longer than the window. What the recipe changes by name (`rope_scaling`) is left out on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from sft.checkpoint.hf_folder import HfFolder
from sft.export.logits import compare_logits, sample_layers
from sft.formats.gate import LogitCheck
from sft.recipe.base_config import Base

SHORTEST = 512
"""Tokens of the first document, at least."""
OTHERS = (256, 64)
"""Tokens of the other documents, at most."""


def check_base(folder: Path, base: Base, documents: Iterable[Sequence[int]]) -> LogitCheck:
    """Compares the logits of a base. `documents` are training data. Raises SftError if they differ."""
    weights = HfFolder(folder)
    if base.positions_unsaid and not any(base.config.rope_layers):
        weights.config = {**weights.config, "rope_parameters": {"rope_theta": None}}  # what the recipe says it means
    try:
        with torch.random.fork_rng(devices=[]):
            return compare_logits(
                weights,
                weights,
                base.config,
                pack_documents(documents, base),
                sample_layers(base.config.n_layers),
                "this project does not compute the base as transformers does; next: report it with the base's config.json",
                rounding=False,
            )
    finally:
        weights.close()


def pack_documents(documents: Iterable[Sequence[int]], base: Base) -> list[list[int]]:
    """Three documents: the first repeats the data until it is longer than the window, the others are short.

    The ids of new tokens, which the base has no rows for, are replaced by others.
    """
    longest = max(SHORTEST, base.config.window + 64 if any(base.config.windows) else 0)
    if base.facts.max_positions:
        longest = min(longest, base.facts.max_positions)
    rows = base.config.vocab_size
    ids: list[int] = []
    for document in documents:
        ids += [int(i) % rows for i in document]
        if len(ids) >= longest:
            break
    first = (ids * (longest // len(ids) + 1))[:longest]
    return [first, *(ids[:size] for size in OTHERS)]
