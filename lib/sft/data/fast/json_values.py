"""Writes tool calls and tools that are still in lines of JSON as templates write them, in compiled code: `read_values`.

In: `Messages` of lines. Out: the texts of calls and tools, behind the other texts, with the JSON of `sft.data.fast.json_copy`. Fields of calls
other than OpenAI's and everything unusual are left to `sft.data.fast.values`.

    {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\\"x\\":1}"}}
    ^ find_fields                               ^ find_fields                ^ write_arguments      named templates: f(x=1)     Jinja: f, {"x": 1}, c
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.data.compiled import compiled, inlined
from sft.data.fast.json_copy import copy_value, skip_blank
from sft.data.fast.json_rows import next_field, read_name
from sft.data.fast.json_text import (
    CLOSE_LIST,
    CLOSE_OBJECT,
    COMMA,
    OPEN_LIST,
    OPEN_OBJECT,
    QUOTE,
    SPACE,
    is_word,
    read_string,
    skip_space,
    skip_value,
)
from sft.data.fast.messages import CALL_ID, CALLS, END, FIRST_RESULT, NONE, START, TOOL_CALLS, TOOLS, Names, U
from sft.data.fast.messages import NAME as RESULT_NAME
from sft.data.fast.turns import copy

NEWLINE, OPEN, CLOSE = b"\n()"
ID, TYPE, FUNCTION = range(3)
NAME, ARGUMENTS = range(2)
CALL_NAME, CALL_ARGUMENTS, CALL_NUMBER = range(3)
"""The texts of a call in `Messages.calls`."""
HAS_CALL, HAS_ID, HAS_TYPE = 1, 2, 4
"""Bits of `ValueTexts.held`."""
SHORTEST_CALL = len('{"function":{"name":"f","arguments":""}}')


class ValueTexts(NamedTuple):
    """What `read_values` fills and needs."""

    as_objects: bool
    """Write JSON for Jinja templates, not the text of the named ones."""
    checks_results: bool
    """Whether a row whose results do not follow the order of its calls is left to Python."""
    call_fields: Names
    function_fields: Names
    tags: Names
    """What the named templates write before and after tools."""
    held: NDArray[np.uint8]
    """[rows] The fields of its calls that hold something."""
    tools_are_read: NDArray[np.bool_]
    """[rows] Whether the tools of a row are texts now."""
    other_columns: np.uint64
    """The columns of tools whose values only Python can read."""
    names: NDArray[np.int64]
    """[levels, names, 2] Scratch: the names of the objects around a value."""
    found: NDArray[np.int64]
    """[2, fields] Scratch: where the values of a call and of its function start."""


@inlined
def unescape(source: Any, at: int, spare: Any) -> int:
    """Writes the string after the quote at source[at - 1] to the spare buffer, with a zero byte after it. Returns where it ends there; NONE
    for a string that is no JSON."""
    at, end = read_string(source, at, spare, 0)
    if at != NONE:
        spare.words[U(end)] = np.uint64(0)
    return int(end)


@inlined
def write_arguments(source: Any, at: int, spare: Any, target: Any, to: int, values: Any) -> int:
    """Writes the arguments of a call, an object or its JSON as a string. Returns where they end; NONE for what is left to Python."""
    data, as_pairs, end = source.bytes, not values.as_objects, NONE
    if data[U(at)] == OPEN_OBJECT and data[U(skip_blank(data, at + 1))] != CLOSE_OBJECT:
        return int(copy_value(source, at, target, to, values.names, False, as_pairs)[1])
    if data[U(at)] == QUOTE:
        end = unescape(source, at + 1, spare)
    at = skip_blank(spare.bytes, 0)
    if end == NONE or spare.bytes[U(at)] != OPEN_OBJECT:
        return NONE
    at, to = copy_value(spare, at, target, to, values.names, True, as_pairs)
    return to if at != NONE and skip_blank(spare.bytes, at) == end else NONE


@inlined
def find_fields(source: Any, at: int, target: Any, to: int, names: Any, found: Any) -> int:
    """Finds where the values of an object start. Returns where the object ends; NONE when it has other fields, or one of them twice."""
    seen, closed = 0, source.bytes[U(at)] != OPEN_OBJECT
    if closed:
        return NONE
    found[: len(names.starts) - 1] = NONE
    at += 1
    while not closed:
        which, at, seen = read_name(source, at, names, seen)
        if at == NONE or which == NONE:
            return NONE
        found[which] = at
        at = skip_value(source, at, target, to)[0]
        if at == NONE:
            return NONE
        at, closed = next_field(source, at)
        if at == NONE:
            return NONE
    return int(at)


@inlined
def is_filled_string(data: Any, at: int) -> bool:
    """Whether a string that is not empty starts there."""
    return bool(at != NONE and data[U(at)] == QUOTE and data[U(at + 1)] != QUOTE)


@inlined
def read_call(source: Any, at: int, spare: Any, target: Any, to: int, values: Any, call: Any) -> Any:
    """Writes one call. Fills `call` [3, 2] for Jinja templates. Returns where it ends in both, and which fields it has; NONE for a call that is left to
    Python."""
    data = source.bytes
    of_call, of_function = values.found[0], values.found[1]
    after = find_fields(source, at, target, to, values.call_fields, of_call)
    if after == NONE or of_call[FUNCTION] == NONE:
        return NONE, NONE, 0
    held = HAS_CALL
    if of_call[TYPE] != NONE:
        held |= HAS_TYPE
        if not is_word(data, of_call[TYPE], b'"function"'):
            return NONE, NONE, 0
    if find_fields(source, of_call[FUNCTION], target, to, values.function_fields, of_function) == NONE:
        return NONE, NONE, 0
    if not is_filled_string(data, of_function[NAME]) or of_function[ARGUMENTS] == NONE:
        return NONE, NONE, 0
    start = to
    to = read_string(source, of_function[NAME] + 1, target, to)[1]
    call[CALL_NAME, START], call[CALL_NAME, END] = start, to
    target.bytes[U(to)] = OPEN
    start = to + 1
    to = write_arguments(source, of_function[ARGUMENTS], spare, target, start, values)
    if to == NONE:
        return NONE, NONE, 0
    call[CALL_ARGUMENTS, START], call[CALL_ARGUMENTS, END] = start, to
    if to - start == 2:  # an empty object is none
        call[CALL_ARGUMENTS, START] = NONE
    target.bytes[U(to)] = CLOSE
    to += 1
    call[CALL_NUMBER, START] = call[CALL_NUMBER, END] = NONE
    if of_call[ID] != NONE:
        held |= HAS_ID
        if not is_filled_string(data, of_call[ID]):
            return NONE, NONE, 0
        if values.as_objects:
            start = to
            to = read_string(source, of_call[ID] + 1, target, to)[1]
            call[CALL_NUMBER, START], call[CALL_NUMBER, END] = start, to
    return after, to, held


@inlined
def same_text(data: Any, at: int, messages: Any, span: Any) -> bool:
    """Whether the string at data[at], without escapes, is a text of the messages."""
    length = span[END] - span[START]
    same = at != NONE and data[U(at + 1 + length)] == QUOTE
    for k in range(length if same else 0):
        same &= data[U(at + 1 + k)] == messages.text[U(span[START] + k)] & np.uint64(0xFF)
    return bool(same)


@compiled
def fits_result(data: Any, messages: Any, result: int, end: int, values: Any) -> bool:
    """Whether a message before `end` is no result, or has the id of the call that was read last, or without an id its name, or neither."""
    if result >= end or messages.roles[result] < FIRST_RESULT:
        return True
    for kind, at in ((CALL_ID, values.found[0, ID]), (RESULT_NAME, values.found[1, NAME])):
        if messages.spans[result, kind, END] > messages.spans[result, kind, START]:
            return same_text(data, at, messages, messages.spans[result, kind])
    return True


@compiled
def has_more_results(messages: Any, message: int, end: int) -> bool:
    """Whether a result with an id or a name is among the results from `message` on, before `end`."""
    while message < end and messages.roles[message] >= FIRST_RESULT:
        spans = messages.spans[message]
        if spans[CALL_ID, END] > spans[CALL_ID, START] or spans[RESULT_NAME, END] > spans[RESULT_NAME, START]:
            return True
        message += 1
    return False


@inlined
def read_calls(
    source: Any, row: int, message: int, spare: Any, target: Any, to: int, values: Any, messages: Any, count: int
) -> Any:
    """Writes the calls of a message. Returns where they end, their number with those before them, and which fields they have; NONE for calls that are left
    to Python."""
    data, all_held, result, last = source.bytes, 0, message + 1, messages.first[row + 1]
    at, end = messages.spans[message, TOOL_CALLS, START], messages.spans[message, TOOL_CALLS, END]
    while True:
        at = skip_space(data, at + 1)  # after the bracket or a comma
        at, to, held = read_call(source, at, spare, target, to, values, messages.calls[count])
        if at == NONE:
            return NONE, 0, 0
        count += 1
        all_held |= held
        if values.checks_results and not fits_result(data, messages, result, last, values):
            messages.is_plain[row] = False
        result += 1
        at = skip_space(data, at)
        if data[U(at)] != COMMA:
            more_calls = message + 1 < last and messages.spans[message + 1, TOOL_CALLS, START] != NONE
            if values.checks_results and (more_calls or has_more_results(messages, result, last)):
                messages.is_plain[row] = False
            return (to if at + 1 == end else NONE), count, all_held
        target.bytes[U(to)] = NEWLINE
        to += 1


@inlined
def read_list(
    source: Any, at: int, target: Any, to: int, values: Any, messages: Any, count: int, takes_null: bool
) -> Any:
    """Writes a list of tools. Returns where it ends in both, and the number of tools; NONE for tools that are left to Python."""
    data, text, before = source.bytes, target.bytes, OPEN_LIST
    if data[U(at)] != OPEN_LIST:
        return NONE, NONE, 0
    while data[U(at)] != CLOSE_LIST:
        if data[U(at)] != before:
            return NONE, NONE, 0
        at = skip_blank(data, at + 1)
        if data[U(at)] != OPEN_OBJECT:
            return NONE, NONE, 0
        text[U(to)] = before
        text[U(to + 1)] = SPACE  # after a comma; the first tool overwrites it
        start = to + (1 if before == OPEN_LIST else 2)
        at, to = copy_value(source, at, target, start, values.names, takes_null, False)
        if at == NONE:
            return NONE, NONE, 0
        messages.tools[count, START], messages.tools[count, END] = start, to
        count += 1
        at, before = skip_blank(data, at), COMMA
    text[U(to)] = CLOSE_LIST
    return at + 1, to + 1, count


@inlined
def read_tools(source: Any, row: int, spare: Any, target: Any, to: int, values: Any, messages: Any, count: int) -> Any:
    """Writes the tools of a row. Returns where they end, and their number with those before them; NONE for tools that are left to Python."""
    at = messages.row_spans[row, TOOLS, START]
    if source.bytes[U(at)] != QUOTE:
        _, to, count = read_list(source, at, target, to, values, messages, count, False)
        return to, count
    end = unescape(source, at + 1, spare)
    if end == NONE:
        return NONE, 0
    at, to, count = read_list(spare, skip_blank(spare.bytes, 0), target, to, values, messages, count, True)
    return (to if at != NONE and skip_blank(spare.bytes, at) == end else NONE), count


@inlined
def copy_tag(target: Any, to: int, tags: Any, tag: int) -> int:
    return copy(target.words, to, tags.words, tags.starts[tag], tags.starts[tag + 1])


@compiled
def read_values(source: Any, spare: Any, target: Any, to: int, values: Any, messages: Any) -> Any:
    """Writes the calls and tools of plain rows to target[to]. In: Buffers of the lines, of scratch and of the texts, ValueTexts, Messages, whose spans of
    calls then are NONE. Returns where they end, and the number of calls and of tools for Jinja templates."""
    num_calls, num_tools = 0, 0
    for row in range(len(messages.is_plain)):
        for message in range(messages.first[row], messages.first[row + 1]):
            if messages.spans[message, TOOL_CALLS, START] == NONE:
                continue
            end, count, held = read_calls(source, row, message, spare, target, to, values, messages, num_calls)
            if end == NONE:
                continue
            if values.as_objects:
                messages.call_spans[message, START], messages.call_spans[message, END] = num_calls, count
                num_calls = count
            else:
                messages.spans[message, CALLS, START], messages.spans[message, CALLS, END] = to, end
            messages.spans[message, TOOL_CALLS, START] = NONE
            values.held[row] |= held
            to = end
        is_other = (messages.columns_held[row] & values.other_columns) != np.uint64(0)
        if not messages.is_plain[row] or messages.row_spans[row, TOOLS, START] == NONE or is_other:
            continue
        start = copy_tag(target, to, values.tags, 0)
        end, count = read_tools(source, row, spare, target, start, values, messages, num_tools)
        if end == NONE:
            continue
        end = copy_tag(target, end, values.tags, 1)
        messages.tool_spans[row, START], messages.tool_spans[row, END] = num_tools, count
        messages.row_spans[row, TOOLS, START], messages.row_spans[row, TOOLS, END] = to, end
        to, num_tools = end, count
        values.tools_are_read[row] = True
    return to, num_calls, num_tools
