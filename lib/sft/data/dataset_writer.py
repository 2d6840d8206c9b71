"""Writes a tokenised dataset in parts. sft.data.dataset describes the files and reads them.

In:  token ids, loss mask and lengths of complete documents (`DatasetWriter.add`, many documents a call).
Out: the folder of the dataset.

A part ends on a document boundary. Every file is written under a temporary name, synced and renamed
(sft.common.direct_io). documents.npy comes last, so a folder without it is not a dataset. The bytes depend on the
documents alone.
"""

from __future__ import annotations

import gzip
import io
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sft.common.direct_io import DirectFile
from sft.common.errors import SftError
from sft.common.files import sync_folder
from sft.data.dataset import DOCUMENT, bounds_name, ids_name, mask_name, token_dtype, trained_counts

PART_TOKENS = 1 << 28  # 1 GiB of uint32 ids: few files, and small enough to copy again after an error
MAX_PARTS = 10_000  # readers sort names as text, so the part number must keep its four digits


@dataclass(frozen=True)
class DocumentBlock:
    """Valid documents, one after another, and their DOCUMENT records without `part` and `start`.

    `numbers`: the place of each in documents.npy.
    """

    ids: NDArray[Any]
    loss_mask: NDArray[np.bool_]
    rows: NDArray[Any]
    numbers: NDArray[np.int64]


@dataclass
class _Part:
    """The part that is being written: its files, the lengths of its documents, and how many tokens it has."""

    number: int
    ids: DirectFile
    loss_mask: DirectFile
    lengths: list[NDArray[np.uint32]] = field(default_factory=list)
    tokens: int = 0


