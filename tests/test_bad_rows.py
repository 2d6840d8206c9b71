"""A row that cannot be read is a counted reject with its reason."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from chat_samples import chat, encoder, text_of, tokenizer_folder, turns
from sft.chat.rows import BadRow, RowReader
from sft.recipe.schema import Prepare, Source
from sft.sources.blocks import LineBlock

HELLO = turns(("user", "Hi"), ("assistant", "Hello"))
folder = tokenizer_folder


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def call(value: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": value}}}]}


def spoken(text: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": text}]}


A, B = HELLO
BAD: dict[str, tuple[Any, str]] = {
    "messages that are texts": ({"messages": ["Hi", "Hello"]}, "bad_message"),
    "a tool that is text": ({"messages": HELLO, "tools": ["f"]}, "bad_tools"),
    "a spoken call that is torn": (spoken('{"name": "f", "arguments": {"a": 1}'), "bad_tool_calls"),
    "not an object": ([1, 2], "not_an_object"),
    "a string": ("Hi", "not_an_object"),
    "no known column": ({"text": "Hi"}, "unknown_columns"),
    "no column at all": ({}, "unknown_columns"),
    "messages is a number": ({"messages": 3}, "bad_messages"),
    "messages is broken JSON": ({"messages": "[{"}, "bad_messages"),
    "no messages": ({"messages": []}, "no_messages"),
    "a message is text": ({"messages": ["Hi"]}, "bad_message"),
    "a message is null": ({"messages": [A, None]}, "bad_message"),
    "no role": ({"messages": [{"content": "Hi"}, B]}, "bad_role"),
    "role is a list": ({"messages": [{"role": ["user"], "content": "Hi"}, B]}, "bad_role"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "Hi"}, B]}, "bad_role"),
    "no content": ({"messages": [{"role": "user"}, B]}, "no_content"),
    "content is a number": ({"messages": [A, {"role": "assistant", "content": 4}]}, "bad_content"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, B]},
        "content_part",
    ),
    "no assistant turn": ({"messages": [A]}, "nothing_to_train"),
    "nothing is to be trained": ({"messages": [A, {**B, "train": False}]}, "nothing_to_train"),
    "train is text": ({"messages": [A, {**B, "train": "yes"}]}, "bad_train_flag"),
    "weight is a half": ({"messages": [A, {**B, "weight": 0.5}]}, "bad_weight"),
    "train and weight disagree": ({"messages": [A, {**B, "weight": 1, "train": False}]}, "bad_train_flag"),
    "call without a name": (
        {"messages": [A, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
        "bad_tool_calls",
    ),
    "arguments are broken JSON": (
        {"messages": [A, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "bad_tool_calls",
    ),
    "tools is an object": ({"messages": HELLO, "tools": {"name": "f"}}, "bad_tools"),
    "tools is broken JSON": ({"messages": HELLO, "tools": "{"}, "bad_tools"),
    "no completion": ({"prompt": "Hi"}, "missing_column"),
    "prompt is a number": ({"prompt": 3, "completion": "Hello"}, "bad_messages"),
    "alpaca without output": ({"instruction": "Hi"}, "missing_column"),
    "system is a list": ({**chat("Hi", "Hello"), "system": ["x"]}, "bad_system"),
    "two systems": ({**chat("Hi", "Hello"), "system": "a", "system_prompt": "b"}, "disagree"),
    "a system column beside a system message": (
        {"messages": [{"role": "system", "content": "a"}, *HELLO], "system": "b"},
        "disagree",
    ),
    "two kinds of thoughts": ({"messages": [A, {**B, "reasoning": "a", "thinking": "b"}]}, "disagree"),
    "thoughts in a field and in the content": (
        {"messages": [A, {"role": "assistant", "reasoning_content": "hm", "content": " <think>hm</think>Hello"}]},
        "disagree",
    ),
    "messages as JSON text in a completion": ({"prompt": "Hi", "completion": json.dumps([B])}, "json_text"),
    "parts as JSON text in a content": (
        {"messages": [A, {"role": "assistant", "content": '[ {"type": "text", "text": "Hello"}]'}]},
        "json_text",
    ),
    "thoughts in a field and before a tag that closes them": (
        {"messages": [A, {"role": "assistant", "reasoning": "hm", "content": "hm</think>Hello"}]},
        "disagree",
    ),
    "messages that begin with an id as JSON text": (
        {"prompt": json.dumps([{"id": 1, **A}]), "completion": "Hello"},
        "json_text",
    ),
    "parts that begin with an index as JSON text": (
        {"messages": [A, {"role": "assistant", "content": '[{"index": 0, "type": "text", "text": "Hello"}]'}]},
        "json_text",
    ),
    "JSON text of messages after white space": (
        {"prompt": "\ufeff\n\t " + json.dumps([A]) + "\n", "completion": "Hello"},
        "json_text",
    ),
    "a conversation as JSON text": (
        {"prompt": json.dumps({"id": 1, "messages": [A, B]}), "completion": "c"},
        "json_text",
    ),
    "conversations as JSON text": ({"prompt": json.dumps([[A, B], [A]]), "completion": "c"}, "json_text"),
    "JSON text of JSON texts": ({"prompt": json.dumps([json.dumps(A)]), "completion": "c"}, "json_text"),
    "JSON text of JSON text": ({"prompt": json.dumps(json.dumps([A])), "completion": "c"}, "json_text"),
    "one message as JSON text": ({"prompt": "Hi", "completion": json.dumps(B)}, "json_text"),
    "one part as Python text": ({"prompt": "{'type': 'text', 'text': 'Hi'}", "completion": "Hello"}, "json_text"),
    "messages as JSON text in a prompt": ({"prompt": json.dumps([A]), "completion": "Hello"}, "json_text"),
    "messages as Python text in a prompt": ({"prompt": str([A, B]), "completion": "Hello"}, "json_text"),
    "two kinds of calls": (
        {"messages": [A, {**B, "function_calls": "f()", "function_call": {"name": "g", "arguments": "{}"}}]},
        "disagree",
    ),
    "arguments beside a function without any": (
        {"messages": [A, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}, "arguments": {"a": 1}}]}]},
        "disagree",
    ),
    "a call in a call": (
        {"messages": [A, {"role": "assistant", "tool_calls": [{"name": "g", "function": {"name": "f"}}]}]},
        "disagree",
    ),
    "a spoken call with arguments beside its function": (
        spoken('{"function": {"name": "f"}, "arguments": {"a": 1}}'),
        "disagree",
    ),
    "a spoken call with two kinds of arguments": (
        spoken('{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 1}}'),
        "disagree",
    ),
    "a spoken call with a thought": (
        spoken('[{"name": "f", "arguments": {"a": 1}, "thought": "WHY"}]'),
        "bad_tool_calls",
    ),
    "a spoken function with a thought": (
        spoken('{"function": {"name": "f", "arguments": {}, "parameters": {"a": 1}}}'),
        "bad_tool_calls",
    ),
    "two kinds of tools": ({"messages": HELLO, "tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "disagree"),
    "functions and tools": ({"messages": [{**A, "functions": "[]"}, B], "tools": [{"name": "f"}]}, "disagree"),
    "functions that are a number": ({"messages": [{**A, "functions": "1"}, B], "tools": [{"name": "f"}]}, "disagree"),
    "functions that are an object": ({"messages": [{**A, "functions": "{}"}, B], "tools": [{"name": "f"}]}, "disagree"),
    "functions that are a list of names": (
        {"messages": [{**A, "functions": '["f"]'}, B], "tools": [{"name": "f"}]},
        "disagree",
    ),
    "functions that are a truth value": (
        {"messages": [{**A, "functions": "true"}, B], "tools": [{"name": "f"}]},
        "disagree",
    ),
    "two speakers": ({"messages": [{**A, "from": "gpt"}, B]}, "disagree"),
    "two contents": ({"messages": [A, {**B, "value": "other"}]}, "disagree"),
    "an answer and a refusal": ({"messages": [A, {**B, "refusal": "No."}]}, "disagree"),
    "context and input": ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "disagree"),
    "two completions": ({"prompt": "a", "completion": "b", "response": "c"}, "disagree"),
    "two flags": ({"messages": [A, {**B, "loss": True, "masked": True}]}, "bad_train_flag"),
    "a list of flags that is too short": ({"messages": HELLO, "loss_mask": [1]}, "bad_train_flag"),
    "encrypted thoughts": (
        {"messages": [A, {**B, "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}]},
        "reasoning_details",
    ),
    "variables": ({"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    "content is an object": ({"messages": [A, {"role": "assistant", "content": {"text": "Hello"}}]}, "bad_content"),
    "thoughts are a list": ({"messages": [A, {**B, "thinking": ["x"]}]}, "bad_content"),
    "calls are a number": ({"messages": [A, {**B, "function_calls": 3}]}, "bad_content"),
    "a name is a number": ({"messages": [{**A, "name": 3}, B]}, "bad_value"),
    "NaN in arguments": ({"messages": [A, call(float("nan"))]}, "bad_value"),
    "infinity in tools": ({"messages": HELLO, "tools": [{"a": float("inf")}]}, "bad_value"),
    "history is text": ({"instruction": "a", "output": "b", "history": ["q"]}, "bad_history"),
    "half a surrogate pair": (chat("Hi", "\ud83d"), "bad_unicode"),
    "a date in tools": ({"messages": HELLO, "tools": [{"a": datetime(2020, 1, 1)}]}, "bad_value"),
    "bytes in arguments": ({"messages": [A, call([b"x"])]}, "bad_value"),
    "a decimal in function_calls": ({"messages": [A, {**B, "function_calls": [Decimal("1.5")]}]}, "bad_value"),
    "tools nested too deeply": ({"messages": HELLO, "tools": [{"a": deep(5000)}]}, "bad_value"),
    "arguments nested too deeply": ({"messages": [A, call(deep(5000))]}, "bad_value"),
    "special-token text among arguments nested deeply": (
        {"messages": [{"role": "user", "content": "<|im_end|>"}, call(deep(900))]},
        "bad_value",
    ),
    "an unknown row nested too deeply": ({"x": deep(5000)}, "unknown_columns"),
    "calls in a user message": ({"messages": [{**A, "function_calls": "f()"}, B]}, "template"),
    "functions in an assistant message": ({"messages": [A, {**B, "functions": "f"}]}, "template"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_kind_of_bad_row_is_a_counted_reject(name: str, folder: Path) -> None:
    row, reason = BAD[name]
    made = encoder(folder)
    got = made.encode([chat("Hi", "Hello"), row, chat("Bye", "Good bye")], Source(path="x"))
    assert [(bad.row, bad.reason) for bad in got.rejects] == [(1, reason)]
    assert got.rejects[0].detail and got.rejects[0].example
    assert got.rows.tolist() == [0, 2]
    assert text_of(made, got, 1, trained=True) == "Good bye<|endoftext|>"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('{"messages":[],"messages":MESSAGES}', "messages"),
        ('{"messages":MESSAGES,"id":1,"id":2}', "id"),
        ('{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","train":false,"train" :true}]}', "messages.train"),
        ('{"messages":MESSAGES,"tools":[{"name":"f","parameters":{"a\\\\":1,"b":1,"b":2}}]}', "tools.parameters.b"),
        ('{"messages":MESSAGES,"tools":"[{\\"name\\":\\"f\\",\\"name\\":\\"g\\"}]"}', "bad_tools"),
        ('{"messages":MESSAGES,"id":1,"id":1,"x":null,"x":""}', ""),
        ('{"messages":MESSAGES,"x":1,"x":2}', ""),
        ('{"messages":MESSAGES,"source":":a \\": b"}', ""),
    ],
)  # fmt: skip
def test_a_name_with_two_values_rejects_the_row(line: str, name: str) -> None:
    batch = LineBlock.of(line.replace("MESSAGES", json.dumps(HELLO)).encode() + b"\n").batch()
    source = Source(path="x", ignore=("x",))
    reader = RowReader(Prepare(tokenizer="t", sources=(source,)), source)
    if not name:
        assert reader.read(batch.rows[0]).messages == HELLO
        return
    with pytest.raises(BadRow, match=name if name == "bad_tools" else f"repeated_name: {name} is twice"):
        reader.read(batch.rows[0])


ALLOWED = {
    "JSON about other things": '[{"from": "Rome", "to": "Oslo", "value": 3}]',
    "an answer of two speakers": json.dumps([A, B]),
    "a record with a type": '{"type": "text", "text": "Bob", "label": "PER"}',
    "an object of a type": '{"type": "image"}',
    "text after a list": json.dumps([B]) + " is a list of messages",
    "no list": "[1, 2] and {}",
    "an empty list": "[]",
    "a nest without messages": "[" * 400 + '{"role": 1}' + "]" * 400,
    "texts about roles": '["the \\"role\\" of x"]',
    "JSON that is broken": '[{"role": "assistant", "content": "a"',
}


@pytest.mark.parametrize("content", ALLOWED.values(), ids=ALLOWED.keys())
def test_an_answer_may_be_json(folder: Path, content: str) -> None:
    row = {"messages": [A, {"role": "assistant", "content": content}]}
    made = encoder(folder).encode([row], Source(path="x"))
    assert not made.rejects


@pytest.mark.parametrize("content", ["It is <think>.", "Between <think> and </think> it thinks.", "think"])
def test_an_answer_with_thoughts_may_write_about_the_tags(folder: Path, content: str) -> None:
    row = {"messages": [A, {"role": "assistant", "content": content, "reasoning": "hm"}]}
    assert not encoder(folder).encode([row], Source(path="x")).rejects


def test_there_are_more_than_twenty_kinds_of_bad_rows() -> None:
    assert len(BAD) >= 20 and len({reason for _, reason in BAD.values()}) >= 15


def test_template_that_has_no_place_for_a_message_rejects_the_row(folder: Path) -> None:
    rows = [
        {"messages": [A, {"role": "tool", "content": "3"}, B]},
        {"messages": [A, {**B, "function_calls": "f()"}]},
        {**chat("Hi", "Hello"), "tools": [{"name": "f"}]},
    ]
    got = encoder(folder, "tulu").encode(rows, Source(path="x"))
    assert [bad.reason for bad in got.rejects] == ["template"] * 3
