"""Templates: the native renderers equal the Jinja text that is exported, and any Jinja template's spans come from structure."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import EOS, IM_END, SPECIALS, chat, conversations, turns
from conftest import REPO
from made_templates import LOOP, READ, TURN, jinja, trained
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

EVERY = Prepare(
    tokenizer="t", sources=(Source(path="x"),), train_roles=("system", "user", "assistant", "tool", "environment")
)


def like(name: str) -> JinjaTemplate:
    """The Jinja text of a named template, as it writes answers: without what only the generation prompt gives."""
    return jinja(named(name).text, TemplateOptions(generation_prefix="rendered"), specials=SPECIALS)


def named(name: str) -> NamedTemplate:
    return NamedTemplate(name, EOS, SPECIALS)


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


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text("<ab>", max_size=5), max_size=4))
def test_special_tokens_can_overlap_where_one_holds_another_or_ends_as_one_begins(texts: list[str]) -> None:
    slowly = any(
        (a != b and a in b) or any(b.startswith(a[k:]) for k in range(1, len(a))) for a in texts for b in texts
    )
    assert SpecialTokens(texts).can_overlap == slowly


@pytest.mark.seconds
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
