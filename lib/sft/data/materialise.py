"""Writes chosen documents from the token cache into a dataset and checks every token on its way.

In:  files of the token cache, and the order of the documents (sft.data.placement).
Out: the parts of the dataset, through `DatasetWriter`. Memory: a few blocks of tokens, and documents.npy.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.data.chunks import Progress, naming
from sft.data.compiled import GatheredBlock, gather
from sft.data.dataset import token_dtype
from sft.data.dataset_writer import DatasetWriter, DocumentBlock
from sft.data.placement import PlacedDocuments, Placement
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


def materialise(
    folder: Path,
    vocab_size: int,
    files: Sequence[Path],
    placement: Placement,
    check: TokenCheck,
    progress: Progress,
    threads: int,
) -> tuple[SplitSize, dict[str, str]]:
    """Writes the dataset and returns its size, and the sha256 (hex) of each file by name.

    Threads gather and check the next blocks while one is written. Raises SftError for a full disk, a damaged cache file, and
    documents that break the mask proof.
    """
    needed = placement.tokens * (token_dtype(vocab_size).itemsize + 1) + 32 * placement.documents
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise SftError(
            f"{folder}: needs {needed:,} bytes, {free:,} are free on that disk; next: free space and run it again"
        )
    largest = min(max(BLOCK_TOKENS, placement.longest), placement.tokens)
    # Buffers are used again: allocating and clearing them for each block would take longer than everything else.
    unused: SimpleQueue[Buffers] = SimpleQueue()
    for _ in range(threads + 2):
        read = np.empty(max(READ_TOKENS, placement.longest), dtype=np.uint32)
        unused.put(Buffers(np.empty(largest, dtype=np.uint32), np.empty(largest, dtype=np.bool_), read))
    writer = DatasetWriter(folder, vocab_size, boundaries=check.facts.boundaries, documents=placement.documents)
    make = _BlockMaker(files, writer, check, unused)
    with naming(folder, needed), ThreadPoolExecutor(threads) as ahead, writer:
        left = placement.batches(BLOCK_TOKENS)
        coming = deque(ahead.submit(make, batch) for batch in itertools.islice(left, threads + 1))
        while coming:
            counts, block, buffers = coming.popleft().result()
            coming.extend(ahead.submit(make, batch) for batch in itertools.islice(left, 1))
            check.add(counts)
            writer.append(block)
            unused.put(buffers)
            progress.add(counts.written.tokens, counts.written.tokens)
    return SplitSize(writer.num_documents, writer.num_tokens, writer.num_targets), writer.hashes


class _BlockMaker:
    """Gathers and validates a batch of documents. Thread-safe."""

    def __init__(
        self,
        files: Sequence[Path],
        writer: DatasetWriter,
        check: TokenCheck,
        unused: SimpleQueue[Buffers],
    ) -> None:
        self.writer, self.check, self.unused = writer, check, unused
        self.opened = functools.lru_cache(OPEN_FILES)(lambda number: TokenFile(files[number]))

    def __call__(self, batch: PlacedDocuments) -> tuple[BlockCounts, DocumentBlock, Buffers]:
        file, start, lengths = batch.file, batch.start, batch.length
        buffers, total = self.unused.get(), int(lengths.sum())
        made = GatheredBlock.of(start, lengths, buffers.ids[:total], buffers.loss_mask[:total])
        eos = np.uint32(self.check.facts.eos_id)
        for a, b in reads(file, start, lengths):
            begin, end = int(start[a]), int(start[b - 1] + lengths[b - 1])
            gather(self.opened(int(file[a])).tokens(begin, end, buffers.read), begin, a, b, eos, made)
        block = self.writer.validate(made.ids, made.loss_mask, lengths, batch.source, made.num_targets, batch.number)
        return self.check.count(made), block, buffers


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
