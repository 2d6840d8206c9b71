"""Dataset rows to conversations.

In: one row of a dataset as a dict, in any of the usual layouts: OpenAI `messages`, ShareGPT `conversations`,
`prompt`/`completion`, Alpaca `instruction`/`input`/`output`, with columns renamed by the recipe. Out: a `Conversation`: messages
with `role` and `content`, which of them are trained, and the tools on offer. A row that cannot be read raises `BadRow` with a
reason that is counted; it never ends the stage. `sft.chat.fields` counts which fields were read. `sft.data.tokenize.Encoder` is the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from sft.chat.calls import check_results, parameters_of, read_tools
from sft.chat.details import DETAIL, read_details
from sft.chat.fields import FieldCounter, HeldFields
from sft.chat.messages import (
    Message,
    check_content,
    check_functions,
    is_empty_answer,
    read_message,
    read_one_flag,
    strip_thinking,
)
from sft.chat.trace import Span
from sft.chat.values import BadRow, Repeating, drop_nulls, first_repeat, is_empty, kind, parse, parse_each, to_json
from sft.recipe.row_fields import FLAGS, MESSAGE_FIELDS
from sft.recipe.schema import COLUMNS, ROLES, Prepare, Source

__all__ = ["BadRow", "Conversation", "Message", "RowReader"]

TEXT_FIELDS = frozenset(("role", "content", "name", "functions", "function_calls", "tool_call_id", "reasoning_content"))
"""Message fields that are taken as they are."""
OTHER_NAMES = {
    "tools": ("functions", "available_tools"),
    "system": ("system_prompt",),
    "completion": ("response",),
    "output": ("response",),
    "input": ("context",),
}
"""Other names of columns, which are read unless the recipe renames the column."""
KWARGS, HISTORY = "chat_template_kwargs", "history"


class Conversation:
    """`train[i]` says whether the model learns to emit message i; `flagged` says whether the row itself set that for some message.

    `variables` are the row's own template variables (TRL's chat_template_kwargs). `empty_answers` counts the trained answers of the assistant
    that have neither text nor a call. `held` are the fields of the row, if they are counted. `details` are the
    trained spans of the contents of which only parts are trained.
    """

    __slots__ = ("details", "empty_answers", "flagged", "held", "messages", "tools", "train", "variables")

    def __init__(
        self,
        messages: list[Message],
        train: list[bool],
        tools: list[dict[str, Any]] | None,
        flagged: bool,
        variables: dict[str, Any] | None = None,
        empty_answers: int = 0,
    ) -> None:
        self.messages, self.train, self.tools, self.flagged = messages, train, tools, flagged
        self.variables, self.empty_answers = variables, empty_answers
        self.held: HeldFields | None = None
        self.details: dict[int, tuple[Span, ...]] = {}


class Turns(NamedTuple):
    """A row's messages as the row has them."""

    items: list[Any]
    columns: list[str]
    """The column of each; "" for a message that is made of a column of text."""
    prompt_length: int
    """How many of them are the prompt of a prompt/completion pair."""
    used: tuple[str, ...]
    """The columns that were read."""


