"""Conversations of one skeleton are rendered without Jinja to what Jinja renders, and what a template asks of a text is noticed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import EOS, SPECIALS, chat, conversations, plain_text, turns
from jinja_samples import TEXTS, THINKER, TURNS
from sft.chat.rows import BadRow, RowReader
from sft.chat.skeleton import Skeletons
from sft.chat.special_tokens import SpecialTokens
from sft.chat.template import JinjaTemplate
from sft.common.errors import SftError
from sft.recipe.schema import Prepare, Source

SOURCE = Source(path="x")
READ = RowReader(Prepare(tokenizer="t", sources=(SOURCE,)), SOURCE).read


def jinja(text: str) -> JinjaTemplate:
    return JinjaTemplate("made.jinja", text, {"eos_token": EOS}, EOS, SpecialTokens(SPECIALS))


def rendered(template: JinjaTemplate, conversation: Any) -> Any:
    try:
        return template.render(conversation)
    except BadRow as error:
        return error.reason


texts = st.one_of(
    plain_text,
    st.sampled_from(
        ["a", "b\n", "<think>x</think>y", "<think>\nx\n</think>\n\ny", "[result]", "[result", '"\\', "<", ">"]
    ),
)


@pytest.mark.seconds
@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_conversations_of_a_skeleton_are_rendered_as_jinja_renders_them(kept: Any, name: str, data: Any) -> None:
    template, skeletons = kept(name)
    form = data.draw(conversations(text=st.just("form"), roles=data.draw(st.booleans()), tools=True))
    thoughts = data.draw(st.integers(0, 3)) == 0
    for _ in range(4):  # the form again, with other texts
        row = copy.deepcopy(form)
        for message in row["messages"]:
            message["content"] = data.draw(texts) or "a"
            if thoughts and message["role"] == "assistant":
                message["reasoning_content"] = data.draw(texts) or "a"
        try:
            conversation = READ(row)
        except BadRow:
            return
        if template.specials.are_in(conversation):
            continue
        before = template.answers_without_prefix
        fast = skeletons.render(conversation)
        fast_count = template.answers_without_prefix - before
        slow = rendered(template, conversation)
        if fast is not None:
            assert fast == slow
            assert fast_count == template.answers_without_prefix - before - fast_count


@pytest.fixture(scope="module")
def kept() -> Any:
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            template = jinja(TEXTS[name])
            made[name] = template, Skeletons(template)
        return made[name]

    return get


@pytest.mark.parametrize("name", ["thinker", "chatml", "trims", "as json", "a macro"])
def test_the_third_conversation_of_a_form_needs_no_jinja(name: str, monkeypatch: Any) -> None:
    template = jinja(TEXTS[name])
    skeletons = Skeletons(template)
    rows = [
        chat("one\n", "two", "<think>\nthree</think>four", "<think>\nfive\n</think>\n\nsix" + "!" * i) for i in range(6)
    ]
    wanted = [template.render(READ(row)) for row in rows]
    for row in rows[:4]:
        skeletons.render(READ(row))
    monkeypatch.setattr(template.probe, "segments", None)
    assert [skeletons.render(READ(row)) for row in rows[4:]] == wanted[4:]


def test_calls_and_tools_are_written_without_jinja(monkeypatch: Any) -> None:
    template = jinja(THINKER)
    skeletons = Skeletons(template)
    rows = []
    for i in range(6):
        call = {"id": f"c{i}", "function": {"name": f"f{i}", "arguments": {"x": i, "y": ["é", {"z": None}]}}}
        messages = [
            *turns(("system", "s"), ("user", f"q{i}")),
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        messages += turns(("tool", f' {{"r": {i}}}'), ("assistant", "done"))
        rows.append(
            {
                "messages": messages,
                "tools": [{"type": "function", "function": {"name": f"f{i}", "description": "d" * i}}],
            }
        )
    wanted = [template.render(READ(row)) for row in rows]
    for row in rows[:4]:
        skeletons.render(READ(row))
    monkeypatch.setattr(template.probe, "segments", None)
    assert [skeletons.render(READ(row)) for row in rows[4:]] == wanted[4:]


@pytest.mark.parametrize(
    "body",
    [
        "m.content[:3]", "m.content | upper", "m.content | length | string", "m.content.upper()", "m.content.strip('x')", "(m.content * 2)",
        "'%.2s' % m.content", "m.content.split()[0]", "m.content | replace('a', 'b')", "(m.content if m.content > 'b' else '')",
        "(m.content if '\\n' in m.content else m.content)", "m.content | list | join", "('x' if messages[0].content == m.content else 'y')",
        "(m.content | first)", "m.content.replace('a', 'b')", "(m.content if m.content is lower else '')", "('' ~ m.content)[1:]",
        "(m.content if (m.content ~ '') is in(['ab']) else 'x')", "([m.content] | sort | join)", "(messages | map(attribute='content') | map('upper') | join)",
        "('x' if m == messages[-1] else m.content)", "('x' if m in [messages[0]] else m.content)", "m.content.__len__() | string",
        "(m.content if cycler(m.content).next() else '')", "m.content | tojson(indent=1)",
    ],
)  # fmt: skip
def test_a_template_that_looks_into_texts_is_left_to_jinja(body: str) -> None:
    try:
        template = jinja(TURNS.replace("BODY", f"(({body}) if m.role == 'user' else m.content)"))
    except SftError:
        return
    skeletons = Skeletons(template)
    rows = [chat(text, "x") for text in ("ab", "cd", "aa", "b\nb", "Aa", "zz", "xax")]
    for row in (*rows, *rows):
        fast = skeletons.render(READ(row))
        assert fast is None or fast == template.render(READ(row))
    assert all(plan is None for plan in skeletons.plans.values()) or "in(" in body


def test_a_rendering_that_differs_is_an_error() -> None:
    template = jinja(THINKER)
    skeletons = Skeletons(template)
    for _ in range(4):
        skeletons.render(READ(chat("a", "b")))
    (key, plan), *_ = ((key, plan) for key, plan in skeletons.plans.items() if plan)
    skeletons.plans[key] = plan._replace(specials=99)
    skeletons.rendered = -1
    with pytest.raises(SftError, match="in another way than those before it"):
        skeletons.render(READ(chat("a", "b")))


def test_special_tokens_and_private_characters_are_left_to_jinja() -> None:
    skeletons = Skeletons(jinja(THINKER))
    for text in (EOS, "a\U000f8000", "\U000fa001", "<|im_", "<think"):
        for _ in range(4):
            assert skeletons.render(READ(chat(text, "b"))) is None or text == "<|im_"
