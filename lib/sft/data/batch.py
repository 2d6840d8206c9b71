"""A batch of rendered documents on its way to tokens: its text as one piece, and where runs end in it.

In: runs of text of each document, untrained and trained in turn. Out: `Batch.data`, the UTF-8 of all documents one after
another, and the byte at which each run and each document ends. A token will be trained when all its bytes lie in one trained run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from sft.data.vocabulary import Offsets

EXAMPLE_CHARACTERS = 300
ROLE_AND_CONTENT = itemgetter("role", "content")


class Reject(NamedTuple):
    """A row that was not used: its number in what was read, a reason that is counted, what was found, and the start of the row."""

    row: int
    reason: str
    detail: str
    example: str


@dataclass
class Batch:
    """Rendered documents. The lists have one entry for each document, but `conversations` and `rejects` speak of rows."""

    source_rows: Sequence[Any]
    runs: list[list[str]] = field(default_factory=list)
    specials: list[int] = field(default_factory=list)  # special tokens that the template wrote
    rows: list[int] = field(default_factory=list)
    escaped: dict[int, tuple[list[str], Callable[[str], str]]] = field(default_factory=dict)
    conversations: list[int] = field(default_factory=list)  # digest of each row that was read, 0 of others
    rejects: list[Reject] = field(default_factory=list)
    unprompted: int = 0  # trained answers that lack what the generation prompt gives
    # What `lay_out` finds:
    data: bytes = b""  # the text of all documents in UTF-8
    first: Offsets = field(
        default_factory=lambda: np.zeros(1, dtype=np.int64)
    )  # the first run of each document, and the number of all
    edges: Offsets = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # where each run ends in `data`
    ends: Offsets = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # where each document ends in it

    def reject(self, row: int, reason: str, detail: str) -> None:
        try:
            example = repr(self.source_rows[row])
        except RecursionError:
            example = "a row nested too deeply to show"
        if len(example) > EXAMPLE_CHARACTERS:
            example = example[:EXAMPLE_CHARACTERS] + "…"
        self.rejects.append(Reject(row, reason, detail.encode(errors="backslashreplace").decode(), example))

    def drop(self, bad: Mapping[int, tuple[str, str]]) -> npt.NDArray[np.bool_]:
        """Takes documents out, each with its reason and detail. Returns which were kept."""
        keep = np.ones(len(self.rows), dtype=bool)
        for document, (reason, detail) in bad.items():
            keep[document] = False
            self.reject(self.rows[document], reason, detail)
        left = np.flatnonzero(keep).tolist()
        self.escaped = {new: self.escaped[old] for new, old in enumerate(left) if old in self.escaped}
        self.runs = [self.runs[document] for document in left]
        self.specials = [self.specials[document] for document in left]
        self.rows = [self.rows[document] for document in left]
        return keep

    def lay_out(self) -> None:
        """Finds the bytes of all documents and where runs end in them. Documents that are no Unicode are dropped."""
        try:
            pieces = list(map(str.encode, chain.from_iterable(self.runs)))
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no encoder takes
            bad: dict[int, tuple[str, str]] = {}
            for document, runs in enumerate(self.runs):
                try:
                    "".join(runs).encode()
                except UnicodeEncodeError as error:
                    bad[document] = ("bad_unicode", f"not valid Unicode: {error.reason}")
            self.drop(bad)
            pieces = list(map(str.encode, chain.from_iterable(self.runs)))
        self.data = b"".join(pieces)
        self.edges = np.cumsum(np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces)))
        last = np.cumsum(np.fromiter(map(len, self.runs), dtype=np.int64, count=len(self.runs)))
        self.first, self.ends = np.concatenate([[0], last]), self.edges[last - 1]

    def cut(self) -> list[bytes]:
        """The bytes of each document."""
        return cut(self.data, self.ends)


def cut(data: bytes, ends: Offsets) -> list[bytes]:
    """The bytes of each document."""
    stops = ends.tolist()
    return list(map(data.__getitem__, map(slice, [0, *stops[:-1]], stops)))


def foreign(data: bytes, ends: Offsets) -> list[int]:
    """The documents that have other characters than ASCII."""
    if data.isascii():
        return []
    starts = np.concatenate([[0], ends[:-1]])
    return np.flatnonzero(np.maximum.reduceat(np.frombuffer(data, dtype=np.uint8), starts) > 127).tolist()


def name_conversation(messages: Sequence[Mapping[str, Any]], system: str = "") -> int:
    """64 bits of who says what, the same under every template and tokenizer; the recipe's own system message does not count."""
    if system and messages[0]["content"] == system:
        messages = messages[1:]
    said = "\0".join(chain.from_iterable(map(ROLE_AND_CONTENT, messages)))
    try:
        return xxhash.xxh3_64_intdigest(said.encode())  # twice as fast without naming an error handler
    except UnicodeEncodeError:
        return xxhash.xxh3_64_intdigest(said.encode(errors="surrogatepass"))


def spread(items: Sequence[int], count: int) -> list[int]:
    """`count` of the items, or all, evenly spaced."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
