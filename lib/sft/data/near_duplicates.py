"""Finds conversations that nearly repeat an earlier one, by MinHash over n-grams of words.

In:  the rows of each job (`SketchChunk`, in worker processes), then the sketches of all documents (`find`).
Out: for each document whether it nearly repeats an earlier one, how many do, by pairs of sources, and some of them. Where a row makes several
documents, the first of them is compared, and the others go with it.

Broder, "On the resemblance and containment of documents" (1997); bands as in Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", 3.4. Two documents that share a band of their sketches are compared by all of it: the share of equal values estimates the
Jaccard similarity of their n-grams. A document is compared with the first and with the previous document of each of its bands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.chat.rows import RowReader
from sft.common.strings import strings
from sft.data.chunks import ChunkJob, message_values
from sft.data.decontaminate import words
from sft.data.mix import U64, scramble
from sft.data.tokencache import read_index, read_summary
from sft.sources.small_files import read_job
from sft.sources.unpack import new_file

NGRAM = 5
"""Words of an n-gram. A shorter conversation is one n-gram."""
VALUES, BANDS = 64, 16
"""Values of a sketch, and the bands that they are cut into."""
SEED = 42
BLOCK = 1 << 16
"""Pairs of documents that are compared at a time."""
NOTHING = np.uint64(0)
"""The key of a document without a word, which repeats nothing."""


class SketchChunk:
    """Writes the sketches of a job's documents: <job>.npy [documents, VALUES]. They are zeros for all documents of a row but the first. Returns
    their number."""

    def __init__(self, cache: Path, tokens: Path, readers: Sequence[RowReader]) -> None:
        self.cache, self.tokens, self.readers = cache, tokens, readers
        self.word_hashes: dict[str, int] = {}

    def __call__(self, job: ChunkJob) -> int:
        summary = read_summary(self.tokens / job.name)
        assert summary is not None, job.name
        wanted = read_index(self.tokens / job.name, summary)["row"].tolist()
        made = np.zeros((len(wanted), VALUES), dtype=np.uint32)
        place = dict(zip(reversed(wanted), reversed(range(len(wanted))), strict=True))  # the first document of each row
        read = self.readers[job.source].read
        for block in read_job(job.chunks, []):
            batch = block.batch()
            chosen = [(place[n], row) for n, row in zip(batch.numbers, batch.rows, strict=True) if n in place]
            texts = ["\n".join(strings(message_values(read, row))) for _, row in chosen]
            made[[at for at, _ in chosen]] = sketches([self.grams(text) for text in texts])
        with new_file(self.cache / f"{job.name}.npy") as out:
            np.save(out, made)
        return len(wanted)

    def grams(self, text: str) -> U64:
        """The hashes of a text's n-grams."""
        known = self.word_hashes
        hashes = [
            known.get(word) or known.setdefault(word, xxhash.xxh3_64_intdigest(word.encode())) for word in words(text)
        ]
        if len(known) > 1 << 20:
            known.clear()
        values = np.array(hashes, dtype=np.uint64)
        size = min(NGRAM, len(values))
        total = np.zeros(len(values) - size + 1 if size else 0, dtype=np.uint64)
        for i in range(size):
            total = scramble(total ^ values[i : i + len(total)])
        return total


def sketches(grams: Sequence[U64]) -> NDArray[np.uint32]:
    """[documents, VALUES] The sketch of each list of n-grams; zeros for an empty one."""
    import rensa  # start-up: only recipes that look for near-duplicates need it

    full = [i for i, hashes in enumerate(grams) if len(hashes)]
    found = np.zeros((len(grams), VALUES), dtype=np.uint32)
    if full:
        ends = np.cumsum([0, *(len(grams[i]) for i in full)])
        joined = np.concatenate([grams[i] for i in full])
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(joined, ends, VALUES, SEED)
        found[full] = np.array(matrix.to_rows(), dtype=np.uint32)
    return found


