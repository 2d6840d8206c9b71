"""What compiled code asks about the texts of messages: whether one holds nothing (`holds_no_text`), and whether Python must look at one (`has_unclear`).

`text` is what `sft.data.compiled.words_of` returns: eight bytes from each place on. `sft.chat.messages` has the same rules for Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sft.data.compiled import inlined
from sft.data.fast.messages import CONTENT, END, FIRST_RESULT, INPUT, INSTRUCTION, NONE, START, THINKING


def _word(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(text.encode(), "little"))


OPEN, CLOSE = _word("<think>"), _word("</think>")
TWO, THREE, FIVE, SEVEN = (np.uint64((1 << 8 * size) - 1) for size in (2, 3, 5, 7))
"""Masks of so many bytes."""
QUOTES, BYTES = (34, 39), 98
SPACES_OF_2 = tuple(map(_word, "\u0085\u00a0\u00ad"))
SPACES_OF_3 = tuple(map(_word, "\u1680\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"))
FIRST_OF_RANGE, LAST_OF_RANGE = _word("\u2000"), _word("\u200f")
"""White space and characters without a width, as UTF-8. The range differs only in its last byte."""
NAMES = tuple(_word(quote + name) for quote in "\"'" for name in ("role", "from", "type"))
"""How a name that every message or content part has begins: see `sft.chat.messages.JSON_NAME`."""


@inlined
def is_blank(byte: int) -> bool:
    """Whether Python's str.strip removes this ASCII character."""
    return bool(byte == 32 or 9 <= byte <= 13 or 28 <= byte <= 31)


@inlined
def blank_size(text: Any, at: int) -> int:
    """The bytes of the blank character that starts there; 0 for any other."""
    word = text[at]
    byte = word & np.uint64(0xFF)
    if byte < 128:
        return int(is_blank(byte))
    if (word & TWO) in SPACES_OF_2:
        return 2
    three = word & THREE
    return (
        3
        if three in SPACES_OF_3 or (FIRST_OF_RANGE <= three <= LAST_OF_RANGE and three & TWO == FIRST_OF_RANGE & TWO)
        else 0
    )


@inlined
def skip_blanks(text: Any, at: int, end: int) -> int:
    """Where the first character that is not blank starts."""
    while at < end:
        size = blank_size(text, at)
        if size == 0:
            break
        at += size
    return at


@inlined
def holds_no_text(text: Any, start: int, end: int) -> bool:
    """Whether a text is blank, but for empty thoughts: see `sft.chat.messages.NO_TEXT`."""
    at = skip_blanks(text, start, end)
    if at + 7 <= end and text[at] & SEVEN == OPEN:
        at = skip_blanks(text, at + 7, end)
        if at + 8 > end or text[at] != CLOSE:
            return False
        at = skip_blanks(text, at + 8, end)
    return bool(at >= end)


@inlined
def has_name(text: Any, start: int, end: int) -> bool:
    """Whether one of NAMES is in the text."""
    while start + 5 <= end and text[start] & FIVE not in NAMES:
        start += 1
    return bool(start + 5 <= end)


@inlined
def only_closes_thoughts(text: Any, start: int, end: int) -> bool:
    """Whether </think> is in the text, and no <think> before it."""
    while start + 8 <= end and text[start] != CLOSE and text[start] & SEVEN != OPEN:
        start += 1
    return bool(start + 8 <= end and text[start] == CLOSE)


@inlined
def has_quotes(text: Any, start: int, end: int) -> bool:
    """Whether a text, without white space around it, begins and ends with the same quote: see `sft.chat.fields.is_quoted`."""
    start = skip_blanks(text, start, end)
    if start < end and text[start] & np.uint64(0xFF) == BYTES:
        start += 1
    quote = text[start] & np.uint64(0xFF) if start < end else np.uint64(0)
    if quote not in QUOTES:
        return False
    while is_blank(text[end - 1] & np.uint64(0xFF)):
        end -= 1
    return bool(text[end - 1] & np.uint64(0xFF) == quote and end > start + 1)


@inlined
def has_unclear(messages: Any, row: int, first: int, end: int) -> bool:
    """Whether Python must look at a message of a row: see `sft.chat.messages.check_content` and `sft.chat.fields.quoted_texts`."""
    text, spans = messages.text, messages.row_spans[row]
    if spans[INPUT, END] > spans[INPUT, START]:  # the message joins the two
        for kind in (INSTRUCTION, INPUT):
            if has_quotes(text, spans[kind, START], spans[kind, END]):
                return True
    for message in range(first, end):
        start, stop = messages.spans[message, CONTENT, START], messages.spans[message, CONTENT, END]
        if start == NONE or start >= stop:
            continue
        byte = text[start] & np.uint64(0xFF)
        if byte <= 32 or byte >= 128:
            start = skip_blanks(text, start, stop)
            byte = text[start] & np.uint64(0xFF) if start < stop else np.uint64(0)
        may_quote = (byte in QUOTES or byte == BYTES) and messages.roles[message] < FIRST_RESULT
        if may_quote and has_quotes(text, start, stop):
            return True
        is_json = (byte == 91 or byte == 123) and messages.roles[message] < FIRST_RESULT  # [ {
        if is_json and has_name(text, start, stop):
            return True
        if messages.spans[message, THINKING, START] != NONE:
            begin, end_of_thoughts = messages.spans[message, THINKING, START], messages.spans[message, THINKING, END]
            opens = byte == 60 and start + 7 <= stop and text[start] & SEVEN == OPEN
            if opens or only_closes_thoughts(text, start, stop) or has_quotes(text, begin, end_of_thoughts):
                return True
    return False
