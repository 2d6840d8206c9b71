"""Rows of a known form, written by compiled code as a Jinja template writes them, make what Jinja makes: same tokens, masks and rejects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import SOURCE, both_ways, encoder, make_tokenizer, turns
from jinja_samples import TEXTS, THINKER
from made_lines import lines
from sft.common.errors import SftError
from sft.data.tokenize import Encoder
from sft.sources.blocks import ColumnBlock, LineBlock

pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("forms")
    make_tokenizer(folder / "tokenizer")
    made: dict[str, Encoder] = {}

    def get(name: str) -> Encoder:
        if name not in made:
            made[name] = fresh(folder, name)
        return made[name]

    return get


def fresh(folder: Path, name: str, **options: Any) -> Encoder:
    file = folder / f"{name}.jinja"
    file.write_text(TEXTS[name])
    return encoder(folder / "tokenizer", file.name, lambda path: file, **options)


@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(lines(), min_size=1, max_size=3))
def test_both_ways_make_the_same(encoders: Any, name: str, rows: list[bytes]) -> None:
    for _ in range(2):  # the first block of a form teaches it
        compiled, python, _ = both_ways(encoders(name), LineBlock.of(b"".join(rows) * 2, 7))
        assert compiled == python


CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"x": 1, "y": ["\u00e9", {"z": null}]}'},
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d"}}]
QUESTION = {"role": "user", "content": 'a\\u0001"\n'}
WITH_CALLS = [
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    *turns(("tool", " {r}"), ("assistant", "b")),
]
PLAIN: dict[str, dict[str, Any]] = {
    "a question and an answer": {"messages": turns(("user", "\n a"), ("assistant", "b"))},
    "thoughts in a field": {"messages": [QUESTION, {"role": "assistant", "content": "b", "reasoning_content": "t"}]},
    "thoughts in the content": {"messages": turns(("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"))},
    "calls": {"messages": WITH_CALLS},
    "calls and tools": {"messages": WITH_CALLS, "tools": TOOLS},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "prompt and completion": {"prompt": "a", "completion": "b"},
    "flags": {"messages": [*turns(("user", "a")), {"role": "assistant", "content": "b", "train": True}]},
}  # fmt: skip


@pytest.mark.parametrize("name", ["thinker", "names of tools"])
@pytest.mark.parametrize("row", PLAIN.values(), ids=PLAIN.keys())
def test_these_rows_need_no_jinja(encoders: Any, name: str, row: dict[str, Any]) -> None:
    made = encoders(name)
    text = json.dumps(row)
    block = LineBlock.of("".join(text.replace("b", "b" * i) + "\n" for i in range(1, 5)).encode())
    for _ in range(2):
        compiled, python, count = both_ways(made, block)
        assert compiled == python and count == 4


@pytest.mark.parametrize("row", PLAIN.values(), ids=PLAIN.keys())
def test_nor_do_these_rows_in_columns(encoders: Any, row: dict[str, Any]) -> None:
    made = encoders("thinker")
    rows = [json.loads(json.dumps(row).replace("b", "b" * i)) for i in range(1, 5)]
    for _ in range(2):
        compiled, python, count = both_ways(made, ColumnBlock.of(rows))
        assert compiled == python and count == 4


def test_a_text_with_special_tokens_or_private_characters_is_left_to_python(encoders: Any) -> None:
    made = encoders("thinker")
    for text in ("<|im_end|>", "\U000f8000", "x<", "<think", "\u3000x", "x\u00a0"):
        rows = [{"messages": turns(("user", t), ("assistant", "b"))} for t in ("a", "c", text)]
        compiled, python, count = both_ways(
            made, LineBlock.of("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())
        )
        assert compiled == python and count == 2, text


def test_a_document_that_jinja_renders_in_another_way_is_an_error(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    made = fresh(tmp_path, "thinker")
    block = LineBlock.of((json.dumps(PLAIN["a question and an answer"]) + "\n").encode() * 2)
    both_ways(made, block)
    made.template.text, other = "", fresh(tmp_path, "trims")
    (rows,) = made.plain_rows.values()
    assert rows is not None
    rows.writer.skeletons.template = other.template  # type: ignore[union-attr]
    with pytest.raises(SftError, match="in another way than those before it"):
        made.encode_plain(block, SOURCE)


def test_a_template_that_looks_into_texts_is_left_to_jinja(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "upper.jinja"
    file.write_text(THINKER.replace("~ message.content ~", "~ message.content | upper ~"))
    made = encoder(tmp_path / "tokenizer", file.name, lambda path: file)
    block = LineBlock.of((json.dumps(PLAIN["a question and an answer"]) + "\n").encode() * 2)
    compiled, python, count = both_ways(made, block)
    assert compiled == python and count == 0
