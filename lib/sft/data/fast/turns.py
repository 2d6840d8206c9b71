"""Writes messages as a named template does, in compiled code: `write_documents`.

In: `Messages`, and the template's texts (`TurnLayout`). Out: the text of the documents with the ends of their runs, and the bytes that
`sft.data.batch.conversation_hashes` covers (`DocumentArrays`). Texts are copied eight bytes at a time; what is copied beyond the end of one is overwritten
by the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.chat.named import NamedTemplate
from sft.chat.rows import RowReader
from sft.data.compiled import WORD, compiled, inlined
from sft.data.fast.contents import has_unclear, holds_no_text
from sft.data.fast.messages import (
    ASSISTANT,
    CALLS,
    CONTENT,
    END,
    FUNCTIONS,
    NEVER,
    NONE,
    ROLE_NAMES,
    START,
    SYSTEM,
    THINKING,
    TOOLS,
    USER,
    Names,
    U,
)

# The texts of a layout: PARTS for each role, then OTHERS.
HEAD, STOP, GAP, LAST_STOP, LAST_GAP = range(5)
PARTS = 5
OTHERS = PARTS * len(ROLE_NAMES)
(
    DEFAULT_SYSTEM, SYSTEM_WITH_TOOLS, AFTER_SYSTEM, PREFIX, BEFORE_FUNCTIONS, BEFORE_USER_FUNCTIONS, AFTER_FUNCTIONS, BEFORE_CALLS, AFTER_CALLS,
    BEFORE_THINKING, AFTER_THINKING, END_OF_TURN,
) = range(OTHERS, OTHERS + 12)  # fmt: skip
NOT_LAST, LAST = range(2)


class TurnLayout(NamedTuple):
    """What a template writes, and the recipe's rules of what is trained."""

    texts: Names
    """The texts: PARTS for each role, then the others."""
    has_turn: NDArray[np.uint8]
    """[roles] Whether the template has a turn for the role."""
    is_trained: NDArray[np.uint8]
    """[roles]"""
    num_specials: NDArray[np.int64]
    """[2, roles] Special tokens of a turn, and of a last turn."""
    default_specials: int
    """Special tokens of the default system message."""
    has_default: bool
    """Whether the template writes a system message where there is none."""
    has_calls: bool
    """Whether functions and function_calls have a place."""
    last_only: bool
    """Whether only the last message that could be trained is trained."""
    rejects_empty: bool
    """Whether a trained answer without text and calls makes a row odd."""

    @classmethod
    def of(cls, template: NamedTemplate, reader: RowReader) -> TurnLayout:
        turns = [template.turns.get(role) for role in ROLE_NAMES]
        texts: list[str] = []
        for turn in turns:
            texts += (turn.head, turn.stop, turn.gap, turn.last_stop, turn.last_gap) if turn else [""] * PARTS
        with_tools, after = template.default_system.split("{}") if template.default_system else ("", "")
        texts += [template.default_without_tools, with_tools, after, template.generation_prefix]
        texts += [" <functions>", "\n<functions>", "</functions>", "<function_calls>", "</function_calls>"]
        texts += ["<think>", "</think>"]
        texts += ["<|im_end|>" if "system" in template.turns else ""]
        specials = [
            [turn.specials if turn else 0 for turn in turns],
            [turn.last_specials if turn else 0 for turn in turns],
        ]
        return cls(
            Names.of(texts),
            np.array([turn is not None for turn in turns], dtype=np.uint8),
            np.array([role in reader.train_roles for role in ROLE_NAMES], dtype=np.uint8),
            np.array(specials),
            template.default_specials,
            bool(template.default_system),
            template.has_calls,
            reader.last_only,
            reader.rejects_empty,
        )

    @property
    def most_in_row(self) -> int:
        """The most bytes that the template adds to a row, except for its messages."""
        sizes = np.diff(self.texts.starts)
        return int(sizes[DEFAULT_SYSTEM] + sizes[SYSTEM_WITH_TOOLS] + sizes[AFTER_SYSTEM])

    @property
    def most_in_message(self) -> int:
        """The most bytes that the template adds to a message: head, stop and gap, and every text that belongs to no role."""
        sizes = np.diff(self.texts.starts)
        return int(3 * sizes[:OTHERS].max() + sizes[DEFAULT_SYSTEM + 1 :].sum())


