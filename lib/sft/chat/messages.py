"""One message of a row, in any accepted shape, as templates read it: `read_message`.

Several fields may hold the same thing under names of different tools: calls, thinking, flags. Two of them that agree are fine; two that
disagree raise BadRow. Nothing that has a wrong type is written as text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sft.chat.calls import calls_text, read_spoken, read_tool_calls
from sft.chat.fields import RESULT_ROLES
from sft.chat.values import BadRow, drop_nulls, is_empty, kind, parse, parse_literal, to_json
from sft.recipe.row_fields import FLAGS, THINKING
from sft.recipe.schema import ROLES

# What ShareGPT files and others call the speakers.
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLERS = ("function_call", "tool_call")
"""Speakers whose text is a call: an assistant's turn without content."""
_BLANK = r"[\s\u00ad\u200b-\u200f\u2060\ufeff]*"
NO_TEXT = re.compile(rf"{_BLANK}(?:<think>{_BLANK}</think>{_BLANK})?")
"""White space and characters without a width, perhaps around empty thoughts."""
BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
"""The same characters."""
JSON_NAME = re.compile(r"[\"'](?:role|from|type)\\*[\"']")
"""A name that every message or content part has, in JSON or as Python prints it."""
PART_TYPES = frozenset(
    ("text", "input_text", "output_text", "image", "image_url", "input_image", "thinking", "tool_use", "tool_result")
)
"""The types of content parts."""
Message = dict[str, Any]
"""A message: `role`, `content`, and perhaps `name`, `functions`, `function_calls`, `tool_calls`, `tool_call_id` and one field of thinking."""


def read_message(item: Any, index: int, schemas: Mapping[str, Any]) -> tuple[Message, bool | None]:
    """One message in any accepted shape, and its own flag (None without one). Raises BadRow."""
    if not isinstance(item, Mapping):
        raise BadRow("bad_message", f"message {index} is {kind(item)}, not an object")
    speaker, content = read_one_of(item, ("role", "from"), index), read_one_of(item, ("content", "value"), index)
    role = read_role(speaker, index, item.keys())
    message: Message = {"role": role}
    calls: list[dict[str, Any]] = []
    if speaker.lower() in CALLERS:
        calls, content = read_spoken_call(message, content, index, schemas), ""
    # Columnar files give every message every field of any message, filled with nulls: a null is an absent field.
    for name in ("name", "tool_call_id"):
        if not is_empty(item.get(name)):
            if not isinstance(item[name], str):
                raise BadRow("bad_value", f"message {index}: {name} is {kind(item[name])}, not text")
            message[name] = item[name]
    for name in ("functions", "function_calls"):
        if isinstance(item.get(name), str) or not is_empty(item.get(name)):
            if name in message:
                raise BadRow("disagree", f"message {index}: {name} beside a call in the content")
            message[name] = read_definition(item[name], f"message {index}: {name}")
    calls = read_calls(item, index, schemas, calls, message.get("function_calls"))
    if calls:
        message["tool_calls"] = calls
    read_thinking(item, index, message)
    has_calls = "tool_calls" in message or "function_calls" in message
    refusal = item.get("refusal")
    if not is_empty(refusal):
        if not isinstance(refusal, str):
            raise BadRow("bad_content", f"message {index}: refusal is {kind(refusal)}, not text")
        if has_calls or content not in (None, "", [], refusal):
            raise BadRow("disagree", f"message {index} has a refusal beside another answer")
        content = refusal
    if content is None:
        if not has_calls:
            fields = ", ".join(str(name) for name, value in item.items() if not is_empty(value))
            raise BadRow("no_content", f"message {index} ({role}) has no content; it holds {fields[:200]}")
        content = ""
    message["content"] = content if isinstance(content, str) else join_parts(content, index)
    return message, read_flag(item, index)


def read_one_of(item: Mapping[str, Any], names: tuple[str, str], index: int) -> Any:
    """The value of a field that has two names. Raises BadRow when both hold something, and not the same."""
    first, second = map(item.get, names)
    if is_empty(second) or first == second:
        return second if first is None else first
    if is_empty(first):
        return second
    if names[0] == "role" and read_role(first, index) == read_role(second, index):
        return first
    raise BadRow("disagree", f"message {index}: {names[0]} and {names[1]} differ")


def read_role(role: Any, index: int, fields: Collection[Any] = ()) -> str:
    """A role by the names that templates know. `fields` are those of its message."""
    if role is None:
        raise BadRow(
            "bad_role", f"message {index} has no role; its fields are {', '.join(map(str, fields))[:200] or 'none'}"
        )
    if not isinstance(role, str):
        raise BadRow("bad_role", f"message {index}: role is {kind(role)}")
    known = SPEAKERS.get(role.lower(), role.lower())
    if known not in ROLES:
        raise BadRow("bad_role", f"message {index}: unknown role {known[:40]!r}; known: {', '.join(sorted(ROLES))}")
    return known


