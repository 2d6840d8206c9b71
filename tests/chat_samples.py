"""A byte-level tokenizer with dolma2's special tokens, trained in a moment, and random conversations for the tests of masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from sft.data.chunks import in_order
from sft.data.tokenize import Encoded, Encoder
from sft.recipe.chat_templates import TEMPLATES
from sft.recipe.schema import Prepare, Source
from sft.sources.blocks import Block

EOS, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIALS = [EOS, PAD, IM_START, IM_END]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LESSONS = [
    "system user assistant environment tool functions function_calls think",
    "You are OLMo, a helpful function-calling AI assistant built by Ai2. You do not currently have access to any functions.",
    "<|im_start|>assistant\n\n\nHello there, how are you?\n\n", "User: hi\n\nAssistant: hello", "It's 12345 apples!!\n\n\n", "  spaces   and\ttabs ",
]  # fmt: skip
SOURCE = Source(path="rows.jsonl")
COMPILED = [name for name, text in TEMPLATES.items() if not (text.between or text.lead or text.strips_history)]
"""The named templates that compiled code renders: each message on its own."""
ENDS_TURNS_IN_EOS = [name for name, text in TEMPLATES.items() if text.turns(EOS)["assistant"].stop == EOS]
"""The named templates in which EOS also ends turns inside a conversation."""


def make_tokenizer(folder: Path, template: str | None = None) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LESSONS * 3, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the samples. A test module names it: folder = tokenizer_folder."""
    return make_tokenizer(tmp_path_factory.mktemp("samples") / "tokenizer")


def encoder(folder: Path, template: str = "olmo", find: Any = None, **options: Any) -> Encoder:
    return Encoder(folder, Prepare(tokenizer="tokenizer", sources=(SOURCE,), template=template, **options), find)


def text_of(made: Encoder, encoded: Encoded, document: int = 0, trained: bool = False) -> str:
    """What a document's ids decode to; with `trained`, only those under the mask."""
    start = int(encoded.lengths[:document].sum())
    part = slice(start, start + int(encoded.lengths[document]))
    ids = encoded.ids[part][encoded.loss_mask[part]] if trained else encoded.ids[part]
    return made.vocabulary.decode(ids).decode(errors="replace")


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def chat(*contents: str) -> dict[str, Any]:
    """user, assistant, user, assistant, …"""
    roles = ("user", "assistant")
    return {"messages": turns(*((roles[index % 2], content) for index, content in enumerate(contents)))}


# Contents that break masks: white space that merges with scaffold, nothing at all, other scripts, and the template's own words.
NASTY = [
    "", " ", "\n", "\n\n\n", "  \n", "\t", "assistant\n", "<|assistant|>\n", "\n\nAssistant: ", "<think>\nhm\n</think>\n\nyes", "</think>",
    "é", "👩‍👩‍👧‍👦", "日本語", "e\u0301", "\u200b", "\ufeff", "{{ eos_token }}", "{% endfor %}", "<function_calls>x()</function_calls>", "<", "|>", "\x00",
    "\U000f1001",
]  # fmt: skip
plain_text = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
    st.lists(st.sampled_from([*NASTY, "word", " word", "12", "."]), max_size=4).map("".join),
).filter(lambda text: not any(special in text for special in SPECIALS))  # literals of the code are drawn too
special_text = st.lists(st.one_of(st.sampled_from(SPECIALS), plain_text), min_size=1, max_size=4).map("".join)
any_text = st.one_of(plain_text, special_text)


@st.composite
def conversations(draw: Any, text: Any = plain_text, roles: bool = False, tools: bool = False) -> dict[str, Any]:
    """A system prompt or none, then user and assistant turns; with `roles`, tool results and calls among them."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(text)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        if roles and draw(st.booleans()):
            call = draw(
                st.sampled_from(
                    [
                        {"function_calls": "f(x=1)"},
                        {
                            "tool_calls": [
                                {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": ["é"]}}}
                            ]
                        },
                        {
                            "tool_calls": [
                                {"function": {"name": "g", "arguments": '{"q": "a b"}'}},
                                {"name": "h", "arguments": {}},
                            ]
                        },
                    ]
                )
            )
            messages.append({"role": "assistant", "content": draw(text), **call})
            messages.append({"role": draw(st.sampled_from(["environment", "tool"])), "content": draw(text)})
        messages.append({"role": "assistant", "content": draw(text)})
        if draw(st.integers(0, 9)) == 0:
            messages[-1]["train"] = draw(st.booleans())
    row: dict[str, Any] = {"messages": messages}
    if tools and draw(st.booleans()):
        row["tools"] = [{"type": "function", "function": {"name": "f", "description": draw(text), "parameters": {}}}]
    return row


def both_ways(made: Encoder, block: Block, source: Source = SOURCE) -> tuple[Any, Any, int]:
    """What the rows of a block make with compiled code and without, and how many of them were plain."""
    made.take_counts(source)
    some, odd = made.encode_plain(block, source)
    parts = [(some, some.rows + block.first)] if some is not None else []
    rejects, ways, fields, empty = [], [], [], []
    for batch, before in ((block.batch(odd), parts), (block.batch(), [])):
        encoded, numbers = made.encode(batch.rows, source), np.array(batch.numbers, dtype=np.int64)
        fields.append(made.take_counts(source))
        empty.append(
            sum(each.proof["empty_answers"] for each in (encoded, *([some] if before else [])) if each is not None)
        )
        rejects.append(
            sorted([*batch.rejects, *((int(numbers[r.row]), r.reason, r.detail, r.example) for r in encoded.rejects)])
        )
        ways.append([column.tolist() for column in in_order([*before, (encoded, numbers[encoded.rows])])])
    assert rejects[0] == rejects[1] and fields[0] == fields[1] and empty[0] == empty[1]
    return *ways, block.count - len(odd)