class DocumentArrays(NamedTuple):
    """What `write_documents` fills. [rows] means that the array has room for one entry for each row."""

    text: NDArray[np.uint64]
    """The text of all documents, as `words_of` returns it."""
    hashed: NDArray[np.uint64]
    """What `sft.data.batch.conversation_hashes` covers: roles and contents, with a zero byte between them, as `words_of` returns it."""
    hashed_ends: NDArray[np.int64]
    """[rows] Where each document ends in `hashed`."""
    rows: NDArray[np.int64]
    """[rows] The row of each document."""
    odd: NDArray[np.int64]
    """[rows] The rows that make no document here."""
    first_run: NDArray[np.int64]
    """[rows + 1] The first run of each document, then the number of all runs."""
    run_ends: NDArray[np.int64]
    """Where each run ends in `text`."""
    num_specials: NDArray[np.int64]
    """[rows] Special tokens that the template wrote."""
    answers_without_prefix: NDArray[np.int64]
    """[rows] Trained answers that do not begin with the generation prefix."""
    empty_answers: NDArray[np.int64]
    """[rows] Trained answers without text and calls."""


class Written(NamedTuple):
    """How far the writing has come."""

    documents: int
    odd: int
    runs: int
    size: int
    """Bytes of text."""


@inlined
def copy(target: Any, to: int, source: Any, start: int, end: int) -> int:
    """Copies the bytes source[start:end] to target[to]. Both are words. Returns where the copy ends."""
    for i in range(0, end - start, WORD):
        target[U(to + i)] = source[U(start + i)]
    return to + end - start


@inlined
def copy_part(target: Any, to: int, layout: Any, part: int) -> int:
    return copy(target, to, layout.texts.words, layout.texts.starts[part], layout.texts.starts[part + 1])


@inlined
def starts_with_prefix(source: Any, start: int, end: int, layout: Any) -> bool:
    """Whether the bytes source[start:end] start with the generation prefix."""
    first = layout.texts.starts[PREFIX]
    length = layout.texts.starts[PREFIX + 1] - first
    same = end - start >= length
    for k in range(length if same else 0):
        same &= (source[start + k] ^ layout.texts.words[first + k]) & np.uint64(0xFF) == 0
    return bool(same)


@inlined
def count_systems(messages: Any, first: int, end: int) -> int:
    """How many of the messages are the system's."""
    count = 0
    for message in range(first, end):
        count += messages.roles[message] == SYSTEM
    return count


@inlined
def has_text(messages: Any, message: int, kind: int) -> bool:
    return bool(messages.spans[message, kind, START] != NONE)


@inlined
def fits(layout: Any, messages: Any, message: int) -> bool:
    """Whether the template has a place for everything in a message."""
    role = messages.roles[message]
    if role == NONE or not layout.has_turn[role]:
        return False
    if has_text(messages, message, FUNCTIONS) and not (layout.has_calls and role in (SYSTEM, USER)):
        return False
    if has_text(messages, message, CALLS) and not (layout.has_calls and role == ASSISTANT):
        return False
    return not has_text(messages, message, THINKING) or role == ASSISTANT


@inlined
def row_fits(layout: Any, messages: Any, row: int, first: int, end: int) -> bool:
    """Whether the template has a place for everything in a row."""
    any_functions = False
    for message in range(first, end):
        if not fits(layout, messages, message):
            return False
        any_functions |= has_text(messages, message, FUNCTIONS)
    if messages.row_spans[row, TOOLS, START] == NONE:
        return True
    systems = count_systems(messages, first, end)
    return layout.has_calls and not any_functions and systems <= 1 and (layout.has_default or systems == 1)


@inlined
def find_last_by_rule(layout: Any, messages: Any, first: int, end: int) -> int:
    """The last message of a row that the recipe's rules could train; NONE when there is none."""
    last = NONE
    for message in range(first, end):
        if layout.is_trained[messages.roles[message]] and messages.flags[message] != NEVER:
            last = message
    return last


@inlined
def is_trained(layout: Any, messages: Any, message: int, last_by_rule: int) -> bool:
    """Whether a message is trained: its flag decides, else the recipe's rules."""
    if messages.flags[message] != NONE:
        return bool(messages.flags[message] == 1)
    return bool(layout.is_trained[messages.roles[message]] and (message == last_by_rule or not layout.last_only))


