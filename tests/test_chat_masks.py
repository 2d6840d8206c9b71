"""What is trained under templates with the habits of published ones. Each template here is small and shows one habit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import preparing
from chat_samples import IM_END, SOURCE, chat, encoder, make_tokenizer, text_of, turns
from made_templates import AS_RENDERED, LOOP, PROMPT, READ, TURN, jinja, runs_of, trained
from sft.chat.rows import BadRow
from sft.chat.template import JinjaTemplate, TemplateOptions
from sft.data import prepare
from sft.data.dataset import Dataset
from sft.data.render import trained_turns, until


def documents(template: JinjaTemplate, row: dict[str, Any]) -> list[list[str]]:
    """The documents of a row with one for each turn."""
    conversation = READ(row)
    return [template.render(until(conversation, turn))[0] for turn in trained_turns(conversation)]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": f"id{name}", "function": {"name": name, "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds two numbers", "parameters": {}}}]


def tool_row(*calls: dict[str, Any], tools: bool = False) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": list(calls)},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "done"},
    ]
    return {"messages": messages, **({"tools": TOOLS} if tools else {})}


# Qwen 3: thoughts stay only after the last question.
LAST_THOUGHTS = (
    """{%- set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% set content = m.content %}{% set thought = m.reasoning_content or '' %}
{%- if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' }}{% if thought and loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- content + '<|im_end|>\\n' }}{% endfor %}"""
    + PROMPT
)
# DeepSeek-R1: the prompt opens a thought, and no answer shows one.
NO_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)


