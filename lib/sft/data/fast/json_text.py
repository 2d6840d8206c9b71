"""Reads strings and simple values of JSON text in compiled code.

In: bytes of JSON that end with a newline and WORD more bytes, so a reader may look a few bytes ahead. Out: positions. Every function
returns NONE for what it does not read; the caller leaves such a row to Python's parser, which decides. Strings are copied and
unescaped eight bytes at a time. tests/test_json_text.py compares all functions with Python's json.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.compiled import WORD, compiled, inlined, words_of
from sft.data.fast.messages import NONE, U

QUOTE, BACKSLASH, SLASH, COMMA, COLON, MINUS, PLUS, POINT, ZERO, NINE = b'"\\/,:-+.09'
OPEN_OBJECT, CLOSE_OBJECT, OPEN_LIST, CLOSE_LIST = b"{}[]"
SPACE, TAB, RETURN = b" \t\r"
LETTER_B, LETTER_E, LETTER_F, LETTER_N, LETTER_R, LETTER_T, LETTER_U, CAPITAL_E = b"befnrtuE"
MAX_DEPTH = 60
"""Levels of a value that is skipped. Deeper ones are left to Python."""


class Buffer(NamedTuple):
    """Bytes, and the same bytes as words (`words_of`)."""

    bytes: NDArray[np.uint8]
    words: NDArray[np.uint64]

    @classmethod
    def of(cls, data: NDArray[np.uint8]) -> Buffer:
        return cls(data, words_of(data))


@inlined
def skip_space(data: Any, at: int) -> int:
    """The position of the next byte that is not white space. A newline ends a row, so it does not count as white space."""
    while data[U(at)] == SPACE or data[U(at)] == TAB or data[U(at)] == RETURN:
        at += 1
    return at


@inlined
def find_name(data: Any, start: int, end: int, names: Any) -> int:
    """Which of the names (`Names`) data[start:end] is; NONE when it is none of them."""
    for i in range(len(names.starts) - 1):
        first = names.starts[i]
        if names.starts[i + 1] - first != end - start:
            continue
        same = True
        for k in range(end - start):
            same &= data[U(start + k)] == names.bytes[U(first + k)]
        if same:
            return i
    return NONE


@inlined
def end_of_plain_string(data: Any, at: int) -> int:
    """The position of the quote that ends a string; NONE when the string has escapes or control characters."""
    while data[U(at)] != QUOTE:
        if data[U(at)] < SPACE or data[U(at)] == BACKSLASH:
            return NONE
        at += 1
    return at


@inlined
def read_hex4(data: Any, at: int) -> int:
    """The value of four hexadecimal digits; NONE when there are other characters."""
    value = 0
    for i in range(4):
        c: Any = np.int64(data[at + i])
        if 48 <= c <= 57:  # 0 to 9
            digit = c - 48
        elif 65 <= c <= 70:  # A to F
            digit = c - 55
        elif 97 <= c <= 102:  # a to f
            digit = c - 87
        else:
            return NONE
        value = value * 16 + digit
    return value


@inlined
def write_utf8(text: Any, to: int, code: int) -> int:
    """Writes one character as UTF-8 to text[to]. Returns where it ends."""
    if code < 0x80:
        text[to] = code
        return to + 1
    if code < 0x800:
        text[to] = 0xC0 | (code >> 6)
        text[to + 1] = 0x80 | (code & 63)
        return to + 2
    if code < 0x10000:
        text[to] = 0xE0 | (code >> 12)
        text[to + 1] = 0x80 | ((code >> 6) & 63)
        text[to + 2] = 0x80 | (code & 63)
        return to + 3
    text[to] = 0xF0 | (code >> 18)
    text[to + 1] = 0x80 | ((code >> 12) & 63)
    text[to + 2] = 0x80 | ((code >> 6) & 63)
    text[to + 3] = 0x80 | (code & 63)
    return to + 4


@inlined
def read_unicode_escape(data: Any, at: int) -> Any:
    r"""The character of the digits after \u, or of a surrogate pair \uD83E\uDD8A, and where it ends; NONE for half of a pair."""
    code = read_hex4(data, at)
    at += 4
    if code == NONE or 0xDC00 <= code < 0xE000:
        return NONE, NONE
    if code < 0xD800 or code >= 0xE000:
        return code, at
    if data[at] != BACKSLASH or data[at + 1] != LETTER_U:
        return NONE, NONE
    low = read_hex4(data, at + 2)
    if low < 0xDC00 or low >= 0xE000:
        return NONE, NONE
    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00), at + 6


@inlined
def simple_escape(c: int) -> int:
    """The character that a backslash before `c` stands for; NONE for an unknown one."""
    if c == LETTER_N:
        return 10
    if c in (QUOTE, BACKSLASH, SLASH):
        return c
    if c == LETTER_T:
        return 9
    if c == LETTER_R:
        return 13
    if c == LETTER_B:
        return 8
    if c == LETTER_F:
        return 12
    return NONE


@inlined
def copy_plain(source: Any, at: int, target: Any, to: int) -> Any:
    """Copies the bytes from source[at] on up to a quote, a backslash or a control character. Returns where it is, in both (`Buffer`s). Up to
    WORD bytes after it are overwritten too."""
    ones, highs = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
    quotes, slashes, spaces = ones * np.uint64(QUOTE), ones * np.uint64(BACKSLASH), ones * np.uint64(SPACE)
    words, text_words = source.words, target.words
    while True:
        word = words[U(at)]
        quote, slash = word ^ quotes, word ^ slashes
        # The high bit of a byte is set where it is a quote, a backslash or a control character, and perhaps in bytes after such a
        # one. The first set bit is always right.
        found = ((quote - ones) & ~quote | (slash - ones) & ~slash | (word - spaces) & ~word) & highs
        text_words[U(to)] = word
        if found:
            break
        at += WORD
        to += WORD
    while not found & np.uint64(0x80):
        found >>= np.uint64(8)
        at += 1
        to += 1
    return at, to


@compiled
def read_string(source: Any, at: int, target: Any, to: int) -> Any:
    """Writes the string after the quote at source[at - 1] to target[to], unescaped. Returns where it ends in both (`Buffer`s);
    NONE for a string that is no JSON or has half of a surrogate pair."""
    data, text = source.bytes, target.bytes
    while True:
        at, to = copy_plain(source, at, target, to)
        c = data[U(at)]
        if c == QUOTE:
            return at + 1, to
        if c != BACKSLASH:
            return NONE, NONE
        c = data[at + 1]
        if c == LETTER_U:
            code, at = read_unicode_escape(data, at + 2)
            if code == NONE:
                return NONE, NONE
            to = write_utf8(text, to, code)
        else:
            code = simple_escape(c)
            if code == NONE:
                return NONE, NONE
            text[to] = code
            at += 2
            to += 1


@inlined
def is_word(data: Any, at: int, word: Any) -> bool:
    """Whether data[at:] starts with the bytes of `word`."""
    same = True
    for i in range(len(word)):
        same &= data[U(at + i)] == word[i]
    return same


@inlined
def skip_number(data: Any, at: int) -> int:
    """Where a number ends. Returns NONE if it is not JSON."""
    if data[at] == MINUS:
        at += 1
    start = at
    while ZERO <= data[at] <= NINE:
        at += 1
    if at == start or (data[start] == ZERO and at - start > 1):
        return NONE
    if data[at] == POINT:
        start = at + 1
        at = start
        while ZERO <= data[at] <= NINE:
            at += 1
        if at == start:
            return NONE
    if data[at] == LETTER_E or data[at] == CAPITAL_E:
        at += 1
        if data[at] == MINUS or data[at] == PLUS:
            at += 1
        start = at
        while ZERO <= data[at] <= NINE:
            at += 1
        if at == start:
            return NONE
    return at


@inlined
def skip_scalar(source: Any, at: int, target: Any, to: int) -> Any:
    """Where a string, a literal or a number ends, and whether it holds something: null and "" do not. NONE for what is no JSON."""
    data = source.bytes
    if data[at] == QUOTE:
        return read_string(source, at + 1, target, to)[0], data[at + 1] != QUOTE
    if is_word(data, at, b"null"):
        return at + 4, False
    if is_word(data, at, b"true"):
        return at + 4, True
    if is_word(data, at, b"false"):
        return at + 5, True
    return skip_number(data, at), True


@compiled
def skip_value(source: Any, at: int, target: Any, to: int) -> Any:
    """Where a value ends, and whether it holds something: null, "", an empty list, and
    an object of nothing else do not. NONE for what is no
    JSON, and for a value of more than MAX_DEPTH levels. The bytes from target[to] on are scratch space."""
    data, one = source.bytes, np.uint64(1)
    depth, are_objects, held = 0, np.uint64(0), False  # one bit for each level, the innermost is the lowest
    while True:
        c = data[at]
        is_first = c == OPEN_OBJECT  # the next thing is the first name of an object
        if c in (OPEN_OBJECT, OPEN_LIST):
            if depth == MAX_DEPTH:
                return NONE, held
            depth += 1
            are_objects = are_objects << one | np.uint64(c == OPEN_OBJECT)
            at = skip_space(data, at + 1)
            is_closed = data[at] == (CLOSE_OBJECT if is_first else CLOSE_LIST)
            held |= not is_first and not is_closed
            if not is_closed and c == OPEN_LIST:
                continue
        else:
            at, holds = skip_scalar(source, at, target, to)
            if at == NONE:
                return NONE, held
            held |= holds
            is_closed = False
            if depth:
                at = skip_space(data, at)
                is_closed = data[at] != COMMA
        while is_closed:  # the innermost level ends here, and perhaps those around it
            if data[at] != (CLOSE_OBJECT if are_objects & one else CLOSE_LIST):
                return NONE, held
            are_objects >>= one
            depth -= 1
            at += 1
            is_closed = is_first = False
            if depth:
                at = skip_space(data, at)
                is_closed = data[at] != COMMA
        if depth == 0:
            return at, held
        if not is_first:
            at = skip_space(data, at + 1)  # after the comma
        if are_objects & one:
            if data[at] != QUOTE:
                return NONE, held
            at = read_string(source, at + 1, target, to)[0]
            if at == NONE:
                return NONE, held
            at = skip_space(data, at)
            if data[at] != COLON:
                return NONE, held
            at = skip_space(data, at + 1)
