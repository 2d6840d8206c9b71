"""Documents to packs: decides which segments of which documents share a sequence. Pure functions on lengths; NumPy only.

In:  the documents of a `sft.data.dataset.Dataset`, the sequence length, and the policy for longer documents.
Out: a `PackIndex`: the segments (document, start, length, labels) of every pack. No token is copied or read. Only the loss
     masks of documents that are cut are read, because their trained tokens have to be counted again.

Packing is best-fit decreasing: documents are placed from long to short, each into the open pack that it leaves fullest.
Only the number of packs with a given room decides where a document goes, so all documents of one length are placed at
once: `_best_fit` walks the distinct lengths, and NumPy does the work that grows with the number of documents. The number
of packs equals that of the one-at-a-time algorithm (arXiv 2404.10830). The two differ only in the choice among equal packs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from sft.common.errors import SftError
from sft.common.files import sync_folder
from sft.data.dataset import Dataset, map_array
from sft.formats.packs import PackHeader, PackingLosses
from sft.formats.record import to_json

SEGMENT = np.dtype([("document", "<u4"), ("start", "<u4"), ("length", "<u4"), ("labels", "<u4")])
"""A stretch of a document in a pack. `labels` is the number of its trained tokens."""
POLICIES = ("truncate", "drop", "split")
PACKING_VERSION = 1
"""Raise it when a change of code packs the same documents differently. Cached packs are then made again."""

TargetCounter = Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], NDArray[np.int64]]
"""(documents, starts, stops) -> the number of trained tokens in [start, stop) of each document."""


@dataclass(frozen=True)
class PackIndex:
    """Pack p holds segments[offsets[p]:offsets[p + 1]], from long to short."""

    seq_len: int
    policy: str
    offsets: NDArray[np.int64]  # [packs + 1]
    segments: NDArray[Any]  # SEGMENT
    losses: PackingLosses
    digest: str  # of all of the above: two runs with equal digests pack the same tokens

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, number: int) -> NDArray[Any]:
        """The segments of one pack."""
        return self.segments[self.offsets[number] : self.offsets[number + 1]]

    def sums(self, field: str) -> NDArray[np.int64]:
        """The sum of a field of the segments, per pack."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(self.segments[field], self.offsets[:-1], dtype=np.int64)

    def save(self, folder: Path | str) -> None:
        """Writes the index as a folder of that name. The folder appears when it is complete."""
        folder = Path(folder)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        header = PackHeader(self.seq_len, self.policy, self.digest, self.losses)
        for name, write in (
            ("offsets.npy", lambda file: np.save(file, self.offsets)),
            ("pieces.npy", lambda file: np.save(file, self.segments)),
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
            # Another process was first. Equal inputs give equal bytes, so its folder is as good.
            shutil.rmtree(partial)
            if not (folder / "index.json").is_file():
                raise
        sync_folder(folder.parent)

    @classmethod
    def load(cls, folder: Path | str) -> PackIndex:
        """Maps a saved index and checks it against its digest. Raises SftError for a damaged one."""
        folder = Path(folder)
        try:
            header = PackHeader.read(folder / "index.json")
            offsets = map_array(folder / "offsets.npy")
            segments = map_array(folder / "pieces.npy")
        except (OSError, ValueError) as error:
            raise SftError(f"{folder}: not a pack index ({error}); next: delete the folder and run it again") from None
        digest = _digest(header.seq_len, header.policy, offsets, segments, header.losses)
        if digest != header.digest:
            raise SftError(
                f"{folder}: the content has digest {digest[:12]}, index.json says {header.digest[:12]};"
                " next: delete the folder and run it again"
            )
        return cls(header.seq_len, header.policy, offsets, segments, header.losses, digest)


def pack_dataset(
    dataset: Dataset, seq_len: int, policy: str = "truncate", cache: Path | None = None, identity: str = ""
) -> PackIndex:
    """The packs of a dataset.

    With a folder `cache`, an index that was made from the same documents is reused. `identity` names the content of the
    loss masks, e.g. the digest of prepare's manifest. Without it nothing is reused, because the trained tokens of cut
    documents depend on the masks.
    """
    folder = None
    if cache is not None and identity:
        key = xxhash.xxh3_128(f"{PACKING_VERSION} {SEGMENT.descr} {seq_len} {policy} {identity} ".encode())
        key.update(np.ascontiguousarray(dataset.documents).data)
        folder = Path(cache) / f"packs-{key.hexdigest()[:20]}"
        if folder.is_dir():
            try:
                return PackIndex.load(folder)
            except SftError:  # damaged: packed again below
                shutil.rmtree(folder, ignore_errors=True)
    index = pack_documents(dataset.documents, seq_len, policy, target_counter(dataset))
    if folder is not None:
        index.save(folder)
    return index


def pack_documents(
    documents: NDArray[Any], seq_len: int, policy: str = "truncate", count_targets: TargetCounter | None = None
) -> PackIndex:
    """The packs of a table of documents (`sft.data.dataset.DOCUMENT`).

    Without `count_targets` (no masks on this machine, e.g. on a login node) the trained tokens of cut documents are
    estimated.
    """
    cut, losses = cut_documents(documents, seq_len, policy, count_targets)
    offsets, order = pack(cut.length, seq_len)
    # Each SEGMENT is built as two halves of 8 bytes: a gather of a million segments costs as much as all the sorting.
    halves = np.empty((len(order), 2), dtype="<u8")
    halves[:, 0] = order if cut.place is None else cut.place[order]
    halves[:, 1] = (cut.length | cut.num_targets.astype("<u8") << np.uint64(32))[order]
    segments = halves.view(SEGMENT).reshape(-1)
    digest = _digest(seq_len, policy, offsets, segments, losses)
    return PackIndex(seq_len, policy, offsets, segments, losses, digest)


class Segments(NamedTuple):
    """Segments in the order of their documents, as columns.

    `place` is document + start * 2^32, which has the bytes of SEGMENT's first two fields. It is None where segment i is
    the start of document i.
    """

    place: NDArray[np.uint64] | None
    length: NDArray[Any]
    num_targets: NDArray[Any]


def cut_documents(
    documents: NDArray[Any], seq_len: int, policy: str, count_targets: TargetCounter | None = None
) -> tuple[Segments, PackingLosses]:
    """Documents to segments of at most `seq_len` tokens with at least one trained token each.

    truncate: the head of a long document is used. Its last token becomes EOS, which is not trained, because the document
              did not end there.
    drop:     documents longer than `seq_len` are left out.
    split:    a long document becomes segments of `seq_len` tokens, the last one shorter. The first token of a segment has
              no context, so it is never a target.

    Raises SftError for an unknown policy, a `seq_len` below 2, and more documents than 2^32.
    """
    if policy not in POLICIES:
        raise SftError(f"long_documents: '{policy}' is not one of {', '.join(POLICIES)}")
    if seq_len < 2:
        raise SftError(f"seq_len {seq_len}: a pack of fewer than 2 tokens trains nothing")
    if len(documents) >= 1 << 32:
        raise SftError(f"{len(documents)} documents are more than the 2^32 that an index can number")
    lengths, num_targets = np.array(documents["length"]), np.array(documents["labels"])
    all_tokens, all_targets = int(lengths.sum(dtype=np.int64)), int(num_targets.sum(dtype=np.int64))
    long = np.flatnonzero(lengths > seq_len)
    if policy == "split" and len(long):
        segments = _split(documents, lengths, num_targets, seq_len, count_targets)
    else:
        if policy == "truncate" and len(long):
            lengths[long] = seq_len
            stops = np.full(len(long), seq_len - 1)
            num_targets[long] = _count(documents, long, np.zeros(len(long), np.int64), stops, count_targets)
        segments = Segments(None, lengths, num_targets)
    unlabelled = int(np.count_nonzero((segments.num_targets == 0) & (segments.length <= seq_len)))
    segments = _select(segments, (segments.num_targets > 0) & (segments.length <= seq_len))
    return segments, PackingLosses(
        documents=len(documents),
        tokens=all_tokens,
        labels=all_targets,
        long_documents=len(long),
        pieces=len(segments.length),
        unlabelled_pieces=unlabelled,
        tokens_lost=all_tokens - int(segments.length.sum(dtype=np.int64)),
        labels_lost=all_targets - int(segments.num_targets.sum(dtype=np.int64)),
        exact=count_targets is not None or policy == "drop" or not len(long),
        shortest=int(documents["length"].min()) if len(documents) and not len(segments.length) else None,
    )


def _split(
    documents: NDArray[Any],
    lengths: NDArray[Any],
    num_targets: NDArray[Any],
    seq_len: int,
    count_targets: TargetCounter | None,
) -> Segments:
    """Every document as segments of `seq_len` tokens, the last one shorter."""
    counts = -(-lengths.astype(np.int64) // seq_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    starts = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    place = (document + (starts << 32)).astype("<u8")
    segments = Segments(place, np.minimum(lengths[document] - starts, seq_len).astype("<u4"), num_targets[document])
    was_cut = np.flatnonzero(counts[document] > 1)
    stops = starts[was_cut] + segments.length[was_cut]
    # A segment's first token is no target, so counting begins at the second one.
    found = _count(documents, document[was_cut], starts[was_cut] + 1, stops, count_targets)
    segments.num_targets[was_cut] = found
    return segments


def _select(segments: Segments, chosen: NDArray[np.bool_]) -> Segments:
    if chosen.all():
        return segments
    place = np.flatnonzero(chosen).astype("<u8") if segments.place is None else segments.place[chosen]
    return Segments(place, segments.length[chosen], segments.num_targets[chosen])


def _count(
    documents: NDArray[Any], which: NDArray[Any], starts: NDArray[Any], stops: NDArray[Any], count: TargetCounter | None
) -> NDArray[np.int64]:
    """The trained tokens in [start, stop) of some documents, estimated where there is no counter."""
    if count is not None:
        return count(which, starts, stops)
    rows = documents[which]
    # The document's own share; at least one, so that an estimate never leaves a document out.
    estimate: NDArray[np.int64] = rows["labels"].astype(np.int64) * (stops - starts) // rows["length"]
    return np.maximum(estimate, 1)


def target_counter(dataset: Dataset) -> TargetCounter:
    """Counts the trained tokens of parts of documents in the loss masks on disk."""

    def count(which: NDArray[Any], starts: NDArray[Any], stops: NDArray[Any]) -> NDArray[np.int64]:
        rows = dataset.documents[which]
        spans = zip(
            rows["part"].tolist(), (rows["start"] + starts).tolist(), (rows["start"] + stops).tolist(), strict=True
        )
        return np.fromiter(
            (np.count_nonzero(dataset.loss_masks[p][int(a) : int(b)]) for p, a, b in spans), np.int64, len(rows)
        )

    return count


def pack(lengths: ArrayLike, capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packs segments of these lengths by best-fit decreasing.

    Returns offsets [packs + 1] and order [segments]: pack p holds the segments order[offsets[p]:offsets[p + 1]], from
    long to short. The result is the same on every machine: equal lengths keep the order of the input, and all
    arithmetic is on integers. Raises SftError for a length below 1 or above `capacity`.

    Example: lengths [3, 5, 2, 5, 3] and a capacity of 8.

        from long to short   segments 1, 3 (5 tokens), 0, 4 (3 tokens), 2 (2 tokens)
        placements           packs 0 to 1 take one segment each (the fives), packs 0 to 1 again (the threes), then pack 2
        visits by pack       pack 0: positions 0 and 2 of the sorted segments; pack 1: 1 and 3; pack 2: 4
        result               offsets [0, 2, 4, 5], order [1, 0, 3, 4, 2]
    """
    lengths = np.asarray(lengths)
    count = len(lengths)
    if not count:
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise SftError(f"lengths from {lengths.min()} to {lengths.max()} do not fit packs of {capacity} tokens")
    placed, packs = _best_fit(np.bincount(lengths), capacity)
    # One visit is one pack that takes segments of one length. A placement is a visit to each of its packs, so visits are
    # in the order of the segments from long to short. There are far fewer visits than segments.
    earlier = np.cumsum(placed.width) - placed.width
    pack_of = np.arange(int(placed.width.sum())) + np.repeat(placed.first - earlier, placed.width)
    taken = np.repeat(placed.each, placed.width)
    # Sort the visits by pack. `begins` is the first position of a visit among the sorted segments.
    by_pack = _argsort(pack_of)
    begins, taken = (np.cumsum(taken) - taken)[by_pack], taken[by_pack]
    ends = np.cumsum(taken)
    offsets = np.zeros(packs + 1, dtype=np.int64)
    offsets[1:] = ends[np.cumsum(np.bincount(pack_of)) - 1]
    positions = np.repeat(begins - (ends - taken), taken)
    positions += np.arange(count)
    return offsets, _argsort(capacity - lengths)[positions]


def _argsort(values: NDArray[Any]) -> NDArray[np.int64]:
    """Stable argsort of integers >= 0, by 16 bits at a time: NumPy's stable sort is a radix sort up to 16 bits."""
    order = np.argsort(values.astype(np.uint16), kind="stable")  # the cast keeps the low 16 bits
    shift = 16
    while int(values.max()) >> shift:
        order = order[np.argsort((values >> shift).astype(np.uint16)[order], kind="stable")]
        shift += 16
    return order


class Placements(NamedTuple):
    """Packs first to first + width - 1 take `each` segments of the current length. One entry of all three is one placement."""

    first: NDArray[np.int64]
    width: NDArray[np.int64]
    each: NDArray[np.int64]


def _best_fit(histogram: NDArray[np.int64], capacity: int) -> tuple[Placements, int]:
    """Best-fit decreasing on a histogram of lengths: the placements from long to short, and the number of packs.

    Ranges of packs with equal room move together. As lengths only fall, a range is in one of two places: `fitting` has
    the ranges with room for the current length, and `narrow[room]` those whose room is still too small. `fitting` is a
    stack with the least room on top: whatever is added to it has less room than everything in it.

    Example: one segment of 5 tokens, two of 3 and three of 2, with a capacity of 8.

        length 5   nothing fits: pack 0 opens and takes one            narrow[3] = [pack 0]
        length 3   pack 0 moves to `fitting` and takes one; it is full
                   nothing fits: pack 1 opens and takes one            fitting = [pack 1 with room 5]
        length 2   pack 1 takes two                                    narrow[1] = [pack 1]
                   nothing fits: pack 2 opens and takes one            narrow[6] = [pack 2]

        first [0, 0, 1, 1, 2], width [1, 1, 1, 1, 1], each [1, 1, 1, 2, 1]; 3 packs
    """
    placed: list[int] = []
    record = placed.extend
    fitting: list[tuple[int, int, int]] = []  # (room, first, width)
    narrow: list[list[tuple[int, int, int]]] = [[] for _ in range(capacity)]
    packs, longer = 0, capacity
    sizes = np.flatnonzero(histogram)[::-1]
    for length, left in zip(sizes.tolist(), histogram[sizes].tolist(), strict=True):
        for ranges in narrow[length:longer][::-1]:
            if ranges:
                fitting += ranges
        longer = length
        while left:
            room, first, available = fitting.pop() if fitting else (capacity, packs, 0)
            # A pack stays the best fit until no segment of this length fits any more, so it takes them all at once.
            # The last pack may take fewer.
            each = room // length
            if each > left:
                each = left
            width = left // each
            if not available:  # nothing fits: open as many packs as needed
                packs += width
            elif width < available:
                fitting.append((room, first + width, available - width))
            else:
                width = available
            record((first, width, each))
            left -= width * each
            room -= each * length
            if room >= length:
                fitting.append((room, first, width))
            elif room:
                narrow[room].append((room, first, width))
    columns = np.fromiter(placed, np.int64, len(placed)).reshape(-1, 3).T
    return Placements(*columns), packs


def _digest(seq_len: int, policy: str, offsets: NDArray[Any], segments: NDArray[Any], losses: PackingLosses) -> str:
    # A fast hash: it guards against damage, not against an attacker.
    digest = xxhash.xxh3_128(json.dumps([seq_len, policy, to_json(losses)]).encode())
    for array in (offsets, segments):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
