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

from sft.chat.messages import CALLERS, SPEAKERS
from sft.data.compiled import compiled, inlined, mix
from sft.data.fast.json_text import (
    CLOSE_LIST,
    CLOSE_OBJECT,
    COLON,
    COMMA,
    OPEN_LIST,
    OPEN_OBJECT,
    QUOTE,
    SPACE,
    ZERO,
    end_of_plain_string,
    find_name,
    is_word,
    read_string,
    skip_space,
    skip_value,
)
from sft.data.fast.messages import (
    ASSISTANT,
    CALLS,
    COMPLETION,
    CONTENT,
    EMPTY,
    END,
    FIRST_RESULT,
    FLAG,
    HARMLESS,
    INPUT,
    INSTRUCTION,
    LIST,
    MASKED,
    MAX_MESSAGES,
    NAME,
    NEVER,
    NONE,
    NUM_TEXTS,
    OUTPUT,
    PASSED,
    PROMPT,
    RESPONSE,
    ROLE,
    ROLE_NAMES,
    START,
    SYSTEM,
    SYSTEM_TEXT,
    THINKING,
    TOOL_CALLS,
    TOOLS,
    USER,
    WEIGHT,
    Names,
    SourceNames,
    U,
)
from sft.recipe.row_fields import HARMLESS_CHARACTERS

LAST_FLAG = MASKED
SHORTEST_MESSAGE = len('"a":"",')
"""A column of text can be a message."""
SPOKEN = {
    **{name: name for name in ROLE_NAMES},
    **{name: role for name, role in SPEAKERS.items() if name not in CALLERS},
}


class FieldNames(NamedTuple):
    """The names that a row and its messages are read by, with their kinds."""

    columns: Names
    column_kinds: NDArray[np.int64]
    fields: Names
    field_kinds: NDArray[np.int64]
    roles: Names
    """The names of speakers."""
    role_of: NDArray[np.int64]
    """The role of each speaker."""
    system_flag: int
    """The flag of a system message that is made of a column: NONE, or NEVER where the recipe trains only the last message."""

    @classmethod
    def of(cls, names: SourceNames, last_only: bool = False) -> FieldNames:
        return cls(
            Names.of(list(names.columns)),
            np.array(list(names.columns.values())),
            Names.of(list(names.fields)),
            np.array(list(names.fields.values())),
            Names.of(list(SPOKEN)),
            np.array([ROLE_NAMES.index(role) for role in SPOKEN.values()]),
            NEVER if last_only else NONE,
        )


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
def read_flag(data: Any, at: int, kind: int) -> Any:
    """The value of a flag, and where it ends; NONE when it is neither true or 1 nor false or 0."""
    value, end = NONE, NONE
    if kind != WEIGHT and is_word(data, at, b"true"):
        value, end = 1, at + 4
    elif kind != WEIGHT and is_word(data, at, b"false"):
        value, end = 0, at + 5
    elif ZERO <= data[at] <= ZERO + 1 and (data[at + 1] in (COMMA, CLOSE_OBJECT) or data[at + 1] <= SPACE):
        value, end = int(data[at]) - ZERO, at + 1
    return (1 - value if kind == MASKED and value != NONE else value), end


@inlined
def is_passed(data: Any, start: int, end: int, kind: int) -> bool:
    """Whether nothing needs to read the value data[start:end]. A harmless field holds no list, no object and no long text."""
    is_list = data[start] == OPEN_LIST or data[start] == OPEN_OBJECT
    return bool(kind == PASSED or (kind == HARMLESS and not is_list and end - start <= HARMLESS_CHARACTERS))


@inlined
def read_field(
    source: Any, at: int, field: int, names: Any, target: Any, to: int, messages: Any, message: int, row: int
) -> Any:
    """The value of a message's field. Returns where it ends, also in `target`, and what it adds to the form of the message; NONE when the
    row is not plain."""
    data, start, held, speaker = source.bytes, at, False, 0
    kind = names.field_kinds[field] if field != NONE else EMPTY
    is_text = data[at] == QUOTE
    if is_text and kind < NUM_TEXTS:
        if messages.spans[message, kind, START] != NONE:
            return NONE, to, 0
        at, end = read_string(source, at + 1, target, to)
        held = end > to
        if held or kind != THINKING:
            messages.spans[message, kind, START], messages.spans[message, kind, END] = to, end
        to = end
    elif is_text and kind == ROLE:
        end = end_of_plain_string(data, at + 1)
        speaker = NONE if end == NONE or messages.roles[message] != NONE else find_name(data, at + 1, end, names.roles)
        if speaker == NONE:
            return NONE, to, 0
        messages.roles[message], held = names.role_of[speaker], True
        at = end + 1
    else:
        at, held = skip_value(source, at, target, to)
        if held and kind == TOOL_CALLS and data[start] == OPEN_LIST:
            messages.spans[message, kind, START], messages.spans[message, kind, END] = start, at
        elif held and FLAG <= kind <= LAST_FLAG:
            value, end = read_flag(data, start, kind)
            if end != at or messages.flags[message] != NONE:
                return NONE, to, 0
            messages.flags[message] = value
        elif at == NONE or (held and not is_passed(data, start, at, kind)):
            return NONE, to, 0
    if field != NONE and held:
        messages.fields_held[row] |= np.uint64(1) << np.uint64(field)
    return at, to, (speaker << 8) + ((field + 1) << 2) + 2 * is_text + held