@inlined
def trains_something(layout: Any, messages: Any, first: int, end: int, last_by_rule: int) -> bool:
    found = False
    for message in range(first, end):
        found |= is_trained(layout, messages, message, last_by_rule)
    return found


@inlined
def is_space(byte: int) -> bool:
    """Whether a byte is one of `sft.data.batch.SPACES`."""
    return bool(byte == 32 or 9 <= byte <= 13)


@inlined
def count_empty_answers(layout: Any, messages: Any, first: int, end: int, last_by_rule: int) -> int:
    """The trained answers of a row that have neither text nor a call: see `sft.chat.messages.is_empty_answer`."""
    count = 0
    for message in range(first, end):
        if messages.roles[message] != ASSISTANT or not is_trained(layout, messages, message, last_by_rule):
            continue
        spans = messages.spans[message]
        calls = messages.call_spans[message]
        if spans[CALLS, END] > spans[CALLS, START] or calls[END] > calls[START]:
            continue
        if spans[THINKING, START] != NONE and not holds_no_text(
            messages.text, spans[THINKING, START], spans[THINKING, END]
        ):
            continue
        count += holds_no_text(messages.text, spans[CONTENT, START], spans[CONTENT, END])
    return count


@inlined
def copy_text(target: Any, to: int, messages: Any, span: Any) -> int:
    """Copies a text of the messages. Returns where the copy ends."""
    return copy(target, to, messages.text, span[START], span[END])


@inlined
def write_body(layout: Any, messages: Any, row: int, message: int, start: int, last: bool, target: Any, to: int) -> int:
    """Writes a message from `start` in its content to the stop of its turn."""
    role = messages.roles[message]
    stop = PARTS * role + (LAST_STOP if last else STOP)
    to = copy(target, to, messages.text, start, messages.spans[message, CONTENT, END])
    if has_text(messages, message, FUNCTIONS):
        to = copy_part(target, to, layout, BEFORE_FUNCTIONS if role == SYSTEM else BEFORE_USER_FUNCTIONS)
        to = copy_text(target, to, messages, messages.spans[message, FUNCTIONS])
        to = copy_part(target, to, layout, AFTER_FUNCTIONS)
        if role == SYSTEM:
            stop = END_OF_TURN  # without the sentence that there are no functions
    elif role == SYSTEM and messages.row_spans[row, TOOLS, START] != NONE:
        to = copy_text(target, to, messages, messages.row_spans[row, TOOLS])
        stop = END_OF_TURN
    if has_text(messages, message, CALLS):
        to = copy_part(target, to, layout, BEFORE_CALLS)
        to = copy_text(target, to, messages, messages.spans[message, CALLS])
        to = copy_part(target, to, layout, AFTER_CALLS)
    return copy_part(target, to, layout, stop)


@inlined
def write_document(
    layout: Any, messages: Any, row: int, first: int, end: int, last_by_rule: int, out: Any, to: int, run: int
) -> Any:
    """Writes messages first … end - 1 to out.text[to]; the ends of runs go to out.run_ends[run]. Returns the ends of both, the special
    tokens that it wrote, and the trained answers without the generation prefix."""
    text, document_start = out.text, run
    num_specials, answers_without_prefix = 0, 0
    if layout.has_default and count_systems(messages, first, end) == 0:
        num_specials = layout.default_specials
        if messages.row_spans[row, TOOLS, START] == NONE:
            to = copy_part(text, to, layout, DEFAULT_SYSTEM)
        else:
            to = copy_part(text, to, layout, SYSTEM_WITH_TOOLS)
            to = copy_text(text, to, messages, messages.row_spans[row, TOOLS])
            to = copy_part(text, to, layout, AFTER_SYSTEM)
    has_prefix = layout.texts.starts[PREFIX] < layout.texts.starts[PREFIX + 1]
    for message in range(first, end):
        role, last = messages.roles[message], message == end - 1
        train = is_trained(layout, messages, message, last_by_rule)
        thinks = has_text(messages, message, THINKING)
        start, is_written = messages.spans[message, CONTENT, START], False
        to = copy_part(text, to, layout, PARTS * role + HEAD)
        if train:
            if role == ASSISTANT and has_prefix:  # it is <think>
                if thinks:
                    to, is_written = copy_part(text, to, layout, BEFORE_THINKING), True
                elif starts_with_prefix(messages.text, start, messages.spans[message, CONTENT, END], layout):
                    to = copy_part(text, to, layout, PREFIX)
                    start += layout.texts.starts[PREFIX + 1] - layout.texts.starts[PREFIX]
                else:
                    answers_without_prefix += 1
            out.run_ends[run] = to
            run += 1
        if thinks:
            to = to if is_written else copy_part(text, to, layout, BEFORE_THINKING)
            to = copy_text(text, to, messages, messages.spans[message, THINKING])
            to = copy_part(text, to, layout, AFTER_THINKING)
        to = write_body(layout, messages, row, message, start, last, text, to)
        if train:
            out.run_ends[run] = to
            run += 1
        to = copy_part(text, to, layout, PARTS * role + (LAST_GAP if last else GAP))
        num_specials += layout.num_specials[LAST if last else NOT_LAST, role]
    if run == document_start or out.run_ends[run - 1] < to:
        out.run_ends[run] = to
        run += 1
    return to, run, num_specials, answers_without_prefix


