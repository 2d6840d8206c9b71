"""Dataset rows to conversations.

In: one row of a dataset as a dict, in any of the usual layouts: OpenAI `messages`, ShareGPT `conversations`,
`prompt`/`completion`, Alpaca `instruction`/`input`/`output`, with columns renamed by the recipe. Out: a `Conversation`: messages
with `role` and `content`, which of them are trained, and the tools on offer. A row that cannot be read raises
`BadRow` with a reason that is counted, never a crash. `sft.data.tokenize.Encoder` is the caller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sft.recipe.schema import COLUMNS, ROLES, Prepare, Source

# What ShareGPT files call the speakers. "function_call" is an assistant turn that only calls a function.
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
# Message fields a template may read. Others (ids, scores, annotations) are dropped so that they cannot change a rendering.
KEPT = frozenset(
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
TEXT_FIELDS = KEPT - {"tool_calls"}
Message = dict[str, Any]
"""A message with `role`, `content` and perhaps other fields of KEPT."""
LAYOUTS = ("messages", "conversations", "prompt", "instruction")


class BadRow(Exception):
    """A row that cannot be used: `reason` is one of a few words that are counted, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Conversation:
    """`train[i]` says whether the model learns to emit message i. `flagged` if the row itself said so for some message."""

    __slots__ = ("flagged", "messages", "tools", "train")

    def __init__(self, messages: list[dict], train: list[bool], tools: list[dict] | None, flagged: bool) -> None:
        self.messages, self.train, self.tools, self.flagged = messages, train, tools, flagged


class RowReader:
    """Reads the rows of one source by the recipe's rules. `prompted`: the template's generation prompt ends in <think>,
    so that answers need not spell it out."""

    def __init__(self, prepare: Prepare, source: Source, prompted: bool = False) -> None:
        self.prompted = prompted
        columns = dict(source.columns)
        self.columns = {name: columns.get(name, name) for name in COLUMNS}
        self.train_roles = frozenset(prepare.train_roles)
        self.last_only = prepare.train_turns == "last"
        self.strip = prepare.thinking == "strip"
        self.system = prepare.system
        # Named columns decide the layout: {prompt = "question"} must not be overruled by a stray `messages` column.
        self.layouts = [name for name in LAYOUTS if name in columns] or list(LAYOUTS)
        # What most rows need, decided once.
        usual = self.train_roles == {"assistant"} and not self.system and not self.strip
        self.pairs = usual and self.layouts in (["prompt"], list(LAYOUTS))
        self.prompt, self.completion = self.columns["prompt"], self.columns["completion"]
        self.messages = self.columns[self.layouts[0]] if self.layouts[0] in ("messages", "conversations") else None
        self.tools, self.system_column = self.columns["tools"], self.columns["system"]
        more = ("messages", "conversations") if self.layouts != ["prompt"] else ()
        self.others = [self.columns[name] for name in ("tools", "system", *more)]

    def read(self, row: Any) -> Conversation:
        if type(row) is not dict and not isinstance(row, Mapping):
            raise BadRow("not_an_object", f"a row must be an object, this is {kind(row)}")
        get = row.get
        if self.pairs:
            prompt, completion = get(self.prompt), get(self.completion)
            if type(prompt) is str and type(completion) is str and not any(map(get, self.others)):
                return Conversation(
                    [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}],
                    [False, True],
                    None,
                    False,
                )
        raw, answer = get(self.messages), 0
        if type(raw) is not list or not raw:
            raw, answer = self._messages(row)
        tools = get(self.tools)
        if tools is not None:
            tools = read_tools(tools)
        messages: list[dict] = []
        train: list[bool] = []
        flags: dict[int, bool] = {}
        train_roles = self.train_roles
        for index, item in enumerate(raw):
            # The common shapes, taken as they are: a known role, a content, and other fields of text that templates read.
            if type(item) is dict:
                role = item.get("role")
                known = type(role) is str and role in ROLES and type(item.get("content")) is str
                if known and (
                    len(item) == 2 or (TEXT_FIELDS.issuperset(item) and set(map(type, item.values())) == {str})
                ):
                    messages.append(item)
                    train.append(role in train_roles)
                    continue
            message, flag = read_message(item, index)
            messages.append(message)
            train.append(message["role"] in train_roles)
            if flag is not None:
                flags[index] = flag
        if answer:
            train = [flag and index >= answer for index, flag in enumerate(train)]
        if self.last_only and True in train:
            last = len(train) - 1 - train[::-1].index(True)
            train = [index == last for index in range(len(train))]
        for index, flag in flags.items():  # what the row says of a message holds, and says nothing of the others
            train[index] = flag
        system = get(self.system_column) or self.system
        if system and messages[0]["role"] != "system":
            if not isinstance(system, str):
                raise BadRow("bad_system", f"the system column holds {kind(system)}, not text")
            messages.insert(0, {"role": "system", "content": system})
            train.insert(0, "system" in train_roles and not self.last_only and not answer)
        if True not in train:
            raise BadRow(
                "nothing_to_train", "no message is trained: roles " + ", ".join(m["role"] for m in messages[:8])
            )
        if self.strip:
            messages = strip_thinking(messages, self.prompted)
        return Conversation(messages, train, tools, bool(flags))

    def _messages(self, row: Mapping) -> tuple[Sequence, int]:
        """The row's messages, and the index before which nothing is trained (the prompt of a prompt/completion pair)."""
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
            completion = row.get(self.completion)
            if completion is None:
                completion = row.get("response")
            if completion is None:
                raise BadRow("missing_column", f"{columns['completion']} is missing")
            prompt = (
                [{"role": "user", "content": value}] if isinstance(value, str) else read_list(value, columns["prompt"])
            )
            if isinstance(completion, str):
                return [*prompt, {"role": "assistant", "content": completion}], len(prompt)
            return [*prompt, *read_list(completion, columns["completion"])], len(prompt)
        given = row.get(columns["input"]) or ""
        output = row.get(columns["output"])
        if output is None:
            output = row.get("response")
        for name, text in (("instruction", value), ("input", given), ("output", output)):
            if not isinstance(text, str):
                reason = "missing_column" if text is None else "bad_content"
                raise BadRow(reason, f"{columns[name]} is {kind(text)}, not text")
        question = f"{value}\n\n{given}" if given else value
        return [{"role": "user", "content": question}, {"role": "assistant", "content": output}], 1


def kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def read_list(value: Any, column: str) -> Sequence:
    if isinstance(value, str):
        value = parse(value, "bad_messages", f"the {column} column holds text that is not JSON")
    if not isinstance(value, (list, tuple)):
        raise BadRow("bad_messages", f"{column} is {kind(value)}, not a list of messages")
    if not value:
        raise BadRow("no_messages", f"{column} is empty")
    return value


def parse(text: str, reason: str, detail: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(reason, f"{detail}: {error}") from None


def to_json(value: Any, where: str) -> str:
    """JSON text. Columnar files can hold values that JSON has no word for: dates, decimals, bytes."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("bad_value", f"{where}: {error}") from None


def read_message(item: Any, index: int) -> tuple[dict, bool | None]:
    """One message in any accepted shape, and the row's own say on training it (None where it says nothing)."""
    if not isinstance(item, Mapping):
        raise BadRow("bad_message", f"message {index} is {kind(item)}, not an object")
    role, content = item.get("role"), item.get("content")
    call_text = None
    if role is None and "from" in item:
        role, content = item["from"], item.get("value")
        if isinstance(role, str) and role.lower() == "function_call":
            call_text, content = content, ""
    if not isinstance(role, str):
        raise BadRow("bad_role", f"message {index}: role is {kind(role)}")
    role = role.lower()
    role = SHAREGPT.get(role, role)
    if role not in ROLES:
        raise BadRow("bad_role", f"message {index}: unknown role {role[:40]!r}; known: {', '.join(sorted(ROLES))}")
    # Columnar files give every message every field of any message, filled with nulls: a null is an absent field.
    message = {key: value for key, value in item.items() if value is not None and key in KEPT}
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


def join_parts(content: Any, index: int) -> str:
    """OpenAI content parts to text; a part that is not text cannot be trained on and is not dropped silently."""
    if not isinstance(content, (list, tuple)):
        raise BadRow("bad_content", f"message {index}: content is {kind(content)}, not text")
    texts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            what = part.get("type") if isinstance(part, Mapping) else kind(part)
            raise BadRow("content_part", f"message {index}: a part of type {str(what)[:40]!r} is not text")
    return "".join(texts)


def read_flag(item: Mapping, index: int) -> bool | None:
    train, weight = item.get("train"), item.get("weight")
    if train is not None and train not in (0, 1):  # true and false are 1 and 0
        raise BadRow("bad_train_flag", f"message {index}: train is {train!r}, expected true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise BadRow("bad_weight", f"message {index}: weight is {weight!r}, expected 0 or 1")
    if train is not None and weight is not None and train != weight:
        raise BadRow("bad_train_flag", f"message {index}: train is {train} but weight is {weight}")
    said = train if train is not None else weight
    return None if said is None else bool(said)


def read_tool_calls(calls: Any, index: int) -> list[dict]:
    """OpenAI tool calls with their arguments as an object: templates iterate over them."""
    if isinstance(calls, str):
        calls = parse(calls, "bad_tool_calls", f"message {index}: tool_calls is text that is not JSON")
    if not isinstance(calls, (list, tuple)):
        raise BadRow("bad_tool_calls", f"message {index}: tool_calls is {kind(calls)}, not a list")
    result: list[dict] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("bad_tool_calls", f"message {index}: a call without a function name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse(
                arguments or "{}",
                "bad_tool_calls",
                f"message {index}: arguments of {function['name'][:40]} are not JSON",
            )
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, Mapping):
            raise BadRow(
                "bad_tool_calls", f"message {index}: arguments of {function['name'][:40]} are {kind(arguments)}"
            )
        call_id = {"id": call["id"]} if call is not function and isinstance(call.get("id"), str) else {}
        to_json(arguments, f"message {index}: arguments of {function['name'][:40]}")
        result.append(
            {**call_id, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
        )
    return result


def read_tools(tools: Any) -> list[dict] | None:
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


def strip_thinking(messages: list[dict], prompted: bool) -> list[dict]:
    """Removes the thinking of the assistant turns before the last user turn, as a chat at inference time does. Thinking is
    what opens the content: an answer may speak of the tags."""
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
            if opened or (prompted and "</think>" in content):
                content = content.split("</think>", 1)[1].lstrip()
            message = {
                key: content if key == "content" else value
                for key, value in message.items()
                if key not in ("reasoning_content", "thinking")
            }
        result.append(message)
    return result