@inlined
def clear_message(messages: Any, message: int, role: int) -> None:
    """Makes room for a message without texts."""
    messages.roles[message], messages.flags[message], messages.forms[message] = role, NONE, np.uint64(0)
    messages.spans[message] = NONE


@inlined
def read_message(source: Any, at: int, names: Any, target: Any, to: int, messages: Any, message: int, row: int) -> Any:
    """One message, after its opening brace. Returns where it ends, also in `target`; NONE when the row is not plain."""
    clear_message(messages, message, NONE)
    seen, closed, form = 0, False, np.uint64(1)
    while not closed:
        field, at, seen = read_name(source, at, names.fields, seen)
        if at == NONE:
            return NONE, to
        at, to, added = read_field(source, at, field, names, target, to, messages, message, row)
        if at == NONE:
            return NONE, to
        form = mix(form, added)
        at, closed = next_field(source, at)
        if at == NONE:
            return NONE, to
    spans = messages.spans[message]
    if messages.roles[message] == NONE or (spans[CALLS, START] != NONE and spans[TOOL_CALLS, START] != NONE):
        return NONE, to
    if spans[CONTENT, START] == NONE:
        if spans[CALLS, START] == NONE and spans[TOOL_CALLS, START] == NONE:
            return NONE, to
        spans[CONTENT, START], spans[CONTENT, END] = to, to
    messages.forms[message] = form
    return at, to


@inlined
def read_messages(source: Any, at: int, names: Any, target: Any, to: int, messages: Any, first: int, row: int) -> Any:
    """A list of messages. Returns where it ends, also in `target`, and the number of messages; NONE when the row is not plain."""
    data, count = source.bytes, 0
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
def read_column(source: Any, at: int, column: int, names: Any, target: Any, to: int, messages: Any, row: int) -> Any:
    """The value of a column that is not the one of messages. Returns where it ends, also in `target`; NONE when the row is not plain."""
    data, start, held = source.bytes, at, False
    kind = names.column_kinds[column] if column != NONE else EMPTY
    if kind < TOOLS and data[at] == QUOTE:
        if messages.row_spans[row, kind, START] != NONE:
            return NONE, to
        at, end = read_string(source, at + 1, target, to)
        messages.row_spans[row, kind, START], messages.row_spans[row, kind, END] = to, end
        held, to = end > to, end
    else:
        at, held = skip_value(source, at, target, to)
        if at != NONE and held and kind == TOOLS and messages.row_spans[row, TOOLS, START] == NONE:
            messages.row_spans[row, TOOLS, START], messages.row_spans[row, TOOLS, END] = start, at
        elif at == NONE or (held and not is_passed(data, start, at, kind)):
            return NONE, to
    if held:
        messages.columns_held[row] |= np.uint64(1) << np.uint64(column)
    return at, to


@inlined
def is_held(spans: Any, kind: int) -> bool:
    """Whether a text of a row is there and not empty."""
    return bool(spans[kind, END] > spans[kind, START])


@inlined
def add_text(messages: Any, message: int, role: int, flag: int, start: int, end: int) -> None:
    """Makes a message of a text of the row."""
    clear_message(messages, message, role)
    messages.flags[message] = flag
    messages.spans[message, CONTENT, START], messages.spans[message, CONTENT, END] = start, end


@inlined
def join_question(target: Any, spans: Any, to: int) -> int:
    """Writes an instruction, a blank line and its input to target[to]. Returns where they end."""
    for kind in (INSTRUCTION, INPUT):
        if kind == INPUT:
            target.bytes[U(to)] = target.bytes[U(to + 1)] = 10
            to += 2
        for at in range(spans[kind, START], spans[kind, END]):
            target.bytes[U(to)] = target.bytes[U(at)]
            to += 1
    return to


