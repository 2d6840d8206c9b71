"""Every usual layout of chat rows gives the same conversation, and a row that cannot be read gives a counted reason."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from chat_samples import EOS, IM_END, chat, encoder, make_tokenizer, text_of, turns
from sft.chat.rows import BadRow, Conversation, RowReader
from sft.recipe.schema import Prepare, Source

HELLO = turns(("user", "Hi"), ("assistant", "Hello"))


def read(row: Any, columns: dict[str, str] | None = None, **options: Any) -> Conversation:
    source = Source(path="x", columns=columns or {})
    return RowReader(Prepare(tokenizer="t", sources=(source,), **options), source).read(row)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("rows") / "tokenizer")


LAYOUTS = {
    "messages": {"messages": HELLO},
    "messages as JSON text": {
        "messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
    },
    "content parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            HELLO[1],
        ]
    },
    "nulls of columnar files": {
        "messages": [{**m, "name": None, "tool_calls": None} for m in HELLO],
        "tools": None,
        "prompt": None,
    },
    "unknown fields": {"messages": [{**m, "score": 3, "id": "x"} for m in HELLO]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "sharegpt with roles": {"conversations": HELLO},
    "prompt and completion": {"prompt": "Hi", "completion": "Hello"},
    "prompt and response": {"prompt": "Hi", "response": "Hello"},
    "prompt as messages": {"prompt": HELLO[:1], "completion": HELLO[1:]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "alpaca without input": {"instruction": "Hi", "output": "Hello"},
    "nulls are absent columns": {
        "messages": None,
        "prompt": "Hi",
        "completion": None,
        "response": "Hello",
        "tools": "null",
    },
    "alpaca with a null": {"instruction": "Hi", "output": None, "response": "Hello", "tools": " "},
    "roles in capitals": {"messages": [{**m, "role": m["role"].title()} for m in HELLO]},
    "sharegpt in capitals": {"conversations": [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Hello"}]},
    "flags as numbers": {"messages": [{**HELLO[0], "train": 0}, {**HELLO[1], "train": 1, "weight": 1.0}]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_conversation(layout: str) -> None:
    got = read(LAYOUTS[layout])
    assert (got.messages, got.train, got.tools) == (HELLO, [False, True], None)


def test_columns_are_renamed_and_win_over_columns_that_merely_exist() -> None:
    row = {"question": "Hi", "answer": "Hello", "messages": turns(("user", "no"), ("assistant", "no"))}
    got = read(row, {"prompt": "question", "completion": "answer"})
    assert got.messages == HELLO
    assert read({"chat": HELLO, "prompt": "no", "completion": "no"}, {"messages": "chat"}).messages == HELLO
    told = read(
        {"q": "Hi", "completion": "Hello", "how": "S", "can": [{"name": "f"}]},
        {"prompt": "q", "system": "how", "tools": "can"},
    )
    assert told.messages == [{"role": "system", "content": "S"}, *HELLO] and told.tools == [{"name": "f"}]


def test_alpaca_input_follows_the_instruction_and_system_column_comes_first() -> None:
    got = read({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."})
    assert got.messages == turns(("system", "Be brief."), ("user", "Add.\n\n1 2"), ("assistant", "3"))
    assert got.train == [False, False, True]


def test_recipe_system_prompt_goes_only_where_there_is_none() -> None:
    assert read(chat("Hi", "Hello"), system="S").messages[0] == {"role": "system", "content": "S"}
    own = {"messages": [{"role": "system", "content": "own"}, *HELLO]}
    assert read(own, system="S").messages[0]["content"] == "own"


def test_only_the_completion_of_a_conversational_prompt_is_trained() -> None:
    prompt = turns(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert read({"prompt": prompt, "completion": "d"}).train == [False, False, False, True]


def test_train_and_weight_flags_of_messages_win() -> None:
    row = chat("a", "b", "c", "d")
    row["messages"][1]["weight"] = 0
    assert read(row).train == [False, False, False, True]
    row["messages"][0]["train"] = True
    assert read(row, train_turns="last").train == [True, False, False, True]


def test_a_flag_says_nothing_of_the_other_messages() -> None:
    prompt = turns(("user", "a"), ("assistant", "OLD"), ("user", "b"))
    told = [{"role": "assistant", "content": "NEW", "train": True}]
    assert read({"prompt": prompt, "completion": told}).train == [False, False, False, True]
    row = chat(*"abcdef")
    row["messages"][1]["train"] = False
    assert read(row, train_turns="last").train == [False] * 5 + [True]
    row["messages"][5]["weight"] = 0
    row["messages"][1]["train"] = True
    assert read(row, train_turns="last").train == [False, True, False, False, False, False]


def test_last_turn_only_and_roles_to_train() -> None:
    row = chat("a", "b", "c", "d")
    assert read(row, train_turns="last").train == [False, False, False, True]
    assert read(row, train_roles=("user", "assistant")).train == [True] * 4
    with pytest.raises(BadRow, match="nothing_to_train"):
        read(row, train_roles=("tool",))


def test_thinking_is_kept_or_stripped_in_history_turns_only() -> None:
    row = chat("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd")
    assert [m["content"] for m in read(row).messages[1::2]] == [
        "<think>\nhm\n</think>\n\nb",
        "<think>\nso\n</think>\n\nd",
    ]
    assert [m["content"] for m in read(row, thinking="strip").messages[1::2]] == ["b", "<think>\nso\n</think>\n\nd"]


def test_only_thinking_that_opens_the_content_is_stripped() -> None:
    for said, left in (
        ("The tag </think> ends it.", "The tag </think> ends it."),
        ("<think>a</think> The tag </think> ends it.", "The tag </think> ends it."),
        ("Write <think>x</think> so.", "Write <think>x</think> so."),
        ("\n<think>\na\n</think>\n\nb", "b"),
        ("<think> alone opens it", None),
    ):
        row = chat("q", said, "r", "<think>so</think>end")
        if left is None:
            with pytest.raises(BadRow, match="bad_thinking: message 1: <think> is not closed"):
                read(row, thinking="strip")
            assert read(row).messages[1]["content"] == said
        else:
            assert [m["content"] for m in read(row, thinking="strip").messages[1::2]] == [left, "<think>so</think>end"]


def test_thinking_that_the_prompt_opens_is_stripped_where_the_template_has_such_a_prompt(folder: Path) -> None:
    row = chat("q", "hm</think>b", "r", "c")
    for template, said in (("olmo_thinker", f"b{IM_END}c{EOS}"), ("olmo", f"hm</think>b{IM_END}c{EOS}")):
        made = encoder(folder, template, thinking="strip")
        assert text_of(made, made.encode([row], Source(path="x")), trained=True) == said


def test_nulls_that_json_states_are_kept() -> None:
    call = {"function": {"name": "f", "arguments": {"a": None, "b": [{"c": None}]}}}
    row = {"messages": [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [{"d": None}]}
    got = read(row)
    assert got.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None, "b": [{"c": None}]}
    assert got.tools == [{"d": None}]


def test_tool_calls_become_objects_and_tools_are_read_from_text() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}]
    row = {
        "messages": [HELLO[0], {"role": "assistant", "content": None, "tool_calls": calls}],
        "tools": '[{"name": "add"}]',
    }
    got = read(row)
    assert got.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": None}}
    assert got.messages[1]["content"] == ""
    assert got.tools == [{"name": "add"}]
    share = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "add(1)"}]}
    assert read(share).messages[1] == {"role": "assistant", "content": "", "function_calls": "add(1)"}


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def call(value: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": value}}}]}


A, B = HELLO
BAD: dict[str, tuple[Any, str]] = {
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
        {"messages": [A, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
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
