"""What a recipe and a tokenizer's folder say about a template: the day, variables, tokens that are scaffold, one of several templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chat_samples import EOS, SOURCE, chat, encoder, make_tokenizer, text_of
from made_templates import LOOP, PROMPT, TURN, jinja, runs_of
from sft.chat.rows import BadRow
from sft.chat.template import TemplateOptions
from sft.common.errors import SftError

DAY = LOOP.replace("BODY", TURN).replace("{% for", "{{ strftime_now('%d %b %Y') }}{% for", 1) + PROMPT


def test_a_template_that_writes_the_day_needs_one_before_anything_is_encoded() -> None:
    with pytest.raises(SftError, match=r'strftime_now.*date = "2026-07-01"'):
        jinja(DAY)
    template = jinja(DAY, TemplateOptions(date="2026-07-01"))
    assert runs_of(template, chat("a", "b"))[0].startswith("01 Jul 2026<|im_start|>")
    given = (
        "{% if not day is defined %}{% set day = strftime_now('%d') %}{% endif %}{{ day }}"
        + LOOP.replace("BODY", TURN)
        + PROMPT
    )
    with pytest.raises(SftError, match=r"strftime_now"):
        jinja(given)
    assert runs_of(jinja(given, TemplateOptions(variables={"day": "now"})), chat("a", "b"))[0].startswith("now<")
    with pytest.raises(SftError, match=r"prepare\.date: .* does not read the day"):
        jinja(LOOP.replace("BODY", TURN) + PROMPT, TemplateOptions(date="2026-07-01"))


MODES = LOOP.replace("BODY", TURN) + (
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def test_variables_come_from_the_recipe_or_from_the_row() -> None:
    quiet = {"enable_thinking": False}
    row = {**chat("a", "b"), "chat_template_kwargs": quiet}
    assert not runs_of(jinja(MODES), chat("a", "b"))[0].endswith("</think>\n\n")
    assert runs_of(jinja(MODES), row)[0].endswith("<think>\n\n</think>\n\n")
    assert runs_of(jinja(MODES, TemplateOptions(variables=quiet)), chat("a", "b"))[0].endswith("</think>\n\n")
    with pytest.raises(SftError, match=r"template_variables: thinking is not read by template"):
        jinja(MODES, TemplateOptions(variables={"thinking": True}))
    with pytest.raises(SftError, match=r"messages is set by the conversation"):
        jinja(MODES, TemplateOptions(variables={"messages": "x"}))
    for wrong in ({"thinking": True}, {"tools": [1]}, {"eos_token": "x"}):
        with pytest.raises(BadRow, match="chat_template_kwargs"):
            runs_of(jinja(MODES), {**row, "chat_template_kwargs": wrong})


def test_checks_of_the_saved_tokenizer_render_with_the_same_day_and_variables(tmp_path: Path) -> None:
    text = DAY.replace("strftime_now('%d %b %Y')", "strftime_now('%d %b %Y') + (mood or '')")
    make_tokenizer(tmp_path / "t", text)
    made = encoder(tmp_path / "t", "tokenizer", date="2026-07-01", template_variables={"mood": "calm"})
    made.save_tokenizer(tmp_path / "saved")
    made.check_saved(tmp_path / "saved")
    saved = (tmp_path / "saved" / "chat_template.jinja").read_text()
    assert saved.startswith('{% set mood = mood if mood is defined else "calm" %}')
    (tmp_path / "saved" / "chat_template.jinja").write_text(saved.replace("(mood or '')", "'X' + mood"))
    with pytest.raises(SftError, match=r"renders '.*Xcalm<.* where the data was rendered as '.*[0-9]calm<"):
        made.check_saved(tmp_path / "saved")


def test_added_tokens_that_are_scaffold_count_as_special_though_they_are_not_declared_so(tmp_path: Path) -> None:
    """DeepSeek's <｜User｜> is not declared special. What an answer writes stays a token: <think>."""
    folder = make_tokenizer(tmp_path / "t", LOOP.replace("BODY", "{{ '<|u|>' if m.role == 'user' else '<|a|>' }}{{ m.content }}{{ eos_token if m.role == 'assistant' }}") + "{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}")  # fmt: skip
    config = json.loads((folder / "tokenizer.json").read_text())
    first = max(token["id"] for token in config["added_tokens"]) + 1
    config["added_tokens"] += [
        {**config["added_tokens"][0], "content": text, "id": first + index, "special": False}
        for index, text in enumerate(("<|u|>", "<|a|>", "<think>", "</think>"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(config))
    made = encoder(folder, "tokenizer")
    assert {"<|u|>", "<|a|>"} < set(made.specials.texts) and "<think>" not in made.specials.texts
    got = made.encode([chat("x<|a|>y", "<think>m</think>n<|u|>o")], SOURCE)
    ids = got.ids.tolist()
    assert [ids.count(first + index) for index in range(4)] == [1, 1, 1, 1]
    assert text_of(made, got) == f"<|u|>x<|a|>y<|a|><think>m</think>n<|u|>o{EOS}"
    assert text_of(made, got, trained=True) == f"<think>m</think>n<|u|>o{EOS}"


def test_one_of_several_templates_of_a_tokenizer_is_chosen_by_name(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": LOOP.replace("BODY", TURN) + PROMPT}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{# #}" + LOOP.replace("BODY", TURN) + PROMPT)
    assert encoder(folder, "tokenizer:tool_use").template.text.startswith("{% for")
    assert encoder(folder, "tokenizer:rag").template.text.startswith("{# #}")
    with pytest.raises(SftError, match=r"has no chat template; it has tokenizer:tool_use, tokenizer:rag; next"):
        encoder(folder, "tokenizer")