@inlined
def has_known_names(messages: Any, first: int, count: int) -> bool:
    """Whether only results after a call have a name."""
    calls = False
    for message in range(first, first + count):
        spans = messages.spans[message]
        if spans[NAME, END] > spans[NAME, START] and not (calls and messages.roles[message] >= FIRST_RESULT):
            return False
        calls |= spans[CALLS, START] != NONE or spans[TOOL_CALLS, START] != NONE
    return True


@inlined
def finish_row(names: Any, target: Any, to: int, messages: Any, first: int, count: int, row: int) -> Any:
    """Makes messages of the texts of a row. Returns the number of its messages, and where their texts end in `target`; NONE when the row
    is not plain. As in `sft.chat.rows`, a prompt is not trained."""
    spans, system_flag = messages.row_spans[row], names.system_flag
    others = is_held(spans, INSTRUCTION) or is_held(spans, INPUT) or is_held(spans, OUTPUT)
    answer = NONE
    if count:
        if not has_known_names(messages, first, count):
            return NONE, to
        if others or is_held(spans, PROMPT) or is_held(spans, COMPLETION) or is_held(spans, RESPONSE):
            return NONE, to
    elif is_held(spans, PROMPT) and not others:
        answer = COMPLETION
        add_text(messages, first, USER, NEVER, spans[PROMPT, START], spans[PROMPT, END])
    elif is_held(spans, INSTRUCTION) and not is_held(spans, COMPLETION) and spans[PROMPT, START] == NONE:
        answer = OUTPUT
        start, end = spans[INSTRUCTION, START], spans[INSTRUCTION, END]
        if is_held(spans, INPUT):
            start, to = to, join_question(target, spans, to)
            end = to
        add_text(messages, first, USER, NEVER, start, end)
    else:
        return NONE, to
    if answer != NONE:
        system_flag = NEVER
        if (spans[answer, START] == NONE) == (spans[RESPONSE, START] == NONE):
            return NONE, to  # no answer, or two of them
        answer = answer if spans[answer, START] != NONE else RESPONSE
        add_text(messages, first + 1, ASSISTANT, NONE, spans[answer, START], spans[answer, END])
        count = 2
    if is_held(spans, SYSTEM_TEXT):
        if messages.roles[first] == SYSTEM or count == MAX_MESSAGES:
            return NONE, to
        for message in range(first + count, first, -1):
            messages.roles[message] = messages.roles[message - 1]
            messages.flags[message] = messages.flags[message - 1]
            messages.forms[message] = messages.forms[message - 1]
            for kind in range(TOOL_CALLS + 1):
                messages.spans[message, kind, START] = messages.spans[message - 1, kind, START]
                messages.spans[message, kind, END] = messages.spans[message - 1, kind, END]
        add_text(messages, first, SYSTEM, system_flag, spans[SYSTEM_TEXT, START], spans[SYSTEM_TEXT, END])
        count += 1
    return count, to


@inlined
def read_row(
    source: Any, at: int, end: int, names: Any, target: Any, to: int, messages: Any, first: int, row: int
) -> Any:
    """The line source[at:end]. Returns the number of its messages, and where their texts end in `target`; NONE when it is not plain."""
    data, count, seen, closed = source.bytes, 0, 0, False
    messages.columns_held[row] = messages.fields_held[row] = 0
    messages.row_spans[row] = NONE
    at = skip_space(data, at)
    if data[at] != OPEN_OBJECT:
        return NONE, to
    at += 1
    while not closed:
        column, at, seen = read_name(source, at, names.columns, seen)
        if at == NONE:
            return NONE, to
        if column != NONE and names.column_kinds[column] == LIST and data[at] == OPEN_LIST:
            at, to, count = read_messages(source, at, names, target, to, messages, first, row)
            messages.columns_held[row] |= np.uint64(1) << np.uint64(column)
        else:
            at, to = read_column(source, at, column, names, target, to, messages, row)
        if at == NONE:
            return NONE, to
        at, closed = next_field(source, at)
        if at == NONE:
            return NONE, to
    if skip_space(data, at) != end:
        return NONE, to
    return finish_row(names, target, to, messages, first, count, row)


@compiled
def read_rows(source: Any, line_ends: Any, names: Any, target: Any, messages: Any) -> None:
    """Fills `messages` (`Messages`) with the rows of all lines. `source` and `target` are `Buffer`s, `names` are `FieldNames`. Texts are
    in `target`; values of tools and tool calls stay in `source`."""
    start, to, message = 0, 0, 0
    for line in range(len(line_ends)):
        messages.first[line] = message
        count, end_of_texts = read_row(source, start, line_ends[line], names, target, to, messages, message, line)
        messages.is_plain[line] = count != NONE
        if count != NONE:
            message += count
            to = end_of_texts
        start = line_ends[line] + 1
    messages.first[len(line_ends)] = np.int64(message)
