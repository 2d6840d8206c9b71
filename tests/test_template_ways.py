"""Templates that are rendered in another way than most: contents as lists of parts, a last answer after the loop, calls only beside tools."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chat_samples import EOS, SOURCE, SPECIALS, chat, encoder, make_tokenizer, text_of
from sft.chat.rows import BadRow, RowReader
from sft.chat.special_tokens import SpecialTokens
from sft.chat.template import JinjaTemplate
from sft.data import preview
from sft.data.normalization import Normalizer
from sft.data.render import Renderer
from sft.recipe.schema import Prepare

PREPARE = Prepare(tokenizer="t", sources=(SOURCE,))
READ = RowReader(PREPARE, SOURCE).read
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# Idefics 3, SmolVLM, LLaVA: a content is a list of parts; a text writes nothing.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)
# Nemotron Nano 2: the last answer is taken out of the list, and written after the loop, behind a thought that is not one.
LAST_AFTER_LOOP = (
    "{% set last = messages[-1] %}{% if last.role == 'assistant' %}{% set messages = messages[:-1] %}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if last.role == 'assistant' %}{{ '<|im_start|>assistant\\n<think></think>' + last.content + '<|im_end|>\\n' }}"
    "{% elif add_generation_prompt %}{{ '<|im_start|>assistant\\n<think></think>' }}{% endif %}"
)
# Hunyuan A13B: calls are only written where there are tools.
CALLS_BESIDE_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% if tools %}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    + PROMPT
)
# Command R7B: the generation prompt is written even where nobody asks for it.
ALWAYS_PROMPTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n<think></think>' }}"
)
# GigaChat 3: an answer ends before its calls do.
STOPS_BEFORE_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% for c in m.tool_calls or [] %}"
    "{{ 'call\\n' + (c.function | tojson) + '<|im_end|>\\n' }}{% endfor %}{% endfor %}" + PROMPT
)
# Gemma 4: the results of calls are written by the message that calls.
RESULTS_INSIDE = (
    "{% for m in messages %}{% if m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\\n' }}{% for c in m.tool_calls or [] %}"
    "{{ c.function | tojson + messages[loop.index + 1].content }}{% endfor %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    + PROMPT
)
CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]


def jinja(text: str) -> JinjaTemplate:
    return JinjaTemplate("made.jinja", text, {}, EOS, SpecialTokens(SPECIALS))


def calling(content: str = "", tools: bool = True) -> dict[str, object]:
    answer = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    messages = [
        {"role": "user", "content": "q"},
        answer,
        {"role": "tool", "content": "three"},
        {"role": "assistant", "content": "a"},
    ]
    return {"messages": messages, **({"tools": TOOLS} if tools else {})}


def trained(text: str, row: dict[str, object]) -> list[str]:
    return jinja(text).render(READ(row))[0][1::2]


def test_contents_become_parts_for_a_template_that_takes_nothing_else() -> None:
    template = jinja(PARTS)
    assert template.probe.way.content_as_parts
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"},
        ]
    }
    runs = template.render(READ(row))[0]
    assert runs == ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b<|im_end|>", "\n<|endoftext|>"]
    skeletons = Renderer(PREPARE, template, template.specials, True, Normalizer())
    batch = skeletons.render([chat(f"a{n}", f"b{n}", "c", "d") for n in range(5)], READ)
    assert [runs[1::2] for runs in batch.runs] == [[f"b{n}<|im_end|>", "d<|im_end|>"] for n in range(5)]


def test_a_model_whose_template_takes_parts_is_exported_with_one_that_takes_texts_too(tmp_path: Path) -> None:
    made = encoder(make_tokenizer(tmp_path / "t", PARTS), "tokenizer")
    made.save_tokenizer(tmp_path / "saved")
    made.check_saved(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    question = [{"role": "user", "content": "a"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert asked == tokenizer.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
    assert text_of(made, made.encode([chat("a", "b")], SOURCE)) == asked + "b<|im_end|>\n<|endoftext|>"


def test_a_last_answer_after_the_loop_is_found() -> None:
    assert jinja(LAST_AFTER_LOOP).probe.way.last_after_loop
    assert trained(LAST_AFTER_LOOP, chat("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]
    runs = jinja(LAST_AFTER_LOOP).render(READ(chat("a", "b", "c", "d")))[0]
    assert [run.endswith("<|im_start|>assistant\n<think></think>") for run in runs[:4:2]] == [True, True]


def test_calls_that_are_only_written_beside_tools_are_trained_where_there_are_some() -> None:
    assert trained(CALLS_BESIDE_TOOLS, calling()) == ['{"name": "add", "arguments": {"x": 1}}<|im_end|>', "a<|im_end|>"]
    with pytest.raises(BadRow, match=r"message 1: tool_calls: .* leaves it out"):
        trained(CALLS_BESIDE_TOOLS, calling(tools=False))


def test_a_prompt_that_is_written_unasked_is_no_part_of_the_document() -> None:
    runs = jinja(ALWAYS_PROMPTS).render(READ(chat("a", "b")))[0]
    assert runs == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think></think>",
        "b<|im_end|>",
        "<|endoftext|>",
    ]


def test_a_reject_says_what_the_template_really_does() -> None:
    with pytest.raises(BadRow, match="message 1: the model would stop before it has said all"):
        trained(STOPS_BEFORE_CALLS, calling(tools=False))
    with pytest.raises(BadRow, match=r"message 2 \(tool\): .* writes 'three' inside an answer"):
        trained(RESULTS_INSIDE, calling("b", tools=False))


def test_white_space_that_is_a_token_stays_white_space_to_the_template() -> None:
    """Gemma has tokens for line breaks, which its template writes between turns. Its template trims contents."""
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
        + PROMPT
    )
    template = JinjaTemplate("made.jinja", text, {}, EOS, SpecialTokens(SPECIALS), added=("\n", "\n\n"))
    batch = Renderer(PREPARE, template, template.specials, True, Normalizer()).render(
        [chat("\n\na \n", "\n b\n\n")], READ
    )
    assert batch.runs[0][:2] == ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b<|im_end|>"]


def test_no_answer_begins_inside_a_token() -> None:
    """The prompt and the history open answers with two tokens that begin with the same letters."""
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|talk|>' }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|think|>' }}{% endif %}"
    )
    template = JinjaTemplate("made.jinja", text, {}, EOS, SpecialTokens([*SPECIALS, "<|talk|>", "<|think|>"]))
    runs = template.render(READ(chat("a", "b")))[0]
    assert runs[0].endswith("<|im_start|>assistant<|think|>") and runs[1] == "<|talk|>b<|im_end|>"


def test_a_header_that_the_prompt_does_not_give_is_not_trained() -> None:
    """Gemma's prompt goes on without a header after the result of a tool, where the history writes one."""
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    with pytest.raises(BadRow, match=r"message 3 opens with .*, which the prompt for it does not give"):
        trained(text, calling(tools=False))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "before each answer, untrained"),
        ({"generation_prefix": "answer"}, "begins with, trained"),
        ({"history": "as-rendered"}, "3 of the row"),
    ],
)
def test_preview_says_what_becomes_of_the_generation_prefix_and_shows_each_document(
    tmp_path: Path, options: dict[str, str], said: str
) -> None:
    text = (
        ALWAYS_PROMPTS.replace("{{ '<|im_start|>assistant", "{% if add_generation_prompt %}{{ '<|im_start|>assistant")
        + "{% endif %}"
    )
    made = encoder(make_tokenizer(tmp_path / "t", text), "tokenizer", **options)
    shown = "\n".join(preview.show(made, 0, "rows.jsonl", 1, chat("a", "b", "c", "d", "e", "f"), False))
    assert "The generation prompt ends in '<think></think>', " in shown and said in shown
    assert shown.count("── document ") == (3 if "history" in options else 0)
