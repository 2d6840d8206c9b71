"""Ranges of characters that are trained inside a message: axolotl's `train_detail`.

In: a list of `{"begin_offset": 0, "end_offset": 8, "train": false}`; both offsets count characters of the content from 0, and the last one is
inside the range. Out: `read_details`, the trained spans of the content, and `place`, where its trained and untrained parts are in a rendering.
Characters in no range are not trained, as in axolotl. The structure of the rendering decides where a content is, not a search for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sft.chat.trace import Span
from sft.chat.values import BadRow, kind, parse

DETAIL = "train_detail"


class PlacedRange(NamedTuple):
    """Characters `start` to `end` (not included) of a document, and whether they are trained."""

    start: int
    end: int
    train: bool


def read_details(value: Any, index: int, content: str) -> tuple[Span, ...]:
    """The trained spans of the content of message `index`, merged and in order. Raises BadRow."""
    where = f"message {index}: {DETAIL}"
    if isinstance(value, str):
        value = parse(value, DETAIL, f"{where} is text that is not JSON")
    if not isinstance(value, (list, tuple)):
        raise BadRow(DETAIL, f"{where} is {kind(value)}, not a list of ranges")
    trained: list[bool | None] = [None] * len(content)
    for detail in value:
        begin, end, train = _read_range(detail, where, len(content))
        if (not train) in trained[begin : end + 1]:
            raise BadRow(DETAIL, f"{where}: two ranges disagree about characters {begin} to {end}")
        trained[begin : end + 1] = [train] * (end + 1 - begin)
    edges = [at for at in range(len(content) + 1) if _at(trained, at) != _at(trained, at - 1)]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _at(trained: Sequence[bool | None], at: int) -> bool:
    return 0 <= at < len(trained) and trained[at] is True


def _read_range(detail: Any, where: str, length: int) -> tuple[int, int, bool]:
    names = ("begin_offset", "end_offset", "train")
    if not isinstance(detail, Mapping) or set(detail) != set(names):
        raise BadRow(DETAIL, f"{where}: a range has exactly {', '.join(names)}; this one is {str(detail)[:80]}")
    begin, end, train = (detail[name] for name in names)
    if type(begin) is not int or type(end) is not int or train not in (0, 1):
        raise BadRow(
            DETAIL, f"{where}: offsets are integers and train is true or false; this range is {str(detail)[:80]}"
        )
    if not 0 <= begin <= end < length:
        raise BadRow(
            DETAIL,
            f"{where}: the range {begin} to {end} is not inside the {length} characters of the content; end_offset is the last one"
            " that belongs to it",
        )
    return begin, end, bool(train)


def place(
    runs: Sequence[str], marked: Sequence[str], marks: str, contents: Sequence[str], spans: Sequence[Sequence[Span]]
) -> list[PlacedRange] | None:
    """Where the parts of contents are in the text of `runs`. `marked`: the runs of the same conversation with one of the characters `marks` in
    place of each content; `spans`: the trained spans of each content. Returns None unless each content is written once, as it is or without white
    space at its ends."""
    if len(runs) != len(marked):
        return None
    found: list[PlacedRange] = []
    left = list(marks)
    base = 0
    for number, (run, pattern) in enumerate(zip(runs, marked, strict=True)):
        at = 0
        for piece in re.split(f"([{re.escape(marks)}])", pattern):
            if piece in left and number % 2:
                which = marks.index(piece)
                left.remove(piece)
                content = contents[which]
                written = next((text for text in _writings(content) if run.startswith(text, at)), None)
                if written is None:
                    return None
                shift = base + at - (content.index(written) if written else 0)
                first, last = base + at, base + at + len(written)
                found += _parts(spans[which], shift, first, last)
                at += len(written)
            elif (piece in marks and piece) or not run.startswith(piece, at):
                return None
            else:
                at += len(piece)
        if at != len(run):
            return None
        base += len(run)
    return None if left else found


def _writings(content: str) -> tuple[str, ...]:
    return content, content.rstrip(), content.lstrip(), content.strip()


def _parts(trained: Sequence[Span], shift: int, first: int, last: int) -> list[PlacedRange]:
    """The trained and untrained parts of text[first:last]. `shift`: where the content's first character would be."""
    parts: list[PlacedRange] = []
    at = first
    for start, end in trained:
        start, end = (min(max(edge + shift, first), last) for edge in (start, end))
        parts += (PlacedRange(at, start, False), PlacedRange(start, end, True))
        at = end
    return [part for part in (*parts, PlacedRange(at, last, False)) if part.start < part.end]
