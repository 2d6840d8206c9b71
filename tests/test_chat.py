"""Templates: the native renderers equal the Jinja text that is exported, and any Jinja template's spans come from structure."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings

from chat_samples import EOS, IM_END, SPECIALS, chat, conversations, turns
from conftest import REPO
from sft.chat.named import NamedTemplate
from sft.chat.probe import TemplateProbe
from sft.chat.rows import BadRow, Conversation, RowReader
from sft.chat.spans import TurnRules, answer_end, to_runs
from sft.chat.special_tokens import SpecialTokens
from sft.chat.template import JinjaTemplate, TemplateOptions, known_templates
from sft.common.errors import SftError
from sft.recipe.chat_templates import HELPFUL, NO_FUNCTIONS, OLMO, TEMPLATES
from sft.recipe.recipe import load
from sft.recipe.schema import Prepare, Source

MORE = [*SPECIALS, "<s>", "<|eot_id|>", "<|header|>", "<end_of_turn>", "<start_of_turn>"]
READ = RowReader(Prepare(tokenizer="t", sources=(Source(path="x"),)), Source(path="x")).read
EVERY = Prepare(
    tokenizer="t", sources=(Source(path="x"),), train_roles=("system", "user", "assistant", "tool", "environment")
)


PLAIN = TemplateOptions()


def jinja(
    text: str,
    specials: list[str] = MORE,
    eos: str = EOS,
    added: tuple[str, ...] = (),
    options: TemplateOptions = PLAIN,
    **variables: str,
) -> JinjaTemplate:
    return JinjaTemplate(
        "made.jinja", text, {"eos_token": eos, **variables}, eos, SpecialTokens(specials), added, options
    )


def like(name: str) -> JinjaTemplate:
    """The Jinja text of a named template, as it writes answers: without what only the generation prompt gives."""
    return jinja(named(name).text, SPECIALS, options=TemplateOptions(generation_prefix="rendered"))


def named(name: str) -> NamedTemplate:
    return NamedTemplate(name, EOS, SPECIALS)


def trained(template: Any, row: dict[str, Any]) -> list[str]:
    return template.render(READ(row))[0][1::2]


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[NamedTemplate, JinjaTemplate]]:
    return {name: (named(name), like(name)) for name in known_templates()}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(row=conversations(roles=True, tools=True))
def test_native_renderer_equals_the_jinja_text(pairs: Any, name: str, row: dict[str, Any]) -> None:
    native, other = pairs[name]
    try:
        conversation = READ(row)
        runs, specials = native.render(conversation)
    except BadRow as error:
        assert error.reason in ("template", "nothing_to_train")
        return
    assert "".join(runs).removesuffix(EOS) == other.verbatim(conversation).removesuffix(EOS)
    if name == "olmo_thinker_remove_intermediate_thinking" and "</think>" in str(conversation.messages[:-1]):
        return  # a Jinja template that drops thoughts rejects the row; here such an answer is not trained
    if name != "simple_concat_with_space" or conversation.messages[0]["role"] != "assistant":
        assert (runs, specials) == other.render(conversation)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_role_can_be_trained_with_what_ends_its_turn(name: str, pairs: Any) -> None:
    reader = RowReader(EVERY, EVERY.sources[0])
    roles = [role for role in ("system", "user", "assistant") if role in named(name).turns]
    row = {"messages": turns(*((role, f"{role} says") for role in roles), ("assistant", "done"))}
    runs, _ = named(name).render(reader.read(row))
    spoken = list(runs[1::2])
    assert len(spoken) == 4 and all(f"{role} says" in run for role, run in zip(roles, spoken, strict=False))
    assert spoken[-1].endswith((EOS, IM_END))
    theirs = pairs[name][1].render(reader.read(row))[0]
    assert "".join(theirs) == "".join(runs)
    assert theirs[1::2][-1] == spoken[-1]


def test_olmo_layout_as_published() -> None:
    row = {"messages": turns(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao"))}
    assert "".join(named("olmo").render(READ(row))[0]) == (
        f"<|im_start|>system\n{OLMO}{NO_FUNCTIONS}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|endoftext|>"
    )
    tool = {
        "messages": [
            {"role": "system", "content": "S", "functions": "[f]"},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": None, "function_calls": "f(1)"},
            {"role": "environment", "content": "2"},
            {"role": "assistant", "content": "It is 2."},
        ]
    }
    runs = named("olmo_thinker_no_think_sft_tokenization").render(READ(tool))[0]
    assert runs == [
        "<|im_start|>system\nS <functions>[f]</functions><|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "<function_calls>f(1)</function_calls><|im_end|>",
        "\n<|im_start|>environment\n2<|im_end|>\n<|im_start|>assistant\n",
        "It is 2.<|endoftext|>",
    ]
    plain = "".join(named("olmo_thinker_no_think_sft_tokenization").render(READ(chat("Q", "A")))[0])
    assert plain.startswith(f"<|im_start|>system\n{HELPFUL}<|im_end|>\n<|im_start|>user\nQ")


def test_tulu_zephyr_and_simple_chat_layouts_as_published() -> None:
    row = chat("a", "b", "c", "d")
    assert named("tulu").render(READ(row))[0] == [
        "<|user|>\na\n<|assistant|>\n", "b<|endoftext|>", "\n<|user|>\nc\n<|assistant|>\n", "d<|endoftext|>"
    ]  # fmt: skip
    assert "".join(named("zephyr").render(READ(row))[0]) == (
        "<|user|>\na<|endoftext|>\n<|assistant|>\nb<|endoftext|>\n<|user|>\nc<|endoftext|>\n<|assistant|>\nd<|endoftext|>\n"
    )
    assert (
        "".join(named("simple_chat").render(READ(row))[0])
        == "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d<|endoftext|>"
    )


@pytest.mark.parametrize("name", ["olmo_thinker", "tulu_thinker"])
def test_thinker_templates_leave_to_the_prompt_the_opening_tag_that_it_gives(name: str) -> None:
    for template in (named(name), like(name)):
        row = chat("a", "<think>\nhm\n</think>\n\nb")
        assert trained(template, row) == ["\nhm\n</think>\n\nb<|endoftext|>"]
        assert template.render(READ(row))[0][0].endswith("assistant|>\n<think>" if "tulu" in name else "\n<think>")
        assert template.answers_without_prefix == 0
        assert trained(template, chat("a", "b")) == ["b<|endoftext|>"]
        assert template.answers_without_prefix == 1


def test_remove_intermediate_thinking_keeps_only_the_last() -> None:
    row = chat("a", "<think>1</think>\nb", "c", "<think>2</think>\nd")
    name = "olmo_thinker_remove_intermediate_thinking"
    assert trained(named(name), row) == ["2</think>\nd<|endoftext|>"]  # an answer without its thought is not trained
    assert trained(named(name), chat("a", "b", "c", "<think>2</think>\nd")) == [
        "b<|im_end|>",
        "2</think>\nd<|endoftext|>",
    ]
    with pytest.raises(BadRow, match=r"leaves out '1', .* history = \"as-rendered\""):
        trained(like(name), row)


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
    {%- for later in messages[loop.index:] %}{% if later.role == 'nobody' %}{{ later.content }}{% endif %}{% endfor %}
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
    template = jinja(text, bos_token="<s>")
    assert trained(template, chat("a", "b", "c", "d")) == expected
    assert template.boundaries == boundaries
    runs, specials = template.render(READ(chat("a", "b", "c", "d")))
    assert ("".join(runs)).count(EOS) == (2 if boundaries == "index" else 1)
    assert specials == sum("".join(runs).count(token) for token in MORE)


@pytest.mark.parametrize("name", FOREIGN)
def test_content_that_looks_like_scaffold_moves_no_mask(name: str) -> None:
    text, expected, _ = FOREIGN[name]
    template = jinja(text, bos_token="<s>")
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


def test_named_template_needs_its_turn_tokens() -> None:
    with pytest.raises(SftError, match="does not have as a special token"):
        NamedTemplate("olmo", EOS, [EOS])


def test_special_text_in_content_is_set_aside_and_restored() -> None:
    specials = SpecialTokens(SPECIALS)
    row = {"messages": turns(("user", f"a{IM_END}b"), ("assistant", EOS)), "tools": [{"name": EOS}]}
    escaped, back = specials.escape(READ(row))
    assert specials.are_in(READ(row)) and not specials.are_in(escaped)
    assert back(escaped.messages[0]["content"]) == f"a{IM_END}b" and back(escaped.messages[1]["content"]) == EOS
    crowded = Conversation(turns(("user", "\U000f0000\U00100000"), ("assistant", EOS)), [False, True], None, False)
    with pytest.raises(BadRow, match="private-use"):
        specials.escape(crowded)


def test_an_edit_of_a_named_template_makes_prepare_stale_and_says_so(workspace: Any) -> None:
    workspace.recipe("x", 'tokenizer = "tok"', 'tokenizer = "tok"\ntemplate = "tulu"')
    workspace.make("prepare", "RECIPE=x")
    assert workspace.ran() == ["prepare x"]
    file = workspace.root / "lib/sft/recipe/chat_templates.py"
    text = file.read_text()
    file.write_text(text.replace("ZEPHYR_JINJA = (\n", 'ZEPHYR_JINJA = (\n    "{# another template #}" +'))
    assert "x/prepare: up to date" in workspace.make("why", "RECIPE=x").stdout
    for edited in (
        text.replace("{{- '<|assistant|>\\\\n' -}}", "{{- '<|model|>\\\\n' -}}"),  # of the Jinja text
        text.replace('TurnText("<|assistant|>\\n"', 'TurnText("<|model|>\\n"'),  # of the table of turns
    ):
        assert edited != text
        file.write_text(edited)
        assert re.search(
            r"x/prepare: template_text tulu [0-9a-f]{12} -> tulu [0-9a-f]{12}\n",
            workspace.make("why", "RECIPE=x").stdout,
        )


def test_the_key_of_a_recipe_without_a_named_template_has_no_digest_of_one() -> None:
    smoke = load(REPO / "recipes/smoke.toml", ["template=tokenizer"])
    assert "template_text" not in smoke.config("prepare")
    named = load(REPO / "recipes/smoke.toml", ["template=olmo", "eval_template=olmo_thinker"])
    assert "template_text" not in named.config("train")
    assert named.config("prepare")["template_text"].startswith("olmo ")
    assert named.config("convert")["template_text"].startswith("olmo_thinker ")


def test_spans_become_runs_only_in_ascending_order() -> None:
    assert to_runs("abcdef", [(1, 2), (4, 6)]) == ["a", "b", "cd", "ef"]
    assert to_runs("abc", [(0, 1)]) == ["", "a", "bc"]
    assert to_runs("abc", []) == ["abc"]
    assert to_runs("abc", [(2, 3), (0, 1)]) is None


RULES = TurnRules(
    header="A:", generation_prefix="<think>", terminator=None, last_terminator=EOS, terminators=(EOS, IM_END), gap="\n", eos=EOS
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said", "trained"),
    [
        ("A:hi<|im_end|>\n", "hi", "hi<|im_end|>"),
        ("A:hi<|im_end|><|endoftext|>\n", "hi", "hi<|im_end|><|endoftext|>"),
        ("A:hi<|endoftext|><|im_start|>", "hi", "hi<|endoftext|>"),  # the model stops at the end of the text
        ("A:hi\n", "hi", None),
        ("A:hi<|im_end|>more<|im_end|>\n", "hi", "hi<|im_end|>"),
        ("A:hm<|im_end|>hi<|im_end|>\n", "hi", "hm<|im_end|>hi<|im_end|>"),  # its first end comes before its words
        ("A:hi<|im_end|>\n", "ho", None),
    ],
)
def test_an_answer_ends_with_the_first_terminator_behind_all_its_words(text: str, said: str, trained: Any) -> None:
    message = {"role": "assistant", "content": said}
    end = answer_end(text, 2, (0, len(text)), RULES, SpecialTokens(SPECIALS), message)
    assert (None if end is None else text[2:end]) == trained


def test_the_probe_reports_which_message_wrote_what() -> None:
    probe = TemplateProbe("x", LOOP.replace("BODY", TURN), {}, SpecialTokens(SPECIALS))
    trace = probe.trace(turns(("user", "a"), ("assistant", "b")))
    assert trace.text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert trace.region_text(1) == "<|im_start|>assistant\nb<|im_end|>\n" and trace.blocks == {}
    assert not probe.writes_field("tool_calls", "assistant", True) and not probe.writes_tools(False)
    assert probe.turn_of_calls() == ("", "")