def renamed_roles(is_known: Callable[[str], bool]) -> dict[str, str]:
    """The roles that a template does not know under the names that it knows for the same thing: `developer` is OpenAI's newer name of system
    messages, and the roles of results are one to all but a few templates."""
    pairs = [("developer", "system"), *((role, "tool") for role in RESULT_ROLES if role != "tool")]
    is_known = functools.cache(is_known)
    return {role: other for role, other in pairs if is_known(other) and not is_known(role)}


def read_definition(value: Any, where: str) -> str:
    """Functions or calls as text: text is taken as it is, a list or an object as its JSON. Raises BadRow."""
    if not isinstance(value, (str, list, tuple, Mapping)):
        raise BadRow("bad_content", f"{where} is {kind(value)}, not text")
    return value if isinstance(value, str) else to_json(drop_nulls(value), where)


def read_spoken_call(message: Message, text: Any, index: int, schemas: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls that are the content of a message: JSON of calls with a name and arguments, or Python's way to write it; other text is kept as
    `function_calls`. Raises BadRow for a call with a field that nothing reads, and for text that begins as an object and is none."""
    if not isinstance(text, str):
        raise BadRow("bad_content", f"message {index}: its call is {kind(text)}, not text")
    try:
        value = parse(text, "", "")
    except BadRow as error:
        value = read_literal(text)
        if value is None and text.lstrip().startswith("{"):
            raise BadRow(
                "bad_tool_calls", f"message {index}: its call is neither JSON nor a Python literal{error.detail}"
            ) from None
    calls = [read_spoken(call, index, schemas) for call in (value if isinstance(value, list) else [value])]
    found = [call for call in calls if call]
    if not found or len(found) < len(calls):
        message["function_calls"] = text
        return []
    return found


def read_literal(text: str) -> Any:
    """The object or list that a text in Python's notation is; None for any other text."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        value = parse_literal(text)
        to_json(value, "")
    except (ValueError, BadRow):
        return None
    return value if isinstance(value, (dict, list)) else None


def read_calls(
    item: Mapping[str, Any], index: int, schemas: Mapping[str, Any], calls: list[dict[str, Any]], text: str | None
) -> list[dict[str, Any]]:
    """The tool calls of `tool_calls` and OpenAI's older `function_call`. Raises BadRow when two fields hold different calls."""
    found = [calls] if calls else []
    for name in ("tool_calls", "function_call"):
        value = item.get(name)
        if not is_empty(value):
            found.append(read_tool_calls([value] if isinstance(value, Mapping) else value, index, schemas))
    found = [calls for calls in found if calls]
    functions = [[call["function"] for call in calls] for calls in found]
    if any(each != functions[0] for each in functions) or (text and found and text != calls_text(found[0])):
        raise BadRow("disagree", f"message {index}: two fields hold different calls")
    return found[0] if found else []


def check_functions(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises BadRow when the functions in a message are not the tools of the column: a template writes only one of them."""
    for message in messages:
        if "functions" in message:
            offered = parse(
                message["functions"] or "null",
                "disagree",
                "the functions of a message are no JSON, and there are tools",
            )
            if not isinstance(offered, list | None) or not all(isinstance(f, Mapping) for f in offered or []):
                raise BadRow("disagree", "the functions of a message are no list of functions, and there are tools")
            if [f.get("function", f) for f in offered or []] != [tool.get("function", tool) for tool in tools]:
                raise BadRow("disagree", "the functions of a message and the tools of the row differ")


def read_thinking(item: Mapping[str, Any], index: int, message: Message) -> None:
    """Stores the thinking of a message under its name for templates. Raises BadRow when two fields hold different thoughts."""
    kept = ""
    for name in THINKING:
        value = item.get(name)
        if is_empty(value):
            continue
        if name == "reasoning_details":
            value = join_details(value, index)
        elif not isinstance(value, str):
            raise BadRow("bad_content", f"message {index}: {name} is {kind(value)}, not text")
        if kept and value != message[kept]:
            raise BadRow("disagree", f"message {index}: {kept} and {name} hold different thoughts")
        if not kept:
            kept = name if name == "thinking" else "reasoning_content"
            message[kept] = value


def join_details(details: Any, index: int) -> str:
    """The text of OpenRouter's reasoning_details. Raises BadRow for encrypted thoughts and for summaries."""
    if not isinstance(details, (list, tuple)):
        raise BadRow("bad_content", f"message {index}: reasoning_details is {kind(details)}, not a list")
    texts = []
    for detail in details:
        found = detail.get("type") if isinstance(detail, Mapping) else kind(detail)
        if found != "reasoning.text" or not isinstance(detail.get("text"), str):
            raise BadRow(
                "reasoning_details", f"message {index}: a detail of type {str(found)[:40]!r} is no text of thoughts"
            )
        texts.append(detail["text"])
    return "".join(texts)


def join_parts(content: Any, index: int) -> str:
    """OpenAI content parts as one text. A part that is not text cannot be trained on, so it rejects the row."""
    if not isinstance(content, (list, tuple)):
        raise BadRow("bad_content", f"message {index}: content is {kind(content)}, not text")
    texts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") in (None, "text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            found = part.get("type") if isinstance(part, Mapping) else kind(part)
            raise BadRow("content_part", f"message {index}: a part of type {str(found)[:40]!r} is not text")
    return "".join(texts)


def read_flag(item: Mapping[str, Any], index: int) -> bool | None:
    """What the flags of a message say; None without one. Raises BadRow when two of them disagree."""
    found: dict[str, bool] = {}
    for name in FLAGS:
        value = item.get(name)
        if not is_empty(value):
            found[name] = read_one_flag(name, value, index)
    if len(set(found.values())) > 1:
        raise BadRow("bad_train_flag", f"message {index}: the flags {' and '.join(found)} disagree")
    return next(iter(found.values()), None)


def read_one_flag(name: str, value: Any, index: int) -> bool:
    """Whether a flag says that message `index` is trained."""
    if name == "weight" and (isinstance(value, bool) or value not in (0, 1)):
        raise BadRow("bad_weight", f"message {index}: weight is {value!r}, expected 0 or 1")
    if value not in (0, 1):  # true and false are 1 and 0
        raise BadRow("bad_train_flag", f"message {index}: {name} is {value!r}, expected true or false")
    return bool(value) != (name == "masked")


def is_empty_answer(message: Message, train: bool) -> bool:
    """Whether a trained answer has neither text nor a call, so that only its end would be trained."""
    if not train or message["role"] != "assistant" or not NO_TEXT.fullmatch(message["content"]):
        return False
    if any(message.get(name) for name in ("tool_calls", "function_calls")):
        return False
    return all(NO_TEXT.fullmatch(message.get(name) or "") for name in ("reasoning_content", "thinking"))


def check_content(message: Message, index: int) -> None:
    """Raises BadRow for a text that is a message, a part or a list of them, and for thoughts both in a field and in the content.

    Results of tools are any JSON, and an answer may be a list of messages, if they are not all an assistant's. A content has thoughts
    beside a field if it opens with <think>, or if it closes thoughts that it never opened: templates take it apart at </think>.
    """
    content: str = message["content"]
    first = content[:1]
    if not first.isalnum() and message["role"] in ("system", "developer", "user", "assistant"):
        text = content.strip(BLANKS)
        if text[:1] in ("[", "{", '"') and JSON_NAME.search(text) and is_serialized(text, message["role"]):
            raise BadRow(
                "json_text",
                f"message {index}: its text is the JSON of messages or parts; next: store the list itself",
            )
    name = next((name for name in ("reasoning_content", "thinking") if message.get(name)), "")
    if name and "think>" in content:
        before, closed, _ = content.partition("</think>")
        if before.lstrip().startswith("<think>") or (closed and "<think>" not in before):
            raise BadRow("disagree", f"message {index}: {name} and the content, which has a <think> tag, hold thoughts")


def is_serialized(text: str, role: str) -> bool:
    """Whether the text of a message is a message, a content part, or a list of them. In an answer, all messages must be an assistant's."""
    try:
        try:
            value = parse(text, "", "")
        except BadRow:
            value = read_literal(text)
        items = written_items(value)
    except RecursionError:
        return False
    if items and all(map(is_part, items)):
        return isinstance(value, list) or ("text" in items[0] and items[0].keys() <= {"type", "text", "cache_control"})
    if not all(isinstance(i, dict) and i.keys() & {"role", "from"} and i.keys() & {"content", "value"} for i in items):
        return False
    speakers = {str(item.get("role") or item.get("from")).lower() for item in items}
    roles = {SPEAKERS.get(speaker, speaker) for speaker in speakers}
    return roles == {"assistant"} if role == "assistant" else bool(roles) and roles.issubset(ROLES)


def written_items(value: Any) -> list[Any]:
    """What could be messages or parts in a value: in lists, in JSON texts, and in an object with a list of messages."""
    if isinstance(value, str) and JSON_NAME.search(value):
        try:
            return written_items(parse(value, "", ""))
        except BadRow:
            return [None]
    if isinstance(value, dict):
        lists = [value[name] for name in ("messages", "conversations") if isinstance(value.get(name), list)]
        return written_items(lists[0]) if lists else [value]
    return [item for held in value for item in written_items(held)] if isinstance(value, list) else [value]


def is_part(item: Any) -> bool:
    """Whether a value is a content part. A part of text has its text."""
    kind = str(item.get("type")) if isinstance(item, dict) else ""
    return kind in PART_TYPES and ("text" in item or not kind.endswith("text"))


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