def test_a_turn_whose_thought_the_template_drops_rejects_the_row_or_becomes_a_document_of_its_own() -> None:
    row = chat("a", "<think>\none\n</think>\n\nb", "c", "<think>\ntwo\n</think>\n\nd")
    with pytest.raises(BadRow, match=r"message 1: .* leaves out 'one', .* history = \"as-rendered\""):
        runs_of(jinja(LAST_THOUGHTS), row)
    first, second = documents(jinja(LAST_THOUGHTS, AS_RENDERED), row)
    assert first[1] == "<think>\none\n</think>\n\nb<|im_end|>" and second[1] == "<think>\ntwo\n</think>\n\nd<|im_end|>"
    assert "one" not in second[0] and second[0].endswith(
        "assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    row["messages"][1]["train"] = False
    assert trained(jinja(LAST_THOUGHTS), row) == ["<think>\ntwo\n</think>\n\nd<|im_end|>"]


@pytest.mark.parametrize("field", [False, True])
def test_a_thought_that_a_template_drops_everywhere_is_trained_behind_the_prompt(field: bool) -> None:
    answer = {"role": "assistant", "content": "b" if field else "<think>\none\n</think>\n\nb"}
    row = {"messages": [*turns(("user", "a")), answer | ({"reasoning_content": "one"} if field else {})]}
    with pytest.raises(BadRow, match="leaves"):
        runs_of(jinja(NO_THOUGHTS), row)
    [runs] = documents(jinja(NO_THOUGHTS, AS_RENDERED), row)
    assert runs[0].endswith("<|im_start|>assistant\n<think>\n") and runs[1] == "one\n</think>\n\nb<|im_end|>"


def test_rows_become_documents_for_each_turn_and_the_growth_is_counted(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "t", LAST_THOUGHTS)
    rows = [chat("a", "<think>one</think>b", "c", "<think>two</think>d"), chat("e", "f"), {"messages": []}]
    made = encoder(tmp_path / "t", "tokenizer", history="as-rendered")
    got = made.encode(rows, SOURCE)
    assert got.rows.tolist() == [0, 0, 1] and [bad.row for bad in got.rejects] == [2]
    said = [text_of(made, got, document, trained=True) for document in range(3)]
    assert said == ["<think>\none\n</think>\n\nb<|im_end|>", "<think>\ntwo\n</think>\n\nd<|im_end|>", "f<|im_end|>"]
    assert got.proof["turns_tokens_added"] == got.lengths[:2].min()
    assert len(set(got.conversations.tolist())) == 2  # both documents of a row are held out together, or neither


def test_prepare_writes_a_document_for_each_turn_and_proves_them_all(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(LAST_THOUGHTS)
    thinking = [chat(f"a{i}", f"<think>one {i}</think>b", f"c{i}", f"<think>two {i}</think>d") for i in range(20)]
    preparing.write_rows(tmp_path / "rows.jsonl", [*thinking, chat("a", "b"), {"messages": []}])
    s = preparing.stage(tmp_path, template="t.jinja", history="as-rendered", validation_fraction=0.2)
    prepare.prepare(s)
    proof = json.loads((s.out / "proof.json").read_bytes())
    encoded = proof["sources"][0]["encoded"]
    assert encoded["documents"] == encoded["documents_proven"] == 41 and encoded["turns_tokens_added"] > 0
    assert any("rows.jsonl: one document per trained turn: " in line for line in s.said)
    assert (proof["sources"][0]["rows"], proof["sources"][0]["rejected"]) == (22, 1)
    data = Dataset.open(s.out / "data")
    assert 0 < len(data) < 41
    whole = preparing.stage(tmp_path, out="whole", template="t.jinja", max_reject_fraction=1.0)
    prepare.prepare(whole)
    assert json.loads((whole.out / "proof.json").read_bytes())["sources"][0]["reasons"]["template"] == 20


def test_all_documents_of_a_row_go_when_one_is_rejected(tmp_path: Path) -> None:
    body = "{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + TURN
    make_tokenizer(tmp_path / "t", LOOP.replace("BODY", body) + PROMPT)
    got = encoder(tmp_path / "t", "tokenizer", history="as-rendered").encode(
        [chat("a", IM_END, "c", "bad"), chat("e", f"f{IM_END}")], SOURCE
    )
    assert got.rows.tolist() == [1] and [bad.row for bad in got.rejects] == [0]


LOSES = {
    "the second call": (
        "{{ '<|im_start|>' + m.role + '\\n' + (m.tool_calls[0] | tojson if m.tool_calls else m.content) + '<|im_end|>\\n' }}",
        tool_row(call("add", x=1), call("mul", y=2)),
        "message 1: .* leaves out a call where there are several",
    ),
    "the second of two equal calls": (
        "{{ '<|im_start|>' + m.role + '\\n' + (m.tool_calls[0] | tojson if m.tool_calls else m.content) + '<|im_end|>\\n' }}",
        tool_row(call("add", x=1), call("add", x=1)),
        "message 1: .* leaves out a call where there are several",
    ),
    "an argument": (
        "{{ '<|im_start|>' + m.role + '\\n' + (m.tool_calls[0].function.name + '(x=' + (m.tool_calls[0].function.arguments.x | string)"
        " if m.tool_calls else m.content) + '<|im_end|>\\n' }}",
        tool_row(call("add", x=1, why="because")),
        "message 1: .* leaves out 'why'",
    ),
    "the system prompt": (
        "{% if m.role != 'system' %}" + TURN + "{% endif %}",
        {"messages": turns(("system", "be kind"), ("user", "a"), ("assistant", "b"))},
        r"message 0 \(system\): .* leaves out 'be kind'",
    ),
    "a system prompt that occurs elsewhere by chance": (
        "{% if m.role != 'system' %}" + TURN + "{% endif %}",
        {"messages": turns(("system", "user"), ("user", "a"), ("assistant", "b"))},
        r"message 0 \(system\): .* leaves out 'user'",
    ),
    "a question that is a word of the header": (
        "{{ '<|im_start|>' + m.role + '\\n' + (m.content if m.role == 'assistant' or messages | length > 2 else '') + '<|im_end|>\\n' }}",
        {"messages": turns(("user", "user"), ("assistant", "b"))},
        r"message 0 \(user\): .* leaves out 'user'",
    ),
    "the first of two equal questions": (
        "{% if m.role == 'assistant' or messages[-1].content | length < 2 or loop.index0 >= messages | length - 2 %}" + TURN + "{% endif %}",
        chat("the same long question, word for word", "b", "the same long question, word for word", "done"),
        r"message 0 \(user\): .* leaves out 'the same",
    ),
    "a tool's parameter": (
        "{% if loop.first and tools %}{{ tools[0].function.name + tools[0].function.description }}{% endif %}" + TURN,
        {**chat("a", "b"), "tools": [{"type": "function", "function": {"name": "f", "description": "g", "parameters": {"properties": {"zip": {}}}}}]},
        "tools: .* leaves out 'zip'",
    ),
    "the end of a long question": (
        "{{ '<|im_start|>' + m.role + '\\n' + m.content[:40] + '<|im_end|>\\n' }}",
        chat("word " * 9, "b"),
        r"message 0 \(user\)",
    ),
    "a part of the answer": (
        "{{ '<|im_start|>' + m.role + '\\n' + m.content.split('###')[0] + '<|im_end|>\\n' }}",
        chat("a", "kept ### lost"),
        "message 1: .* leaves out 'kept ### lost'",
    ),
    "a tool's description": (
        "{% if loop.first and tools %}{{ tools | map(attribute='function') | map(attribute='name') | join }}{% endif %}" + TURN,
        {**chat("a", "b"), "tools": TOOLS},
        "tools: .* leaves out 'adds two numbers'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSES)
def test_a_row_is_rejected_when_its_template_loses(name: str) -> None:
    body, row, why = LOSES[name]
    template = jinja(LOOP.replace("BODY", body) + PROMPT)
    assert trained(template, chat("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]
    with pytest.raises(BadRow, match=why):
        runs_of(template, row)


WRITES = {
    "white space is trimmed": ("m.content | trim", chat("\n a \n", "  b\n")),
    "JSON": ("m.content | tojson", chat('say "hi"\n\té', 'a "b"\\n\nc é')),
    "JSON in JSON": ("(m.content | tojson) | tojson", chat('say "hi"\n\té', 'a "b"\\n\nc é')),
    "other tags for thoughts": (
        "m.content | replace('<think>', '[THINK]') | replace('</think>', '[/THINK]')",
        chat("a", "<think>one</think>two"),
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_template_may_write_a_text_in_its_own_way(name: str) -> None:
    body, row = WRITES[name]
    said = trained(jinja(LOOP.replace("BODY", TURN.replace("m.content", f"({body})")) + PROMPT), row)
    assert len(said) == 1 and said[0].endswith(IM_END)


# Jamba: the message after an answer writes the token that ends it.
END_FROM_NEXT = (
    "{% for m in messages %}{{ '<|eom|>' if not loop.first else '' }}{{ '<|bom|><|' + m.role + '|> ' + m.content }}{% endfor %}"
    "{{ '<|eom|>' }}{% if add_generation_prompt %}{{ '<|bom|><|assistant|>' }}{% endif %}"
)
# GLM 4: nothing ends a turn but the token of the next role.
ROLE_TOKENS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# ToolACE: the header of a further answer ends every rendering.
HEADER_AT_END = LOOP.replace("BODY", TURN) + "{{ '<|im_start|>assistant\\n' }}"
# Llama 4: the prompt has white space before the header that turns have not.
SPACE_BEFORE_HEADER = (
    LOOP.replace("BODY", TURN) + "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
# A template for continuing answers: the last has no end.
OPEN_END = LOOP.replace(
    "BODY", "{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% if not loop.last %}{{ '<|im_end|>\\n' }}{% endif %}"
) + ("{% if add_generation_prompt %}{{ '<|im_end|>\\n<|im_start|>assistant\\n' }}{% endif %}")
MACRO = (
    "{% macro show(all) %}{% for m in all %}"
    + TURN
    + "{% endfor %}{% endmacro %}{{ show(messages) | trim }}{{ '\\n' }}"
    + PROMPT
)
IN_HEADER = (
    LOOP.replace(
        "BODY",
        "{% if m.role == 'assistant' %}{% generation %}"
        + TURN
        + "{% endgeneration %}{% else %}"
        + TURN
        + "{% endif %}",
    )
    + PROMPT
)
EMPTY_THOUGHT = (
    LOOP.replace("BODY", TURN)
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
OPEN_THOUGHT = (
    LOOP.replace(
        "BODY",
        "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}",
    )
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
USABLE = {
    "end from the next message": (END_FROM_NEXT, [" b<|eom|>", " d<|eom|>"]),
    "role tokens": (ROLE_TOKENS, ["b<|user|>", "d<|user|>"]),
    "header at the end": (HEADER_AT_END, ["b<|im_end|>", "d<|im_end|>"]),
    "space before the header": (SPACE_BEFORE_HEADER, ["b<|im_end|>", "d<|im_end|>"]),
    "open end": (OPEN_END, ["b<|im_end|>", "d<|im_end|>"]),
    "macro": (MACRO, ["b<|im_end|>", "d<|im_end|>"]),
    "generation blocks that begin in the header": (IN_HEADER, ["b<|im_end|>", "d<|im_end|>"]),
    "empty thought in the prompt": (EMPTY_THOUGHT, ["b<|im_end|>", "d<|im_end|>"]),
    "open thought in the prompt": (OPEN_THOUGHT, ["\n</think>\n\nb<|im_end|>", "\n</think>\n\nd<|im_end|>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", USABLE)
def test_answers_are_trained_from_the_end_of_the_prompt_to_the_token_at_which_the_model_stops(name: str) -> None:
    text, expected = USABLE[name]
    template = jinja(text)
    runs = runs_of(template, chat("a", "b", "c", "d"))
    assert runs[1::2] == expected
    assert runs[0] == template.probe.text(turns(("user", "a")), prompt=True)
    assert not any(re.fullmatch(r"(<\|[a-z_]+\|>)+\s*", run) for run in runs[1::2])


def test_the_last_call_gets_the_token_of_the_tool_role() -> None:
    row = tool_row(call("add", x=1))
    assert trained(jinja(ROLE_TOKENS), row)[0].endswith("<|tool|>")
    del row["messages"][2:]
    assert trained(jinja(ROLE_TOKENS), row)[0].endswith("<|tool|>")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("prompt", ["<think>\n\n</think>\n\n", "b<|im_end|>"]),
        ("answer", ["assistant\n", "<think>\n\n</think>\n\nb<|im_end|>"]),
        ("rendered", ["assistant\n", "b<|im_end|>"]),
    ],
)
def test_the_recipe_chooses_where_the_generation_prefix_goes(choice: str, expected: list[str]) -> None:
    template = jinja(EMPTY_THOUGHT, TemplateOptions(generation_prefix=choice))
    runs = runs_of(template, chat("a", "b"))
    assert runs[0].endswith(expected[0]) and runs[1] == expected[1]
    assert template.answers_without_prefix == (choice == "rendered")


def test_a_thinking_answer_is_not_put_behind_a_prompt_that_says_it_does_not_think() -> None:
    runs = runs_of(jinja(EMPTY_THOUGHT), chat("a", "<think>\nhm\n</think>\n\nb"))
    assert runs[0].endswith("assistant\n") and runs[1] == "<think>\nhm\n</think>\n\nb<|im_end|>"


def test_a_tools_result_that_the_turn_of_the_call_writes_is_not_trained() -> None:
    """Gemma 4 writes results behind the call, with no turn of their own."""
    body = (
        "{% if m.role != 'tool' %}"
        + TURN
        + "{% endif %}{% if loop.nextitem is defined and loop.nextitem.role == 'tool' %}"
        "{{ '<|im_start|>tool\\n' + loop.nextitem.content + '<|im_end|>\\n' }}{% endif %}"
    )
    row = {"messages": turns(("user", "q"), ("assistant", "f"), ("tool", "SECRET"), ("assistant", "done"))}
    runs = runs_of(jinja(LOOP.replace("BODY", body) + PROMPT), row)
    assert runs[1::2] == ["f<|im_end|>", "done<|im_end|>"] and "SECRET" in runs[2]


# Llama 3.1: with tools, the first question is written before the loop.
BEFORE_THE_LOOP = (
    "{% if tools %}{{ '<|im_start|>user\\nTools: ' + (tools | tojson) + '\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    + PROMPT
)


def test_a_question_that_stands_before_the_loop_is_seen() -> None:
    said = trained(jinja(BEFORE_THE_LOOP), tool_row(call("add", x=1), tools=True))
    assert said[0].startswith('[{"id": "idadd"') and said[1] == "done<|im_end|>"


def test_a_template_without_conversations_without_tools_takes_rows_with_tools() -> None:
    """Hermes 2 Pro's and Command R+'s templates for tools."""
    text = (
        "{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}"
        + LOOP.replace("BODY", TURN)
    )
    template = jinja(text + PROMPT)
    assert template.needs_tools and trained(template, {**chat("a", "b"), "tools": TOOLS}) == ["b<|im_end|>"]
    with pytest.raises(BadRow, match="NoneType"):
        runs_of(template, chat("a", "b"))


@pytest.mark.parametrize("fails", [True, False])
def test_arguments_are_text_for_a_template_that_wants_text(fails: bool) -> None:
    """DeepSeek V3 fails for an object, and functionary would write it as Python does."""
    shown = "call.function.arguments" if not fails else "'' + call.function.arguments"
    body = (
        "{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ SHOWN }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}"
    ).replace("SHOWN", shown)
    said = trained(jinja(LOOP.replace("BODY", body) + PROMPT), tool_row(call("add", x="é")))
    assert said[0] == 'add{"x": "é"}<|im_end|>'


def test_a_token_of_a_call_that_answers_have_inside_ends_no_turn() -> None:
    """Kimi K3 closes every part of a turn with the same token."""
    body = (
        "{{ '<|bom|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{{ '<|call|>answer<|call|>' }}{% endif %}{{ m.content }}"
        "{% if m.tool_calls %}{{ (m.tool_calls | tojson) + '<|call|>' }}{% else %}{{ '<|end|>' }}{% endif %}"
    )
    template = jinja(
        LOOP.replace("BODY", body) + "{% if add_generation_prompt %}{{ '<|bom|>assistant\\n' }}{% endif %}"
    )
    assert template.terminators == ["<|end|>"]
    assert trained(template, chat("a", "b")) == ["<|call|>answer<|call|>b<|end|>"]


def test_a_thought_outside_the_generation_block_rejects_the_row() -> None:
    body = (
        "{{ '<|im_start|>' + m.role + '\\n' + (m.reasoning_content or '') }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    )
    template = jinja(LOOP.replace("BODY", body) + PROMPT)
    assert trained(template, chat("a", "b")) == ["b<|im_end|>"]
    row = {"messages": [*turns(("user", "a")), {"role": "assistant", "content": "b", "reasoning_content": "why so"}]}
    with pytest.raises(BadRow, match="leaves out 'why so'"):
        runs_of(template, row)
