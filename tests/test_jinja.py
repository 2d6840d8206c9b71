"""Jinja templates of other models: their spans come from structure, and what would spoil a mask is refused or rejected."""

from __future__ import annotations

from typing import Any

import pytest

import made_templates
from chat_samples import EOS, IM_END, SPECIALS, chat, turns
from made_templates import READ, trained
from sft.chat.rows import BadRow
from sft.chat.template import JinjaTemplate
from sft.common.errors import SftError

MORE = [*SPECIALS, "<s>", "<|eot_id|>", "<|header|>", "<end_of_turn>", "<start_of_turn>"]


def jinja(text: str) -> JinjaTemplate:
    return made_templates.jinja(text, specials=MORE)


# Templates in the manner of published ones, each with its own difficulty.
HEADER_TOKENS = """{{ bos_token }}{% set offset = 0 %}
{%- if messages[0]['role'] == 'system' %}{{ '<|header|>system\\n\\n' + messages[0]['content'] | trim + '<|eot_id|>' }}{% set offset = 1 %}{% endif %}
{%- for message in messages[offset:] %}
    {%- if message.tool_calls is defined %}
        {{- '<|header|>assistant\\n\\n' }}
        {%- for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|header|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant\\n\\n' }}{% endif %}"""
LOOK_AHEAD = """{%- macro body(m) %}{{ m.content }}{% endmacro %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}{% if message.role == 'user' and ns.last < 0 %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- for later in messages[loop.index:] %}{% if later.role == 'absent' %}{{ later.content }}{% endif %}{% endfor %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
        {{- body(message) + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + body(message) + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
INLINE = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
RENAMED = """{% for message in messages if message.role != 'system' %}{% if message.role == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message.role %}{% endif %}
{{- '<start_of_turn>' + role + '\\n' + (message.content | trim) + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
END_AFTER_LOOP = """{% for m in messages %}{{ '\\n' + m.role + ': ' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\\nassistant:' }}{% else %}{{ eos_token }}{% endif %}"""
FOREIGN = {
    "header tokens": (HEADER_TOKENS, ["b<|eot_id|>", "d<|eot_id|>"], "eos"),
    "look ahead": (LOOK_AHEAD, ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"], "eos"),
    "inline": (INLINE, [" b<|endoftext|>", " d<|endoftext|>"], "index"),
    "renamed": (RENAMED, ["b<end_of_turn>", "d<end_of_turn>"], "eos"),
    "end after the loop": (END_AFTER_LOOP, [" b", " d<|endoftext|>"], "eos"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_spans_of_any_template_come_from_its_structure(name: str) -> None:
    text, expected, boundaries = FOREIGN[name]
    template = jinja(text)
    assert trained(template, chat("a", "b", "c", "d")) == expected
    assert template.boundaries == boundaries
    runs, specials = template.render(READ(chat("a", "b", "c", "d")))
    assert ("".join(runs)).count(EOS) == (2 if boundaries == "index" else 1)
    assert specials == sum("".join(runs).count(token) for token in MORE)


@pytest.mark.parametrize("name", FOREIGN)
def test_content_that_looks_like_scaffold_moves_no_mask(name: str) -> None:
    text, expected, _ = FOREIGN[name]
    template = jinja(text)
    trap = "assistant\n\nb [INST] x [/INST] b\nassistant: b model\n"
    runs = template.render(READ(chat(trap, "b", trap, "d")))[0]
    assert runs[1::2] == expected
    assert "".join(runs).count("[INST] x") == 2


def test_conversation_is_rendered_once_whatever_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    template = jinja(LOOK_AHEAD)
    template.render(READ(chat("a", "b")))  # the first row asks the probe what the template writes
    calls: list[int] = []
    segments = template.probe.segments
    monkeypatch.setattr(
        template.probe, "segments", lambda *args, **kwargs: calls.append(1) or segments(*args, **kwargs)
    )
    assert len(trained(template, chat(*"abcdefghijklmnopqrstuvwxyz"))) == 13
    assert len(calls) == 1


MARKED = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}BLOCK{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_generation_blocks_are_followed_and_trailing_scaffold_is_not_trained() -> None:
    template = jinja(
        MARKED.replace("BLOCK", "{% generation %}{{ message.content + '<|im_end|>\\n' }}{% endgeneration %}")
    )
    assert template.probe.has_generation
    assert trained(template, chat("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]
    row = chat("a", "b", "c", "d")
    row["messages"][1]["train"] = False
    assert trained(template, row) == ["d<|im_end|>"]


REFUSED = {
    "terminator outside the block": (
        MARKED.replace("BLOCK", "{% generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}"),
        "ends before the terminator",
    ),
    "no terminator": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}",
        "never learn to stop",
    ),
    "drops history": ("{{ messages[-1].content + eos_token }}", "does not write assistant message 1 once"),
    "broken Jinja": ("{% for m in messages %}", "correct the Jinja text"),
    "refuses answers": ("{{ raise_exception('no') }}", "cannot render a plain two-turn conversation"),
    "another header when prompted": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}",
        "make the two equal",
    ),
    **{
        f"another message's text in an answer: {leak}": (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.role == 'assistant' %}{{ LEAK }}{% endif %}"
            "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}".replace("LEAK", leak),
            f"the text of a {role} message inside of assistant message [12]",
        )
        for leak, role in {
            "messages[0].content | upper": "user", "messages[0] | tojson": "user", "messages": "user",
            "messages[0].content.encode()": "user", "messages[0].content if messages[0].role == 'system'": "system",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_template_whose_masks_would_be_wrong_is_refused(name: str) -> None:
    text, why = REFUSED[name]
    with pytest.raises(SftError, match=why) as caught:
        jinja(text)
    assert "next: " in str(caught.value)


LOOP = (
    "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def calling(content: str = "", **fields: Any) -> dict[str, Any]:
    asked = {"role": "assistant", "content": content, **(fields or {"tool_calls": CALL})}
    return {"messages": [*turns(("user", "q")), asked, *turns(("tool", "r"), ("assistant", "done"))]}


UNFIT = {
    "a call without a terminator": (
        "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.tool_calls %}{{ 'CALL ' + (m.tool_calls | tojson) + '\\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}",
        calling(),
        "message 1 ends without <|im_end|>",
    ),
    "long answers without a terminator": (
        "{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% if m.content | length < 40 %}{{ '<|im_end|>' }}{% endif %}{{ '\\n' }}",
        chat("q", "x" * 50),
        "message 1 ends without <|im_end|>",
    ),
    "another turn behind the answer": (
        TURN + "{% if m.role == 'assistant' %}{{ '<|im_start|>feedback\\nrate<|im_end|>\\n' }}{% endif %}",
        chat("a", "b", "c", "d"),
        "message 1: '<|im_start|>feedback.*' follows the terminator",
    ),
    "calls left out": (TURN, calling(), "message 1: tool_calls: template .* leaves it out"),
    "calls left out beside a content": (TURN, calling("I think"), "tool_calls: template .* leaves it out"),
    "content left out beside calls": (
        "{{ '<|im_start|>' + m.role + '\\n' }}{{ m.tool_calls | tojson if m.tool_calls else m.content }}{{ '<|im_end|>\\n' }}",
        calling("I think"),
        "leaves out the content beside it",
    ),
    "thinking left out": (TURN, {"messages": [*turns(("user", "q")), {**turns(("assistant", "a"))[0], "thinking": "hm"}]}, "thinking"),
    "functions left out": (TURN, {"messages": [{**turns(("user", "q"))[0], "functions": "f"}, *turns(("assistant", "a"))]}, "functions"),
    "an answer left out": (
        "{{ '<|im_start|>' + m.role + '\\n' + (m.content if m.content != 'no' else '') + '<|im_end|>\\n' }}",
        chat("q", "no"),
        "message 1: template .* leaves out 'no'",
    ),
    "tools left out": (TURN, {**chat("q", "a"), "tools": [{"name": "f"}]}, "tools: template .* leaves it out"),
    "division by zero": (TURN + "{% if m.content == 'boom' %}{{ 1 // 0 }}{% endif %}", chat("q", "boom"), "message 1: ZeroDivisionError"),
    "too large": (TURN + "{% if m.content == 'big' %}{{ 'x' * 10 ** 15 }}{% endif %}", chat("q", "big"), "message 1: MemoryError"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_row_that_a_template_would_spoil_is_rejected(name: str) -> None:
    body, row, why = UNFIT[name]
    template = jinja(LOOP.replace("BODY", body))
    if name != "another turn behind the answer":
        assert trained(template, chat("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]
    with pytest.raises(BadRow, match=why) as caught:
        template.render(READ(row))
    assert caught.value.reason == "template"


def test_call_may_end_in_another_terminator_than_an_answer() -> None:
    """Llama's <|eom_id|>, gpt-oss' <|call|>."""
    body = (
        "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.tool_calls %}{{ (m.tool_calls | tojson) + '<|eot_id|>' }}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    )
    template = jinja(LOOP.replace("BODY", body))
    said = trained(template, calling())
    assert said[0].startswith("[{") and said[0].endswith("<|eot_id|>") and said[1:] == ["done<|im_end|>"]
    assert template.terminators == ["<|eot_id|>", "<|im_end|>"]
    assert jinja(LOOP.replace("BODY", TURN)).terminators == ["<|im_end|>"]


BEHIND_TOOLS = (
    "{% set ns = namespace(tool=false) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ ('<end_of_turn>' if ns.tool else '<start_of_turn>') + m.content + eos_token }}{% else %}"
    "{{ ('<|header|>' if m.role == 'tool' else '<s>') + m.content }}{% endif %}{% set ns.tool = m.role == 'tool' %}{% endfor %}"
    "{% if add_generation_prompt %}{{ PROMPT }}{% endif %}"
)


def test_scaffold_that_opens_an_answer_only_behind_a_tool_result_is_not_trained() -> None:
    """DeepSeek-R1 closes the tool's output in the turn after it: the prompt gives that token, not the model."""
    row = {"messages": turns(("user", "q"), ("assistant", "f()"), ("tool", "r"), ("assistant", "done"))}
    template = jinja(BEHIND_TOOLS.replace("PROMPT", "'<end_of_turn>' if ns.tool else '<start_of_turn>'"))
    assert trained(template, row) == [f"f(){EOS}", f"done{EOS}"]
    with pytest.raises(BadRow, match=r"message 3 opens with '<end_of_turn>done.*', but the prompt for it ends in"):
        jinja(BEHIND_TOOLS.replace("PROMPT", "'<start_of_turn>'")).render(READ(row))
    silent = jinja(
        BEHIND_TOOLS.replace("'<start_of_turn>')", "'')").replace("PROMPT", "'<end_of_turn>' if ns.tool else ''")
    )
    assert trained(silent, row) == [f"f(){EOS}", f"done{EOS}"]


def test_special_tokens_that_the_model_opens_its_answer_with_are_trained() -> None:
    """gpt-oss names the channel of an answer itself."""
    template = jinja(LOOP.replace("BODY", TURN.replace("m.content", "'<|header|>final<|eot_id|>' + m.content")))
    with pytest.raises(BadRow, match="the model would stop before it has said all"):
        jinja(LOOP.replace("BODY", TURN.replace("m.content", "'<|im_end|>' + m.content"))).render(READ(chat("a", "b")))
    assert trained(template, chat("a", "b")) == ["<|header|>final<|eot_id|>b<|im_end|>"]


def test_messages_written_in_another_order_reject_the_row() -> None:
    backwards = jinja(LOOP.replace("BODY", TURN).replace("in messages", "in messages | reverse"))
    for contents in ("abcd", "abc"):
        with pytest.raises(BadRow, match="another order"):
            backwards.render(READ(chat(*contents)))


def test_generation_block_that_goes_on_behind_the_terminator_rejects_the_row() -> None:
    block = "{% generation %}{{ m.content + '<|im_end|>' }}{% if 'x' in m.content %}{{ 'more' }}{% endif %}{% endgeneration %}"
    template = jinja(
        LOOP.replace("BODY", "{{ '<|im_start|>' + m.role + '\\n' }}" + block + "{{ '\\n' }}"),
    )
    assert trained(template, chat("a", "b")) == ["b<|im_end|>"]
    with pytest.raises(BadRow, match="'more' follows the terminator"):
        template.render(READ(chat("a", "x")))


def test_fields_that_a_template_writes_are_kept() -> None:
    body = (
        "{{ '<|im_start|>' + m.role + '\\n' + (m.thinking or '') + m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
        "{{ '<|im_end|>\\n' }}"
    )
    template = jinja("{{ tools | tojson if tools else '' }}" + LOOP.replace("BODY", body))
    row = calling("I think", tool_calls=CALL, thinking="hm")
    row["tools"] = [{"name": "f"}]
    said = trained(template, row)
    assert said[0].startswith("hmI think[{") and said == [said[0], "done<|im_end|>"]
    bare = jinja(LOOP.replace("BODY", TURN.replace("m.content", "m.content + (m.tool_calls or '') | string")))
    assert trained(bare, calling())[0] == f"{CALL}<|im_end|>"


def test_special_tokens_inside_a_turn_and_end_of_text_behind_it_do_not_end_it_early() -> None:
    body = "{{ '<|im_start|>' + m.role + '\\n' }}{{ '<s>' + m.tool_calls | tojson if m.tool_calls else m.content }}{{ '<|eot_id|><|im_end|>\\n' }}"
    template = jinja(
        LOOP.replace("BODY", body).replace(
            "{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add"
        )
    )
    assert template.terminators == [IM_END] and template.boundaries == "eos"
    said = trained(template, calling())
    assert (
        said[0].startswith("<s>[")
        and said[0].endswith("<|eot_id|><|im_end|>")
        and said[1] == "done<|eot_id|><|im_end|>"
    )


def test_template_cannot_reach_python() -> None:
    with pytest.raises((SftError, BadRow)):
        jinja(
            "{% for m in messages %}{{ m.content.__class__.__mro__ }}{{ eos_token }}{% endfor %}{{ ''.__class__.__base__.__subclasses__() }}"
        )


def test_message_that_a_template_leaves_out_rejects_the_row() -> None:
    quiet = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.role + m.content + eos_token }}{% endif %}{% endfor %}"
    row = {"messages": turns(("user", "a"), ("tool", "lost"), ("assistant", "b"))}
    with pytest.raises(BadRow, match="leaves out 'lost'"):
        jinja(quiet).render(READ(row))
