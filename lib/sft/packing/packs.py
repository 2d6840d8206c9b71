"""Documents to packs: which pieces of which documents share a sequence. Pure functions on lengths; NumPy only.

In:  the documents of a `sft.data.dataset.Dataset`, the sequence length, what to do with longer documents.
Out: a `PackIndex`: for every pack its pieces (document, start, length, labels). No token is copied or read, but for the
     masks of documents that are cut, whose labels have to be counted again.

Packing is best-fit decreasing: documents from long to short, each into the open pack that it leaves fullest. The state
that decides where a document goes is only how many packs have how much room, so all documents of one length move at
once: `_place` walks the distinct lengths, and NumPy does what is proportional to the number of documents. The number
of packs is that of the one-at-a-time algorithm (arXiv 2404.10830), which differs only in the choice among equal packs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from sft.common.errors import SftError
from sft.common.files import sync_folder
from sft.data.dataset import Dataset
from sft.formats.packs import PackHeader, PackingLosses

PIECE = np.dtype([("document", "<u4"), ("start", "<u4"), ("length", "<u4"), ("labels", "<u4")])
POLICIES = ("truncate", "drop", "split")

# (documents, starts, stops) -> trained tokens in [start, stop) of each document
LabelCounter = Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], NDArray[np.int64]]


@dataclass(frozen=True)
class PackIndex:
    """Pack p holds pieces[offsets[p]:offsets[p + 1]], long to short."""

    seq_len: int
    policy: str
    offsets: NDArray[np.int64]  # [packs + 1]
    pieces: NDArray[Any]  # PIECE
    losses: PackingLosses
    digest: str  # sha256 of all of the above: two runs with equal digests pack the same tokens

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, number: int) -> NDArray[Any]:
        return self.pieces[self.offsets[number] : self.offsets[number + 1]]

    def sums(self, field: str) -> NDArray[np.int64]:
        """The sum of a field of the pieces, per pack."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(self.pieces[field], self.offsets[:-1], dtype=np.int64)

    def save(self, folder: Path | str) -> None:
        """Writes the index as a folder of that name, whole or not at all."""
        folder = Path(folder)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        header = PackHeader(self.seq_len, self.policy, self.digest, self.losses)
        for name, write in (
            ("offsets.npy", lambda file: np.save(file, self.offsets)),
            ("pieces.npy", lambda file: np.save(file, self.pieces)),
            ("index.json", lambda file: file.write(header.to_bytes())),
        ):
            with (partial / name).open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(partial)
        try:
            partial.rename(folder)
        except OSError:
            # Somebody else was first: equal inputs give equal bytes, so theirs is as good.
            shutil.rmtree(partial)
            if not (folder / "index.json").is_file():
                raise
        sync_folder(folder.parent)

    @classmethod
    def load(cls, folder: Path | str) -> PackIndex:
        """Maps a saved index and checks it against its digest."""
        folder = Path(folder)
        try:
            header = PackHeader.read(folder / "index.json")
            offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
            pieces = np.load(folder / "pieces.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise SftError(f"{folder}: not a pack index ({error}); delete it, and it is made again") from None
        digest = _digest(header.seq_len, header.policy, offsets, pieces, header.losses)
        if digest != header.digest:
            raise SftError(
                f"{folder}: content {digest[:12]} is not the recorded {header.digest[:12]}; delete it, and it is made again"
            )
        return cls(header.seq_len, header.policy, offsets, pieces, header.losses, digest)


def pack_dataset(
    dataset: Dataset, seq_len: int, policy: str = "truncate", cache: Path | None = None, identity: str = ""
) -> PackIndex:
    """The packs of a dataset.

    With `cache`, a folder, an index made before from the same documents is reused. `identity` is what the content of
    the masks is known by, such as the digest of prepare's manifest; without it nothing is reused, because labels of cut
    documents depend on the masks.
    """
    folder = None
    if cache is not None and identity:
        key = xxhash.xxh3_128(f"{PIECE.descr} {seq_len} {policy} {identity} ".encode())
        key.update(np.ascontiguousarray(dataset.documents).data)
        folder = Path(cache) / f"packs-{key.hexdigest()[:20]}"
        if folder.is_dir():
            try:
                return PackIndex.load(folder)
            except SftError:  # damaged: made again below
                shutil.rmtree(folder, ignore_errors=True)
    index = pack_documents(dataset.documents, seq_len, policy, label_counter(dataset))
    if folder is not None:
        index.save(folder)
    return index


def pack_documents(
    documents: NDArray[Any], seq_len: int, policy: str = "truncate", count_labels: LabelCounter | None = None
) -> PackIndex:
    """The packs of a table of documents (`sft.data.dataset.DOCUMENT`).

    Without `count_labels` (no masks at hand, as on a login node) labels of cut documents are estimated.
    """
    cut_pieces, losses = cut(documents, seq_len, policy, count_labels)
    offsets, order = pack(cut_pieces.length, seq_len)
    # A PIECE as two halves of 8 bytes, because each gather of a million pieces costs as much as all sorting.
    halves = np.empty((len(order), 2), dtype="<u8")
    halves[:, 0] = order if cut_pieces.where is None else cut_pieces.where[order]
    halves[:, 1] = (cut_pieces.length | cut_pieces.labels.astype("<u8") << np.uint64(32))[order]
    pieces = halves.view(PIECE).reshape(-1)
    return PackIndex(seq_len, policy, offsets, pieces, losses, _digest(seq_len, policy, offsets, pieces, losses))


class Pieces(NamedTuple):
    """Pieces in the order of the documents. `where` is document + start * 2^32; None where piece i starts document i."""

    where: NDArray[np.uint64] | None
    length: NDArray[Any]
    labels: NDArray[Any]


def cut(
    documents: NDArray[Any], seq_len: int, policy: str, count_labels: LabelCounter | None = None
) -> tuple[Pieces, PackingLosses]:
    """Documents to pieces of at most `seq_len` tokens that hold at least one trained token each.

    truncate: the head stays, and its last token becomes EOS, which is not trained: the document did not end there.
    drop:     documents longer than `seq_len` are left out.
    split:    pieces of `seq_len` tokens, the last one shorter. The first token of a piece has no context, so it is
              never a target.
    """
    if policy not in POLICIES:
        raise SftError(f"long_documents: '{policy}' is not one of {', '.join(POLICIES)}")
    if seq_len < 2:
        raise SftError(f"seq_len {seq_len}: a pack of fewer than 2 tokens trains nothing")
    if len(documents) >= 1 << 32:
        raise SftError(f"{len(documents)} documents are more than the 2^32 that an index can number")
    lengths, labels = np.array(documents["length"]), np.array(documents["labels"])
    tokens_before, labels_before = int(lengths.sum(dtype=np.int64)), int(labels.sum(dtype=np.int64))
    long = np.flatnonzero(lengths > seq_len)
    if policy == "split" and len(long):
        counts = -(-lengths.astype(np.int64) // seq_len)
        which = np.repeat(np.arange(len(lengths)), counts)
        starts = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
        where = (which + (starts << 32)).astype("<u8")
        pieces = Pieces(where, np.minimum(lengths[which] - starts, seq_len).astype("<u4"), labels[which])
        was_cut = np.flatnonzero(counts[which] > 1)
        stops = starts[was_cut] + pieces.length[was_cut]
        pieces.labels[was_cut] = _labels(documents, which[was_cut], starts[was_cut] + 1, stops, count_labels)
    else:
        if policy == "truncate" and len(long):
            lengths[long] = seq_len
            stops = np.full(len(long), seq_len - 1)
            labels[long] = _labels(documents, long, np.zeros(len(long), np.int64), stops, count_labels)
        pieces = Pieces(None, lengths, labels)
    kept = pieces.labels > 0
    if policy == "drop":
        kept &= pieces.length <= seq_len
    unlabelled = int(np.count_nonzero((pieces.labels == 0) & (pieces.length <= seq_len)))
    if not kept.all():
        where = np.flatnonzero(kept).astype("<u8") if pieces.where is None else pieces.where[kept]
        pieces = Pieces(where, pieces.length[kept], pieces.labels[kept])
    return pieces, PackingLosses(
        documents=len(documents),
        tokens=tokens_before,
        labels=labels_before,
        long_documents=len(long),
        pieces=len(pieces.length),
        unlabelled_pieces=unlabelled,
        tokens_lost=tokens_before - int(pieces.length.sum(dtype=np.int64)),
        labels_lost=labels_before - int(pieces.labels.sum(dtype=np.int64)),
        exact=count_labels is not None or policy == "drop" or not len(long),
    )


def _labels(
    documents: NDArray[Any], which: NDArray[Any], starts: NDArray[Any], stops: NDArray[Any], count: LabelCounter | None
) -> NDArray[np.int64]:
    if count is not None:
        return count(which, starts, stops)
    rows = documents[which]
    # A share of the document's own; at least one, so that an estimate never leaves a document out.
    return np.maximum(rows["labels"].astype(np.int64) * (stops - starts) // rows["length"], 1)


def label_counter(dataset: Dataset) -> LabelCounter:
    """Counts the trained tokens of spans of documents in the masks on disk."""

    def count(which: NDArray[Any], starts: NDArray[Any], stops: NDArray[Any]) -> NDArray[np.int64]:
        rows = dataset.documents[which]
        spans = zip(
            rows["part"].tolist(), (rows["start"] + starts).tolist(), (rows["start"] + stops).tolist(), strict=True
        )
        return np.fromiter(
            (np.count_nonzero(dataset.mask(p)[int(a) : int(b)]) for p, a, b in spans), np.int64, len(rows)
        )

    return count


def pack(lengths: ArrayLike, capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best-fit decreasing. Returns offsets [packs + 1] and order: pack p holds order[offsets[p]:offsets[p + 1]], long to
    short.

    Deterministic on every machine: equal lengths keep the order of the input, and all arithmetic is on integers.
    """
    lengths = np.asarray(lengths)
    count = len(lengths)
    if not count:
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise SftError(f"lengths from {lengths.min()} to {lengths.max()} do not fit packs of {capacity} tokens")
    first, width, each, packs = _place(np.bincount(lengths), capacity)
    # A visit is one pack taking `each` pieces of a length; a step is visits of the packs first … first + width - 1.
    # Visits are in the order of the pieces from long to short, and much fewer than pieces.
    pack_of = np.arange(int(width.sum())) + np.repeat(first - (np.cumsum(width) - width), width)
    took = np.repeat(each, width)
    # Visits pack by pack, then the pieces that each of them took.
    by_pack = _order(pack_of)
    begins, took = (np.cumsum(took) - took)[by_pack], took[by_pack]
    ends = np.cumsum(took)
    offsets = np.zeros(packs + 1, dtype=np.int64)
    offsets[1:] = ends[np.cumsum(np.bincount(pack_of)) - 1]
    taken = np.repeat(begins - (ends - took), took)
    taken += np.arange(count)
    return offsets, _order(capacity - lengths)[taken]


def _order(values: NDArray[Any]) -> NDArray[np.int64]:
    """Stable argsort of integers >= 0, 16 bits at a time, because NumPy's stable sort is a radix sort up to 16 bits."""
    order = np.argsort(values.astype(np.uint16), kind="stable")  # the cast keeps the low 16 bits
    shift = 16
    while int(values.max()) >> shift:
        order = order[np.argsort((values >> shift).astype(np.uint16)[order], kind="stable")]
        shift += 16
    return order


def _place(
    histogram: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
    """Best-fit decreasing on a histogram of lengths.

    Returns steps as arrays (first, width, each), in the order that pieces are taken from long to short: packs first to
    first + width - 1 take `each` pieces of the current length; and the number of packs.

    Lengths only fall, so a pack is in one of two places. `fitting` holds the ranges of packs (room, first, width) with
    room for the current length, the least room on top: a stack, because what comes to it always has less room than
    what is there. `narrow[r]` holds those whose room r is still too small; they move over when the length gets there.
    """
    steps: list[int] = []
    record = steps.extend
    fitting: list[tuple[int, int, int]] = []
    narrow: list[list[tuple[int, int, int]]] = [[] for _ in range(capacity)]
    packs, before = 0, capacity
    sizes = np.flatnonzero(histogram)[::-1]
    for length, left in zip(sizes.tolist(), histogram[sizes].tolist(), strict=True):
        for ranges in narrow[length:before][::-1]:
            if ranges:
                fitting += ranges
        before = length
        while left:
            room, first, there = fitting.pop() if fitting else (capacity, packs, 0)
            # A pack keeps being the best fit until no piece of this length fits any more, so it takes them all at once;
            # the last one may take fewer.
            each = room // length
            if each > left:
                each = left
            width = left // each
            if not there:  # nothing fits: open as many packs as it takes
                packs += width
            elif width < there:
                fitting.append((room, first + width, there - width))
            else:
                width = there
            record((first, width, each))
            left -= width * each
            room -= each * length
            if room >= length:
                fitting.append((room, first, width))
            elif room:
                narrow[room].append((room, first, width))
    first_, width_, each_ = np.fromiter(steps, np.int64, len(steps)).reshape(-1, 3).T
    return first_, width_, each_, packs


def _digest(seq_len: int, policy: str, offsets: NDArray[Any], pieces: NDArray[Any], losses: PackingLosses) -> str:
    digest = xxhash.xxh3_128(
        json.dumps([seq_len, policy, asdict(losses)]).encode()
    )  # against damage, not against people
    for array in (offsets, pieces):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
