"""Writes chosen documents from the token cache into a dataset and checks every token on its way.

In:  files of the token cache, and for every document its file, its place in it and its length.
Out: the parts of the dataset, through `DatasetWriter`.

Documents are numbered in the given order, which is random. In the parts they keep the order of the cache, one file after
another, so reading and writing are sequential whatever the size. The files follow each other in the order of their first
documents, so that the sources are mixed inside each part. Memory: a few blocks of tokens.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.data.chunks import Progress, naming
from sft.data.compiled import gather
from sft.data.dataset import token_dtype
from sft.data.dataset_writer import DatasetWriter, DocumentBlock
from sft.data.token_check import BlockCounts, TokenCheck
from sft.data.tokencache import TokenFile
from sft.formats.dataset import SplitSize

BLOCK_TOKENS = 1 << 19  # documents are gathered and written in blocks of this many tokens
READ_TOKENS = 1 << 19  # tokens of one read
GAP_TOKENS = 1 << 14  # reading up to this many tokens in vain is faster than a second read
OPEN_FILES = 64


class Buffers(NamedTuple):
    """Memory of one block, which is used again for later blocks."""

    ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]
    read: NDArray[np.uint32]


@dataclass(frozen=True)
class Documents:
    """The places of documents in the cache, by their numbers in the dataset. `start` and `length` are tokens."""

    file: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    source: NDArray[np.uint16]


def materialise(
    folder: Path,
    vocab_size: int,
    files: Sequence[Path],
    documents: Documents,
    check: TokenCheck,
    progress: Progress,
    threads: int,
) -> tuple[SplitSize, dict[str, str]]:
    """Writes the dataset and returns its size, and the sha256 (hex) of each file by name.

    Threads gather and check the next blocks while one is written. Raises SftError for a full disk, a damaged cache file, and
    documents that break the mask proof.
    """
    order = by_place(documents)
    placed = Documents(documents.file[order], documents.start[order], documents.length[order], documents.source[order])
    ends = np.cumsum(placed.length)
    needed = int(ends[-1]) * (token_dtype(vocab_size).itemsize + 1) + 32 * len(ends)
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise SftError(
            f"{folder}: needs {needed:,} bytes, {free:,} are free on that disk; next: free space and run it again"
        )
    spans = _blocks(ends)
    largest = max(int(ends[b - 1] - ends[a] + placed.length[a]) for a, b in spans)
    longest = int(placed.length.max())
    # Buffers are used again: allocating and clearing them for each block would take longer than everything else.
    unused: SimpleQueue[Buffers] = SimpleQueue()
    for _ in range(threads + 2):
        read = np.empty(max(READ_TOKENS, longest), dtype=np.uint32)
        unused.put(Buffers(np.empty(largest, dtype=np.uint32), np.empty(largest, dtype=np.bool_), read))
    writer = DatasetWriter(folder, vocab_size, boundaries=check.facts.boundaries, order=inverse(order))
    make = _BlockMaker(files, placed, writer, check, unused)
    with naming(folder, needed), ThreadPoolExecutor(threads) as ahead, writer:
        left = iter(spans)
        coming = deque(ahead.submit(make, *span) for span in itertools.islice(left, threads + 1))
        while coming:
            counts, block, buffers = coming.popleft().result()
            coming.extend(ahead.submit(make, *span) for span in itertools.islice(left, 1))
            check.add(counts)
            writer.append(block)
            unused.put(buffers)
            progress.add(counts.tokens, counts.tokens)
    return SplitSize(writer.num_documents, writer.num_tokens, writer.num_targets), writer.hashes


def _blocks(ends: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cuts documents, which end at these tokens, into blocks [first, stop) of about BLOCK_TOKENS."""
    cuts = np.searchsorted(ends, np.arange(BLOCK_TOKENS, int(ends[-1]), BLOCK_TOKENS), side="right")
    return list(itertools.pairwise(np.unique(np.concatenate([[0], cuts, [len(ends)]])).tolist()))


class _BlockMaker:
    """Gathers and validates documents [first, stop). Thread-safe."""

    def __init__(
        self,
        files: Sequence[Path],
        documents: Documents,
        writer: DatasetWriter,
        check: TokenCheck,
        unused: SimpleQueue[Buffers],
    ) -> None:
        self.documents, self.writer, self.check, self.unused = documents, writer, check, unused
        self.opened = functools.lru_cache(OPEN_FILES)(lambda number: TokenFile(files[number]))

    def __call__(self, first: int, stop: int) -> tuple[BlockCounts, DocumentBlock, Buffers]:
        here, count = slice(first, stop), stop - first
        file, start, lengths = self.documents.file[here], self.documents.start[here], self.documents.length[here]
        buffers, total = self.unused.get(), int(lengths.sum())
        ids, loss_mask = buffers.ids[:total], buffers.loss_mask[:total]
        found = (np.empty(count, np.int64), np.empty(count, np.bool_), *np.empty((2, count), np.uint32))
        places, eos = np.cumsum(lengths) - lengths, np.uint32(self.check.facts.eos_id)
        for a, b in reads(file, start, lengths):
            begin, end = int(start[a]), int(start[b - 1] + lengths[b - 1])
            tokens = self.opened(int(file[a])).tokens(begin, end, buffers.read)
            gather(tokens, begin, a, b, start, lengths, places, eos, ids, loss_mask, *found)
        block = self.writer.validate(ids, loss_mask, lengths, self.documents.source[here], found[0], first)
        return self.check.count(lengths, *found), block, buffers


def by_place(documents: Documents) -> NDArray[np.int64]:
    """The order in which documents are written: file by file, by their place in it. Second copies follow all first ones."""
    files, first = np.unique(documents.file, return_index=True)
    rank = np.zeros(int(files[-1]) + 1 if len(files) else 0, dtype=np.int64)
    rank[files[np.argsort(first)]] = np.arange(len(files))
    places = rank[documents.file] << 40 | documents.start
    order = np.argsort(places, kind="stable")
    again = np.diff(places[order], prepend=-1) == 0
    if not again.any():
        return order
    here = np.arange(len(order))
    copy = here - np.maximum.accumulate(np.where(again, 0, here))
    return order[np.argsort(copy, kind="stable")]


def reads(file: NDArray[np.int64], start: NDArray[np.int64], length: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Documents [first, stop) for one read each.

    They follow each other in one file with gaps of at most GAP_TOKENS, and span READ_TOKENS at most, or are one document.
    """
    end = start + length
    separate = np.diff(file) != 0
    separate |= (start[1:] < end[:-1]) | (start[1:] - end[:-1] > GAP_TOKENS)
    for first, stop in itertools.pairwise([0, *(np.flatnonzero(separate) + 1).tolist(), len(file)]):
        while first < stop:
            count = max(1, int(np.searchsorted(end[first:stop], start[first] + READ_TOKENS, side="right")))
            yield first, first + count
            first += count


def inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The inverse of a permutation: the position of each number."""
    positions = np.empty_like(order)
    positions[order] = np.arange(len(order))
    return positions
