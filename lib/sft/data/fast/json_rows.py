"""Reads rows of messages from lines of JSON in compiled code: `read_rows`.

In: lines, each with its newline. Out: `Messages`, and their texts, unescaped, in one buffer. A row is left out (`is_plain` is
false) when it is not plain, and when it has an oddity of JSON: a field twice, an escaped name, half of a surrogate pair.

    {"messages": [{"role": "user", "content": "Hi"}], "id": 7}
    ^ read_row    ^ read_messages  ^ read_field                ^ skip_value
                  ^ read_message
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.compiled import compiled, inlined
from sft.data.fast.json_text import (
    CLOSE_LIST,
    CLOSE_OBJECT,
    COLON,
    COMMA,
    OPEN_LIST,
    OPEN_OBJECT,
    QUOTE,
    end_of_plain_string,
    find_name,
    is_word,
    read_string,
    skip_space,
    skip_value,
)
from sft.data.fast.messages import (
    CONTENT,
    END,
    MAX_MESSAGES,
    NONE,
    QUIET_FIELDS,
    ROLE,
    ROLE_NAMES,
    START,
    Names,
    RowNames,
)

LAST_QUIET = ROLE + len(QUIET_FIELDS)
SHORTEST_MESSAGE = len('{"role":"","content":""},')


class FieldNames(NamedTuple):
    """The names that a row and its messages are read by."""

    columns: Names
    """The column of messages, columns that must hold nothing, and from `first_passed[0]` on those that are passed over."""
    fields: Names
    """TEXT_FIELDS, the role, QUIET_FIELDS, EMPTY_FIELDS, and from `first_passed[1]` on those that are passed over."""
    roles: Names
    first_passed: NDArray[np.int64]

    @classmethod
    def of(cls, names: RowNames) -> FieldNames:
        return cls(Names.of(names.columns), Names.of(names.fields), Names.of(ROLE_NAMES), np.array(names.first_passed))


@inlined
def read_name(source: Any, at: int, names: Any, seen: int) -> Any:
    """A field's name and colon. Returns the number of the name (NONE for an unknown one), where the value starts, and `seen`, the
    bits of the names so far. The position is NONE when this is no name, or when the name was seen before."""
    data = source.bytes
    at = skip_space(data, at)
    if data[at] != QUOTE:
        return NONE, NONE, seen
    end = end_of_plain_string(data, at + 1)
    if end == NONE:
        return NONE, NONE, seen
    name = find_name(data, at + 1, end, names)
    at = skip_space(data, end + 1)
    if data[at] != COLON or (name != NONE and seen >> name & 1):
        return NONE, NONE, seen
    return name, skip_space(data, at + 1), seen | (1 << name if name != NONE else 0)


@inlined
def next_field(source: Any, at: int) -> Any:
    """After a value: the position after a comma or a closing brace, and whether it was the brace; NONE for anything else."""
    at = skip_space(source.bytes, at)
    closed = source.bytes[at] == CLOSE_OBJECT
    return (at + 1 if closed or source.bytes[at] == COMMA else NONE), closed


@inlined
def read_field(
    source: Any, at: int, field: int, names: Any, target: Any, to: int, messages: Any, message: int, row: int
) -> Any:
    """The value of a message's field. Returns where it ends, also in `target`; NONE when the row is not plain."""
    data, start = source.bytes, to
    if data[at] == QUOTE and NONE < field < ROLE:
        messages.spans[message, field, START] = to
        at, to = read_string(source, at + 1, target, to)
        messages.spans[message, field, END] = to
        held = to > start
    elif data[at] == QUOTE and field == ROLE:
        end, held = end_of_plain_string(data, at + 1), True
        if end == NONE:
            return NONE, to
        messages.roles[message] = find_name(data, at + 1, end, names.roles)
        at = end + 1
    elif NONE < field <= ROLE:
        return (at + 4 if is_word(data, at, b"null") else NONE), to
    else:
        is_text = data[at] == QUOTE
        at, held = skip_value(source, at, target, to)
        if at == NONE or (held and field < names.first_passed[1] and not (is_text and ROLE < field <= LAST_QUIET)):
            return NONE, to
    if field != NONE and held:
        messages.fields_held[row] |= np.uint64(1) << np.uint64(field)
    return at, to


@inlined
def read_message(source: Any, at: int, names: Any, target: Any, to: int, messages: Any, message: int, row: int) -> Any:
    """One message, after its opening brace. Returns where it ends, also in `target`; NONE when the row is not plain."""
    messages.roles[message] = NONE
    messages.spans[message] = NONE
    seen, closed = 0, False
    while not closed:
        field, at, seen = read_name(source, at, names.fields, seen)
        if at == NONE:
            return NONE, to
        at, to = read_field(source, at, field, names, target, to, messages, message, row)
        if at == NONE:
            return NONE, to
        at, closed = next_field(source, at)
        if at == NONE:
            return NONE, to
    if messages.roles[message] == NONE or messages.spans[message, CONTENT, START] == NONE:
        return NONE, to
    return at, to


@inlined
def read_messages(source: Any, at: int, names: Any, target: Any, to: int, messages: Any, first: int, row: int) -> Any:
    """A list of messages. Returns where it ends, also in `target`, and the number of messages; NONE when the row is not plain."""
    data, count = source.bytes, 0
    if data[at] != OPEN_LIST:
        return NONE, to, 0
    while True:
        at = skip_space(data, at + 1)
        if data[at] != OPEN_OBJECT or count == MAX_MESSAGES:
            return NONE, to, 0
        at, to = read_message(source, at + 1, names, target, to, messages, first + count, row)
        if at == NONE:
            return NONE, to, 0
        count += 1
        at = skip_space(data, at)
        if data[at] != COMMA:
            return (at + 1 if data[at] == CLOSE_LIST else NONE), to, count


@inlined
def read_row(
    source: Any, at: int, end: int, names: Any, target: Any, to: int, messages: Any, first: int, row: int
) -> Any:
    """The line source[at:end]. Returns the number of its messages, and where their texts end in `target`; NONE when it is not plain."""
    data, count, seen, closed = source.bytes, 0, 0, False
    at = skip_space(data, at)
    if data[at] != OPEN_OBJECT:
        return NONE, to
    at += 1
    while not closed:
        column, at, seen = read_name(source, at, names.columns, seen)
        if at == NONE:
            return NONE, to
        if column == 0:
            at, to, count = read_messages(source, at, names, target, to, messages, first, row)
            held = count > 0
        else:
            at, held = skip_value(source, at, target, to)
        if at == NONE or (held and column != 0 and column < names.first_passed[0]):
            return NONE, to
        if held:
            messages.columns_held[row] |= np.uint64(1) << np.uint64(column)
        at, closed = next_field(source, at)
        if at == NONE:
            return NONE, to
    return (count if count and skip_space(data, at) == end else NONE), to


@compiled
def read_rows(source: Any, line_ends: Any, names: Any, target: Any, messages: Any) -> None:
    """Fills `messages` (`Messages`) with the rows of all lines. `source` and `target` are `Buffer`s, `names` are `FieldNames`."""
    start, to, message = 0, 0, 0
    for line in range(len(line_ends)):
        messages.first[line] = message
        messages.columns_held[line] = messages.fields_held[line] = 0
        count, end_of_texts = read_row(source, start, line_ends[line], names, target, to, messages, message, line)
        messages.is_plain[line] = count != NONE
        if count != NONE:
            message += count
            to = end_of_texts
        start = line_ends[line] + 1
    messages.first[len(line_ends)] = np.int64(message)
