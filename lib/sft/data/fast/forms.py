"""Writes messages as a Jinja template does, in compiled code: `find_forms`, `write_forms`.

In: `Messages`, and plans of forms (`sft.data.fast.plans`). Two rows have the same form when they differ only in their texts. Out: a hash of
the form of each row with its parts, the texts that vary; and the text of the documents, in which the parts stand between the literals
of the plan. White space at the ends of a text, and the constants that the template asks texts for, belong to the form:

    text    "\\n<think>\\nhm\\n</think>\\n\\nHello."     form    "\\n<think>\\n□\\n</think>\\n\\n□"     parts    hm, Hello.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.chat.rows import RowReader
from sft.data.compiled import WORD, compiled, inlined, mix
from sft.data.fast.contents import has_unclear, is_blank
from sft.data.fast.json_copy import write_escape
from sft.data.fast.json_values import CALL_ARGUMENTS, CALL_NAME, CALL_NUMBER
from sft.data.fast.messages import (
    END,
    FUNCTIONS,
    NONE,
    NUM_TEXTS,
    ROLE_NAMES,
    START,
    Names,
    U,
)
from sft.data.fast.turns import (
    Written,
    copy,
    copy_text,
    count_empty_answers,
    find_last_by_rule,
    has_text,
    is_trained,
    trains_something,
    write_hashed,
)

PLACE = 256
"""Stands for a part in a form; bytes stand for themselves."""
PRIVATE = 0xF3
"""The first byte of private-use characters, which stand for texts in a plan."""
UNUSUAL = np.uint64(0)
"""The key of a row whose form is not known here."""
AS_TEXT, AS_JSON = range(2)


class FormLayout(NamedTuple):
    """What texts are searched for, and the recipe's rules of what is trained."""

    is_trained: NDArray[np.uint8]
    """[roles]"""
    last_only: bool
    rejects_empty: bool
    firsts: NDArray[np.uint64]
    """The bytes that a constant, a special token or a private-use character starts with, each eight times."""
    specials: Names
    constants: Names
    """Longest first."""
    literal_tools: bool
    """Whether the template looks into the tools, so that they belong to the form."""

    @classmethod
    def of(
        cls, reader: RowReader, specials: Sequence[str], constants: Sequence[str], literal_tools: bool
    ) -> FormLayout:
        constants = sorted(constants, key=lambda text: (-len(text.encode()), text))
        firsts = sorted({PRIVATE, *(text.encode()[0] for text in (*specials, *constants))})
        return cls(
            np.array([role in reader.train_roles for role in ROLE_NAMES], dtype=np.uint8),
            reader.last_only,
            reader.rejects_empty,
            np.array([int.from_bytes(bytes([first]) * WORD, "little") for first in firsts], dtype=np.uint64),
            Names.of(list(specials)),
            Names.of(constants),
            literal_tools,
        )


class Forms(NamedTuple):
    """What `find_forms` fills."""

    keys: NDArray[np.uint64]
    """[rows] The hash of each row's form, or UNUSUAL."""
    first_part: NDArray[np.int64]
    """[rows + 1] The first part of each row, then the number of all parts."""
    parts: NDArray[np.int64]
    """[parts, 2] Where each part starts and ends in the text of the messages."""
    empty_answers: NDArray[np.int64]
    """[rows] Trained answers without text and calls."""


class PlanTable(NamedTuple):
    """Plans, one after another. An operation writes a literal and then a part."""

    literals: Names
    """The literal of each operation."""
    part: NDArray[np.int64]
    """[operations] Which part of the row follows; NONE for none."""
    how: NDArray[np.int64]
    """[operations] AS_TEXT, or AS_JSON for a part that is written inside a string of JSON."""
    ends_run: NDArray[np.int64]
    """[operations] Whether a run ends after it."""
    first: NDArray[np.int64]
    """[plans + 1] The first operation of each plan, then the number of all operations."""
    num_specials: NDArray[np.int64]
    """[plans]"""
    answers_without_prefix: NDArray[np.int64]
    """[plans]"""


