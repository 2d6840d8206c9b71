"""Names the rows of a source by file and number, and counts its rejected rows.

In:  the jobs of a source, in the order of its files, with their summaries from the token cache.
Out: (file, row) of a row of a job, the rejected rows one by one, and `RejectTally`, which holds a few of them.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from sft.data.chunks import ChunkJob
from sft.data.tokencache import Summary
from sft.formats.rejects import RejectedRow

EXAMPLES_PER_REASON = 3


class RowNames:
    """Goes through the jobs of one source, which must come in the order of its files."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.base = self.after = 0  # lines of the file before the job, and after it
        self.ends: list[int] = []
        self.files: list[str] = []

    def enter(self, job: ChunkJob, summary: Summary) -> None:
        """Goes on to a job."""
        self.base = self.after if job.chunks[0].index else 0
        self.after = self.base + summary.lines
        self.files = [chunk.file.name for chunk in job.chunks]
        self.ends = np.cumsum(summary.chunk_lines).tolist()

    def name(self, row: int) -> tuple[str, int]:
        """(file, row in it from 1) of a row of the job."""
        chunk = bisect.bisect_right(self.ends, row)
        before = self.ends[chunk - 1] if chunk else -self.base  # only a job's first chunk may begin inside a file
        return self.files[chunk], row - before + 1

    def rejects(self, summary: Summary) -> Iterator[RejectedRow]:
        """The rejected rows of the job."""
        for r in summary.rejects:
            yield RejectedRow(self.source, *self.name(r.row), r.reason, r.detail, r.example)


@dataclass
class RejectTally:
    """The number of rejected rows of a source, by reason too, and the first ones of each reason and of each file."""

    total: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[RejectedRow]] = field(default_factory=dict)
    first_in: dict[str, RejectedRow] = field(default_factory=dict)

    def add(self, reject: RejectedRow) -> None:
        self.total += 1
        self.reasons[reject.reason] += 1
        examples = self.examples.setdefault(reject.reason, [])
        if len(examples) < EXAMPLES_PER_REASON:
            examples.append(reject)
        self.first_in.setdefault(reject.file, reject)

    @property
    def first(self) -> RejectedRow:
        """The first of all."""
        return next(iter(self.first_in.values()))
