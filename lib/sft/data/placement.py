"""The order in which chosen documents are read from the token cache and written: `Placement`.

In:  the documents of each source that a split takes (`sft.data.mix.Selection`), and how long the documents in each file are.
Out: batches of documents in the order of their places in the dataset.

Documents are numbered in a random order. In the parts they keep the order of the cache, one file after another, so reading and
writing are sequential whatever the size. The files follow each other in the order of their first documents, so that the sources
are mixed inside each part. Second copies of documents follow all first ones. Memory: a batch, and a few bytes for each file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.mix import Selection


@dataclass(frozen=True)
class CachedSource:
    """The documents of a source in the token cache, file after file."""

    first: NDArray[np.int64]
    """[files + 1] The number of the first document of each file, then the number of all documents."""
    lengths: NDArray[np.uint32]
    """[documents] Tokens."""


@dataclass(frozen=True)
class PlacedDocuments:
    """Documents in the order of their places: where each is in the cache, and its number in the split."""

    file: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    source: NDArray[np.uint16]
    number: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.file)

    def part(self, first: int, stop: int) -> PlacedDocuments:
        here = slice(first, stop)
        return PlacedDocuments(*(values[here] for values in vars(self).values()))


class FileRange(NamedTuple):
    """The chosen documents of one file: items [begin, end) of a source's selection."""

    number: int
    """The lowest number of these documents."""
    source: int
    file: int
    begin: int
    end: int


class Placement:
    """The chosen documents of a split. `documents`, `tokens` and `longest` (tokens) describe all of them."""

    def __init__(self, chosen: Selection, sources: Sequence[CachedSource]) -> None:
        self.chosen, self.sources = chosen, sources
        self.documents, self.tokens, self.longest = len(chosen), 0, 0
        self.numbers = np.split(chosen.numbers, np.cumsum([len(index) for index in chosen.index_of])[:-1])
        self.runs: list[FileRange] = []
        self.copies = 1
        for number, (index, source) in enumerate(zip(chosen.index_of, sources, strict=True)):
            lengths = source.lengths[index]
            self.tokens += int(lengths.sum(dtype=np.int64))
            self.longest = max(self.longest, int(lengths.max(initial=0)))
            self.copies = max(self.copies, _most_copies(index))
            cuts = np.searchsorted(index, source.first)
            for file in np.flatnonzero(np.diff(cuts)).tolist():
                begin, end = int(cuts[file]), int(cuts[file + 1])
                self.runs.append(FileRange(int(self.numbers[number][begin:end].min()), number, file, begin, end))
        self.runs.sort()
        self.first_file = np.cumsum([0, *(len(source.first) - 1 for source in sources)])

    def batches(self, most_tokens: int) -> Iterator[PlacedDocuments]:
        """Batches of at most `most_tokens` tokens, or of one longer document."""
        for copy in range(self.copies):
            waiting: list[PlacedDocuments] = []
            room = most_tokens
            for run in self.runs:
                documents = self._of(run, copy)
                first = 0
                ends = np.cumsum(documents.length)
                while first < len(documents):
                    before = int(ends[first - 1]) if first else 0
                    stop = int(np.searchsorted(ends, before + room, side="right"))
                    if stop == first and not waiting:
                        stop += 1
                    if stop > first:
                        waiting.append(documents.part(first, stop))
                        room -= int(ends[stop - 1]) - before
                        first = stop
                    if first < len(documents):
                        yield _concatenated(waiting)
                        waiting, room = [], most_tokens
            if waiting:
                yield _concatenated(waiting)

    def _of(self, run: FileRange, copy: int) -> PlacedDocuments:
        """The documents of a run that are taken more than `copy` times."""
        source = self.sources[run.source]
        begin, end = int(source.first[run.file]), int(source.first[run.file + 1])
        lengths = source.lengths[begin:end].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        local = self.chosen.index_of[run.source][run.begin : run.end].astype(np.int64) - begin
        numbers = self.numbers[run.source][run.begin : run.end].astype(np.int64)
        if self.copies > 1:
            here = np.arange(len(local)) - np.searchsorted(local, local) == copy  # `local` is sorted
            local, numbers = local[here], numbers[here]
        file = np.full(len(local), self.first_file[run.source] + run.file, dtype=np.int64)
        source_of = np.full(len(local), run.source, dtype=np.uint16)
        return PlacedDocuments(file, starts[local], lengths[local], source_of, numbers)


def _most_copies(index: NDArray[Any]) -> int:
    """How often the most frequent number of a sorted array is in it."""
    new = np.flatnonzero(index[1:] != index[:-1]) + 1 if (index[1:] == index[:-1]).any() else None
    return 1 if new is None else int(np.diff(np.concatenate([[0], new, [len(index)]])).max())


def _concatenated(parts: Sequence[PlacedDocuments]) -> PlacedDocuments:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return PlacedDocuments(*map(np.concatenate, columns)) if len(parts) > 1 else parts[0]