class DatasetWriter:
    """Writes documents into a folder. Use it as a context manager: an exception leaves no documents.npy behind.

    `num_documents`, `num_tokens` and `num_targets` count what was written. `hashes` has the sha256 (hex) of each finished
    file by its name.
    """

    def __init__(
        self,
        folder: Path | str,
        vocab_size: int,
        part_tokens: int = PART_TOKENS,
        boundaries: str = "eos",
        documents: int = 0,
    ) -> None:
        """`documents`: how many there will be, as far as that is known; the memory for their records is made once."""
        if vocab_size < 1 or part_tokens < 1:
            raise SftError(f"{folder}: vocab_size {vocab_size} and part_tokens {part_tokens} must be positive")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vocab_size, self.part_tokens, self.dtype = vocab_size, part_tokens, token_dtype(vocab_size)
        self.boundaries = boundaries
        self.num_documents = self.num_tokens = self.num_targets = 0
        self.hashes: dict[str, str] = {}
        self._documents = np.empty(documents, dtype=DOCUMENT)
        self._part: _Part | None = None
        self._next_number = 0
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="close")
        self._closing: list[Future[None]] = []  # the files of the previous part

    def add(
        self,
        ids: ArrayLike,
        loss_mask: ArrayLike,
        lengths: ArrayLike,
        source: int | ArrayLike = 0,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        """Appends documents: `ids` and `loss_mask` hold them one after another, `lengths` has their lengths.

        `source` is the number of the mix's source, one for all or one per document. Raises SftError for invalid documents.
        """
        ids, lengths = np.asarray(ids), np.asarray(lengths, dtype=np.int64)
        loss_mask = np.asarray(loss_mask, dtype=np.bool_)
        num_targets = trained_counts(loss_mask, np.cumsum(lengths))
        if numbers is None:
            numbers = np.arange(self.num_documents, self.num_documents + len(lengths))
        self.append(self.validate(ids, loss_mask, lengths, source, num_targets, numbers))

    def validate(
        self,
        ids: NDArray[Any],
        loss_mask: NDArray[np.bool_],
        lengths: NDArray[np.int64],
        source: int | ArrayLike,
        num_targets: NDArray[np.int64],
        numbers: NDArray[np.int64],
    ) -> DocumentBlock:
        """Validates a block of documents. Thread-safe. Raises SftError."""
        self._check_ids(ids, loss_mask, lengths, numbers)
        starts = np.cumsum(lengths) - lengths
        if loss_mask[starts].any():
            bad = int(np.flatnonzero(loss_mask[starts])[0])
            raise SftError(
                f"{self.folder}: document {numbers[bad]}: its first token is a target, but no token precedes it to predict it"
            )
        rows = np.empty(len(lengths), dtype=DOCUMENT)
        rows["length"], rows["source"], rows["labels"] = lengths, source, num_targets
        return DocumentBlock(
            np.ascontiguousarray(ids, dtype=self.dtype), np.ascontiguousarray(loss_mask), rows, numbers
        )

    def _check_ids(
        self,
        ids: NDArray[Any],
        loss_mask: NDArray[np.bool_],
        lengths: NDArray[np.int64],
        numbers: NDArray[np.int64],
    ) -> None:
        total = int(lengths.sum())
        if len(ids) != total or len(loss_mask) != total:
            raise SftError(
                f"{self.folder}: {len(ids)} ids and {len(loss_mask)} mask entries for lengths that add up to {total}"
            )
        if len(lengths) and (lengths < 1).any():
            raise SftError(f"{self.folder}: document {numbers[np.argmin(lengths)]} is empty")
        if len(lengths) and int(lengths.max()) >= 1 << 31:
            raise SftError(
                f"{self.folder}: document {numbers[np.argmax(lengths)]} has {lengths.max()} tokens, more than 2^31"
            )
        if total and (int(ids.max()) >= self.vocab_size or int(ids.min()) < 0):
            raise SftError(f"{self.folder}: ids from {ids.min()} to {ids.max()} for a vocabulary of {self.vocab_size}")

    def append(self, block: DocumentBlock) -> None:
        """Writes valid documents. The order of these calls is the order of the documents in the parts."""
        lengths = block.rows["length"].astype(np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        first = 0
        while first < len(lengths):
            part = self._part or self._open_part()
            room = self.part_tokens - part.tokens
            last = int(np.searchsorted(ends, starts[first] + room, side="right"))
            if last <= first and part.tokens:
                self._close_part()
                continue
            last = max(last, first + 1)  # a document longer than a part has a part of its own
            tokens = slice(int(starts[first]), int(ends[last - 1]))
            part.ids.write(block.ids[tokens])
            part.loss_mask.write(block.loss_mask[tokens])
            self._record(part, block.rows[first:last], block.numbers[first:last])
            first = last

    def _record(self, part: _Part, rows: NDArray[Any], numbers: NDArray[np.int64]) -> None:
        """Notes where documents were written that were appended to the part."""
        ends = part.tokens + np.cumsum(rows["length"].astype(np.int64))
        rows["part"], rows["start"] = part.number, ends - rows["length"]
        if (most := int(numbers.max()) + 1) > len(self._documents):
            self._documents = np.resize(self._documents, max(most, 2 * len(self._documents)))
        self._documents[numbers] = rows
        part.lengths.append(rows["length"].copy())
        self.num_documents += len(rows)
        self.num_tokens += int(ends[-1]) - part.tokens
        self.num_targets += int(rows["labels"].sum(dtype=np.int64))
        part.tokens = int(ends[-1])

    def _open_part(self) -> _Part:
        number = self._next_number
        if number >= MAX_PARTS:
            raise SftError(f"{self.folder}: more than {MAX_PARTS} parts of {self.part_tokens} tokens; use larger parts")
        self._next_number += 1
        self._part = _Part(
            number,
            DirectFile(self.folder / ids_name(number, self.boundaries)),
            DirectFile(self.folder / mask_name(number, self.boundaries)),
        )
        return self._part

    def _close_part(self) -> None:
        """Closes the part's files in threads, after those of the previous part are closed."""
        part, self._part = self._part, None
        if part is None:
            return
        self._wait()
        self._closing = [self._pool.submit(self._close_file, file) for file in (part.ids, part.loss_mask)]
        if self.boundaries == "eos":
            path = self.folder / bounds_name(part.number)
            self._closing.append(self._pool.submit(self._write_bounds, path, part.lengths))

    def _wait(self) -> None:
        for future in self._closing:
            future.result()
        self._closing = []

    def _close_file(self, file: DirectFile) -> None:
        self.hashes[file.path.name] = file.close()

    def _write_bounds(self, path: Path, parts: list[NDArray[np.uint32]]) -> None:
        """Writes the csv.gz of a part: the start and end of every document."""
        import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and readers of a dataset do not need it
        from pyarrow.csv import WriteOptions, write_csv  # start-up: the same

        packed, file = io.BytesIO(), DirectFile(path)
        # No name and no time in the gzip header: the same documents give the same bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=1, mtime=0) as csv:
            end = 0
            for lengths in parts:
                ends = end + np.cumsum(lengths, dtype=np.int64)
                text = pa.BufferOutputStream()
                write_csv(pa.table({"start": ends - lengths, "end": ends}), text, WriteOptions(include_header=False))
                csv.write(text.getvalue())
                end = int(ends[-1])
                file.write(packed.getvalue())
                packed.seek(0)
                packed.truncate()
        file.write(packed.getvalue())
        self._close_file(file)

    def close(self) -> None:
        """Finishes the last part and writes documents.npy, which makes the folder a dataset."""
        self._close_part()
        self._wait()
        self._pool.shutdown()
        header = io.BytesIO()
        described = {
            "descr": np.lib.format.dtype_to_descr(DOCUMENT),
            "fortran_order": False,
            "shape": (self.num_documents,),
        }
        np.lib.format.write_array_header_1_0(header, described)
        file = DirectFile(self.folder / "documents.npy")
        file.write(header.getvalue())
        file.write(self._documents[: self.num_documents])
        self._close_file(file)
        sync_folder(self.folder)

    def abort(self) -> None:
        """Removes the temporary files of the unfinished part. Finished parts stay; the caller decides about them."""
        self._pool.shutdown()
        if self._part is not None:
            self._part.ids.abort()
            self._part.loss_mask.abort()
        self._part = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
