"""A tokenised dataset on disk, read memory-mapped. sft.data.dataset_writer writes it.

In:  a folder that OLMo-core's readers accept, with one more file that locates documents without scanning for EOS:

    token_ids_part_0000.npy     raw little-endian ids, the smallest unsigned dtype that holds vocab_size - 1, no header
    labels_mask_part_0000.npy   the loss mask: raw bool, one byte per token; True = this token is a target
    token_ids_part_0000.csv.gz  "start,end" of every document; they tile the part
    documents.npy               a real .npy of `DOCUMENT`: the place of each document, in the order of training

Out: `Dataset`, with the ids and the loss mask of every document.

Documents with EOS inside (boundaries = "index") go to indexed_ids_part_0000.npy and indexed_mask_part_0000.npy, without
a csv.gz. OLMo-core ends a document at every EOS and would split them, so it must not find these files under its names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.data.mix import scramble

DOCUMENT = np.dtype([("part", "<u4"), ("start", "<u8"), ("length", "<u4"), ("labels", "<u4"), ("source", "<u2")])
"""The place of a document, in tokens. `labels` counts its trained tokens; `source` is the number of the mix's source."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned dtype that holds every id of a vocabulary. Readers derive it in the same way."""
    for name in ("<u1", "<u2", "<u4", "<u8"):
        if vocab_size - 1 <= np.iinfo(np.dtype(name)).max:
            return np.dtype(name)
    raise SftError(f"vocab_size {vocab_size} does not fit 64 bits")


def map_array(path: Path) -> NDArray[Any]:
    """Maps a .npy file with a list of numbers or records. Raises OSError, or ValueError for a damaged one: numpy parses the header as
    Python, and what then fails has many types."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 1:
        raise ValueError("it is no list of numbers")
    return found


def trained_runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The begin and the end (exclusive) of each run of trained tokens."""
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    edges = np.concatenate([[0] if mask[:1].any() else [], edges, [len(mask)] if mask[-1:].any() else []])
    edges = edges.astype(np.int64)
    return edges[::2], edges[1::2]


def trained_counts(mask: NDArray[np.bool_], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of trained tokens of each document. `ends` has the end of each; documents follow each other.

    It works on runs of trained tokens, of which there are few. A run may cross the end of a document.
    """
    begins, stops = trained_runs(mask)
    runs = np.searchsorted(begins, ends)  # the number of runs that begin before each end
    total = np.concatenate([[0], np.cumsum(stops - begins)])[runs]
    beyond = np.concatenate([[0], stops])[runs] - ends  # tokens of the last run that lie beyond the end
    return np.diff(total - np.maximum(beyond, 0), prepend=0)


def ids_name(part: int, boundaries: str = "eos") -> str:
    return f"{'token' if boundaries == 'eos' else 'indexed'}_ids_part_{part:04d}.npy"


def mask_name(part: int, boundaries: str = "eos") -> str:
    return f"{'labels' if boundaries == 'eos' else 'indexed'}_mask_part_{part:04d}.npy"


def bounds_name(part: int) -> str:
    return f"token_ids_part_{part:04d}.csv.gz"


@dataclass(frozen=True)
class Dataset:
    """A dataset folder, memory-mapped. `documents` locates document i in `ids[part]` and `loss_masks[part]`."""

    folder: Path
    documents: NDArray[Any]  # DOCUMENT
    dtype: np.dtype[Any]
    ids: tuple[NDArray[Any], ...]
    loss_masks: tuple[NDArray[np.bool_], ...]

    @classmethod
    def open(cls, folder: Path | str) -> Dataset:
        """Maps a folder and checks that its files agree in their sizes and that documents tile the parts. Reads no token.

        Raises SftError.
        """
        folder = Path(folder)
        path = folder / "documents.npy"
        try:
            documents = map_array(path)
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
                f"{folder}: {len(parts)} token files and {len(masks)} mask files are not a complete set; copy it again"
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

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, document: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Ids and loss mask of one document, without copying."""
        row = self.documents[document]
        where = slice(int(row["start"]), int(row["start"]) + int(row["length"]))
        return self.ids[int(row["part"])][where], self.loss_masks[int(row["part"])][where]

    def __iter__(self) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        return (self[i] for i in range(len(self)))


def _check_tiling(path: Path, documents: NDArray[Any], sizes: list[int]) -> None:
    """Raises SftError unless the documents cover every part without gaps and overlaps. It finds a torn copy before training.

    `sizes` are the tokens of the parts. Two lists of positions must be equal, apart from their order:

        starts of documents, and the ends of the parts       a part of 8 tokens with documents [0, 3) and [3, 8): 0 3, 8
        ends of documents, and position 0 of the parts                                                            3 8, 0

    Every document must start at the beginning of its part or where another one ends, and end at the end of its part or
    where another one starts. As no document is empty, this leaves one chain of documents through each part. A position is
    part * 2^40 + token.
    """
    part, start = documents["part"].astype(np.uint64) << np.uint64(40), documents["start"].astype(np.uint64)
    length, part_ends = documents["length"].astype(np.uint64), np.array(sizes, dtype=np.uint64)
    part_starts = np.arange(len(sizes), dtype=np.uint64) << np.uint64(40)
    starts = np.concatenate([part | start, part_starts | part_ends])
    ends = np.concatenate([part | (start + length), part_starts])
    too_far = (start + length > np.uint64(1) << np.uint64(40)).any() or (documents["part"] >= len(sizes)).any()
    if not length.all() or too_far or not _same_numbers(starts, ends):
        raise SftError(
            f"{path}: its documents do not cover the {len(sizes)} parts of {sizes[:4]} tokens, each token once; copy the dataset again or run"
            " make prepare"
        )
    if (documents["labels"] > documents["length"]).any():
        raise SftError(f"{path}: has a document with more trained tokens than tokens; run make prepare again")


def _same_numbers(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> bool:
    """Whether both arrays hold the same numbers in any order.

    Compares the sums of a 64-bit hash of each number. Different arrays have equal sums with a probability of 2^-64.
    Sorting both instead would take seconds for millions of documents.
    """
    return len(a) == len(b) and bool(scramble(a).sum() == scramble(b).sum())
