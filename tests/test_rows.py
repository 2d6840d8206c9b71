"""Every usual layout of chat rows gives the same conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_samples import EOS, IM_END, chat, encoder, text_of, tokenizer_folder, turns
from sft.chat.fields import FieldCounts
from sft.chat.rows import BadRow, Conversation, RowReader
from sft.recipe import row_fields
from sft.recipe.schema import Prepare, Source
from sft.sources import unpack

HELLO = turns(("user", "Hi"), ("assistant", "Hello"))
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(row: Any, columns: dict[str, str] | None = None, **options: Any) -> Conversation:
    source = Source(path="x", columns=columns or {})
    return RowReader(Prepare(tokenizer="t", sources=(source,), **options), source).read(row)


folder = tokenizer_folder


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
    "dolly": {"instruction": "Hi", "context": "", "response": "Hello", "category": "open_qa"},
    "both names of a field": {"messages": [{**m, "from": m["role"], "value": m["content"]} for m in HELLO]},
    "one name of two holds nothing": {
        "messages": [{"from": m["role"], "role": {}, "content": [], "value": m["content"]} for m in HELLO]
    },
    "a refusal": {"messages": [HELLO[0], {"role": "assistant", "content": "", "refusal": "Hello"}]},
    "an empty function_call": {"messages": [{**m, "function_call": {"name": None, "arguments": None}} for m in HELLO]},
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
    "messages as a list of JSON texts": {"messages": list(map(json.dumps, HELLO))},
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
    renamed = read(
        {"q": "Hi", "completion": "Hello", "how": "S", "can": [{"name": "f"}]},
        {"prompt": "q", "system": "how", "tools": "can"},
    )
    assert renamed.messages == [{"role": "system", "content": "S"}, *HELLO] and renamed.tools == [{"name": "f"}]


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
    completion = [{"role": "assistant", "content": "NEW", "train": True}]
    assert read({"prompt": prompt, "completion": completion}).train == [False, False, False, True]
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


def called(arguments: Any, required: list[str] | None = None) -> Any:
    """The arguments of a call as they are read, where the tool requires some."""
    call = {"function": {"name": "f", "arguments": arguments}}
    schema = {"type": "object", "properties": {"b": {"items": {"required": ["c"]}}}, "required": required}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    row = {"messages": [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": tools}
    return read(row).messages[1]["tool_calls"][0]["function"]["arguments"]


def test_null_properties_are_absent_unless_the_tool_requires_them() -> None:
    filled = {"a": None, "b": [{"c": None, "d": None}, None], "e": {"x": None}}
    assert called(filled) == {"b": [{"c": None}, None], "e": {}}
    assert called(filled, required=["a"]) == {"a": None, "b": [{"c": None}, None], "e": {}}
    assert called('{"a": null}') == {"a": None}
    assert read({"messages": HELLO, "tools": [{"name": "f", "description": None}]}).tools == [{"name": "f"}]


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


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"instruction": "Hi", "context": "C", "response": "Hello"}, turns(("user", "Hi\n\nC"), ("assistant", "Hello"))),
        ({"instruction": "", "input": "Hi", "output": "Hello"}, HELLO),
        ({**chat("Hi", "Hello"), "system_prompt": "S"}, [{"role": "system", "content": "S"}, *HELLO]),
        ({"prompt": "Hi", "completion": "Hello", "system": "S", "system_prompt": "S"}, [{"role": "system", "content": "S"}, *HELLO]),
        ({"messages": [{"role": "developer", "content": "S"}, *HELLO]}, [{"role": "developer", "content": "S"}, *HELLO]),
        (
            {"instruction": "Hi", "output": "Hello", "history": [["a", "b"]]},
            turns(("user", "a"), ("assistant", "b"), ("user", "Hi"), ("assistant", "Hello")),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                               {"from": "tool_response", "value": "3"}, {"from": "gpt", "value": "Hello"}]},
            [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [CALLED]}, {"role": "tool", "content": "3"}, HELLO[1]],
        ),
        *(
            ({"conversations": [HELLO[0], {"from": "function_call", "value": text}]},
             [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [CALLED]}])
            for text in ('{"name": "f", "parameters": {"x": 1}}', '[{"name": "f", "input": {"x": 1}, "id": null}]',
                         '{"name": "f", "function": {"name": "f", "arguments": {"x": 1}}, "arguments": "{\\"x\\": 1}"}')
        ),
        (
            {"messages": [HELLO[0], {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}]},
            [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [CALLED]}],
        ),
        *(
            ({"messages": [HELLO[0], {**HELLO[1], **thoughts}]}, [HELLO[0], {**HELLO[1], kept: "T"}])
            for thoughts, kept in [
                ({"reasoning": "T"}, "reasoning_content"),
                ({"reasoning": "T", "reasoning_content": "T"}, "reasoning_content"),
                ({"reasoning_details": [{"type": "reasoning.text", "text": "T", "format": "x"}], "reasoning": "T"}, "reasoning_content"),
                ({"thinking": "T", "reasoning": None}, "thinking"),
            ]
        ),
    ],
)  # fmt: skip
def test_names_of_other_tools_are_read(row: Any, want: Any) -> None:
    assert read(row).messages == want


@pytest.mark.parametrize("field", ["thinking", "reasoning_content"])
def test_thoughts_have_the_name_that_the_template_reads(folder: Path, tmp_path: Path, field: str) -> None:
    text = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + ('<think>' + m.FIELD + '</think>' if m.FIELD else '') + m.content + eos_token }}"
    text = (
        text.replace("FIELD", field)
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    (tmp_path / "x.jinja").write_text(text)
    made = encoder(folder, "x.jinja", lambda name: tmp_path / name)
    for name in ("thinking", "reasoning_content", "reasoning"):
        got = made.encode([{"messages": [HELLO[0], {**HELLO[1], name: "T"}]}], Source(path="x"))
        assert text_of(made, got, trained=True) == f"<think>T</think>Hello{EOS}"


@pytest.mark.parametrize("column", ["tools", "functions", "available_tools"])
def test_tools_have_several_names(column: str) -> None:
    want: Any = {"name": "f", "parameters": {}}
    want = {"type": "function", "function": want} if column == "functions" else want
    assert read({"messages": HELLO, column: [{"name": "f", "parameters": {}}]}).tools == [want]


@pytest.mark.parametrize(
    "name", ["loss", "loss_mask", "trainable", "training", "label", "train", "train_on_turn", "weight", "masked"]
)
def test_flags_have_several_names(name: str) -> None:
    bad, good = (1, 0) if name == "masked" else (0, 1)
    row = chat("a", "BAD", "b", "GOOD")
    row["messages"][1][name], row["messages"][3][name] = bad, good
    assert read(row).train == [False, False, False, True]
    assert read({**chat("a", "BAD", "b", "GOOD"), name: [bad, bad, bad, good]}).train == [False, False, False, True]
    with pytest.raises(BadRow, match=f"{name} has 3 flags for 4 messages"):
        read({**chat("a", "BAD", "b", "GOOD"), name: [bad, bad, good]})


def test_variables_of_a_row_are_kept_for_the_template() -> None:
    row = {**chat("Hi", "Hello"), "chat_template_kwargs": {"enable_thinking": False, "other": None}}
    assert read(row).variables == {"enable_thinking": False}
    assert read({**row, "chat_template_kwargs": {"other": None}}).variables is None


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps(chat("a", "b")["messages"]),
        '[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]',
        '[{"type": "text", "name": "email"}]',
        '[{"type": ["text"], "text": "b"}, 7]',
        '[{"role": "user"}]',
        '[{"role": "assistant", "content": "b"}',
        '[{"text": "b"}]',
    ],
)
def test_an_answer_may_be_json(answer: str) -> None:
    assert read(chat("Write it as JSON", answer)).messages[1]["content"] == answer
    assert read(
        {"messages": [*chat("a", "b")["messages"], {"role": "tool", "content": '[{"type": "text", "text": "b"}]'}]}
    )


def test_trained_answers_without_text_and_call_are_counted_or_rejected(folder: Path) -> None:
    call = {"role": "assistant", "content": "", "function_calls": "f()"}
    rows = [
        chat("q", ""),
        chat("q", " \n"),
        {"messages": [HELLO[0], call]},
        chat("", "a"),
        {"prompt": "x", "completion": ""},
        {"messages": [HELLO[0], {**HELLO[1], "content": "", "thinking": "hm", "tool_calls": "null"}]},
    ]
    assert [read(row).empty_answers for row in rows] == [1, 1, 0, 0, 1, 0]
    assert encoder(folder).encode(rows, Source(path="x")).proof["empty_answers"] == 3
    strict = encoder(folder, empty_answers="reject").encode(rows, Source(path="x"))
    assert [(bad.row, bad.reason) for bad in strict.rejects] == [
        (0, "empty_answer"),
        (1, "empty_answer"),
        (4, "empty_answer"),
    ]


def counted(
    *rows: Any, columns: dict[str, str] | None = None, ignore: tuple[str, ...] = ()
) -> tuple[dict[str, int], dict[str, str]]:
    """In how many rows each field holds something, and the fields that nothing reads."""
    source = Source(path="x", columns=columns or {}, ignore=ignore)
    reader = RowReader(Prepare(tokenizer="t", sources=(source,)), source)
    counts = FieldCounts()
    for row in rows:
        held = reader.read_counted(row).held
        assert held is not None
        counts.add(held)
    return dict(counts.rows), counts.unread


def test_fields_are_counted_by_the_rows_in_which_they_hold_something() -> None:
    first = {"messages": [HELLO[0], {**HELLO[1], "score": 0.5, "name": ""}], "id": 1, "tools": [], "meta": {"a": None}}
    rows, unread = counted(first, {"messages": HELLO, "id": "", "source": "web"})
    assert rows == {"messages": 2, "messages.role": 2, "messages.content": 2, "messages.score": 1, "id": 1, "source": 1}
    assert not unread


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({**chat("Hi", "Hello"), "images": ["a.png"]}, {"images": '["a.png"]'}),
        ({**chat("Hi", "Hello"), "rationale": "R"}, {"rationale": '"R"'}),
        ({**chat("Hi", "Hello"), "rationale": "Hello"}, {}),
        ({**chat("Hi", "Hello"), "rationale": {"a": [], "b": {"c": None}}, "images": []}, {}),
        ({**chat("Hi", "Hello"), "prompt": "another", "label": True}, {"prompt": '"another"', "label": "true"}),
        ({"prompt": "Hi", "completion": "Hello", "context": "C"}, {"context": '"C"'}),
        ({"messages": [{**HELLO[0], "audio": {"id": 1}}, HELLO[1]]}, {"messages.audio": '{"id": 1}'}),
        ({"messages": [HELLO[0], {**HELLO[1], "details": [{"begin_offset": 0}]}]}, {"messages.details": '[{"begin_offset": 0}]'}),
        (
            {"messages": [HELLO[0], {"role": "assistant", "tool_calls": [{"index": 0, "x": 1, "function": {"name": "f", "y": 2}}]}]},
            {"messages.tool_calls.x": "1", "messages.tool_calls.function.y": "2"},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "citations": [1]}]}, HELLO[1]]},
            {"messages.content.citations": "[1]"},
        ),
        ({"conversations": [{"from": "human", "value": "a", "html": "b"}, {"from": "gpt", "value": "c"}]}, {"conversations.html": '"b"'}),
        *(
            ({**chat("Hi", "Hello"), name: "x", "user_hash": "h", "lang": "en"}, {name: '"x"'})
            for name in ("image_url", "audio_url", "video_id", "pdf_hash", "num_images", "ImageURL", "photo_id", "page_url")
        ),
        ({"prompt": HELLO[:1], "response": [{**HELLO[1], "emotion": "x"}]}, {"response.emotion": '"x"'}),
        ({"prompt": HELLO[:1], "completion": [{**HELLO[1], "emotion": "x"}]}, {"completion.emotion": '"x"'}),
        (
            {"messages": [HELLO[0], {**HELLO[1], "reasoning_details": [{"type": "reasoning.text", "text": "T", "id": 1, "summary": "S"}]}]},
            {"messages.reasoning_details.summary": '"S"'},
        ),
        ({"messages": [{**HELLO[0], "image_url": "x"}, HELLO[1]]}, {"messages.image_url": '"x"'}),
        ({"messages": [{**HELLO[0], "some_id": "x", "id": 1}, HELLO[1]]}, {"messages.some_id": '"x"'}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": "x"}}]}, HELLO[1]]},
            {"messages.content.image_url": '{"url": "x"}'},
        ),
        ({**chat("Hi", "Hello"), "source": "s" * 200, "metadata": {"source": "s" * 100, "split": "s" * 100, "x": 0.5}}, {}),
        ({**chat("Hi", "Hello"), "source": "s" * 300}, {"source": '"' + "s" * 79 + "…"}),
        ({**chat("Hi", "Hello"), "tags": ["s" * 150] * 2}, {"tags": '["' + "s" * 78 + "…"}),
        ({**chat("Hi", "Hello"), "metadata": {"system_prompt": "be X"}}, {"metadata": '{"system_prompt": "be X"}'}),
        ({**chat("Hi", "Hello"), "meta": [{"id": 1, "image": 5}]}, {"meta": '[{"id": 1, "image": 5}]'}),
        (
            {"messages": [HELLO[0], {**HELLO[1], "metadata": {"attachments": [{"text": "T"}]}}]},
            {"messages.metadata": '{"attachments": [{"text": "T"}]}'},
        ),
        ({"messages": [{**HELLO[0], "source": "a"}, {**HELLO[1], "source": "s" * 300}]}, {"messages.source": '"' + "s" * 79 + "…"}),
        ({"messages": [{**HELLO[0], "name": "Ada"}, HELLO[1]]}, {"messages.name": '"Ada"'}),
        ({**chat("Hi", "Hello"), "": "index"}, {"": '"index"'}),
        ({"messages": [{**HELLO[0], "name": "User"}, HELLO[1]], "system": "S"}, {}),
        ({"messages": [HELLO[0], {"role": "tool", "content": "1", "name": "f"}, HELLO[1]]}, {"messages.name": '"f"'}),
        (
            {"messages": [HELLO[0], {"role": "assistant", "tool_calls": [CALLED]}, {"role": "tool", "content": "1", "name": "f"}, HELLO[1]]},
            {},
        ),
    ],
)  # fmt: skip
def test_fields_that_nothing_reads_are_reported_until_the_recipe_ignores_them(row: Any, unread: dict[str, str]) -> None:
    assert counted(row)[1] == unread
    assert counted(row, ignore=tuple(unread))[1] == {}


def test_names_without_training_content_are_known_and_listed() -> None:
    for name in (
        "id",
        "ID",
        "prompt_id",
        "quality_score",
        "num_turns",
        "source",
        "lang",
        "model",
        "timestamp",
        "sha256",
        unpack.UNNAMED,
    ):
        assert row_fields.is_harmless(name), name
    for name in (
        "rationale",
        "context",
        "images",
        "chosen",
        "input_ids",
        "labels",
        "system_prompt",
        "solution",
        "train_detail",
    ):
        assert not row_fields.is_harmless(name), name
    listed = "\n".join(row_fields.describe())
    assert "sha256" in listed and "*_score" in listed and "num_*" in listed


def test_what_the_recipe_ignores_is_not_read() -> None:
    source = Source(path="x", ignore=("system", "messages.thinking"))
    reader = RowReader(Prepare(tokenizer="t", sources=(source,)), source)
    row = {"messages": [HELLO[0], {**HELLO[1], "thinking": "T"}], "system": "S"}
    assert reader.read(row).messages == HELLO
    assert counted(row, ignore=source.ignore)[0]["messages.thinking"] == 1
    named = {"messages": [{**HELLO[0], "name": "n", "functions": "[]"}, HELLO[1]]}
    reader = RowReader(Prepare(tokenizer="t", sources=(source,)), Source(path="x", ignore=("messages.functions",)))
    assert reader.read(named).messages[0] == {**HELLO[0], "name": "n"}


def spoken(text: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": text}]}


@pytest.mark.parametrize(
    "text",
    [
        "{'name': 'f', 'arguments': '{\"x\": 1}'}",
        "[{'name': 'f', 'arguments': {'x': 1}}]",
        ' {"name": "f", "parameters": {"x": 1}}',
    ],
)
def test_a_spoken_call_may_be_written_as_json_or_as_python_writes_it(text: str) -> None:
    assert read(spoken(text)).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALLED]}


@pytest.mark.parametrize("text", ["f(x=1)", "[f(x=1), g()]", "'f'", "[" * 300, "[1, {2}]", "[1e999]"])
def test_other_text_of_a_spoken_call_is_kept(text: str) -> None:
    assert read(spoken(text)).messages[1]["function_calls"] == text


def test_tools_and_calls_may_be_lists_of_json_texts() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    row = {
        "messages": [HELLO[0], {"role": "assistant", "tool_calls": [json.dumps(CALLED)]}],
        "tools": [json.dumps(tool)],
    }
    got = read(row)
    assert (got.messages[1]["tool_calls"], got.tools) == ([CALLED], [tool])
    assert "messages.tool_calls.function.name" in counted(row)[0]
