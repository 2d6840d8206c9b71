"""Dataset rows to conversations.

In: one row of a dataset as a dict, in any of the usual layouts: OpenAI `messages`, ShareGPT `conversations`,
`prompt`/`completion`, Alpaca `instruction`/`input`/`output`, with columns renamed by the recipe. Out: a `Conversation`: messages
with `role` and `content`, which of them are trained, and the tools on offer. A row that cannot be read raises `BadRow` with a
reason that is counted; it never ends the stage. `sft.data.tokenize.Encoder` is the caller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sft.recipe.schema import COLUMNS, ROLES, Prepare, Source

# What ShareGPT files call the speakers. "function_call" is an assistant's turn that only calls a function.
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
# Message fields that a template may read. Others (ids, scores, annotations) are dropped so that they cannot change a rendering.
MESSAGE_FIELDS = frozenset(
    (
        "role",
        "content",
        "name",
        "functions",
        "function_calls",
        "tool_calls",
        "tool_call_id",
        "reasoning_content",
        "thinking",
    )
)
TEXT_FIELDS = MESSAGE_FIELDS - {"tool_calls"}
LAYOUTS = ("messages", "conversations", "prompt", "instruction")
Message = dict[str, Any]
"""A message: `role`, `content` and perhaps others of MESSAGE_FIELDS."""


class BadRow(Exception):
    """A row that cannot be used. `reason` is one of a few words that are counted; `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Conversation:
    """`train[i]` says whether the model learns to emit message i; `flagged` says whether the row itself set that for some message."""

    __slots__ = ("flagged", "messages", "tools", "train")

    def __init__(
        self, messages: list[Message], train: list[bool], tools: list[dict[str, Any]] | None, flagged: bool
    ) -> None:
        self.messages, self.train, self.tools, self.flagged = messages, train, tools, flagged


class RowReader:
    """Reads the rows of one source by the recipe's rules.

    `prompt_opens_thinking`: the template's generation prompt ends in <think>, so answers need not begin with it.
    """

    def __init__(self, prepare: Prepare, source: Source, prompt_opens_thinking: bool = False) -> None:
        self.prompt_opens_thinking = prompt_opens_thinking
        columns = dict(source.columns)
        self.columns = {name: columns.get(name, name) for name in COLUMNS}
        self.train_roles = frozenset(prepare.train_roles)
        self.last_only = prepare.train_turns == "last"
        self.strip = prepare.thinking == "strip"
        self.system = prepare.system
        # Named columns decide the layout: {prompt = "question"} must not be overruled by a stray `messages` column.
        self.layouts = [name for name in LAYOUTS if name in columns] or list(LAYOUTS)
        # Looked up once, because most rows need it.
        self.prompt, self.completion = self.columns["prompt"], self.columns["completion"]
        self.messages = self.columns[self.layouts[0]] if self.layouts[0] in ("messages", "conversations") else None
        self.tools, self.system_column = self.columns["tools"], self.columns["system"]
        default_rules = self.train_roles == {"assistant"} and not self.system and not self.strip
        self.may_be_pairs = default_rules and self.layouts in (["prompt"], list(LAYOUTS))
        also_messages = ("messages", "conversations") if self.layouts != ["prompt"] else ()
        self.not_in_pairs = [self.columns[name] for name in ("tools", "system", *also_messages)]

    def read(self, row: Any) -> Conversation:
        """The row as a conversation. Raises BadRow."""
        if type(row) is not dict and not isinstance(row, Mapping):
            raise BadRow("not_an_object", f"a row must be an object, this is {kind(row)}")
        get = row.get
        if self.may_be_pairs:
            prompt, completion = get(self.prompt), get(self.completion)
            if type(prompt) is str and type(completion) is str and not any(map(get, self.not_in_pairs)):
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                return Conversation(messages, [False, True], None, False)
        items, prompt_length = get(self.messages), 0
        if type(items) is not list or not items:
            items, prompt_length = self._read_items(row)
        tools = get(self.tools)
        if tools is not None:
            tools = read_tools(tools)
        messages, flags = self._read_messages(items)
        train = self._choose_trained(messages, flags, prompt_length)
        system = get(self.system_column) or self.system
        if system and messages[0]["role"] != "system":
            if not isinstance(system, str):
                raise BadRow("bad_system", f"the system column holds {kind(system)}, not text")
            messages.insert(0, {"role": "system", "content": system})
            train.insert(0, "system" in self.train_roles and not self.last_only and not prompt_length)
        if True not in train:
            raise BadRow(
                "nothing_to_train", "no message is trained: roles " + ", ".join(m["role"] for m in messages[:8])
            )
        if self.strip:
            messages = strip_thinking(messages, self.prompt_opens_thinking)
        return Conversation(messages, train, tools, bool(flags))

    def _read_messages(self, items: Sequence[Any]) -> tuple[list[Message], dict[int, bool]]:
        """The messages, and for those with a train or weight flag what it says."""
        messages: list[Message] = []
        flags: dict[int, bool] = {}
        for index, item in enumerate(items):
            # The common shapes are taken unchanged: a known role, a content, and other text fields that templates read.
            if type(item) is dict:
                role = item.get("role")
                known = type(role) is str and role in ROLES and type(item.get("content")) is str
                if known and (
                    len(item) == 2 or (TEXT_FIELDS.issuperset(item) and set(map(type, item.values())) == {str})
                ):
                    messages.append(item)
                    continue
            message, flag = read_message(item, index)
            messages.append(message)
            if flag is not None:
                flags[index] = flag
        return messages, flags

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

    def _read_items(self, row: Mapping[str, Any]) -> tuple[Sequence[Any], int]:
        """The row's messages as the row has them, and how many of them are the prompt of a prompt/completion pair."""
        columns = self.columns
        layout = next((name for name in self.layouts if row.get(columns[name]) is not None), None)
        if layout is None:
            expected = " or ".join(columns[name] for name in self.layouts)
            present = ", ".join(map(str, list(row)[:8])) or "none"
            raise BadRow("unknown_columns", f"no column {expected} with a value; the row has {present}")
        value = row[columns[layout]]
        if layout in ("messages", "conversations"):
            return read_list(value, columns[layout]), 0
        if layout == "prompt":
            return self._read_pair(row, value)
        return self._read_instruction(row, value)

    def _read_pair(self, row: Mapping[str, Any], value: Any) -> tuple[Sequence[Any], int]:
        """`prompt` and `completion` (or `response`), each a text or a list of messages."""
        completion = row.get(self.completion)
        if completion is None:
            completion = row.get("response")
        if completion is None:
            raise BadRow("missing_column", f"{self.completion} is missing")
        prompt = [{"role": "user", "content": value}] if isinstance(value, str) else read_list(value, self.prompt)
        if isinstance(completion, str):
            return [*prompt, {"role": "assistant", "content": completion}], len(prompt)
        return [*prompt, *read_list(completion, self.completion)], len(prompt)

    def _read_instruction(self, row: Mapping[str, Any], instruction: Any) -> tuple[Sequence[Any], int]:
        """Alpaca's `instruction`, `input` and `output` (or `response`)."""
        more = row.get(self.columns["input"]) or ""
        output = row.get(self.columns["output"])
        if output is None:
            output = row.get("response")
        for name, text in (("instruction", instruction), ("input", more), ("output", output)):
            if not isinstance(text, str):
                reason = "missing_column" if text is None else "bad_content"
                raise BadRow(reason, f"{self.columns[name]} is {kind(text)}, not text")
        question = f"{instruction}\n\n{more}" if more else instruction
        return [{"role": "user", "content": question}, {"role": "assistant", "content": output}], 1


def kind(value: Any) -> str:
    """A value's type, for messages."""
    return "nothing" if value is None else type(value).__name__


def read_list(value: Any, column: str) -> Sequence[Any]:
    """A list of messages, perhaps as JSON text."""
    if isinstance(value, str):
        value = parse(value, "bad_messages", f"the {column} column holds text that is not JSON")
    if not isinstance(value, (list, tuple)):
        raise BadRow("bad_messages", f"{column} is {kind(value)}, not a list of messages")
    if not value:
        raise BadRow("no_messages", f"{column} is empty")
    return value


def parse(text: str, reason: str, detail: str) -> Any:
    """JSON text as a value. Raises BadRow(reason, detail)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(reason, f"{detail}: {error}") from None


def to_json(value: Any, where: str) -> str:
    """A value as JSON text. Raises BadRow: columnar files can hold values that JSON cannot express, such as dates and bytes."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("bad_value", f"{where}: {error}") from None


def read_message(item: Any, index: int) -> tuple[Message, bool | None]:
    """One message in any accepted shape, and its own train or weight flag (None without one). Raises BadRow."""
    if not isinstance(item, Mapping):
        raise BadRow("bad_message", f"message {index} is {kind(item)}, not an object")
    role, content, call_text = item.get("role"), item.get("content"), None
    if role is None and "from" in item:
        role, content = item["from"], item.get("value")
        if isinstance(role, str) and role.lower() == "function_call":
            call_text, content = content, ""
    role = read_role(role, index)
    # Columnar files give every message every field of any message, filled with nulls: a null is an absent field.
    message = {key: value for key, value in item.items() if value is not None and key in MESSAGE_FIELDS}
    message["role"] = role
    if call_text is not None:
        if not isinstance(call_text, str):
            raise BadRow("bad_content", f"message {index}: value is {kind(call_text)}, not text")
        message["function_calls"] = call_text
    for name in ("functions", "function_calls", "reasoning_content", "thinking"):
        if name in message and not isinstance(message[name], str):
            if name in ("reasoning_content", "thinking"):
                raise BadRow("bad_content", f"message {index}: {name} is {kind(message[name])}, not text")
            message[name] = to_json(message[name], f"message {index}: {name}")
    if "tool_calls" in message:
        calls = read_tool_calls(message.pop("tool_calls"), index)
        if calls:
            message["tool_calls"] = calls
    if content is None:
        if "tool_calls" not in message and "function_calls" not in message:
            raise BadRow("no_content", f"message {index} ({role}) has no content")
        content = ""
    message["content"] = content if isinstance(content, str) else join_parts(content, index)
    return message, read_flag(item, index)


def read_role(role: Any, index: int) -> str:
    """A role by the names that templates know."""
    if not isinstance(role, str):
        raise BadRow("bad_role", f"message {index}: role is {kind(role)}")
    known = SHAREGPT.get(role.lower(), role.lower())
    if known not in ROLES:
        raise BadRow("bad_role", f"message {index}: unknown role {known[:40]!r}; known: {', '.join(sorted(ROLES))}")
    return known


def join_parts(content: Any, index: int) -> str:
    """OpenAI content parts as one text. A part that is not text cannot be trained on, so it rejects the row."""
    if not isinstance(content, (list, tuple)):
        raise BadRow("bad_content", f"message {index}: content is {kind(content)}, not text")
    texts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            found = part.get("type") if isinstance(part, Mapping) else kind(part)
            raise BadRow("content_part", f"message {index}: a part of type {str(found)[:40]!r} is not text")
    return "".join(texts)


def read_flag(item: Mapping[str, Any], index: int) -> bool | None:
    """A message's `train` or `weight`; None without either."""
    train, weight = item.get("train"), item.get("weight")
    if train is not None and train not in (0, 1):  # true and false are 1 and 0
        raise BadRow("bad_train_flag", f"message {index}: train is {train!r}, expected true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise BadRow("bad_weight", f"message {index}: weight is {weight!r}, expected 0 or 1")
    if train is not None and weight is not None and train != weight:
        raise BadRow("bad_train_flag", f"message {index}: train is {train} but weight is {weight}")
    flag = train if train is not None else weight
    return None if flag is None else bool(flag)


def read_tool_calls(calls: Any, index: int) -> list[dict[str, Any]]:
    """OpenAI tool calls with their arguments as an object: templates iterate over them."""
    if isinstance(calls, str):
        calls = parse(calls, "bad_tool_calls", f"message {index}: tool_calls is text that is not JSON")
    if not isinstance(calls, (list, tuple)):
        raise BadRow("bad_tool_calls", f"message {index}: tool_calls is {kind(calls)}, not a list")
    return [read_tool_call(call, index) for call in calls]


def read_tool_call(call: Any, index: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("bad_tool_calls", f"message {index}: a call without a function name")
    where = f"message {index}: arguments of {function['name'][:40]}"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse(arguments or "{}", "bad_tool_calls", f"{where} are not JSON")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise BadRow("bad_tool_calls", f"{where} are {kind(arguments)}")
    to_json(arguments, where)
    call_id = {"id": call["id"]} if call is not function and isinstance(call.get("id"), str) else {}
    return {**call_id, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools column as a list of objects; None when it offers no tools."""
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = parse(tools, "bad_tools", "the tools column holds text that is not JSON")
        if tools is None:
            return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("bad_tools", f"the tools column holds {kind(tools)}, not a list of objects")
    to_json(tools, "the tools column")
    return [dict(tool) for tool in tools] or None


def strip_thinking(messages: list[Message], prompt_opens_thinking: bool) -> list[Message]:
    """Removes the thinking of the assistant's turns before the last user turn, as a chat does at inference time.

    Only thinking that opens the content is removed: an answer may write about the tags.
    """
    last_user = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    result = []
    for index, message in enumerate(messages):
        if index < last_user and message["role"] == "assistant":
            content = message["content"]
            opened = content.lstrip().startswith("<think>")
            if opened and "</think>" not in content:
                raise BadRow(
                    "bad_thinking", f"message {index}: <think> is not closed, so nothing says where the answer begins"
                )
            if opened or (prompt_opens_thinking and "</think>" in content):
                content = content.split("</think>", 1)[1].lstrip()
            message = {
                key: content if key == "content" else value
                for key, value in message.items()
                if key not in ("reasoning_content", "thinking")
            }
        result.append(message)
    return result
