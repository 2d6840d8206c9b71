"""Writes chosen documents from the token cache into a dataset, every token checked on its way.

In: files of the token cache, and for every document which file it is in, where, and how long it is.
Out: the dataset's parts through `DatasetWriter`. Documents are numbered in the order that they are given in, which is random, but
lie in the parts as they lie in the files of the cache, one file after another: reading and writing go forwards, whatever the size. The
files follow each other in the order of their first documents, so that the sources are mixed inside each part. Memory: a few blocks of
tokens, and what the system keeps of mapped files.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from sft.data.chunks import Progress, naming
from sft.data.compiled import gather
from sft.data.dataset import DatasetWriter, Looked, token_dtype
from sft.data.describe import Check, Seen
from sft.data.tokencache import Summary, Tokens
from sft.errors import SftError

Halves = tuple[NDArray[np.uint32], NDArray[np.bool_]]
"""Ids and mask of a block."""
BLOCK_TOKENS = 1 << 19  # documents are gathered and written this many tokens at a time
OPEN_FILES = 256


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
    files: Sequence[tuple[Path, Summary]],
    documents: Documents,
    check: Check,
    progress: Progress,
    threads: int,
) -> dict[str, int]:
    """Threads gather and check the next blocks while one is written. Returns what was written."""
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
    opened = functools.lru_cache(OPEN_FILES)(lambda number: Tokens.open(*files[number]).tokens)
    # Blocks are used again: memory that the system has to find and clear for each would take longer than all else.
    free_blocks: SimpleQueue[Halves] = SimpleQueue()
    for _ in range(threads + 2):
        free_blocks.put((np.empty(largest, dtype=np.uint32), np.empty(largest, dtype=np.bool_)))

    def block(span: tuple[int, int]) -> tuple[Seen, Looked, Halves]:
        here = slice(*span)
        lengths, count = length[here], span[1] - span[0]
        halves, total = free_blocks.get(), int(lengths.sum())
        ids, mask = halves[0][:total], halves[1][:total]
        found = (np.empty(count, np.int64), np.empty(count, np.bool_), *np.empty((2, count), np.uint32))
        puts, eos = np.cumsum(lengths) - lengths, np.uint32(check.identity["eos_id"])
        edges = [0, *(np.flatnonzero(np.diff(file[here])) + 1).tolist(), count]
        for first, stop in itertools.pairwise(edges):
            tokens = opened(int(file[span[0] + first]))
            gather(tokens, first, stop, start[here], lengths, puts, eos, ids, mask, *found)
        looked = writer.look(ids, mask, lengths, source[here], found[0], span[0])
        return check.look(lengths, *found), looked, halves

    writer = DatasetWriter(folder, vocab_size, boundaries=check.identity["boundaries"], order=inverse(order))
    with naming(folder, needed), ThreadPoolExecutor(threads) as ahead, writer:
        left = iter(spans)
        coming = deque(ahead.submit(block, span) for span in itertools.islice(left, threads + 1))
        while coming:
            seen, looked, halves = coming.popleft().result()
            coming.extend(ahead.submit(block, span) for span in itertools.islice(left, 1))
            check.add(seen)
            writer.append(looked)
            free_blocks.put(halves)
            progress.add(seen.tokens, seen.tokens)
    return {"documents": writer.documents, "tokens": writer.tokens, "labels": writer.labels}


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


def inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each number stands in a permutation."""
    found = np.empty_like(order)
    found[order] = np.arange(len(order))
    return found
