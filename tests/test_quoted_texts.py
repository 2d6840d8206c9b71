"""Columns that hold JSON strings in quotes: refused when every text is one, counted alike by Python and compiled code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_samples import SOURCE, encoder, tokenizer_folder, turns
from preparing import stage, write_rows
from sft.common.errors import SftError
from sft.data import prepare
from sft.recipe.schema import Source
from sft.sources.blocks import ColumnBlock, LineBlock

folder = tokenizer_folder
Q = json.dumps
PAIRS = [{"prompt": Q("hi"), "completion": "x"}, {"prompt": " " + Q('a\n"é') + "\n", "completion": "y"}]
CHATS = [
    {"messages": turns(("user", "a"), ("assistant", Q("b")), ("user", "c"), ("assistant", Q(text)))} for text in "de"
]
ALPACA = [{"instruction": Q(text), "input": "one", "output": "x"} for text in "ab"]
THOUGHTS = [
    {"messages": [*turns(("user", "a")), {"role": "assistant", "content": "b", "reasoning": Q(text)}]} for text in "cd"
]
INPUTS = [{"instruction": text, "input": Q("one"), "output": "x"} for text in "ab"]


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (PAIRS, "prompt: all 2 rows"),
        (CHATS, r"messages \(assistant\): all 2"),
        (ALPACA, "instruction: all 2"),
        (INPUTS, "input: all 2"),
        ([{**row, "system": Q("s")} for row in PAIRS], "system: all 2"),
        ([{"prompt": repr(text.encode()), "completion": "x"} for text in "ab"], "prompt: all 2"),
        ([{**row, "history": [[Q("a"), Q("b")]]} for row in ALPACA], "history: all 2"),
        (THOUGHTS, "messages.reasoning: all 2"),
        ([{"prompt": repr(text), "completion": "x"} for text in ("a", "b\n")], "prompt: all 2"),
    ],
)
def test_a_column_of_quoted_texts_is_refused_or_kept(tmp_path: Path, rows: list[Any], name: str) -> None:
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SftError, match=f'(?s){name}.*quoted_texts = "keep"'):
        prepare.prepare(stage(tmp_path))
    prepare.prepare(stage(tmp_path, sources=(Source(path="rows.jsonl", quoted_texts="keep"),)))


@pytest.mark.parametrize(
    "rows",
    [
        PAIRS[:1],
        [*PAIRS, {"prompt": "hi", "completion": "x"}],
        [{"prompt": f'"{text}" and "b"', "completion": '"'} for text in "ab"],
        [{"prompt": "'tis what it's '", "completion": text} for text in "ab"],
        [{"prompt": '"two\nlines"', "completion": text} for text in "ab"],
        [{"messages": [*turns(("user", "a")), {"role": "tool", "content": Q("r")}, *turns(("assistant", t))]} for t in "ab"],
    ],
    ids=["one row", "some rows", "quotes", "apostrophes", "lines", "results of tools"],
)  # fmt: skip
def test_other_quotes_are_text(tmp_path: Path, rows: list[Any]) -> None:
    write_rows(tmp_path / "rows.jsonl", rows)
    prepare.prepare(stage(tmp_path, template="chatml"))


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["lines", "columns"])
@pytest.mark.parametrize(
    "rows", [PAIRS, CHATS, ALPACA, INPUTS, THOUGHTS, [{**row, "prompt": repr(row["prompt"])} for row in PAIRS]]
)
def test_compiled_code_leaves_quoted_texts_to_python(folder: Path, rows: list[Any], kind: str) -> None:
    rows = [*rows, {"prompt": '"a" or "b"', "completion": "x"}]
    block = ColumnBlock.of(rows) if kind == "columns" else LineBlock.of("".join(f"{Q(row)}\n" for row in rows).encode())
    made = encoder(folder)
    _, odd = made.encode_plain(block, SOURCE)
    made.encode(block.batch(odd).rows, SOURCE)
    found = made.take_counts(SOURCE)
    made.encode(block.batch().rows, SOURCE)
    assert found == made.take_counts(SOURCE) and {count for count, _ in found.quoted.values()} == {2}
