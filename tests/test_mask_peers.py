"""Trained tokens against those of other projects: transformers' mask of {% generation %} blocks in TRL's templates, and `renderers`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import peers
from chat_samples import IM_END, SOURCE, encoder, make_tokenizer, text_of, turns
from test_real_templates import TRL

ROWS = [
    turns(("user", "hi"), ("assistant", "hello there")),
    turns(
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "hello there"),
        ("user", "and?"),
        ("assistant", "bye now"),
    ),
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALLS = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "three", "tool_call_id": "call00001", "name": "add"},
    {"role": "assistant", "content": "It is 3."},
]
WITHOUT_CALLS = ("lfm2_training", "qwen2_5_vl_training")
MARKED = (
    *WITHOUT_CALLS,
    "lfm2_v2_training",
    "nemotron_3_nano_training",
    "nemotron_3_super_training",
    "qwen2_5_training",
    "qwen3_training",
    "qwen3_5_nothink_training",
    "qwen3_5_think_training",
)
"""TRL's templates with {% generation %} blocks and ChatML's tokens; the first ones write no tools or no calls."""


@functools.cache
def sample_tokenizer(root: Path) -> tuple[Path, Any]:
    folder = make_tokenizer(root / "tokenizer")
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


def answers(text: str) -> list[str]:
    """The answers of a text in which each ends with <|im_end|>, without white space around them."""
    return [answer.strip() for answer in text.split(IM_END) if answer.strip()]


@pytest.mark.seconds
@pytest.mark.parametrize("name", MARKED)
def test_trained_tokens_are_those_of_transformers_mask_without_what_the_prompt_gives(name: str, root: Path) -> None:
    """TRL's blocks also hold a turn's last newline, and the part of an answer that the generation prompt gives."""
    file = peers.pypi_package(*TRL) / "trl" / "chat_templates" / f"{name}.jinja"
    folder, tokenizer = sample_tokenizer(root)
    text = file.read_text(encoding="utf-8")
    made = encoder(folder, file.name, lambda _: file)
    for messages, tools in ((ROWS[0], None), (ROWS[1], None), *([] if name in WITHOUT_CALLS else [(CALLS, TOOLS)])):
        encoded = made.encode([{"messages": messages, **({"tools": tools} if tools else {})}], SOURCE)
        assert not encoded.rejects
        theirs = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=text, return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [i for i, mask in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if mask]
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tools=tools, chat_template=text, add_generation_prompt=True, tokenize=False
        ).rstrip()
        ours, others = answers(text_of(made, encoded, trained=True)), answers(tokenizer.decode(marked))
        assert len(ours) == len(others) > 0
        for our, other in zip(ours, others, strict=True):
            assert other.endswith(our)
            assert prompt.endswith(other.removesuffix(our).rstrip())


QUESTION = {"role": "user", "content": "1 + 2?"}
THINKING = [
    *turns(("system", "Be brief."), ("user", " hi \n")),
    {"role": "assistant", "content": "hello\n", "reasoning_content": "they greet"},
    QUESTION,
    {"role": "assistant", "content": "", "reasoning_content": "add", "tool_calls": [CALL, {**CALL, "id": "call00002"}]},
    {"role": "tool", "content": "three", "tool_call_id": "call00001", "name": "add"},
    {"role": "tool", "content": "3", "tool_call_id": "call00002", "name": "add"},
    {"role": "assistant", "content": "It is <|im_start 3.", "reasoning_content": "answer"},
    *turns(("user", ""), ("assistant", "日本語 👩‍👩‍👧")),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokenizer", "history"),
    [("qwen3", "whole"), ("qwen3", "as-rendered"), ("deepseek_v3", "whole"), ("deepseek_v3", "as-rendered")],
)
def test_trained_tokens_are_those_that_renderers_says_the_model_samples(tokenizer: str, history: str) -> None:
    """`renderers` writes the templates of some models as Python code: pip install renderers==0.1.12."""
    module = pytest.importorskip(f"renderers.{tokenizer}", reason="the package renderers is not installed")
    folder = peers.tokenizer(tokenizer)
    theirs = {"qwen3": "Qwen3Renderer", "deepseek_v3": "DeepSeekV3Renderer"}[tokenizer]
    renderer = getattr(module, theirs)(AutoTokenizer.from_pretrained(folder))
    made = encoder(folder, "tokenizer", history=history)
    rows = [(ROWS[0], None), (ROWS[1], None)]
    if tokenizer == "qwen3":
        rows += [(CALLS, TOOLS)] + ([(THINKING, TOOLS)] if history == "as-rendered" else [])
    for messages, tools in rows:
        encoded = made.encode([{"messages": messages, **({"tools": tools} if tools else {})}], SOURCE)
        assert not encoded.rejects
        answered = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        documents = [answered] if history == "whole" else [[turn] for turn in answered]
        ends = encoded.lengths.cumsum().tolist()
        for turns_of, start, end in zip(documents, [0, *ends[:-1]], ends, strict=True):
            rendered = renderer.render(messages[: turns_of[-1] + 1], tools=tools)
            sampled = zip(rendered.token_ids, rendered.sampled_mask, rendered.message_indices, strict=True)
            expected = [i for i, is_sampled, index in sampled if is_sampled and index in turns_of]
            assert encoded.ids[start:end][encoded.loss_mask[start:end]].tolist() == expected
