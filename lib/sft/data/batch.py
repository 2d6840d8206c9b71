"""A batch of rendered documents on its way to tokens: its text, and where the runs end in it.

In: runs of text of each document, untrained and trained in turn. Out: `RenderedBatch.data`, the UTF-8 of all documents one after
another, and the byte at which each run and each document ends.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from sft.chat.details import PlacedRange
from sft.chat.fields import HeldFields
from sft.data.align import Offsets
from sft.data.normalization import Normalizer
from sft.sources.blocks import Reject

EXAMPLE_CHARACTERS = 300
ROLE_AND_CONTENT = itemgetter("role", "content")
USER = b"user\0"
SPACES = b" \t\n\v\f\r"


class Fault(NamedTuple):
    """Why a document is dropped."""

    reason: str
    detail: str


@dataclass
class RenderedBatch:
    """Rendered documents. The lists have one entry for each document, except `source_rows`, `hashes`, `groups` and `held`, which have one for
    each row."""

    source_rows: Sequence[Any]
    runs: list[list[str]] = field(default_factory=list)
    num_specials: list[int] = field(default_factory=list)
    """Special tokens that the template wrote."""
    rows: list[int] = field(default_factory=list)
    """The row of each document."""
    turns: list[int] = field(default_factory=list)
    """The message that each document trains; -1 for all that the row trains."""
    escaped: dict[int, tuple[list[str], Callable[[str], str]]] = field(default_factory=dict)
    """Documents with special-token text in their content: the runs with that text escaped, and the function that restores it."""
    ranges: dict[int, list[PlacedRange]] = field(default_factory=dict)
    """Documents of which only parts of messages are trained: the parts."""
    hashes: list[int] = field(default_factory=list)
    """The hash of the conversation of each row that was read, 0 of the others."""
    groups: list[int] = field(default_factory=list)
    """The hash of its group, see `conversation_hashes`."""
    held: list[HeldFields | None] = field(default_factory=list)
    """The fields of each row that was read."""
    rejects: list[Reject] = field(default_factory=list)
    empty_answers: list[int] = field(default_factory=list)
    """Trained answers without text and calls."""
    answers_without_prefix: int = 0
    """Trained answers that do not begin with the generation prefix."""
    normalizer: Normalizer = Normalizer()
    """How the tokenizer spells texts."""
    # `lay_out` sets these:
    data: bytes = b""
    """The text of all documents in UTF-8."""
    spelled: bytes = b""
    """The text as the tokenizer spells it. It is `data` itself unless a text changes."""
    num_normalized: int = 0
    """Documents that the tokenizer spells differently."""
    first_run: Offsets = field(init=False)
    """[documents + 1] The first run of each document, then the number of all runs."""
    run_ends: Offsets = field(init=False)
    """[runs] Where each run ends in `spelled`."""
    ends: Offsets = field(init=False)
    """[documents] Where each document ends in `data`."""

    def reject(self, row: int, reason: str, detail: str) -> None:
        try:
            example = repr(self.source_rows[row])
        except RecursionError:
            example = "a row nested too deeply to show"
        if len(example) > EXAMPLE_CHARACTERS:
            example = example[:EXAMPLE_CHARACTERS] + "…"
        self.rejects.append(Reject(row, reason, detail.encode(errors="backslashreplace").decode(), example))

    def drop(self, faults: Mapping[int, Fault]) -> npt.NDArray[np.bool_]:
        """Rejects the rows of documents and removes all documents of these rows. Returns which documents were kept."""
        bad: set[int] = set()
        for document, (reason, detail) in faults.items():
            if (row := self.rows[document]) not in bad:
                self.reject(row, reason, detail)
                bad.add(row)
        keep = np.array([row not in bad for row in self.rows], dtype=np.bool_)
        left = np.flatnonzero(keep).tolist()
        self.escaped = {new: self.escaped[old] for new, old in enumerate(left) if old in self.escaped}
        self.ranges = {new: self.ranges[old] for new, old in enumerate(left) if old in self.ranges}
        self.runs = [self.runs[document] for document in left]
        self.num_specials = [self.num_specials[document] for document in left]
        self.rows = [self.rows[document] for document in left]
        self.empty_answers = [self.empty_answers[document] for document in left]
        self.turns = [self.turns[document] for document in left]
        return keep

    def lay_out(self) -> None:
        """Computes the bytes of all documents and where runs end in them. Drops documents that are not valid Unicode."""
        try:
            parts = list(map(str.encode, chain.from_iterable(self.runs)))
        except UnicodeEncodeError:  # JSON can express half of a surrogate pair, which no encoder accepts
            faults: dict[int, Fault] = {}
            for document, runs in enumerate(self.runs):
                try:
                    "".join(runs).encode()
                except UnicodeEncodeError as error:
                    faults[document] = Fault("bad_unicode", f"not valid Unicode: {error.reason}")
            self.drop(faults)
            parts = list(map(str.encode, chain.from_iterable(self.runs)))
        self.data = b"".join(parts)
        self.run_ends = np.cumsum(np.fromiter(map(len, parts), dtype=np.int64, count=len(parts)))
        last_run = np.cumsum(np.fromiter(map(len, self.runs), dtype=np.int64, count=len(self.runs)))
        self.first_run, self.ends = np.concatenate([[0], last_run]), self.run_ends[last_run - 1]
        self.spelled, self.num_normalized = self.data, 0
        if changed := changed_documents(self.normalizer, self.data, self.ends):
            self._spell(changed, parts)

    def _spell(self, changed: Sequence[int], parts: list[bytes]) -> None:
        """Sets the text as the tokenizer spells it. `changed`: documents; `parts`: the bytes of every run."""
        for document in changed:
            first, last = self.first_run[document : document + 2].tolist()
            parts[first:last] = [self.normalizer.spell(part.decode()).encode() for part in parts[first:last]]
        self.spelled, self.num_normalized = b"".join(parts), len(changed)
        self.run_ends = np.cumsum(np.fromiter(map(len, parts), dtype=np.int64, count=len(parts)))

    def spelled_documents(self) -> list[bytes]:
        """The bytes that the ids of each document must spell."""
        return split_documents(self.spelled, self.run_ends[self.first_run[1:] - 1])

    def documents(self) -> list[bytes]:
        """The bytes of each document."""
        return split_documents(self.data, self.ends)


def split_documents(data: bytes, ends: Offsets) -> list[bytes]:
    """The bytes of each document, from the bytes of all and where each ends."""
    stops = ends.tolist()
    return list(map(data.__getitem__, map(slice, [0, *stops[:-1]], stops)))


def changed_documents(normalizer: Normalizer, data: bytes, ends: Offsets) -> list[int]:
    """The documents that a tokenizer spells differently."""
    if normalizer.changes_nothing:
        return []
    starts = [0, *ends[:-1].tolist()]
    return [d for d in non_ascii(data, ends) if normalizer.changes(data[starts[d] : ends[d]].decode())]


def non_ascii(data: bytes, ends: Offsets) -> list[int]:
    """The documents that contain other characters than ASCII."""
    if data.isascii():
        return []
    starts = np.concatenate([[0], ends[:-1]])
    found: list[int] = np.flatnonzero(np.maximum.reduceat(np.frombuffer(data, dtype=np.uint8), starts) > 127).tolist()
    return found


def conversation_hashes(messages: Sequence[Mapping[str, Any]], system: str = "") -> tuple[int, int]:
    """Two 64-bit hashes, which do not depend on template, tokenizer and the recipe's own `system` message.

    The first covers the roles and contents. The second, of the group, covers the first user message: conversations that begin
    with the same one have the same group, see `group_key`. White space around that message does not count.
    """
    if system and messages[0]["content"] == system:
        messages = messages[1:]
    joined = "\0".join(chain.from_iterable(map(ROLE_AND_CONTENT, messages)))
    try:
        text = joined.encode()  # twice as fast without an error handler
    except UnicodeEncodeError:
        text = joined.encode(errors="surrogatepass")
    start, end = group_span(text)
    return xxhash.xxh3_64_intdigest(text), xxhash.xxh3_64_intdigest(group_key(text[start:end]))


def group_key(text: bytes) -> bytes:
    """What is hashed of the text of a group: one text for all spellings of a line's end and of composed characters (NFC)."""
    if not text.isascii():
        with contextlib.suppress(UnicodeDecodeError):  # of half a surrogate pair
            text = unicodedata.normalize("NFC", text.decode()).strip().encode() or text
    return text.replace(b"\r\n", b"\n")


def group_span(text: bytes) -> tuple[int, int]:
    """Where the first user message is, without white space around it, in roles and contents with a zero byte between them: all without
    one, or if it is empty."""
    at = 0 if text.startswith(USER) else text.find(b"\0" + USER) + 1
    if not at and not text.startswith(USER):
        return 0, len(text)
    start = at + len(USER)
    end = text.find(b"\0", start)
    end = len(text) if end < 0 else end
    end = start + len(text[start:end].rstrip(SPACES))
    start = end - len(text[start:end].lstrip(SPACES))
    return (start, end) if start < end else (0, len(text))


def evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    """`count` of the items, or all when there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
