"""What training makes of each source: its weight in the loss, its counts, and the table at the end.

In:  the documents and packs of the dataset, the recipe's weights, the sums of every step.
Out: `SourceUse` records, which the manifest keeps; the table and the warnings for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.common import columns
from sft.common.errors import SftError
from sft.formats.dataset import SourceMix
from sft.formats.metrics import LOST, SourceUse

RED, RESET = "\033[31m", "\033[0m"


def source_weights(weights: Mapping[str, float], sources: Sequence[str]) -> list[float]:
    """The factor on the loss of each source of the dataset, 1 where the recipe has none.

    Raises SftError where the recipe has other sources than the dataset.
    """
    if weights and list(weights) != list(sources):
        raise SftError(
            f"[[prepare.sources]] loss_weight: the recipe has the sources {', '.join(weights)}, the dataset has"
            f" {', '.join(sources)}; next: make prepare again"
        )
    return [weights.get(name, 1.0) for name in sources]


def repeated_choices(sources: Sequence[SourceMix], epochs: float) -> list[str]:
    """A line for each source of which every epoch of several takes the same part: the prepared dataset has that part alone."""
    lines = []
    for source in sources:
        copies, rest = divmod(source.taken, source.available) if source.available else (0, 0)
        if epochs > 1 and rest:
            whole = epochs * source.taken / source.available
            times = f"each document {copies} times and the same {rest:,} once more" if copies else f"the same {rest:,}"
            lines.append(
                f"{source.path}: each epoch takes {times}, of {source.available:,}; for {epochs:g} epochs as one that takes"
                f" each document equally often, write weight = {whole:.4g} and epochs = 1, and scale the other weights likewise"
            )
    return lines


def before_training(
    sources: Sequence[str], weights: Sequence[float], documents: NDArray[Any], segments: NDArray[Any]
) -> list[SourceUse]:
    """The documents and trained tokens of each source before the first step. `documents` is of DOCUMENT, `segments` of SEGMENT."""

    def count(numbers: NDArray[Any], labels: NDArray[Any] | None = None) -> list[int]:
        sums: list[int] = np.bincount(numbers, weights=labels, minlength=len(sources)).astype(np.int64).tolist()
        return sums

    all_labels = count(documents["source"], documents["labels"])
    packed = count(documents["source"][segments["document"]], segments["labels"])
    rows = zip(sources, count(documents["source"]), all_labels, packed, weights, strict=True)
    return [SourceUse(name, a, a - b, 0, 0, n, weight) for name, n, a, b, weight in rows]


def after_step(
    uses: Sequence[SourceUse], loss_sums: Sequence[float], target_counts: Sequence[float], skipped: bool
) -> list[SourceUse]:
    """The records with one more step. The sums have one entry for each source."""
    return [
        replace(
            use,
            seen=use.seen + int(n),
            skipped=use.skipped + int(n) * skipped,
            first_loss=loss / n if use.first_loss is None else use.first_loss,
            last_loss=loss / n,
        )
        if n
        else use
        for use, loss, n in zip(uses, loss_sums, target_counts, strict=True)
    ]


def table(uses: Sequence[SourceUse]) -> list[str]:
    """The lines of a table with a row for each source."""
    weighted = any(use.loss_weight != 1 for use in uses)
    head = ["SOURCE", "DOCUMENTS", "LABELS", "SEEN", "SKIPPED", "LOST", "FIRST LOSS", "LAST LOSS"]
    rows = [[*head, "WEIGHT"] if weighted else head]
    for use in uses:
        counts = [f"{n:,}" for n in (use.documents, use.labels, use.seen, use.skipped)]
        losses = ["–" if x is None else f"{x:.4f}" for x in (use.first_loss, use.last_loss)]
        row = [use.source, *counts, f"{use.lost:.1%}", *losses]
        rows.append([*row, f"{use.loss_weight:g}"] if weighted else row)
    return columns.table(rows, right=range(1, len(rows[0])), width=columns.WIDTH - len("[train] ")).splitlines()


def lost_sources(uses: Iterable[SourceUse], colour: bool = False) -> list[str]:
    """A warning for each source that lost a tenth of its trained tokens or more to seq_len or to skipped steps. `colour`: in red."""
    lines = [
        f"warning: {use.source} lost {use.lost:.0%} of its trained tokens: {use.truncated:,} of {use.labels:,} to seq_len,"
        f" {use.skipped:,} of {use.seen:,} in steps that the guard skipped; next: raise [train] seq_len or skip_sigmas"
        for use in uses
        if use.lost >= LOST
    ]
    return [f"{RED}{line}{RESET}" for line in lines] if colour else lines