@inlined
def byte_at(words: Any, at: int) -> Any:
    return np.int64(words[U(at)] & np.uint64(0xFF))


@inlined
def is_wide_blank(words: Any, at: int) -> bool:
    """Whether another character that str.strip removes begins at `at`."""
    first, second, third = byte_at(words, at), byte_at(words, at + 1), byte_at(words, at + 2)
    if first == 0xC2:
        return bool(second == 0x85 or second == 0xA0)
    if first == 0xE1:
        return bool(second == 0x9A and third == 0x80)
    if first == 0xE2:
        is_general = second == 0x80 and (0x80 <= third <= 0x8A or third == 0xA8 or third == 0xA9 or third == 0xAF)
        return bool(is_general or (second == 0x81 and third == 0x9F))
    return bool(first == 0xE3 and second == 0x80 and third == 0x80)


@inlined
def has_wide_edge(words: Any, start: int, end: int) -> bool:
    """Whether words[start:end] starts or ends with a blank that is no ASCII character. Compiled code does not tell where it goes."""
    if is_wide_blank(words, start):
        return True
    return bool(
        (end - start >= 2 and is_wide_blank(words, end - 2)) or (end - start >= 3 and is_wide_blank(words, end - 3))
    )


@inlined
def starts_here(words: Any, at: int, names: Any, name: int, first: int, last: int) -> bool:
    """Whether the bytes first … last - 1 of a name are at `at`."""
    start, same = names.starts[name], True
    for k in range(first, last):
        same &= byte_at(words, at + k - first) == names.bytes[U(start + k)]
    return bool(same)


@inlined
def name_at(words: Any, at: int, end: int, names: Any) -> int:
    """The length of the first of the names that is at `at` and ends before `end`; 0 without one."""
    for name in range(len(names.starts) - 1):
        length = names.starts[name + 1] - names.starts[name]
        if at + length <= end and starts_here(words, at, names, name, 0, length):
            return int(length)
    return 0


@inlined
def touches_constant(words: Any, start: int, end: int, names: Any) -> bool:
    """Whether words[start:end] ends with the beginning of a constant or starts with the end of one."""
    for name in range(len(names.starts) - 1):
        length = names.starts[name + 1] - names.starts[name]
        for k in range(1, length):
            if k <= end - start and starts_here(words, end - k, names, name, 0, k):
                return True
            if length - k <= end - start and starts_here(words, start, names, name, k, length):
                return True
    return False


@inlined
def next_first(firsts: Any, words: Any, at: int, end: int) -> int:
    """The position of the next byte that something searched for can start with; `end` or more without one."""
    ones, highs = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
    while at < end:
        found = np.uint64(0)
        for k in range(len(firsts)):
            difference = words[U(at)] ^ firsts[k]
            found |= (difference - ones) & ~difference
        found &= highs
        if found:
            while not found & np.uint64(0x80):
                found >>= np.uint64(8)
                at += 1
            return at
        at += WORD
    return end


@inlined
def add_part(layout: Any, words: Any, start: int, end: int, key: Any, forms: Any, count: int) -> Any:
    """Adds words[start:end] as a part. Returns the key, or UNUSUAL, and the number of parts."""
    if has_wide_edge(words, start, end) or touches_constant(words, start, end, layout.constants):
        return UNUSUAL, count
    forms.parts[count, START], forms.parts[count, END] = start, end
    return mix(key, PLACE), count + 1


