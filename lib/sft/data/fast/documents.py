"""Documents as text, as compiled code writes them: `PlainDocuments`, and the memory that is used again for every block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.data.batch import group_key, split_documents
from sft.data.compiled import WORD, words_of
from sft.data.fast.messages import CONTENT, END, ROLE_NAMES, START, Messages
from sft.data.fast.turns import DocumentArrays, Written, find_groups


class PlainDocuments(NamedTuple):
    """Documents as text: what `sft.data.batch.RenderedBatch` holds after `lay_out`, and the hash of each conversation."""

    data: bytes
    padded: NDArray[np.uint8]
    """`data`, with WORD bytes after its end."""
    rows: NDArray[np.int64]
    """[documents] The row of each."""
    first_run: NDArray[np.int64]
    """[documents + 1] The first run of each, then the number of all runs."""
    run_ends: NDArray[np.int64]
    """[runs] Where each run ends in `data`."""
    num_specials: NDArray[np.int64]
    """[documents] Special tokens that the template wrote."""
    hashes: NDArray[np.uint64]
    """[documents] The hash of each conversation, see `sft.data.batch.conversation_hashes`."""
    groups: NDArray[np.uint64]
    """[documents] The hash of its group."""
    answers_without_prefix: NDArray[np.int64]
    """[documents] Trained answers that do not begin with the generation prefix."""
    empty_answers: NDArray[np.int64]
    """[documents] Trained answers without text and calls."""

    @property
    def ends(self) -> NDArray[np.int64]:
        """[documents] Where each document ends in `data`."""
        ends: NDArray[np.int64] = self.run_ends[self.first_run[1:] - 1]
        return ends

    def without(self, documents: Sequence[int]) -> PlainDocuments:
        """The other documents."""
        keep = np.ones(len(self.rows), dtype=np.bool_)
        keep[list(documents)] = False
        runs = np.diff(self.first_run)
        rest: list[NDArray[Any]] = [values[keep] for values in self[5:]]
        lengths = np.diff(self.run_ends, prepend=0)[np.repeat(keep, runs)]
        data = b"".join(
            [text for text, kept in zip(split_documents(self.data, self.ends), keep.tolist(), strict=True) if kept]
        )
        return PlainDocuments(
            data,
            np.frombuffer(bytearray(data) + bytes(WORD), dtype=np.uint8),
            self.rows[keep],
            np.concatenate([[0], np.cumsum(runs[keep])]),
            np.cumsum(lengths),
            *rest,
        )


class Memory:
    """Memory for the documents of a block. Pages that are never written cost nothing."""

    def __init__(self) -> None:
        self.text = self.hashed = np.empty(0, dtype=np.uint8)
        self.run_ends = np.empty(0, dtype=np.int64)
        self.first_run = np.empty(1, dtype=np.int64)
        self.of_rows = np.empty((6, 0), dtype=np.int64)

    def reserve(self, size: int, runs: int, messages: Messages) -> DocumentArrays:
        """Room for documents of so many bytes and runs."""
        rows, count = len(messages.is_plain), int(messages.first[-1])
        contents = messages.spans[:count, CONTENT]
        hashed = int((contents[:, END] - contents[:, START]).sum()) + count * (max(map(len, ROLE_NAMES)) + 2)
        self.text, self.hashed = room(self.text, size + WORD), room(self.hashed, hashed + 2 * WORD)
        self.run_ends = room(self.run_ends, runs)
        if self.of_rows.shape[1] < rows:
            self.of_rows, self.first_run = np.empty((6, rows), dtype=np.int64), np.empty(rows + 1, dtype=np.int64)
        hashed_ends, document_rows, odd, *counts = self.of_rows
        self.arrays = DocumentArrays(
            words_of(self.text),
            words_of(self.hashed),
            hashed_ends,
            document_rows,
            odd,
            self.first_run,
            self.run_ends,
            *counts,
        )
        return self.arrays

    def documents(self, written: Written) -> PlainDocuments:
        """What was written, valid until the next call of `reserve`."""
        out, (documents, _, runs, size) = self.arrays, written
        ends = out.hashed_ends[:documents]
        starts, stops, changes = find_groups(self.hashed, ends, np.empty((3, documents), dtype=np.int64))
        groups = hashes(self.hashed, starts, stops)
        for document in np.flatnonzero(changes).tolist():
            text = self.hashed[starts[document] : stops[document]].tobytes()
            groups[document] = xxhash.xxh3_64_intdigest(group_key(text))
        return PlainDocuments(
            self.text[:size].tobytes(),
            self.text[: size + WORD],
            out.rows[:documents],
            out.first_run[: documents + 1],
            out.run_ends[:runs],
            out.num_specials[:documents],
            hashes(self.hashed, np.concatenate([[0], ends[:-1]]), ends),
            groups,
            out.answers_without_prefix[:documents],
            out.empty_answers[:documents],
        )


def hashes(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hash of each text in data."""
    texts = map(data.data.__getitem__, map(slice, starts.tolist(), ends.tolist()))
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), dtype=np.uint64, count=len(ends))


def room(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array, or a longer one of its kind without its content."""
    return array if len(array) >= size else np.empty((size, *array.shape[1:]), dtype=array.dtype)


NOTHING = np.zeros(0, dtype=np.int64)
NO_DOCUMENTS = PlainDocuments(
    b"",
    np.zeros(WORD, dtype=np.uint8),
    NOTHING,
    np.zeros(1, dtype=np.int64),
    NOTHING,
    NOTHING,
    NOTHING.astype(np.uint64),
    NOTHING.astype(np.uint64),
    NOTHING,
    NOTHING,
)
