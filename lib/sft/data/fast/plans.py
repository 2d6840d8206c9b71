"""Plans of forms: what a Jinja template writes around the texts of the conversations of one form. `FormWriter`.

In: `Messages` of a block. Out: their documents, by `sft.data.fast.forms`, without Jinja. `sft.chat.skeleton` finds out what a form renders to, from
one row of it, and proves that the template only writes the texts. The row must be the same in Python and in compiled code, and Jinja
must render it to what the plan writes; so must a sample of the other rows. All rows of other forms are left to Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.chat.rows import BadRow, Conversation, RowReader
from sft.chat.skeleton import JSON_SLOT, MOST_SKELETONS, OBJECT_SLOT, RenderPlan, Skeletons, Unusual
from sft.chat.template import JinjaTemplate
from sft.common.errors import SftError
from sft.data.fast.documents import Memory, PlainDocuments, room
from sft.data.fast.forms import (
    AS_JSON,
    AS_TEXT,
    UNUSUAL,
    FormLayout,
    Forms,
    PlanTable,
    find_forms,
    measure_forms,
    write_forms,
)
from sft.data.fast.messages import (
    CALL_ID,
    CALLS,
    CONTENT,
    END,
    FUNCTIONS,
    NAME,
    NONE,
    NUM_TEXTS,
    ROLE_NAMES,
    START,
    THINKING,
    Messages,
    Names,
)
from sft.data.fast.turns import Written
from sft.sources.blocks import Block

KINDS = {
    "content": CONTENT, "functions": FUNCTIONS, "function_calls": CALLS, "reasoning_content": THINKING, "thinking": THINKING, "name": NAME,
    "tool_call_id": CALL_ID,
}  # fmt: skip
"""The kind of each text of a message."""
CHECKED_EVERY = 512
"""One of so many documents of a block is rendered by Jinja too, and its first one."""
MOST_SEARCHES = 20
"""How often the forms of a block are searched again. Each time the template compared a text with one more constant."""
Part = tuple[int, int, int, bool, int]
"""Its place: message, kind, call; whether it is an object, and its number in the plan."""


class Operation(NamedTuple):
    """See `PlanTable`."""

    literal: str
    part: int
    how: int
    ends_run: bool


class Plan(NamedTuple):
    """What a form renders to."""

    operations: list[Operation]
    num_specials: int
    answers_without_prefix: int


class FormWriter:
    """Writes plain rows as one Jinja template does."""

    def __init__(self, template: JinjaTemplate, reader: RowReader) -> None:
        self.template, self.reader = template, reader
        self.skeletons = Skeletons(template)
        self.parts = np.empty((0, 2), dtype=np.int64)
        self._forget()

    def _forget(self) -> None:
        """Starts again with the constants that are known now."""
        found = self.skeletons
        self.version = found.version
        self.layout = FormLayout.of(self.reader, found.specials.texts, found.watch.constants, found.literal_tools)
        self.plan_of: dict[int, int] = {}  # by key; NONE where Jinja must render
        self.once: set[int] = set()  # keys that were seen once
        self.plans: list[Plan] = []
        self.table = make_table(self.plans)

    @property
    def is_usable(self) -> bool:
        """Whether compiled code can find the constants and the special tokens in texts."""
        texts = (*self.skeletons.specials.texts, *self.skeletons.watch.constants)
        return self.skeletons.usable and all(text == text.strip() and text for text in texts)

    def write(self, block: Block, messages: Messages, memory: Memory) -> Written:
        rows = len(messages.is_plain)
        for _ in range(MOST_SEARCHES):
            forms = self._find(messages, rows)
            plan_of = self._plan(block, messages, forms)
            if plan_of is not None:
                break
        else:
            plan_of = np.full(rows, NONE)
        size, runs = measure_forms(self.table, plan_of, forms)
        out = memory.reserve(size, runs, messages)
        written: Written = write_forms(self.table, plan_of, ROLES, messages, forms, out)
        return written

    def _find(self, messages: Messages, rows: int) -> Forms:
        count = int(messages.first[-1])
        spans = messages.spans[:count, :NUM_TEXTS]
        most = int((spans[..., END] - spans[..., START]).sum()) // 2 + spans[..., 0].size
        calls = messages.calls
        most += int((calls[..., END] - calls[..., START]).sum()) // 2 + 3 * len(calls) + len(messages.tools) + 1
        self.parts = room(self.parts, most)
        empty = np.empty(rows, dtype=np.int64)
        forms = Forms(np.empty(rows, dtype=np.uint64), np.empty(rows + 1, dtype=np.int64), self.parts, empty)
        if self.is_usable:
            find_forms(self.layout, messages, forms)
        else:
            forms.keys[:] = UNUSUAL
        return forms

    def _plan(self, block: Block, messages: Messages, forms: Forms) -> NDArray[np.int64] | None:
        """[rows] The plan of each row, NONE where Jinja must render. None when the constants have changed."""
        keys, rows, inverse, counts = np.unique(forms.keys, return_index=True, return_inverse=True, return_counts=True)
        if len(self.plans) >= MOST_SKELETONS or len(self.once) >= 10 * MOST_SKELETONS:
            self._forget()
        known, added = len(self.plans), []
        for key, row, count in zip(keys.tolist(), rows.tolist(), counts.tolist(), strict=True):
            if key in self.plan_of or key == int(UNUSUAL):
                continue
            if count == 1 and key not in self.once:
                self.once.add(key)
                continue
            self.plan_of[key] = self._learn(block, messages, forms, row)
            if self.version != self.skeletons.version:
                self._forget()
                return None
            added.append(key)
        if len(self.plans) > known:
            self.table = make_table(self.plans)
        found = np.array([self.plan_of.get(key, NONE) for key in keys.tolist()], dtype=np.int64)
        return found[inverse.reshape(-1)]

    def _learn(self, block: Block, messages: Messages, forms: Forms, row: int) -> int:
        """The number of a new plan for the form of this row, or NONE."""
        conversation = self._read(block, row)
        if conversation is None or conversation.variables:
            return NONE
        texts: list[str] = []
        objects: list[str] = []
        try:
            plan = self.skeletons.learn(conversation, texts, objects)
            parts = None if plan is None else sorted(self._parts(conversation))
        except (Unusual, KeyError):
            return NONE
        if plan is None or parts is None:
            return NONE
        wanted = [objects[number] if is_object else texts[number] for *_, is_object, number in parts]
        if wanted != read_parts(messages, forms, row) or not same_messages(conversation, messages, row):
            return NONE
        place = {(is_object, number): index for index, (*_, is_object, number) in enumerate(parts)}
        self.plans.append(Plan(operations_of(plan, place), plan.specials, plan.answers_without_prefix))
        return len(self.plans) - 1

    def _read(self, block: Block, row: int) -> Conversation | None:
        rows = block.batch([row]).rows
        try:
            return self.reader.read(rows[0]) if rows else None
        except (BadRow, RecursionError):
            return None

    def _parts(self, conversation: Conversation) -> Iterator[Part]:
        """The parts of a conversation, each with its place in compiled code and its number in Python's order."""
        texts: list[str] = []
        objects = 0

        def numbers(text: str) -> range:
            first = len(texts)
            self.skeletons.shape(text, texts)
            return range(first, len(texts))

        for index, message in enumerate(conversation.messages):
            for name, value in message.items():
                if name == "tool_calls":
                    for call, held in enumerate(value):
                        if "id" in held:
                            yield from ((index, NUM_TEXTS, 3 * call + 1, False, n) for n in numbers(held["id"]))
                        function = held["function"]
                        yield from ((index, NUM_TEXTS, 3 * call, False, n) for n in numbers(function["name"]))
                        if function["arguments"]:
                            yield index, NUM_TEXTS, 3 * call + 2, True, objects
                            objects += 1
                elif name != "role":
                    yield from ((index, KINDS[name], 0, False, n) for n in numbers(value))
        for tool in range(len(conversation.tools or ()) if not self.skeletons.literal_tools else 0):
            yield len(conversation.messages), 0, tool, True, objects + tool

    def check(self, block: Block, made: PlainDocuments) -> None:
        """Raises SftError when Jinja renders one of a sample of the documents to something else."""
        for document in range(0, len(made.rows), CHECKED_EVERY):
            conversation = self._read(block, int(made.rows[document]))
            first, last = made.first_run[document : document + 2].tolist()
            ends = made.run_ends[first:last].tolist()
            starts = [int(made.run_ends[first - 1]) if first else 0, *ends[:-1]]
            runs = [made.data[start:end].decode() for start, end in zip(starts, ends, strict=True)]
            specials, answers = int(made.num_specials[document]), int(made.answers_without_prefix[document])
            if conversation is None or not self.skeletons.agrees(conversation, runs, specials, answers):
                raise SftError(
                    f"prepare.template: {self.template.name} renders row {block.first + int(made.rows[document])} in another way than those before"
                    " it of the same form; next: report the template, and use one of the named templates until it is fixed"
                )