class RowReader:
    """Reads the rows of one source by the recipe's rules.

    `prompt_opens_thinking`: the template's generation prompt ends in <think>, so answers need not begin with it. `renamed_roles`: see
    `sft.chat.messages.renamed_roles`. `thoughts`: the only one of `reasoning_content` and `thinking` that the template reads.
    `written`: see `FieldCounter`.
    """

    def __init__(
        self,
        prepare: Prepare,
        source: Source,
        prompt_opens_thinking: bool = False,
        renamed_roles: Mapping[str, str] = MappingProxyType({}),
        thoughts: str = "",
        written: Collection[tuple[str, str]] = (),
    ) -> None:
        self.renamed_thoughts = ("thinking" if thoughts == "reasoning_content" else "reasoning_content", thoughts)
        self.prompt_opens_thinking = prompt_opens_thinking
        renamed = dict(source.columns)
        self.columns = {name: renamed.get(name, name) for name in COLUMNS}
        self.names = {
            name: (self.columns[name], *(OTHER_NAMES.get(name, ()) if name not in renamed else ())) for name in COLUMNS
        }
        self.train_roles = frozenset(prepare.train_roles)
        self.renamed_roles = {role: other for role, other in renamed_roles.items() if role not in self.train_roles}
        self.last_only = prepare.train_turns == "last"
        self.strip = prepare.thinking == "strip"
        self.system = prepare.system
        self.rejects_empty = prepare.empty_answers == "reject"
        # Named columns decide the layout: {prompt = "question"} must not be overruled by a stray `messages` column.
        self.layouts = [name for name in LAYOUTS if name in renamed] or list(LAYOUTS)
        self.ignore = frozenset(source.ignore)
        self.ignored_fields = {  # by column of messages: the message fields that are ignored
            column: set(fields)
            for column in (
                *(self.columns[name] for name in ("messages", "conversations", "prompt")),
                *self.names["completion"],
            )
            if (fields := {name[len(column) + 1 :] for name in source.ignore if name.startswith(f"{column}.")})
        }
        self.group = source.validation_group
        self.beside = frozenset((*self.names["system"], *self.names["tools"], KWARGS, DETAIL, *FLAGS))
        """Columns that are read beside those of messages."""
        first = self.layouts[0]
        self.messages = self.columns[first] if first in ("messages", "conversations") else ""
        self.writes_ids = {("tool_call_id", "tool"), ("id", "assistant")} <= set(written)
        self.writes_names = ("name", "tool") in written
        self.counter = FieldCounter(source.ignore, written, source.validation_group)

    def ignores_fields(self, names: Collection[str]) -> bool:
        """Whether the recipe ignores one of these fields of messages."""
        return any(not fields.isdisjoint(names) for fields in self.ignored_fields.values())

    def learn(self, row: Any) -> None:
        """Finds out which of the columns and message fields of a row are passed over."""
        if not isinstance(row, Mapping):
            return
        read = {column for names in self.names.values() for column in names}
        for name in row.keys() - read:
            self.counter.is_passed_over(name)
        for column in (self.columns["messages"], self.columns["conversations"]):
            messages = row.get(column)
            for message in messages if isinstance(messages, list) else ():
                for name in (message.keys() if isinstance(message, Mapping) else set()) - MESSAGE_FIELDS:
                    self.counter.is_passed_over(f"{column}.{name}")

    def read_counted(self, row: Any) -> Conversation:
        """`read`, with the row's fields in `held`. The caller counts them if the row makes a document."""
        return self.read(row, self.counter)

    def read(self, row: Any, counter: FieldCounter | None = None) -> Conversation:
        """The row as a conversation. Raises BadRow."""
        if type(row) is not dict:
            self._check_object(row)
        whole = row
        if self.ignore:
            row = {name: value for name, value in row.items() if name not in self.ignore}
        turns = self._read_turns(row)
        system = tools = variables = None
        used = (*turns.used, self.group) if self.group else turns.used
        is_plain = self.beside.isdisjoint(row)
        if not is_plain:
            system, tools, variables = self._pick(row, "system"), self._read_tools(row), self._read_variables(row)
            used += (*self.names["system"], *self.names["tools"], KWARGS)
        messages, flags, details = self._read_messages(turns, parameters_of(tools) if tools else {})
        if not self.writes_ids:
            check_results(messages, self.writes_names)
        if not is_plain:
            used += read_flag_lists(row, turns, flags)
            if not is_empty(row.get(DETAIL)) and (values := list_of_flags(row, DETAIL, turns)):
                used += (DETAIL,)
                for index, value in enumerate(values):
                    add_detail(value, index, messages[index], flags, details)
        train = self._choose_trained(messages, flags, turns.prompt_length)
        self._add_system(messages, train, system, turns.prompt_length)
        if tools and any("functions" in message for message in messages):
            check_functions(messages, tools)
            tools = None
        if True not in train:
            raise BadRow(
                "nothing_to_train", "no message is trained: roles " + ", ".join(m["role"] for m in messages[:8])
            )
        empty_answers = sum(map(is_empty_answer, messages, train))
        if empty_answers and self.rejects_empty:
            raise BadRow("empty_answer", "a trained answer has neither text nor a call")
        held = None
        if counter is not None:
            held = counter.held(whole, used, list(zip(turns.columns, turns.items, strict=True)), messages)
        shift = len(messages) - len(turns.items)
        details = {index + shift: spans for index, spans in details.items()}
        if self.strip:
            messages = self._strip(messages, details)
        conversation = Conversation(messages, train, tools, bool(flags), variables, empty_answers)
        conversation.held, conversation.details = held, details
        return conversation

    def _check_object(self, row: Any) -> None:
        """Raises BadRow for a row that is no object, or has a name twice."""
        if not isinstance(row, Mapping):
            raise BadRow("not_an_object", f"a row must be an object, this is {kind(row)}")
        if isinstance(row, Repeating) and (name := first_repeat(row, self.ignore)):
            raise BadRow("repeated_name", f"{name[:80]} is twice in one object, with different values")

    def _strip(self, messages: list[Message], details: Mapping[int, tuple[Span, ...]]) -> list[Message]:
        """The messages without thoughts. Raises BadRow where that moves the trained spans of a message."""
        stripped = strip_thinking(messages, self.prompt_opens_thinking)
        if changed := [i for i in details if stripped[i]["content"] != messages[i]["content"]]:
            raise BadRow(
                DETAIL, f'message {changed[0]}: thinking = "strip" changes the content, so its {DETAIL} has no place'
            )
        return stripped

    def _pick(self, row: Mapping[str, Any], name: str) -> Any:
        """The value of a column under any of its names. Raises BadRow when two of them hold different values."""
        found: Any = None
        of = ""
        for column in self.names[name]:
            value = row.get(column)
            if is_empty(value) and (value != "" or found is not None):
                continue
            if found not in (None, "") and value != found:
                raise BadRow("disagree", f"the columns {of} and {column} hold different values")
            found, of = value, column
        return found

    def _read_tools(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        found: list[dict[str, Any]] | None = None
        for column in self.names["tools"]:
            value = row.get(column)
            tools = None if is_empty(value) else read_tools(value, column)
            if found and tools and [t.get("function", t) for t in tools] != [t.get("function", t) for t in found]:
                raise BadRow("disagree", f"{column} and another column of tools hold different values")
            found = found or tools
        return found

    def _read_variables(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row's own template variables."""
        value = row.get(KWARGS)
        if is_empty(value):
            return None
        if isinstance(value, str):
            value = parse(value, "bad_variables", f"{KWARGS} is text that is not JSON")
        if not isinstance(value, Mapping):
            raise BadRow("bad_variables", f"{KWARGS} is {kind(value)}, not an object")
        to_json(value, KWARGS)
        return drop_nulls(value) or None

    def _add_system(self, messages: list[Message], train: list[bool], system: Any, prompt_length: int) -> None:
        """Puts the system column, or else the recipe's system prompt, before a conversation that has no system message."""
        if not is_empty(system) and not isinstance(system, str):
            raise BadRow("bad_system", f"the system column holds {kind(system)}, not text")
        if messages[0]["role"] == "system":
            if system and system != messages[0]["content"]:
                raise BadRow("disagree", "the system column and the system message hold different texts")
        elif system := system or self.system:
            messages.insert(0, {"role": "system", "content": system})
            train.insert(0, "system" in self.train_roles and not self.last_only and not prompt_length)

    def _read_messages(
        self, turns: Turns, schemas: Mapping[str, Any]
    ) -> tuple[list[Message], dict[int, bool], dict[int, tuple[Span, ...]]]:
        """The messages, and the training flag and the trained spans of each message that has some, by the message's index."""
        messages: list[Message] = []
        flags: dict[int, bool] = {}
        details: dict[int, tuple[Span, ...]] = {}
        for index, item in enumerate(turns.items):
            if self.ignored_fields and isinstance(item, Mapping):
                ignored = self.ignored_fields.get(turns.columns[index], ())
                item = {name: value for name, value in item.items() if name not in ignored}
            # The common shapes are taken unchanged: a known role, a content, and other text fields that templates read.
            if type(item) is dict:
                role = item.get("role")
                known = (
                    type(role) is str
                    and role in ROLES
                    and type(item.get("content")) is str
                    and role not in self.renamed_roles
                )
                if known and (
                    len(item) == 2
                    or (
                        TEXT_FIELDS.issuperset(item)
                        and set(map(type, item.values())) == {str}
                        and item.get("reasoning_content", "x")
                        and (self.renamed_thoughts[1] != "thinking" or "reasoning_content" not in item)
                    )
                ):
                    check_content(item, index)
                    messages.append(item)
                    continue
            message, flag = read_message(item, index, schemas)
            other, wanted = self.renamed_thoughts
            if wanted and other in message:
                message[wanted] = message.pop(other)
            message["role"] = self.renamed_roles.get(message["role"], message["role"])
            check_content(message, index)
            messages.append(message)
            if flag is not None:
                flags[index] = flag
            add_detail(item.get(DETAIL), index, message, flags, details)
        return messages, flags, details

    def _choose_trained(self, messages: Sequence[Message], flags: Mapping[int, bool], prompt_length: int) -> list[bool]:
        """Which messages are trained. The first `prompt_length` are a prompt; a message's own flag wins over every rule."""
        train_roles = self.train_roles
        train = [message["role"] in train_roles for message in messages]
        if prompt_length:
            train[:prompt_length] = [False] * prompt_length
        if self.last_only and True in train:
            last = len(train) - 1 - train[::-1].index(True)
            train = [index == last for index in range(len(train))]
        for index, flag in flags.items():
            train[index] = flag
        return train

    def _read_turns(self, row: Mapping[str, Any]) -> Turns:
        """The messages of the first layout that the row has."""
        columns = self.columns
        items = row.get(self.messages) if self.messages else None
        if type(items) is list and items and type(items[0]) is not str:  # most rows
            return Turns(items, [self.messages] * len(items), 0, (self.messages,))
        present = [name for name in self.layouts if row.get(columns[name]) is not None]
        layout = next((name for name in present if not is_empty(row[columns[name]])), present[0] if present else None)
        if layout is None:
            expected = " or ".join(columns[name] for name in self.layouts)
            found = ", ".join(map(str, list(row)[:8])) or "none"
            raise BadRow("unknown_columns", f"no column {expected} with a value; the row has {found}")
        return LAYOUTS[layout](self, row, columns[layout])

    def _read_list(self, row: Mapping[str, Any], column: str) -> Turns:
        """A list of messages, by OpenAI's or ShareGPT's names."""
        items = read_list(row[column], column)
        return Turns(items, [column] * len(items), 0, (column,))

    def _read_pair(self, row: Mapping[str, Any], column: str) -> Turns:
        """`prompt` and `completion`, each a text or a list of messages, and a `history` before a prompt that is text."""
        value, names = row[column], self.names["completion"]
        completion = self._pick(row, "completion")
        if completion is None:
            found = ", ".join(map(str, list(row)[:8]))
            raise BadRow("missing_column", f"{self.columns['completion']} is missing; the row has {found}")
        held = next(name for name in names if row.get(name) == completion)
        if isinstance(value, str):
            history = read_history(row.get(HISTORY))
            prompt, used = [*history, {"role": "user", "content": value}], (column, *names, HISTORY)
            column = ""
        else:
            history, prompt, used = [], read_list(value, column), (column, *names)
        answer = (
            [{"role": "assistant", "content": completion}]
            if isinstance(completion, str)
            else read_list(completion, held)
        )
        of = [column] * len(prompt) + ["" if isinstance(completion, str) else held] * len(answer)
        return Turns([*prompt, *answer], of, 0 if history else len(prompt), used)

    def _read_instruction(self, row: Mapping[str, Any], column: str) -> Turns:
        """Alpaca's `instruction`, `input`, `output` and `history`, and Dolly's `instruction`, `context` and `response`."""
        instruction = row[column]
        more, output = self._pick(row, "input") or "", self._pick(row, "output")
        for name, text in (("instruction", instruction), ("input", more), ("output", output)):
            if not isinstance(text, str):
                reason = "missing_column" if text is None else "bad_content"
                raise BadRow(reason, f"{self.columns[name]} is {kind(text)}, not text")
        question = f"{instruction}\n\n{more}" if instruction and more else instruction or more
        history = read_history(row.get(HISTORY))
        items = [*history, {"role": "user", "content": question}, {"role": "assistant", "content": output}]
        used = (column, *self.names["input"], *self.names["output"], HISTORY)
        return Turns(items, [""] * len(items), 0 if history else 1, used)


LAYOUTS: dict[str, Callable[[RowReader, Mapping[str, Any], str], Turns]] = {
    "messages": RowReader._read_list,
    "conversations": RowReader._read_list,
    "prompt": RowReader._read_pair,
    "instruction": RowReader._read_instruction,
}
"""How the turns of a row are read, by the column that decides it (one of COLUMNS). Of several, the first one with a value is read."""


def read_history(history: Any) -> list[Message]:
    """The turns before an instruction: a list of pairs of question and answer."""
    if is_empty(history):
        return []
    if not isinstance(history, (list, tuple)):
        raise BadRow("bad_history", f"history is {kind(history)}, not a list of pairs")
    messages: list[Message] = []
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow("bad_history", "history holds something that is no pair of texts")
        messages += ({"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]})
    return messages


def read_flag_lists(row: Mapping[str, Any], turns: Turns, flags: dict[int, bool]) -> tuple[str, ...]:
    """Reads columns that are lists with one flag for each message into `flags`. Returns their names. Raises BadRow when they do not fit."""
    if not is_one_list(turns):
        return ()
    names = tuple(name for name in FLAGS if isinstance(row.get(name), (list, tuple)) and not is_empty(row[name]))
    for name in names:
        for index, value in enumerate(list_of_flags(row, name, turns)):
            flag = None if value is None else read_one_flag(name, value, index)
            if flag is not None and flags.setdefault(index, flag) != flag:
                raise BadRow("bad_train_flag", f"message {index}: the column {name} says {flag}, another flag does not")
    return names


def is_one_list(turns: Turns) -> bool:
    """Whether the messages are one column's, so that a column beside it can have a flag for each."""
    return not turns.prompt_length and turns.columns[0] in turns.used and len(set(turns.columns)) == 1


def list_of_flags(row: Mapping[str, Any], name: str, turns: Turns) -> Sequence[Any]:
    """A column with one value for each message; () where it is none. Raises BadRow when the lengths differ."""
    values = row[name]
    if not is_one_list(turns) or not isinstance(values, (list, tuple)):
        return ()
    if len(values) != len(turns.items):
        raise BadRow("bad_train_flag", f"{name} has {len(values)} flags for {len(turns.items)} messages")
    return values


def add_detail(
    value: Any, index: int, message: Message, flags: dict[int, bool], details: dict[int, tuple[Span, ...]]
) -> None:
    """Enters the trained spans of a message, and whether one of them is trained as its flag. Raises BadRow when fields disagree."""
    if is_empty(value):
        return
    spans = read_details(value, index, message["content"])
    if flags.setdefault(index, bool(spans)) != bool(spans) or details.get(index, spans) != spans:
        raise BadRow("bad_train_flag", f"message {index}: {DETAIL} and another flag disagree")
    if spans:
        details[index] = spans


def read_list(value: Any, column: str) -> list[Any]:
    """A list of messages, perhaps as JSON text."""
    if isinstance(value, str):
        value = parse(value, "bad_messages", f"the {column} column holds text that is not JSON")
    if not isinstance(value, (list, tuple)):
        raise BadRow("bad_messages", f"{column} is {kind(value)}, not a list of messages")
    if not value:
        raise BadRow("no_messages", f"{column} is empty")
    if isinstance(value[0], str):
        return parse_each(value, "bad_message", f"message {{}} of {column}")
    return list(value)