@compiled
def find_parts(layout: Any, words: Any, start: int, end: int, key: Any, forms: Any, count: int) -> Any:
    """Adds words[start:end] to the form `key`, and its parts to `forms.parts`. Returns the key, or UNUSUAL, and the number of parts."""
    begin, stop = start, end
    while begin < stop and is_blank(byte_at(words, begin)):
        key = mix(key, byte_at(words, begin))
        begin += 1
    while stop > begin and is_blank(byte_at(words, stop - 1)):
        stop -= 1
    at = part = begin
    while True:
        at = next_first(layout.firsts, words, at, stop)
        if at >= stop:
            break
        if byte_at(words, at) == PRIVATE or name_at(words, at, stop, layout.specials):
            return UNUSUAL, count
        length = name_at(words, at, stop, layout.constants) if at >= part else 0
        if length:
            gap, after = at, at + length
            while gap > part and is_blank(byte_at(words, gap - 1)):
                gap -= 1
            while after < stop:
                if is_blank(byte_at(words, after)):
                    after += 1
                    continue
                length = name_at(words, after, stop, layout.constants)
                if not length:
                    break
                after += length
            if gap > part:
                key, count = add_part(layout, words, part, gap, key, forms, count)
                if key == UNUSUAL:
                    return UNUSUAL, count
            for place in range(gap, after):
                key = mix(key, byte_at(words, place))
            part = after
        at += 1
    if stop > part:
        key, count = add_part(layout, words, part, stop, key, forms, count)
        if key == UNUSUAL:
            return UNUSUAL, count
    for place in range(stop, end):
        key = mix(key, byte_at(words, place))
    return key, count


@inlined
def find_calls(layout: Any, messages: Any, message: int, key: Any, forms: Any, count: int) -> Any:
    """Adds the calls of a message: the parts of names and ids, and the arguments."""
    for call in range(messages.call_spans[message, START], messages.call_spans[message, END]):
        for kind in (CALL_NAME, CALL_NUMBER):
            start, end = messages.calls[call, kind, START], messages.calls[call, kind, END]
            key = mix(key, 1000 + 2 * kind + (start != NONE))
            if start != NONE:
                key, count = find_parts(layout, messages.text, start, end, key, forms, count)
                if key == UNUSUAL:
                    return UNUSUAL, count
        key, count = find_object(layout, messages.text, messages.calls[call, CALL_ARGUMENTS], key, forms, count)
        if key == UNUSUAL:
            return UNUSUAL, count
    return key, count


@inlined
def find_object(layout: Any, words: Any, span: Any, key: Any, forms: Any, count: int) -> Any:
    """Adds an object as JSON, which is one part, whatever is in it; an empty one is none."""
    start, end = span[START], span[END]
    if start == NONE:
        return mix(key, 1020), count
    at = next_first(layout.firsts, words, start, end)
    while at < end:
        if byte_at(words, at) == PRIVATE or name_at(words, at, end, layout.specials):
            return UNUSUAL, count
        at = next_first(layout.firsts, words, at + 1, end)
    forms.parts[count, START], forms.parts[count, END] = start, end
    return mix(key, 1021), count + 1


@inlined
def find_form(layout: Any, messages: Any, row: int, last_by_rule: int, forms: Any, count: int) -> Any:
    """The form of a row, or UNUSUAL, and the number of parts."""
    key = mix(np.uint64(1), messages.first[row + 1] - messages.first[row])
    has_tools = messages.tool_spans[row, START] < messages.tool_spans[row, END]
    for message in range(messages.first[row], messages.first[row + 1]):
        train = is_trained(layout, messages, message, last_by_rule)
        key = mix(mix(key, 2 * messages.roles[message] + train), messages.forms[message])
        if has_text(messages, message, FUNCTIONS) and has_tools:  # Python compares the two
            return UNUSUAL, count
        for kind in range(NUM_TEXTS):
            if not has_text(messages, message, kind):
                continue
            start, end = messages.spans[message, kind, START], messages.spans[message, kind, END]
            key, count = find_parts(layout, messages.text, start, end, mix(key, 2000 + kind), forms, count)
            if key == UNUSUAL:
                return UNUSUAL, count
        key, count = find_calls(layout, messages, message, key, forms, count)
        if key == UNUSUAL:
            return UNUSUAL, count
    for tool in range(messages.tool_spans[row, START], messages.tool_spans[row, END]):
        key, after = find_object(layout, messages.text, messages.tools[tool], mix(key, 3000), forms, count)
        if key == UNUSUAL:
            return UNUSUAL, count
        if not layout.literal_tools:
            count = after
            continue
        for place in range(messages.tools[tool, START], messages.tools[tool, END]):
            key = mix(key, byte_at(messages.text, place))
    return key, count


