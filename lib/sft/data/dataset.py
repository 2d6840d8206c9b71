"""A tokenised dataset on disk: writing it in parts, reading it memory-mapped.

In:  token ids, label mask and lengths of whole documents (`DatasetWriter.add`, many documents a call).
Out: a folder that OLMo-core's readers accept, and one file more that says where documents are without scanning for EOS:

    token_ids_part_0000.npy     raw little-endian ids, the smallest unsigned dtype that holds vocab_size - 1, no header
    labels_mask_part_0000.npy   raw bool, one byte a token; True = this token is a target
    token_ids_part_0000.csv.gz  "start,end" of every document, tiling the part
    documents.npy               a real .npy of `DOCUMENT`: where each document lies; their numbers need not follow their places

Documents that have EOS inside (boundaries = "index") go to indexed_ids_part_0000.npy and indexed_mask_part_0000.npy, without
a csv.gz: OLMo-core looks for EOS to find documents and would take them apart, so it must not find these files by its names.

A part is cut on a document boundary only. Every file is written under a temporary name, synced, then renamed (sft.common.direct_io);
documents.npy comes last, so a folder without it is not a dataset. The bytes depend on the documents alone.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sft.common.direct_io import BulkFile
from sft.common.errors import SftError
from sft.common.files import sync_folder
from sft.data.compiled import DIGITS, write_bounds
from sft.data.mix import scramble

DOCUMENT = np.dtype([("part", "<u4"), ("start", "<u8"), ("length", "<u4"), ("labels", "<u4"), ("source", "<u2")])
PART_TOKENS = 1 << 28  # 1 GiB of uint32 ids: few files, and small enough to copy again after an error
MAX_PARTS = 10_000  # readers sort names as text, so the part number must keep its four digits


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned dtype that holds every id of a vocabulary; readers derive it the same way."""
    for name in ("<u1", "<u2", "<u4", "<u8"):
        if vocab_size - 1 <= np.iinfo(np.dtype(name)).max:
            return np.dtype(name)
    raise SftError(f"vocab_size {vocab_size} does not fit 64 bits")


def trained_runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each run of trained tokens begins, and where it ends (exclusive). There are few of them, so this is cheap."""
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    edges = np.concatenate([[0] if mask[:1].any() else [], edges, [len(mask)] if mask[-1:].any() else []])
    edges = edges.astype(np.int64)
    return edges[::2], edges[1::2]


def trained_counts(mask: NDArray[np.bool_], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The trained tokens of each document; `ends` says where each ends."""
    begins, stops = trained_runs(mask)
    upto = np.searchsorted(begins, ends)  # runs that begin before each end
    total = np.concatenate([[0], np.cumsum(stops - begins)])[upto]
    beyond = np.concatenate([[0], stops])[upto] - ends  # what a run has behind the end of its document
    return np.diff(total - np.maximum(beyond, 0), prepend=0)


def ids_name(part: int, boundaries: str = "eos") -> str:
    return f"{'token' if boundaries == 'eos' else 'indexed'}_ids_part_{part:04d}.npy"


def mask_name(part: int, boundaries: str = "eos") -> str:
    return f"{'labels' if boundaries == 'eos' else 'indexed'}_mask_part_{part:04d}.npy"


def bounds_name(part: int) -> str:
    return f"token_ids_part_{part:04d}.csv.gz"


@dataclass(frozen=True)
class Looked:
    """Documents with which nothing is wrong, one after another, and their DOCUMENT records, less the place."""

    ids: NDArray[Any]
    mask: NDArray[np.bool_]
    rows: NDArray[Any]


