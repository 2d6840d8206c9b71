"""Whether a rendering says everything that a message says.

In: what a template wrote, and a message. Out: the first text of the message that is missing, or None. A template may trim white space,
move thinking, and escape text for JSON. It may not leave out a word: a word that is not rendered would not be trained, or would be
missing from the prompt.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sft.chat.rows import Message

THINK_TAGS = re.compile(r"</?think>")
"""Templates may write other tags for these."""
WORD = re.compile(r"\w+|[^\w\s]")
ESCAPED_CHARACTER = re.compile(r"\\+u([0-9a-fA-F]{4})")
ESCAPED_SPACE = re.compile(r"\\+[nrtbf]")
CONTROL = re.compile(r"[\x00-\x1f]")
ESCAPE = re.compile(r"\\+")


def missing_text(written: str, message: Message, thinking: bool = True) -> str | None:
    """The first text of a message that `written` does not contain. Returns None if it contains all.

    Thinking, content and calls may come in any order, but they do not overlap. Without `thinking`, the thought of an
    answer is not checked.
    """
    content: str = message["content"]
    if len(message) == 2 and content.strip() in written and (thinking or "</think>" not in content):
        return None
    groups = [group for group in _groups(message, thinking) if group]
    orders = [list(itertools.chain.from_iterable(order)) for order in itertools.permutations(groups)]
    missing = [_first_missing(written, texts) for texts in orders]
    if None not in missing:
        return missing[0]
    values = [value for call in message.get("tool_calls") or () for value in _leaves(call["function"]["arguments"])]
    return missing_words(written, values)


def missing_words(written: str, texts: Sequence[str]) -> str | None:
    """The first of the texts that `written` does not contain, whatever their order."""
    return next((text for text in texts if _first_missing(written, [text]) is not None), None)


def tool_texts(tools: Sequence[dict[str, Any]]) -> list[str]:
    """The names and descriptions of tools, and the names of their parameters."""
    functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]
    texts = [function.get(name) for function in functions for name in ("name", "description")]
    for function in functions:
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        texts += list(properties) if isinstance(properties, dict) else []
    return [text for text in texts if isinstance(text, str)]


def _groups(message: Message, thinking: bool) -> list[list[str]]:
    """The texts that follow each other: thinking, content, calls."""
    content: str = message["content"]
    thought = message.get("reasoning_content") or message.get("thinking") or ""
    if not thinking:
        content, thought = content.rsplit("</think>", 1)[-1], ""
    calls = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    texts = [[thought], THINK_TAGS.split(content), [message.get("functions", "")]]
    texts.append([message["function_calls"]] if "function_calls" in message else calls)
    return [[text for text in group if text.strip()] for group in texts]


def _leaves(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _first_missing(written: str, texts: Sequence[str]) -> str | None:
    """The first text that does not follow the earlier ones in `written`. Returns None if all do."""
    position = 0
    for text in texts:
        found = written.find(text.strip(), position)
        if found < 0:
            break
        position = found + len(text.strip())
    else:
        return None
    plain, position = _without_escapes(written), 0
    for text in texts:
        for word in WORD.findall(_without_escapes(text)):
            found = plain.find(word, position)
            if found < 0:
                return text.strip()
            position = found + len(word)
    return None


def _without_escapes(text: str) -> str:
    """The text with JSON's escapes undone, however often it was escaped."""
    text = ESCAPED_CHARACTER.sub(lambda found: chr(int(found[1], 16)), text)
    return ESCAPE.sub("", CONTROL.sub(" ", ESCAPED_SPACE.sub(" ", text)))