@dataclass(frozen=True)
class Sketches:
    """The sketches of all documents, source after source and job after job. They are read from files when they are needed."""

    files: Sequence[Path]
    first: NDArray[np.int64]
    """[files + 1] The number of the first document of each file, then the number of all documents."""

    def band(self, number: int) -> U64:
        """[documents] The hash of a band of each sketch; NOTHING for a document without a word."""
        keys = np.empty(int(self.first[-1]), dtype=np.uint64)
        columns = slice(number * VALUES // BANDS, (number + 1) * VALUES // BANDS)
        for file, begin, end in zip(self.files, self.first[:-1], self.first[1:], strict=True):
            values = np.load(file, mmap_mode="r", allow_pickle=False)[:, columns].astype(np.uint64)
            total = np.zeros(len(values), dtype=np.uint64)
            for column in values.T:
                total = scramble(total ^ column)
            total[~values.any(axis=1)] = NOTHING
            keys[begin:end] = total
        return keys

    def similarity(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float64]:
        """The estimated Jaccard similarity of pairs of documents."""
        return np.asarray((self._of(one) == self._of(other)).mean(axis=1), dtype=np.float64)

    def _of(self, documents: NDArray[np.int64]) -> NDArray[np.uint32]:
        made = np.empty((len(documents), VALUES), dtype=np.uint32)
        file_of = np.searchsorted(self.first, documents, side="right") - 1
        for file in np.unique(file_of).tolist():
            here = file_of == file
            made[here] = np.load(self.files[file], mmap_mode="r", allow_pickle=False)[
                documents[here] - self.first[file]
            ]
        return made


def find(all_sketches: Sketches, threshold: float) -> NDArray[np.int64]:
    """[documents] The earlier document that each one nearly repeats, or -1. Independent of workers and jobs' order in time."""
    repeats = np.full(int(all_sketches.first[-1]), -1, dtype=np.int64)
    for number in range(BANDS):
        keys = all_sketches.band(number)
        order = np.argsort(keys, kind="stable")  # equal keys stay in the order of the documents
        ranked = keys[order]
        same = np.flatnonzero((ranked[1:] == ranked[:-1]) & (ranked[1:] != NOTHING)) + 1
        starts = np.maximum.accumulate(np.where(np.diff(ranked, prepend=~ranked[:1]) != 0, np.arange(len(ranked)), 0))
        for earlier in (order[starts[same]], order[same - 1]):
            pairs_left = np.stack([earlier, order[same]])[:, repeats[order[same]] < 0]
            for first in range(0, pairs_left.shape[1], BLOCK):
                one, other = pairs_left[:, first : first + BLOCK]
                similar = all_sketches.similarity(one, other) >= threshold
                repeats[other[similar]] = one[similar]
    return repeats


def spread(repeats: NDArray[np.int64], rows: NDArray[Any]) -> NDArray[np.int64]:
    """`repeats` of documents, with that of a row's first document for all of the row. `rows`: the row of each document, ascending."""
    return repeats[np.searchsorted(rows, rows)]


def examples(repeats: NDArray[np.int64], ends: Sequence[int], most: int) -> NDArray[np.int64]:
    """The first `most` later documents of each pair of sources."""
    later = np.flatnonzero(repeats >= 0)
    key = np.searchsorted(ends, repeats[later], side="right") * len(ends) + np.searchsorted(ends, later, side="right")
    return np.sort(np.concatenate([later[:0], *(later[key == pair][:most] for pair in np.unique(key))]))


def pairs(repeats: NDArray[np.int64], ends: Sequence[int]) -> dict[tuple[int, int], int]:
    """{(source of the earlier document, source of the later one): documents}. `ends`: where the documents of each source end."""
    later = np.flatnonzero(repeats >= 0)
    sources = [np.searchsorted(ends, documents, side="right").tolist() for documents in (repeats[later], later)]
    return dict(sorted(Counter(zip(*sources, strict=True)).items()))