class DatasetWriter:
    """Writes documents into a folder. Use as a context manager: an exception leaves no documents.npy behind."""

    def __init__(
        self,
        folder: Path | str,
        vocab_size: int,
        part_tokens: int = PART_TOKENS,
        boundaries: str = "eos",
        order: NDArray[np.int64] | None = None,
    ) -> None:
        """documents.npy lists the documents as they are added, or the added documents `order`, each once."""
        if vocab_size < 1 or part_tokens < 1:
            raise SftError(f"{folder}: vocab_size {vocab_size} and part_tokens {part_tokens} must be positive")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vocab_size, self.part_tokens, self.dtype = vocab_size, part_tokens, token_dtype(vocab_size)
        self.boundaries, self.order = boundaries, order
        self.documents = self.tokens = self.labels = 0
        self._rows: list[NDArray[Any]] = []  # DOCUMENT records, one array a call
        self._part, self._part_used = -1, 0
        self._part_rows: list[NDArray[Any]] = []
        self._ids: BulkFile | None = None
        self._mask: BulkFile | None = None
        self._closing: list[Future[None]] = []  # the files of the part before
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="close")
        self.hashes: dict[str, str] = {}
        """sha256 of each finished file, by its name."""

    def add(self, ids: ArrayLike, mask: ArrayLike, lengths: ArrayLike, source: int | ArrayLike = 0) -> None:
        """Appends documents: `ids` and `mask` hold them one after another, `lengths` says where each ends.

        `source` is the number of the mix's source, one for all or one per document.
        """
        ids, lengths = np.asarray(ids), np.asarray(lengths, dtype=np.int64)
        mask = np.asarray(mask, dtype=np.bool_)
        self.append(self.look(ids, mask, lengths, source, trained_counts(mask, np.cumsum(lengths)), self.documents))

    def look(
        self, ids: NDArray[Any], mask: NDArray[np.bool_], lengths: NDArray[np.int64], source: int | ArrayLike, labels: NDArray[np.int64],
        first: int,
    ) -> Looked:  # fmt: skip
        """Finds nothing wrong with documents, the first of which is number `first`. May run in many threads, ahead of `append`."""
        self._check(ids, mask, lengths, first)
        starts = np.cumsum(lengths) - lengths
        if mask[starts].any():
            bad = int(np.flatnonzero(mask[starts])[0])
            raise SftError(
                f"{self.folder}: document {first + bad}: its first token is a target; nothing precedes it to predict it from"
            )
        rows = np.empty(len(lengths), dtype=DOCUMENT)
        rows["length"], rows["source"], rows["labels"] = lengths, source, labels
        return Looked(np.ascontiguousarray(ids, dtype=self.dtype), np.ascontiguousarray(mask), rows)

    def append(self, looked: Looked) -> None:
        """Writes what was looked at; the order of these calls is the order of documents."""
        ids, mask, rows = looked.ids, looked.mask, looked.rows
        lengths = rows["length"].astype(np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        first = 0
        while first < len(lengths):
            room = self.part_tokens - self._part_used
            last = int(np.searchsorted(ends, starts[first] + room, side="right"))
            if self._part < 0 or (last <= first and self._part_used):
                self._next_part()
                continue
            last = max(last, first + 1)  # a document longer than a part has a part of its own
            self._append(ids, mask, rows, int(starts[first]), int(ends[last - 1]), slice(first, last))
            first = last

    def _check(self, ids: NDArray[Any], mask: NDArray[Any], lengths: NDArray[np.int64], first: int) -> None:
        total = int(lengths.sum())
        if len(ids) != total or len(mask) != total:
            raise SftError(
                f"{self.folder}: {len(ids)} ids and {len(mask)} mask entries for lengths that add up to {total}"
            )
        if len(lengths) and (lengths < 1).any():
            raise SftError(f"{self.folder}: document {first + int(np.argmin(lengths))} is empty")
        if len(lengths) and int(lengths.max()) >= 1 << 31:
            raise SftError(
                f"{self.folder}: document {first + int(np.argmax(lengths))} has {lengths.max()} tokens, more than 2^31"
            )
        if total and (int(ids.max()) >= self.vocab_size or int(ids.min()) < 0):
            raise SftError(f"{self.folder}: ids from {ids.min()} to {ids.max()} for a vocabulary of {self.vocab_size}")

    def _append(
        self, ids: NDArray[Any], mask: NDArray[Any], rows: NDArray[Any], start: int, end: int, which: slice
    ) -> None:
        assert self._ids is not None and self._mask is not None
        self._ids.write(ids[start:end])
        self._mask.write(mask[start:end])
        part = rows[which]
        lengths = part["length"].astype(np.int64)
        part["part"], part["start"] = self._part, self._part_used + np.cumsum(lengths) - lengths
        self._rows.append(part)
        self._part_rows.append(part)
        self._part_used += end - start
        self.documents += len(part)
        self.tokens += end - start
        self.labels += int(part["labels"].sum(dtype=np.int64))

    def _next_part(self) -> None:
        self._finish_part()
        self._part, self._part_used = self._part + 1, 0
        if self._part >= MAX_PARTS:
            raise SftError(f"{self.folder}: more than {MAX_PARTS} parts of {self.part_tokens} tokens; use larger parts")
        self._ids = BulkFile(self.folder / ids_name(self._part, self.boundaries))
        self._mask = BulkFile(self.folder / mask_name(self._part, self.boundaries))

    def _finish_part(self) -> None:
        """Hands the part over to the disk, and waits for the one before."""
        if self._ids is None or self._mask is None:
            return
        self._wait()
        self._closing = [self._pool.submit(self._finish, file) for file in (self._ids, self._mask)]
        if self.boundaries == "eos":
            name = bounds_name(self._part)
            self._closing.append(self._pool.submit(self._write_bounds, self.folder / name, self._part_rows))
        self._ids = self._mask = None
        self._part_rows = []

    def _wait(self) -> None:
        for file in self._closing:
            file.result()
        self._closing = []

    def _finish(self, file: BulkFile) -> None:
        self.hashes[file.path.name] = file.close()

    def _write_bounds(self, path: Path, parts: list[NDArray[Any]]) -> None:
        packed = io.BytesIO()
        # No name and no time in the gzip header: the same documents give the same bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=1, mtime=0) as csv:
            for rows in parts:
                text = np.empty(2 * DIGITS * len(rows), dtype=np.uint8)
                csv.write(text[: write_bounds(rows["start"], rows["length"], text)].data)
        file = BulkFile(path)
        file.write(packed.getvalue())
        self._finish(file)

    def close(self) -> None:
        """Finishes the last part and writes documents.npy, which makes the folder a dataset."""
        self._finish_part()
        self._wait()
        self._pool.shutdown()
        file = BulkFile(self.folder / "documents.npy")
        header = io.BytesIO()
        described = {
            "descr": np.lib.format.dtype_to_descr(DOCUMENT),
            "fortran_order": False,
            "shape": (self.documents,),
        }
        np.lib.format.write_array_header_1_0(header, described)
        file.write(header.getvalue())
        rows = np.concatenate([np.empty(0, dtype=DOCUMENT), *self._rows])
        file.write(rows if self.order is None else np.take(rows, self.order))
        self._finish(file)
        sync_folder(self.folder)
        self._rows = []

    def abort(self) -> None:
        """Removes the temporary files of an unfinished part; finished parts stay for the caller to judge."""
        self._pool.shutdown()
        for file in (self._ids, self._mask):
            if file is not None:
                file.abort()
        self._ids = self._mask = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


@dataclass(frozen=True)
class Dataset:
    """A dataset folder, memory-mapped: `documents` says where document i is in `ids(part)` and `mask(part)`."""

    folder: Path
    documents: NDArray[Any]  # DOCUMENT
    dtype: np.dtype[Any]
    _ids: tuple[NDArray[Any], ...]
    _masks: tuple[NDArray[np.bool_], ...]

    @classmethod
    def open(cls, folder: Path | str) -> Dataset:
        """Maps a folder and checks that its files agree: sizes, tiling. Reads no token."""
        folder = Path(folder)
        path = folder / "documents.npy"
        try:
            documents = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise SftError(f"{path}: cannot be read ({error}); run make prepare again") from None
        if documents.dtype != DOCUMENT:
            raise SftError(f"{path}: has fields {documents.dtype}, not {DOCUMENT}; run make prepare again")
        parts = sorted(folder.glob("*_ids_part_*.npy"))
        masks = sorted(folder.glob("*_mask_part_*.npy"))
        boundaries = "index" if parts and parts[0].name == ids_name(0, "index") else "eos"
        names = [[name(i, boundaries) for i in range(len(parts))] for name in (ids_name, mask_name)]
        if [[p.name for p in parts], [p.name for p in masks]] != names:
            raise SftError(
                f"{folder}: {len(parts)} token files and {len(masks)} mask files are not a whole set; copy it again"
            )
        sizes = [mask.stat().st_size for mask in masks]
        widths = {path.stat().st_size / size for path, size in zip(parts, sizes, strict=True) if size}
        width = widths.pop() if widths else 4
        if widths or width not in (1, 2, 4, 8):
            raise SftError(
                f"{folder}: token and mask files disagree in size ({sorted(widths | {width})} bytes a token); copy it again"
            )
        _check_tiling(path, documents, sizes)
        dtype = np.dtype(f"<u{int(width)}")
        return cls(
            folder,
            documents,
            dtype,
            tuple(np.asarray(np.memmap(path, dtype=dtype, mode="r")) for path in parts),
            tuple(np.asarray(np.memmap(path, dtype=np.bool_, mode="r")) for path in masks),
        )

    @property
    def parts(self) -> int:
        return len(self._ids)

    @property
    def tokens(self) -> int:
        return int(self.documents["length"].sum(dtype=np.int64))

    @property
    def labels(self) -> int:
        return int(self.documents["labels"].sum(dtype=np.int64))

    def ids(self, part: int) -> NDArray[Any]:
        return self._ids[part]

    def mask(self, part: int) -> NDArray[np.bool_]:
        return self._masks[part]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, document: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Ids and mask of one document, without copying."""
        row = self.documents[document]
        where = slice(int(row["start"]), int(row["start"]) + int(row["length"]))
        return self._ids[int(row["part"])][where], self._masks[int(row["part"])][where]

    def __iter__(self) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        return (self[i] for i in range(len(self)))


def _check_tiling(path: Path, documents: NDArray[Any], sizes: list[int]) -> None:
    """Every part must be covered by its documents, without gaps or overlaps: a torn copy fails here and not in training."""
    part, start = documents["part"].astype(np.uint64) << np.uint64(40), documents["start"].astype(np.uint64)
    length, held = documents["length"].astype(np.uint64), np.array(sizes, dtype=np.uint64)
    parts = np.arange(len(sizes), dtype=np.uint64) << np.uint64(40)
    # Documents of some length lead from their start to their end. They tile the parts when every place is reached as often as it is
    # left, but for where a part begins and ends: then they make one way through each, and no two ways share a part.
    left = np.concatenate([part | start, parts | held])
    reached = np.concatenate([part | (start + length), parts])
    if not length.all() or (start + length > np.uint64(1) << np.uint64(40)).any() or not _same_places(left, reached):
        raise SftError(
            f"{path}: its documents do not cover the {len(sizes)} parts of {sizes[:4]} tokens, each token once; copy the dataset again or run"
            " make prepare"
        )
    if (documents["labels"] > documents["length"]).any():
        raise SftError(f"{path}: has a document with more labels than tokens; run make prepare again")


def _same_places(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> bool:
    """Whether both hold the same numbers, each as often: by the sum of 64-bit hashes, as sorting millions takes seconds."""
    return len(a) == len(b) and scramble(a).sum() == scramble(b).sum()
