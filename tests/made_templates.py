"""Templates of tests, and what they train: `jinja(text)` with the special tokens of published templates."""

from __future__ import annotations

from typing import Any

from chat_samples import EOS, SPECIALS
from sft.chat.rows import RowReader
from sft.chat.special_tokens import SpecialTokens
from sft.chat.template import JinjaTemplate, Template, TemplateOptions
from sft.recipe.schema import Prepare, Source

MORE = [*SPECIALS, "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|eom|>", "<|bom|>", "<|end|>", "<|call|>"]
READ = RowReader(Prepare(tokenizer="t", sources=(Source(path="x"),)), Source(path="x")).read
PLAIN = TemplateOptions()
AS_RENDERED = TemplateOptions(history="as-rendered")
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
LOOP = "{% for m in messages %}BODY{% endfor %}"


def jinja(
    text: str, options: TemplateOptions = PLAIN, added: tuple[str, ...] = (), specials: list[str] = MORE
) -> JinjaTemplate:
    return JinjaTemplate("made.jinja", text, {"bos_token": "<s>"}, EOS, SpecialTokens(specials), added, options)


def runs_of(template: Template, row: dict[str, Any]) -> list[str]:
    return template.render(READ(row))[0]


def trained(template: Template, row: dict[str, Any]) -> list[str]:
    return runs_of(template, row)[1::2]
