"""Rows to rendered text in compiled code, without a Python object for each: `read_lines` of JSON, `read_columns` of Arrow, for sft.data.fast.plain.

One pass goes over each line: `scan` finds its messages and their texts, `write` puts them into the template's turns. In columns the
texts are found already. All that is compiled together stands in this file, with its constants: numba compiles anew when the file
changes, and does not look at others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.compiled import WORD, compiled
from sft.recipe.schema import ROLES

MESSAGES = 1 << 12  # a conversation of more is no plain one
SYSTEM, USER, ASSISTANT = range(3)
SPEAKERS = ("system", "user", "assistant", *(role for role in ROLES if role not in ("system", "user", "assistant")))
# Texts of a message, in the order of the fields' names below; the other fields must be absent or null.
CONTENT, FUNCTIONS, CALLS, ROLE = range(4)
FIELDS = ("content", "functions", "function_calls", "role")
BARRED = ("tool_calls", "reasoning_content", "thinking", "train", "weight", "from", "value")
# Texts of a turn, then those that belong to no role.
HEAD, STOP, GAP, LAST_STOP, LAST_GAP = range(5)
PARTS = 5
DEFAULT, GIVEN, OFFERED, OFFERED_TO_USER, END_OF_OFFERED, CALLED, END_OF_CALLED, END_OF_TURN = range(8)
SHORTEST = len('{"role":"","content":""},')
ODD = -1
U = np.uint64  # of an index: a signed one could count from the end, which costs every access a comparison
QUOTE, BACKSLASH, COMMA, COLON = 34, 92, 44, 58
OPEN_OBJECT, CLOSE_OBJECT, OPEN_LIST, CLOSE_LIST = 123, 125, 91, 93


class Layout(NamedTuple):
    """What a template writes, as arrays: texts one after another, where each begins and the last ends, and what it knows."""

    texts: NDArray[np.uint64]  # the words of the bytes, as `words_of` gives them
    where: NDArray[np.int64]  # [PARTS a role, then the others, + 1]
    known: NDArray[np.uint8]  # [roles]: the template has a turn for it
    trained: NDArray[np.uint8]  # [roles]
    specials: NDArray[
        np.int64
    ]  # [2, roles] special tokens of a turn, and of a last one; then, [2, roles], of the default
    calls: bool  # functions and function_calls have a place
    last_only: bool


class Names(NamedTuple):
    """What fields and roles are called, as bytes one after another, and where each begins and the last ends."""

    row: NDArray[np.uint8]  # messages, then columns that must be null
    row_where: NDArray[np.int64]
    message: NDArray[np.uint8]
    message_where: NDArray[np.int64]
    role: NDArray[np.uint8]
    role_where: NDArray[np.int64]
    role_words: NDArray[np.uint64]


# --- scanning JSON ----------------------------------------------------------------------------------------------------


@compiled
def skip_space(data, at):
    while data[U(at)] == 32 or data[U(at)] == 9 or data[U(at)] == 13:
        at += 1
    return at


@compiled
def find_name(data, begin, end, names, where):
    """Which of the names stands in data[begin:end]; ODD when none does."""
    for i in range(len(where) - 1):
        if where[i + 1] - where[i] != end - begin:
            continue
        same = True
        for k in range(end - begin):
            same &= data[U(begin + k)] == names[U(where[i] + k)]
        if same:
            return i
    return ODD


@compiled
def end_of_string(data, at):
    """The quote that ends a string without escapes and control characters; ODD when it has some."""
    while data[U(at)] != QUOTE:
        if data[U(at)] < 32 or data[U(at)] == BACKSLASH:
            return ODD
        at += 1
    return at


@compiled
def hex4(data, at):
    value = 0
    for i in range(4):
        c = data[at + i]
        if 48 <= c <= 57:
            digit = c - 48
        elif 65 <= c <= 70:
            digit = c - 55
        elif 97 <= c <= 102:
            digit = c - 87
        else:
            return ODD
        value = value * 16 + digit
    return value


@compiled
def put_character(text, to, code):
    """UTF-8 of one character; returns where it ends."""
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


@compiled
def read_string(data, words, at, text, text_words, to):
    """Writes the string that begins behind the quote at data[at - 1] to text[to]. Returns where it ends in both; ODD for a bad one."""
    ones, highs = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
    quotes, slashes, spaces = ones * np.uint64(QUOTE), ones * np.uint64(BACKSLASH), ones * np.uint64(32)
    while True:
        word = words[U(at)]
        quote, slash = word ^ quotes, word ^ slashes
        # A byte's high bit is set where the byte is a quote, a backslash or a control character, and perhaps behind such a one.
        found = ((quote - ones) & ~quote | (slash - ones) & ~slash | (word - spaces) & ~word) & highs
        text_words[U(to)] = word
        if found == 0:
            at += WORD
            to += WORD
            continue
        while not found & np.uint64(0x80):
            found >>= np.uint64(8)
            at += 1
            to += 1
        c = data[U(at)]
        if c == QUOTE:
            return at + 1, to
        if c != BACKSLASH:
            return ODD, ODD
        c = data[at + 1]
        at += 2
        if c == 110:  # n
            text[to] = 10
        elif c in (QUOTE, BACKSLASH, 47):
            text[to] = c
        elif c == 116:  # t
            text[to] = 9
        elif c == 114:  # r
            text[to] = 13
        elif c == 98:  # b
            text[to] = 8
        elif c == 102:  # f
            text[to] = 12
        elif c == 117:  # u
            code = hex4(data, at)
            at += 4
            if code == ODD or 0xDC00 <= code < 0xE000:
                return ODD, ODD
            if 0xD800 <= code < 0xDC00:
                if data[at] != BACKSLASH or data[at + 1] != 117:
                    return ODD, ODD
                low = hex4(data, at + 2)
                at += 6
                if low < 0xDC00 or low >= 0xE000:
                    return ODD, ODD
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
            to = put_character(text, to, code)
            continue
        else:
            return ODD, ODD
        to += 1


@compiled
def is_word(data, at, word):
    same = True
    for i in range(len(word)):
        same &= data[U(at + i)] == word[i]
    return same


@compiled
def skip_value(data, words, at, text, text_words, to):
    """Where a string, a literal or a small integer ends; ODD for all else, and for what is no JSON."""
    c = data[at]
    if c == QUOTE:
        return read_string(data, words, at + 1, text, text_words, to)[0]
    if is_word(data, at, b"null") or is_word(data, at, b"true"):
        return at + 4
    if is_word(data, at, b"false"):
        return at + 5
    if c == 45:
        at += 1
    begin = at
    while 48 <= data[at] <= 57:
        at += 1
    if at == begin or at - begin > 18 or (data[begin] == 48 and at - begin > 1):
        return ODD
    c = data[at]
    return at if c in (COMMA, CLOSE_OBJECT) or c <= 32 else ODD


@compiled
def read_message(data, words, at, names, text, text_words, to, roles, spans, message):
    """One message, behind its brace: its role and where its texts lie. Returns where it ends, also in `text`; ODD when not plain."""
    roles[message] = ODD
    for i in range(6):
        spans[message, i] = ODD
    seen = 0
    while True:
        at = skip_space(data, at)
        if data[at] != QUOTE:
            return ODD, ODD
        begin = at + 1
        end = end_of_string(data, begin)
        if end == ODD:
            return ODD, ODD
        field = find_name(data, begin, end, names.message, names.message_where)
        at = skip_space(data, end + 1)
        if data[at] != COLON:
            return ODD, ODD
        at = skip_space(data, at + 1)
        if field != ODD:
            if seen >> field & 1:
                return ODD, ODD
            seen |= 1 << field
        if data[at] == QUOTE and ODD < field < ROLE:
            spans[message, 2 * field] = to
            at, to = read_string(data, words, at + 1, text, text_words, to)
            if at == ODD:
                return ODD, ODD
            spans[message, 2 * field + 1] = to
        elif data[at] == QUOTE and field == ROLE:
            begin = at + 1
            end = end_of_string(data, begin)
            if end == ODD:
                return ODD, ODD
            roles[message] = find_name(data, begin, end, names.role, names.role_where)
            at = end + 1
        elif field == ODD:
            at = skip_value(data, words, at, text, text_words, to)
            if at == ODD:
                return ODD, ODD
        elif is_word(data, at, b"null"):
            at += 4
        else:
            return ODD, ODD
        at = skip_space(data, at)
        if data[at] == CLOSE_OBJECT:
            break
        if data[at] != COMMA:
            return ODD, ODD
        at += 1
    if roles[message] == ODD or spans[message, 0] == ODD:
        return ODD, ODD
    return at + 1, to


@compiled
def scan(data, words, at, stop, names, text, text_words, roles, spans):
    """The messages of the line data[at:stop]: their number, ODD when the line is not plain."""
    count, to, seen = 0, 0, 0
    at = skip_space(data, at)
    if data[at] != OPEN_OBJECT:
        return ODD
    at += 1
    while True:
        at = skip_space(data, at)
        if data[at] != QUOTE:
            return ODD
        begin = at + 1
        end = end_of_string(data, begin)
        if end == ODD:
            return ODD
        column = find_name(data, begin, end, names.row, names.row_where)
        at = skip_space(data, end + 1)
        if data[at] != COLON:
            return ODD
        at = skip_space(data, at + 1)
        if column != ODD:
            if seen >> column & 1:
                return ODD
            seen |= 1 << column
        if column == 0:
            if data[at] != OPEN_LIST:
                return ODD
            while True:
                at = skip_space(data, at + 1)
                if data[at] != OPEN_OBJECT or count == MESSAGES:
                    return ODD
                at, to = read_message(data, words, at + 1, names, text, text_words, to, roles, spans, count)
                if at == ODD:
                    return ODD
                count += 1
                at = skip_space(data, at)
                if data[at] != COMMA:
                    break
            if data[at] != CLOSE_LIST:
                return ODD
            at += 1
        elif column != ODD:
            if not is_word(data, at, b"null"):
                return ODD
            at += 4
        else:
            at = skip_value(data, words, at, text, text_words, to)
            if at == ODD:
                return ODD
        at = skip_space(data, at)
        if data[at] == CLOSE_OBJECT:
            break
        if data[at] != COMMA:
            return ODD
        at += 1
    at = skip_space(data, at + 1)
    return count if count and at == stop else ODD


# --- writing turns ----------------------------------------------------------------------------------------------------
# Texts are given as words that begin at each of their bytes: a piece is copied eight bytes at a time, and what is copied
# beyond its end is written over by the next piece.


@compiled
def put(out, to, source, begin, end):
    for i in range(0, end - begin, WORD):
        out[U(to + i)] = source[U(begin + i)]
    return to + end - begin


@compiled
def put_part(out, to, layout, part):
    return put(out, to, layout.texts, layout.where[part], layout.where[part + 1])


@compiled
def begins_with(source, begin, end, layout, part):
    start, length = layout.where[part], layout.where[part + 1] - layout.where[part]
    same = end - begin >= length
    for k in range(length if same else 0):
        same &= (source[begin + k] ^ layout.texts[start + k]) & np.uint64(0xFF) == 0
    return same


@compiled
def write(layout, count, roles, spans, content, offered, called, out, to, edges, run):
    """One conversation as its template writes it, to `out` from `to` on; its runs end at `edges`, from number `run` on.

    Returns where it ends (ODD when the template has no place for something or nothing is trained), the next run, its special
    tokens, and its trained answers that lack what the generation prompt gives.
    """
    others = PARTS * len(layout.known)
    specials, unprompted, systems, last_trained = 0, 0, False, ODD
    for i in range(count):
        role = roles[i]
        functions, calls = spans[i, 2 * FUNCTIONS] != ODD, spans[i, 2 * CALLS] != ODD
        if (
            not layout.known[role]
            or (functions and not (layout.calls and role in (SYSTEM, USER)))
            or (calls and not (layout.calls and role == ASSISTANT))
        ):
            return ODD, run, 0, 0
        systems |= role == SYSTEM
        if layout.trained[role]:
            last_trained = i
    if last_trained == ODD:
        return ODD, run, 0, 0
    if not systems:
        to = put_part(out, to, layout, others + DEFAULT)
        specials += layout.specials[2, 0]
    for i in range(count):
        role, last = roles[i], i == count - 1
        part = PARTS * role
        to = put_part(out, to, layout, part + HEAD)
        begin, end = spans[i, 2 * CONTENT], spans[i, 2 * CONTENT + 1]
        learn = layout.trained[role] and (i == last_trained or not layout.last_only)
        if learn:
            if role == ASSISTANT and layout.where[others + GIVEN] < layout.where[others + GIVEN + 1]:
                if begins_with(content, begin, end, layout, others + GIVEN):
                    to = put_part(out, to, layout, others + GIVEN)
                    begin += layout.where[others + GIVEN + 1] - layout.where[others + GIVEN]
                else:
                    unprompted += 1
            edges[run] = to
            run += 1
        to = put(out, to, content, begin, end)
        stop = part + (LAST_STOP if last else STOP)
        if spans[i, 2 * FUNCTIONS] != ODD:
            to = put_part(out, to, layout, others + (OFFERED if role == SYSTEM else OFFERED_TO_USER))
            to = put(out, to, offered, spans[i, 2 * FUNCTIONS], spans[i, 2 * FUNCTIONS + 1])
            to = put_part(out, to, layout, others + END_OF_OFFERED)
            if role == SYSTEM:
                stop = others + END_OF_TURN  # without the words that there are no functions
        if spans[i, 2 * CALLS] != ODD:
            to = put_part(out, to, layout, others + CALLED)
            to = put(out, to, called, spans[i, 2 * CALLS], spans[i, 2 * CALLS + 1])
            to = put_part(out, to, layout, others + END_OF_CALLED)
        to = put_part(out, to, layout, stop)
        if learn:
            edges[run] = to
            run += 1
        to = put_part(out, to, layout, part + (LAST_GAP if last else GAP))
        specials += layout.specials[1 if last else 0, role]
    if edges[run - 1] < to:
        edges[run] = to
        run += 1
    return to, run, specials, unprompted


@compiled
def log(count, roles, spans, content, names, said, to):
    """What `name_conversation` takes the digest of: roles and contents, with a zero byte between each."""
    for i in range(count):
        if i:
            said[to] = 0
            to += 1
        role = roles[i]
        to = put(said, to, names.role_words, names.role_where[role], names.role_where[role + 1])
        said[to] = 0
        to = put(said, to + 1, content, spans[i, 2 * CONTENT], spans[i, 2 * CONTENT + 1])
    return to


@compiled
def keep(row, made, documents, runs, rows, first, specials, lacking):
    """Notes a document that `write` has made, behind the others."""
    rows[documents] = row
    first[documents] = runs
    specials[documents] = made[2]
    lacking[documents] = made[3]


@compiled
def read_lines(
    data, words, line_ends, names, layout, text, text_words, roles, spans, out, said, odd, rows, first, edges, specials, lacking, said_ends
):  # fmt: skip
    """Every line, as a document or, by its number, in `odd`. Returns the number of documents, odd lines, runs, and bytes in `out`."""
    documents, odds, runs, to, spoken, at = 0, 0, 0, 0, 0, 0
    for line in range(len(line_ends)):
        made = (ODD, runs, 0, 0)
        count = scan(data, words, at, line_ends[line], names, text, text_words, roles, spans)
        if count != ODD:
            made = write(layout, count, roles, spans, text_words, text_words, text_words, out, to, edges, runs)
        if made[0] == ODD:
            odd[odds] = line
            odds += 1
        else:
            keep(line, made, documents, runs, rows, first, specials, lacking)
            spoken = log(count, roles, spans, text_words, names, said, spoken)
            said_ends[documents] = spoken
            documents += 1
            to, runs = made[0], made[1]
        at = line_ends[line] + 1
    first[documents] = runs
    return documents, odds, runs, to


@compiled
def read_columns(
    begins, skipped, speakers, texts, where, absent, names, layout, roles, spans, out, said, odd, rows, first, edges, specials, lacking, said_ends
):  # fmt: skip
    """The same for rows of messages begins[row] … begins[row + 1] - 1, less those to be `skipped`. `speakers` are the bytes of the roles;
    texts[field] are the words of a field, its texts lie between where[field, message] and where[field, message + 1]."""
    documents, odds, runs, to, spoken = 0, 0, 0, 0, 0
    for row in range(len(skipped)):
        made, count = (ODD, runs, 0, 0), begins[row + 1] - begins[row]
        plain = not skipped[row]
        for i in range(count if plain else 0):
            message = begins[row] + i
            roles[i] = find_name(speakers, where[ROLE, message], where[ROLE, message + 1], names.role, names.role_where)
            plain &= roles[i] != ODD
            for field in range(ROLE):
                missing = absent[field, message]
                spans[i, 2 * field] = ODD if missing else where[field, message]
                spans[i, 2 * field + 1] = ODD if missing else where[field, message + 1]
        if plain:
            made = write(layout, count, roles, spans, texts[0], texts[1], texts[2], out, to, edges, runs)
        if made[0] == ODD:
            odd[odds] = row
            odds += 1
        else:
            keep(row, made, documents, runs, rows, first, specials, lacking)
            spoken = log(count, roles, spans, texts[0], names, said, spoken)
            said_ends[documents] = spoken
            documents += 1
            to, runs = made[0], made[1]
    first[documents] = runs
    return documents, odds, runs, to
