"""Writes chosen documents from the token cache into a dataset, in any order, every token checked on its way.

In: files of the token cache, and for every document of the new order which file it is in, where, and how long it is.
Out: the dataset's parts through `DatasetWriter`. Memory: two blocks of tokens a thread, and what the system keeps of mapped files.
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

import numpy as np
from numpy.typing import NDArray

from sft.data.chunks import Progress, naming
from sft.data.compiled import gather
from sft.data.dataset import DatasetWriter, Looked, token_dtype
from sft.data.describe import Check, Seen
from sft.data.tokencache import Summary, Tokens
from sft.errors import SftError

BLOCK_TOKENS = 1 << 19  # documents are gathered and written this many tokens at a time
OPEN_FILES = 256


@dataclass(frozen=True)
class Documents:
    """Documents in the order in which they are written; one entry a document."""

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
    length, ends = documents.length, np.cumsum(documents.length)
    needed = int(ends[-1]) * (token_dtype(vocab_size).itemsize + 1) + 32 * len(length)
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise SftError(
            f"{folder}: needs {needed:,} bytes, {free:,} are free on that disk; next: free space and run it again"
        )
    cuts = np.searchsorted(ends, np.arange(BLOCK_TOKENS, int(ends[-1]), BLOCK_TOKENS), side="right")
    spans = iter(list(itertools.pairwise(np.unique(np.concatenate([[0], cuts, [len(length)]])).tolist())))
    opened = functools.lru_cache(OPEN_FILES)(lambda number: Tokens.open(*files[number]).tokens)

    def block(span: tuple[int, int]) -> tuple[Seen, Looked]:
        here = slice(*span)
        lengths = length[here]
        total, count = int(lengths.sum()), len(lengths)
        ids, mask = np.empty(total, dtype=np.uint32), np.empty(total, dtype=np.bool_)
        found = (np.empty(count, np.int64), np.empty(count, np.bool_), *np.empty((2, count), np.uint32))
        puts, start, eos = np.cumsum(lengths) - lengths, documents.start[here], np.uint32(check.identity["eos_id"])
        for file, which in _by_file(documents.file[here], start):
            gather(opened(file), which, start, lengths, puts, eos, ids, mask, *found)
        return check.look(lengths, *found), writer.look(ids, mask, lengths, documents.source[here], found[0], span[0])

    writer = DatasetWriter(folder, vocab_size, boundaries=check.identity["boundaries"])
    with naming(folder, needed), ThreadPoolExecutor(threads) as ahead, writer:
        coming = deque(ahead.submit(block, span) for span in itertools.islice(spans, threads + 1))
        while coming:
            seen, looked = coming.popleft().result()
            coming.extend(ahead.submit(block, span) for span in itertools.islice(spans, 1))
            check.add(seen)
            writer.append(looked)
            progress.add(seen.tokens, seen.tokens)
    return {"documents": writer.documents, "tokens": writer.tokens, "labels": writer.labels}


def _by_file(file: NDArray[np.int64], start: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The documents of each file, once and forwards."""
    order = np.lexsort((start, file))
    numbers, begins = np.unique(file[order], return_index=True)
    return zip(numbers.tolist(), np.split(order, begins[1:]), strict=True)
