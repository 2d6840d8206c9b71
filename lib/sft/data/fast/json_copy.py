"""Copies values of JSON as Python's json.dumps writes them, in compiled code: `copy_value`.

In: bytes of JSON with a byte behind it that ends every value. Out: the same value with json.dumps' spaces and escapes. NONE for what json.dumps might
write in another way than it stands there: numbers with exponents or many digits, names that are twice in one object, and nulls where
nulls are dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sft.data.compiled import compiled, inlined
from sft.data.fast.json_text import (
    BACKSLASH,
    CAPITAL_E,
    CLOSE_LIST,
    CLOSE_OBJECT,
    COLON,
    COMMA,
    LETTER_E,
    LETTER_U,
    MAX_DEPTH,
    MINUS,
    NINE,
    OPEN_LIST,
    OPEN_OBJECT,
    POINT,
    QUOTE,
    SLASH,
    SPACE,
    ZERO,
    copy_plain,
    is_word,
    read_string,
    read_unicode_escape,
    simple_escape,
    skip_space,
    write_utf8,
)
from sft.data.fast.messages import END, NONE, START, U

MOST_NAMES = 32
"""An object with more names is left to Python."""
NEWLINE, EQUALS = b"\n="


@inlined
def skip_blank(data: Any, at: int) -> int:
    """The position of the next byte that is not white space."""
    at = skip_space(data, at)
    while data[U(at)] == NEWLINE:
        at = skip_space(data, at + 1)
    return at


@inlined
def write_escape(text: Any, to: int, code: int) -> int:
    """Writes a quote, a backslash or a control character with its escape of JSON. Returns where it ends."""
    short = 0
    if code in (QUOTE, BACKSLASH):
        short = code
    elif code == 10:
        short = 110
    elif code == 9:
        short = 116
    elif code == 13:
        short = 114
    elif code == 8:
        short = 98
    elif code == 12:
        short = 102
    text[U(to)] = BACKSLASH
    if short:
        text[U(to + 1)] = short
        return to + 2
    low = code & 15
    text[U(to + 1)] = LETTER_U
    text[U(to + 2)] = ZERO
    text[U(to + 3)] = ZERO
    text[U(to + 4)] = ZERO + (code >> 4)
    text[U(to + 5)] = ZERO + low if low < 10 else 87 + low
    return to + 6


@compiled
def copy_string(source: Any, at: int, target: Any, to: int) -> Any:
    """Writes the string after the quote at source[at - 1] with its quotes. Returns where it ends in both; NONE for a string that is no JSON."""
    data, text = source.bytes, target.bytes
    text[U(to)] = QUOTE
    to += 1
    while True:
        at, to = copy_plain(source, at, target, to)
        c = data[U(at)]
        if c == QUOTE:
            text[U(to)] = QUOTE
            return at + 1, to + 1
        if c != BACKSLASH:
            return NONE, NONE
        c = data[U(at + 1)]
        if c == LETTER_U:
            code, at = read_unicode_escape(data, at + 2)
            if code == NONE:
                return NONE, NONE
            is_escaped = code < SPACE or code in (QUOTE, BACKSLASH)
            to = write_escape(text, to, code) if is_escaped else write_utf8(text, to, code)
        elif simple_escape(c) == NONE:
            return NONE, NONE
        else:
            if c != SLASH:
                text[U(to)] = BACKSLASH
                to += 1
            text[U(to)] = c
            at += 2
            to += 1


@inlined
def end_of_number(data: Any, at: int) -> int:
    """Where a number ends that json.dumps writes as it stands there; NONE for another one."""
    is_negative = data[U(at)] == MINUS
    start = at + is_negative
    at = start
    while ZERO <= data[U(at)] <= NINE:
        at += 1
    digits = at - start
    if digits == 0 or digits > 15 or (data[U(start)] == ZERO and digits > 1):
        return NONE
    if data[U(at)] == LETTER_E or data[U(at)] == CAPITAL_E:
        return NONE
    if data[U(at)] != POINT:
        return NONE if is_negative and data[U(start)] == ZERO else at
    first = at + 1
    at = first
    while ZERO <= data[U(at)] <= NINE:
        at += 1
    if at == first or at - first + digits > 15 or data[U(at)] == LETTER_E or data[U(at)] == CAPITAL_E:
        return NONE
    if data[U(at - 1)] == ZERO and at - first > 1:
        return NONE  # a zero at the end
    if data[U(start)] == ZERO and data[U(first)] == ZERO and data[U(first + 1)] == ZERO:
        return NONE  # a small number has an exponent
    return at


@inlined
def copy_scalar(source: Any, at: int, target: Any, to: int, takes_null: bool) -> Any:
    """Writes a string, a literal or a number. Returns where it ends in both; NONE for what is left to Python."""
    data, end = source.bytes, NONE
    if data[U(at)] == QUOTE:
        return copy_string(source, at + 1, target, to)
    if is_word(data, at, b"true") or (takes_null and is_word(data, at, b"null")):
        end = at + 4
    elif is_word(data, at, b"false"):
        end = at + 5
    else:
        end = end_of_number(data, at)
    if end == NONE:
        return NONE, NONE
    for place in range(at, end):
        target.bytes[U(to)] = data[U(place)]
        to += 1
    return end, to


@inlined
def is_new_name(text: Any, start: int, end: int, names: Any, level: int, count: Any) -> bool:
    """Whether text[start:end] is none of the first `count` names of a level. Remembers it."""
    if count == MOST_NAMES:
        return False
    for i in range(count):
        first = names[level, i, START]
        same = names[level, i, END] - first == end - start
        for k in range(end - start if same else 0):
            same &= text[U(first + k)] == text[U(start + k)]
        if same:
            return False
    names[level, count, START], names[level, count, END] = start, end
    return True


@compiled
def copy_value(source: Any, at: int, target: Any, to: int, names: Any, takes_null: bool, as_pairs: bool) -> Any:
    """Writes a value as json.dumps does, or with `as_pairs` an object as the arguments of a call: name=value, … Returns where it ends in both;
    NONE for what is left to Python. `names` is scratch."""
    data, text, one = source.bytes, target.bytes, np.uint64(1)
    depth, are_objects = 0, np.uint64(0)  # one bit for each level, the innermost is the lowest
    counts = np.uint64(0)  # names of the innermost object
    while True:
        c = data[U(at)]
        is_first = c == OPEN_OBJECT
        if c in (OPEN_OBJECT, OPEN_LIST):
            if depth == MAX_DEPTH:
                return NONE, NONE
            names[depth, MOST_NAMES, START] = np.int64(counts)
            counts = np.uint64(0)
            if depth or not as_pairs:
                text[U(to)] = c
                to += 1
            depth += 1
            are_objects = are_objects << one | np.uint64(is_first)
            at = skip_blank(data, at + 1)
            is_closed = data[U(at)] == (CLOSE_OBJECT if is_first else CLOSE_LIST)
            if not is_closed and not is_first:
                continue
        else:
            at, to = copy_scalar(source, at, target, to, takes_null)
            if at == NONE:
                return NONE, NONE
            is_closed = False
            if depth:
                at = skip_blank(data, at)
                is_closed = data[U(at)] != COMMA
        while is_closed:  # the innermost level ends here, and perhaps those around it
            close = CLOSE_OBJECT if are_objects & one else CLOSE_LIST
            if data[U(at)] != close:
                return NONE, NONE
            depth -= 1
            if depth or not as_pairs:
                text[U(to)] = close
                to += 1
            are_objects >>= one
            counts = np.uint64(names[depth, MOST_NAMES, START])
            at += 1
            is_closed = is_first = False
            if depth:
                at = skip_blank(data, at)
                is_closed = data[U(at)] != COMMA
        if depth == 0:
            return at, to
        if not is_first:
            text[U(to)] = COMMA
            text[U(to + 1)] = SPACE
            to += 2
            at = skip_blank(data, at + 1)
        if are_objects & one:
            is_pair = as_pairs and depth == 1
            start = to
            if data[U(at)] != QUOTE:
                return NONE, NONE
            at, to = read_string(source, at + 1, target, to) if is_pair else copy_string(source, at + 1, target, to)
            if at == NONE or not is_new_name(text, start, to, names, depth, np.int64(counts)):
                return NONE, NONE
            counts += one
            at = skip_blank(data, at)
            if data[U(at)] != COLON:
                return NONE, NONE
            text[U(to)] = EQUALS if is_pair else COLON
            text[U(to + 1)] = SPACE
            to += 1 if is_pair else 2
            at = skip_blank(data, at + 1)