@compiled
def find_forms(layout: Any, messages: Any, forms: Any) -> None:
    """Fills `Forms`. In: FormLayout, Messages."""
    count = 0
    for row in range(len(messages.is_plain)):
        first, end = messages.first[row], messages.first[row + 1]
        forms.first_part[row], forms.keys[row] = count, UNUSUAL
        forms.empty_answers[row] = 0
        if not messages.is_plain[row] or has_unclear(messages, row, first, end):
            continue
        last = find_last_by_rule(layout, messages, first, end)
        if not trains_something(layout, messages, first, end, last):
            continue
        num_empty = count_empty_answers(layout, messages, first, end, last)
        if num_empty and layout.rejects_empty:
            continue
        forms.empty_answers[row] = num_empty
        forms.keys[row], count = find_form(layout, messages, row, last, forms, count)
    forms.first_part[len(messages.is_plain)] = count


@compiled
def measure_forms(plans: Any, plan_of: Any, forms: Any) -> Any:
    """The most bytes of the documents, and the number of their runs."""
    size, runs = 0, 0
    for row in range(len(plan_of)):
        plan = plan_of[row]
        if plan == NONE:
            continue
        for operation in range(plans.first[plan], plans.first[plan + 1]):
            size += plans.literals.starts[operation + 1] - plans.literals.starts[operation]
            runs += plans.ends_run[operation]
            if plans.part[operation] != NONE:
                part = forms.parts[forms.first_part[row] + plans.part[operation]]
                size += (part[END] - part[START]) * (6 if plans.how[operation] == AS_JSON else 1)
    return size, runs


@inlined
def copy_escaped(target: Any, to: int, source: Any, start: int, end: int) -> int:
    """Copies text as it is written inside a string of JSON. Returns where the copy ends."""
    for at in range(start, end):
        byte = byte_at(source, at)
        if byte == 34 or byte == 92 or byte < 32:
            to = write_escape(target, to, byte)
        else:
            target[U(to)] = np.uint64(byte)
            to += 1
    return to


@compiled
def write_forms(plans: Any, plan_of: Any, roles: Any, messages: Any, forms: Any, out: Any) -> Any:
    """Writes the documents of the rows that have a plan. In: PlanTable, the plan of each row or NONE, the roles' Names, Messages, Forms,
    DocumentArrays. Returns `Written`."""
    documents, odd, runs, size, hashed_size = 0, 0, 0, 0, 0
    for row in range(len(plan_of)):
        plan = plan_of[row]
        if plan == NONE:
            out.odd[odd] = row
            odd += 1
            continue
        out.rows[documents], out.first_run[documents] = row, runs
        for operation in range(plans.first[plan], plans.first[plan + 1]):
            start, end = plans.literals.starts[operation], plans.literals.starts[operation + 1]
            size = copy(out.text, size, plans.literals.words, start, end)
            if plans.part[operation] != NONE:
                part = forms.parts[forms.first_part[row] + plans.part[operation]]
                if plans.how[operation] == AS_JSON:
                    size = copy_escaped(out.text, size, messages.text, part[START], part[END])
                else:
                    size = copy_text(out.text, size, messages, part)
            if plans.ends_run[operation]:
                out.run_ends[runs] = size
                runs += 1
        out.num_specials[documents] = plans.num_specials[plan]
        out.answers_without_prefix[documents] = plans.answers_without_prefix[plan]
        out.empty_answers[documents] = forms.empty_answers[row]
        hashed_size = write_hashed(
            messages, messages.first[row], messages.first[row + 1], roles, out.hashed, hashed_size
        )
        out.hashed_ends[documents] = hashed_size
        documents += 1
    out.first_run[documents] = runs
    return Written(documents, odd, runs, size)
