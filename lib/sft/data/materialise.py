"""Writes chosen documents from the token cache into a dataset, every token checked on its way.

In: files of the token cache, and for every document which file it is in, where, and how long it is.
Out: the dataset's parts through `DatasetWriter`. Documents are numbered in the order that they are given in, which is random, but
lie in the parts as they lie in the files of the cache, one file after another: reading and writing go forwards, whatever the size. The
files follow each other in the order of their first documents, so that the sources are mixed inside each part. Memory: a few blocks of
tokens.
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

import numpy as np
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.data.chunks import Progress, naming
from sft.data.compiled import gather
from sft.data.dataset import DatasetWriter, Looked, token_dtype
from sft.data.token_check import Check, Seen
from sft.data.tokencache import TokenFile
from sft.formats.dataset import SplitSize

Memory = tuple[NDArray[np.uint32], NDArray[np.bool_], NDArray[np.uint32]]
"""Ids and mask of a block, and room for what is read."""
BLOCK_TOKENS = 1 << 19  # documents are gathered and written this many tokens at a time
READ_TOKENS = 1 << 19  # and read so
GAP_TOKENS = 1 << 14  # to read what nobody wants is faster than to begin another read
OPEN_FILES = 64


@dataclass(frozen=True)
class Documents:
    """Documents by their numbers in the dataset."""

    file: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    source: NDArray[np.uint16]


def materialise(
    folder: Path,
    vocab_size: int,
    files: Sequence[Path],
    documents: Documents,
    check: Check,
    progress: Progress,
    threads: int,
) -> tuple[SplitSize, dict[str, str]]:
    """Threads gather and check the next blocks while one is written. Returns what was written, and the sha256 of each file by name."""
    order = by_place(documents)
    file, start, length = documents.file[order], documents.start[order], documents.length[order]
    source = documents.source[order]
    ends = np.cumsum(length)
    needed = int(ends[-1]) * (token_dtype(vocab_size).itemsize + 1) + 32 * len(length)
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise SftError(
            f"{folder}: needs {needed:,} bytes, {free:,} are free on that disk; next: free space and run it again"
        )
    cuts = np.searchsorted(ends, np.arange(BLOCK_TOKENS, int(ends[-1]), BLOCK_TOKENS), side="right")
    spans = list(itertools.pairwise(np.unique(np.concatenate([[0], cuts, [len(length)]])).tolist()))
    largest = max(int(ends[b - 1] - ends[a] + length[a]) for a, b in spans)
    opened = functools.lru_cache(OPEN_FILES)(lambda number: TokenFile(files[number]))
    # Memory is used again: what the system has to find and clear for each block would take longer than all else.
    unused: SimpleQueue[Memory] = SimpleQueue()
    for _ in range(threads + 2):
        room = np.empty(max(READ_TOKENS, int(length.max())), dtype=np.uint32)
        unused.put((np.empty(largest, dtype=np.uint32), np.empty(largest, dtype=np.bool_), room))

    def block(span: tuple[int, int]) -> tuple[Seen, Looked, Memory]:
        here = slice(*span)
        lengths, count = length[here], span[1] - span[0]
        memory, total = unused.get(), int(lengths.sum())
        ids, mask, room = memory[0][:total], memory[1][:total], memory[2]
        found = (np.empty(count, np.int64), np.empty(count, np.bool_), *np.empty((2, count), np.uint32))
        puts, eos = np.cumsum(lengths) - lengths, np.uint32(check.facts.eos_id)
        for first, stop in reads(file[here], start[here], lengths):
            base, end = int(start[span[0] + first]), int(start[span[0] + stop - 1] + lengths[stop - 1])
            tokens = opened(int(file[span[0] + first])).tokens(base, end, room)
            gather(tokens, base, first, stop, start[here], lengths, puts, eos, ids, mask, *found)
        looked = writer.look(ids, mask, lengths, source[here], found[0], span[0])
        return check.look(lengths, *found), looked, memory

    writer = DatasetWriter(folder, vocab_size, boundaries=check.facts.boundaries, order=inverse(order))
    with naming(folder, needed), ThreadPoolExecutor(threads) as ahead, writer:
        left = iter(spans)
        coming = deque(ahead.submit(block, span) for span in itertools.islice(left, threads + 1))
        while coming:
            seen, looked, memory = coming.popleft().result()
            coming.extend(ahead.submit(block, span) for span in itertools.islice(left, 1))
            check.add(seen)
            writer.append(looked)
            unused.put(memory)
            progress.add(seen.tokens, seen.tokens)
    return SplitSize(writer.documents, writer.tokens, writer.labels), writer.hashes


def by_place(documents: Documents) -> NDArray[np.int64]:
    """The documents in the order in which they are written: file by file, forwards; second copies behind all first ones."""
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
    """Documents [first, stop) that one read brings: near each other, forwards in one file, and READ_TOKENS at most or one document."""
    end = start + length
    apart = np.diff(file) != 0
    apart |= (start[1:] < end[:-1]) | (start[1:] - end[:-1] > GAP_TOKENS)
    for first, stop in itertools.pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(file)]):
        while first < stop:
            most = int(np.searchsorted(end[first:stop], start[first] + READ_TOKENS, side="right"))
            yield first, first + max(1, most)
            first += max(1, most)


def inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each number stands in a permutation."""
    found = np.empty_like(order)
    found[order] = np.arange(len(order))
    return found