@inlined
def write_hashed(messages: Any, first: int, end: int, roles: Any, hashed: Any, to: int) -> int:
    """Writes what `sft.data.batch.conversation_hashes` covers. `roles` are the names of the roles. Returns where it ends."""
    zero = np.uint64(0)
    for message in range(first, end):
        if message > first:
            hashed[U(to)] = zero
            to += 1
        role = messages.roles[message]
        to = copy(hashed, to, roles.words, roles.starts[role], roles.starts[role + 1])
        hashed[U(to)] = zero
        to = copy_text(hashed, to + 1, messages, messages.spans[message, CONTENT])
    return to


@compiled
def write_documents(layout: Any, roles: Any, messages: Any, out: Any) -> Any:
    """Writes the documents of all plain rows. In: TurnLayout, the roles' Names, Messages, DocumentArrays. Returns `Written`."""
    documents, odd, runs, size, hashed_size = 0, 0, 0, 0, 0
    for row in range(len(messages.is_plain)):
        first, end = messages.first[row], messages.first[row + 1]
        is_good, last, num_empty = messages.is_plain[row], NONE, 0
        is_good = is_good and row_fits(layout, messages, row, first, end) and not has_unclear(messages, row, first, end)
        if is_good:
            last = find_last_by_rule(layout, messages, first, end)
            is_good = trains_something(layout, messages, first, end, last)
            num_empty = count_empty_answers(layout, messages, first, end, last)
        if not is_good or (num_empty and layout.rejects_empty):
            out.odd[odd] = row
            odd += 1
            continue
        out.rows[documents], out.first_run[documents] = row, runs
        size, runs, num_specials, answers = write_document(layout, messages, row, first, end, last, out, size, runs)
        out.num_specials[documents], out.answers_without_prefix[documents] = num_specials, answers
        out.empty_answers[documents] = num_empty
        hashed_size = write_hashed(messages, first, end, roles, out.hashed, hashed_size)
        out.hashed_ends[documents] = hashed_size
        documents += 1
    out.first_run[documents] = runs
    return Written(documents, odd, runs, size)


@compiled
def find_groups(hashed: Any, ends: Any, spans: Any) -> Any:
    """Fills and returns [3, documents]: the start and the end of `sft.data.batch.group_span` of each document in `hashed`, and whether
    `group_key` may change that text."""
    begin = 0
    for document in range(len(ends)):
        end = ends[document]
        start, at_role = NONE, True
        for at in range(begin, end):
            if at_role and at + 5 <= end and is_user(hashed, at):
                start = at + 5
                break
            at_role = hashed[U(at)] == 0
        stop = start
        changes = start == NONE
        while start != NONE and stop < end and hashed[U(stop)] != 0:
            changes |= (hashed[U(stop)] >= 128) | (hashed[U(stop)] == 13)
            stop += 1
        while start < stop and is_space(hashed[U(stop - 1)]):
            stop -= 1
        while start < stop and is_space(hashed[U(start)]):
            start += 1
        if start >= stop:
            start, stop, changes = begin, end, True
        spans[0, document], spans[1, document], spans[2, document] = start, stop, changes
        begin = end
    return spans


@inlined
def is_user(text: Any, at: int) -> bool:
    """Whether "user" and a zero byte stand there."""
    first = text[U(at)] == 117 and text[U(at + 1)] == 115
    last = text[U(at + 2)] == 101 and text[U(at + 3)] == 114 and text[U(at + 4)] == 0
    return bool(first and last)