def operations_of(plan: RenderPlan, place: dict[tuple[bool, int], int]) -> list[Operation]:
    """A plan as operations. `place`: which part of the row each text and object is."""
    made = []
    for pieces, slots in zip(plan.runs, plan.slots, strict=True):
        at = {index: (kind, number) for index, kind, number in slots}
        for index in range(0, len(pieces), 2):
            kind, number = at.get(index + 1, (NONE, NONE))
            part = NONE if kind == NONE else place[kind == OBJECT_SLOT, number]
            ends_run = index + 1 >= len(pieces)
            made.append(Operation(pieces[index], part, AS_JSON if kind == JSON_SLOT else AS_TEXT, ends_run))
    return made


def make_table(plans: Sequence[Plan]) -> PlanTable:
    """All plans, for compiled code."""
    operations = [operation for plan in plans for operation in plan.operations]
    part, how, ends_run = np.array([operation[1:] for operation in operations], dtype=np.int64).reshape(-1, 3).T.copy()
    return PlanTable(
        Names.of([operation.literal for operation in operations]),
        part,
        how,
        ends_run,
        np.cumsum([0, *(len(plan.operations) for plan in plans)]),
        np.array([plan.num_specials for plan in plans], dtype=np.int64),
        np.array([plan.answers_without_prefix for plan in plans], dtype=np.int64),
    )


def read_parts(messages: Messages, forms: Forms, row: int) -> list[str]:
    """The parts of a row."""
    first, last = forms.first_part[row : row + 2].tolist()
    return [text_of(messages, start, end) for start, end in forms.parts[first:last].tolist()]


def text_of(messages: Messages, start: int, end: int) -> str:
    """A text of the messages. The words overlap: each begins at the next byte."""
    return (messages.text[start:end] & np.uint64(0xFF)).astype(np.uint8).tobytes().decode()


def same_messages(conversation: Conversation, messages: Messages, row: int) -> bool:
    """Whether compiled code has read what Python has read: roles and texts."""
    first, last = messages.first[row : row + 2].tolist()
    if last - first != len(conversation.messages):
        return False
    for index, message in enumerate(conversation.messages):
        texts = {KINDS[name]: value for name, value in message.items() if name not in ("role", "tool_calls")}
        spans = messages.spans[first + index, :NUM_TEXTS].tolist()
        found = {kind: text_of(messages, *span) for kind, span in enumerate(spans) if span[START] != NONE}
        if ROLE_NAMES[int(messages.roles[first + index])] != message["role"] or found != texts:
            return False
    return True


ROLES = Names.of(ROLE_NAMES)
