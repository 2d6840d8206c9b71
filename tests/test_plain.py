"""Plain rows, read by compiled code from lines of JSON, make what rows and templates make: same tokens, masks, names and rejects."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import COMPILED, SOURCE, both_ways, encoder, make_tokenizer, turns
from made_lines import lines
from sft.data import align
from sft.data.compiled import WORD, compiled
from sft.data.fast import plain
from sft.data.fast.json_rows import read_rows
from sft.data.fast.messages import MAX_MESSAGES
from sft.data.fast.turns import write_documents
from sft.data.tokenize import Encoder
from sft.recipe.chat_templates import TEMPLATES
from sft.recipe.schema import Source
from sft.sources.blocks import LineBlock

pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("plain") / "tokenizer")


@pytest.fixture(scope="module")
def olmo(folder: Path) -> Encoder:
    return encoder(folder)


def lines_both_ways(made: Encoder, lines: bytes, source: Source = SOURCE) -> tuple[Any, Any, int]:
    return both_ways(made, LineBlock.of(lines, 7), source)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(lines(), max_size=5))
def test_both_ways_make_the_same(olmo: Encoder, rows: list[bytes]) -> None:
    compiled, python, _ = lines_both_ways(olmo, b"".join(rows))
    assert compiled == python


@pytest.mark.parametrize("name", COMPILED)
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(lines(), min_size=1, max_size=3))
def test_both_ways_make_the_same_under_every_template(encoders: Any, name: str, rows: list[bytes]) -> None:
    compiled, python, _ = lines_both_ways(encoders(name), b"".join(rows))
    assert compiled == python


@pytest.fixture(scope="module")
def encoders(folder: Path) -> Any:
    made: dict[str, Encoder] = {}
    return lambda name: made.setdefault(name, encoder(folder, name)) if name not in made else made[name]


@settings(max_examples=250, deadline=None)
@given(rows=st.lists(lines(), min_size=1, max_size=2), data=st.data())
def test_damaged_lines_are_judged_as_without_compiled_code(olmo: Encoder, rows: list[bytes], data: Any) -> None:
    text = bytearray(b"".join(rows))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 2))
        piece = data.draw(
            st.sampled_from(
                [b"", b'"', b"\\", b"{", b"}", b"[", b",", b"\\u12", b"\\ud800", b"\x00", b"\t", b"\n", b"\xff", b"0"]
            )
        )
        text[at : at + data.draw(st.integers(0, 2))] = piece
    text = bytes(text.rstrip(b"\n")) + b"\n"
    compiled, python, _ = lines_both_ways(olmo, text)
    assert compiled == python


PLAINEST = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
CALL_AND_RESULT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "function_calls": "f()"}, {"role": "environment", "name": "f", "content": "1"}, {"role": "assistant", "content": "b"}]}'
ODD = {
    "a name": PLAINEST.replace('"content": "b"', '"content": "b", "name": "n"') + "}",
    "a result of no call": CALL_AND_RESULT.replace('"function_calls": "f()"', '"content": "f()"'),
    "a blank line": " ",
    "an empty object": "{}",
    "no object": "[1]",
    "no messages": '{"messages": []}',
    "messages twice": PLAINEST + ', "messages": []}',
    "a flag twice": PLAINEST.replace('"content": "b"', '"content": "b", "train": false, "train": true') + "}",
    "an argument twice": PLAINEST.replace('"b"', 'null, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1, "a": 2}}}]') + "}",
    "an argument twice in a text": PLAINEST.replace('"b"', 'null, "tool_calls": [{"function": {"name": "f", "arguments": "{\\"a\\":1,\\"a\\":2}"}}]') + "}",
    "a tool with a name twice": PLAINEST + ', "tools": [{"name": "f", "name": "g"}]}',
    "tools that end early": '{"tools": [{"name": "f"}',
    "a harmless column twice": PLAINEST + ', "id": 1, "id": 2}',
    "a role twice": '{"messages": [{"role": "user", "content": "a", "role": "assistant"}]}',
    "an escaped name": PLAINEST.replace('"role"', '"\\u0072ole"', 1) + "}",
    "an escaped role": PLAINEST.replace('"user"', '"\\u0075ser"') + "}",
    "two objects": PLAINEST + "}" + PLAINEST + "}",
    "a comma too many": PLAINEST + ",}",
    "half of a surrogate pair": PLAINEST.replace('"a"', '"\\ud83e"') + "}",
    "the other half": PLAINEST.replace('"a"', '"\\udd8a"') + "}",
    "a surrogate and a letter": PLAINEST.replace('"a"', '"\\ud83e\\u0041"') + "}",
    "a bad escape": PLAINEST.replace('"a"', '"\\x41"') + "}",
    "a control character": PLAINEST.replace('"a"', '"\x01"') + "}",
    "a leading zero": PLAINEST + ', "id": 01}',
    "a lonely minus": PLAINEST + ', "id": -}',
    "tools that are none": PLAINEST + ', "tools": [1]}',
    "a field that nothing reads": PLAINEST + ', "rationale": "r"}',
    "a field of a message that nothing reads": PLAINEST.replace('"content": "b"', '"content": "b", "audio": {"id": 1}') + "}",
    "NaN": PLAINEST + ', "score": NaN}',
    "a system column that is no text": PLAINEST + ', "system": ["s"]}',
    "two system columns": PLAINEST + ', "system": "s", "system_prompt": "s"}',
    "a flag that is none": PLAINEST.replace('"content": "b"', '"content": "b", "train": 2') + "}",
    "flags in a list": PLAINEST + ', "loss": [0, 1]}',
    "a content of null": PLAINEST.replace('"b"', "null") + "}",
    "calls with nulls": PLAINEST.replace('"b"', 'null, "tool_calls": [{"function": {"name": "f", "arguments": {"a": null}}}]') + "}",
    "a call that is none": PLAINEST.replace('"b"', 'null, "tool_calls": [{"function": {"name": "f", "arguments": "["}}]') + "}",
    "another layout beside messages": PLAINEST + ', "prompt": "p"}',
    "two speakers": PLAINEST.replace('"role": "user"', '"role": "user", "from": "human"') + "}",
    "a content that is no text": PLAINEST.replace('"b"', "1") + "}",
    "an unknown role": PLAINEST.replace('"user"', '"User"') + "}",
    "nothing to train": '{"messages": [{"role": "user", "content": "a"}]}',
    "special-token text": PLAINEST.replace('"a"', '"<|im_end|>"') + "}",
    "more messages than are plain": json.dumps({"messages": turns(("user", "a"), ("assistant", "b")) * MAX_MESSAGES}),
    "a harmless object": PLAINEST + ', "meta": {"a": [1e3, -0.5]}}',
    "a harmless field with a long text": PLAINEST + f', "source": "{"s" * 300}"' + "}",
    "a harmless object in a message": PLAINEST.replace('"content": "b"', '"content": "b", "metadata": {"attachments": [{"text": "t"}]}') + "}",
    "a call with arguments beside its function": PLAINEST.replace('"b"', 'null, "tool_calls": [{"arguments": {"a": 1}, "function": {"name": "f", "arguments": {"b": 1}}}]') + "}",
    "a call with another name than its function": PLAINEST.replace('"b"', 'null, "tool_calls": [{"name": "g", "function": {"name": "f", "arguments": {"b": 1}}}]') + "}",
    "messages as JSON text": json.dumps({"prompt": "a", "completion": json.dumps(turns(("assistant", "b")))}),
    "thoughts twice": PLAINEST.replace('"content": "b"', '"reasoning": "r", "content": "\\n<think>r</think>b"') + "}",
    "messages that begin with an id as JSON text": json.dumps({"prompt": '\ufeff [{"id": 1, "role": "user", "content": "a"}]', "completion": "b"}),
    "JSON text of JSON texts": json.dumps({"prompt": json.dumps(['{"role": "user", "content": "a"}']), "completion": "b"}),
    "a message as Python text": json.dumps({"prompt": "{'role': 'user', 'content': 'a'}", "completion": "b"}),
    "thoughts that the content closes": PLAINEST.replace('"content": "b"', '"reasoning": "r", "content": "r</think>b"') + "}",
    "an open string": PLAINEST + ', "id": "',
    "an open object": PLAINEST,
}  # fmt: skip


@pytest.mark.parametrize("line", ODD.values(), ids=ODD.keys())
def test_an_odd_line_is_left_to_python_and_takes_no_neighbour_with_it(olmo: Encoder, line: str) -> None:
    compiled, python, count = lines_both_ways(olmo, f"{PLAINEST}}}\n{line}\n{PLAINEST}}}\n".encode())
    assert compiled == python
    assert count == 2


@pytest.mark.parametrize(
    "line",
    [
        PLAINEST + "}",
        " " + PLAINEST.replace(":", "\t:\t").replace(",", " , ") + " } \r",
        PLAINEST.replace('"a"', '"\\u00e9\\ud83e\\udd8a\\n\\t\\r\\b\\f\\/\\\\\\" \\u0000 \\uFFFF"') + "}",
        PLAINEST.replace('"a"', '"é🦊日本語 and more than eight bytes"') + "}",
        PLAINEST + ', "id": -12, "score": 0.5, "flagged": true, "nothing": null, "lang": "\\"}", "tools": [], "system": null, "x": {"y": [], "z": ""}}',
        PLAINEST + ', "id": 12345678901234567890123}',
        PLAINEST.replace('"content": "b"', '"content": "b", "function_calls": "f()", "tool_call_id": "n", "tool_calls": null') + "}",
        PLAINEST.replace('"content": "a"', '"functions": "[]", "content": "a"') + "}",
        PLAINEST + ', "tools": [{"name": "f"}], "system": "é"}',
        PLAINEST.replace('"content": "b"', '"content": "b", "train": true, "reasoning": "r"') + "}",
        PLAINEST.replace('"b"', 'null, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}}]') + "}",
        CALL_AND_RESULT,
        CALL_AND_RESULT.replace('"role": "environment", "name": "f"', '"name": "f", "role": "environment"'),
        '{"system_prompt": "s", "prompt": "p", "completion": ""}',
        json.dumps({"prompt": '[{"id": 1}]', "completion": ' {"kind": "r</think>b"}'}),
        json.dumps({"messages": turns(("user", "a"), ("assistant", "r</think>b"))}),
        '{"instruction": "i", "context": "c", "response": "o", "category": "qa"}',
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}], "functions": [{"name": "f"}]}',
    ],
)  # fmt: skip
def test_a_plain_line_is_read_by_compiled_code(olmo: Encoder, line: str) -> None:
    compiled, python, count = lines_both_ways(olmo, (line + "\n").encode())
    assert compiled == python
    assert count == 1


@pytest.mark.parametrize(
    ("content", "is_empty"),
    [
        *(
            (text, True)
            for text in ("", " \n\x1f", "\u00a0", "\u200b\u3000", "\ufeff ", "<think>\n\n</think>\n\u2009\n")
        ),
        *(
            (text, False)
            for text in (".", "\u00a1", "\u2010", "<think>x</think>", "<think>", "<think></think>x", "[1]")
        ),
        ('[{"type": "PER", "text": "Bob"}]', False),
    ],
)
def test_compiled_code_and_python_agree_on_what_is_an_empty_answer(olmo: Encoder, content: str, is_empty: bool) -> None:
    row = {"messages": turns(("user", "a"), ("assistant", content))}
    block = LineBlock.of(json.dumps(row).encode() + b"\n")
    some, _ = olmo.encode_plain(block, SOURCE)
    encoded = olmo.encode([row], SOURCE)
    assert encoded.proof["empty_answers"] == is_empty
    assert some is None or some.proof["empty_answers"] == is_empty
    assert lines_both_ways(olmo, block.lines)[0] == lines_both_ways(olmo, block.lines)[1]


def test_a_block_that_is_not_utf8_is_left_to_python(olmo: Encoder) -> None:
    compiled, python, count = lines_both_ways(olmo, f"{PLAINEST}}}\n".encode() + b'{"messages": "\xff"}\n')
    assert compiled == python
    assert count == 0


@pytest.mark.parametrize(
    "options", [{"train_turns": "last"}, {"train_roles": ("user", "assistant")}, {"special_text": "token"}, {"special_text": "reject"}]
)  # fmt: skip
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(lines(), min_size=1, max_size=3))
def test_both_ways_make_the_same_by_the_recipes_rules(folder: Path, options: Any, rows: list[bytes]) -> None:
    made = (
        KEPT.setdefault(repr(options), encoder(folder, "olmo_thinker", **options))
        if repr(options) not in KEPT
        else KEPT[repr(options)]
    )
    compiled, python, _ = lines_both_ways(made, b"".join(rows))
    assert compiled == python


KEPT: dict[str, Encoder] = {}


def test_columns_may_have_other_names_and_rules_may_leave_no_plain_rows(folder: Path, olmo: Encoder) -> None:
    line = (PLAINEST.replace("messages", "turns") + "}\n").encode()
    renamed = Source(path="x", columns={"messages": "turns"})
    compiled, python, count = lines_both_ways(olmo, line, renamed)
    assert compiled == python and count == 1
    for options in ({"system": "Be kind."}, {"thinking": "strip"}, {"encoder": "tokenizers"}):
        assert encoder(folder, **options).encode_plain(LineBlock.of(line), renamed) == (None, [0])
    for name in set(TEMPLATES) - set(COMPILED):
        assert encoder(folder, name).encode_plain(LineBlock.of(line), renamed) == (None, [0])


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"prompt": "q", "completion": "a"}, {"q": "Hi", "a": "Hello"}),
        ({"instruction": "q", "output": "a"}, {"q": "Hi", "a": "Hello"}),
        ({"conversations": "c"}, {"c": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
    ],
    ids=["pair", "instruction", "sharegpt"],
)
def test_named_columns_of_any_layout_are_read(olmo: Encoder, columns: dict[str, str], row: dict[str, Any]) -> None:
    compiled, python, _ = lines_both_ways(
        olmo, (json.dumps(row) + "\n").encode() * 2, Source(path="x", columns=columns)
    )
    assert compiled == python and len(olmo.encode([row], Source(path="x", columns=columns)).lengths) == 1


def test_what_is_compiled_beforehand_is_all_that_is_needed(folder: Path) -> None:
    made = encoder(folder)
    made.compile()
    functions: list[Any] = [read_rows, write_documents, align.align_tokens]
    known = [len(function.signatures) for function in functions]
    rng = random.Random(0)
    rows = [turns(("user", "é" * rng.randint(0, 99)), ("assistant", "b" * rng.randint(0, 99))) for _ in range(50)]
    lines_both_ways(made, b"".join(json.dumps({"messages": row}).encode() + b"\n" for row in rows))
    assert [len(function.signatures) for function in functions] == known


def test_code_is_compiled_where_nothing_can_be_kept() -> None:
    made: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x", made)  # of no file, so there is no folder to keep it beside
    assert compiled(made["twice"])(21) == 42


def test_these_templates_are_rendered_by_compiled_code() -> None:
    olmo = {name for name in TEMPLATES if name.startswith("olmo") and not name.endswith("intermediate_thinking")}
    assert len(olmo) == 4 and olmo | {"chatml", "tulu", "tulu_thinker", "zephyr"} <= set(COMPILED)


@pytest.mark.parametrize("name", COMPILED)
def test_the_shortest_messages_fit_into_the_room_that_is_made(encoders: Any, name: str) -> None:
    made = encoders(name)
    fields = [{"role": "user", "functions": ""}, {"role": "assistant", "function_calls": ""}]
    for pair in (fields, [{"role": m["role"]} for m in fields], [{"role": "system"}, {"role": "assistant"}]):
        row = {"messages": [{**message, "content": ""} for message in pair] * 500}
        lines = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        block = LineBlock.of(lines * 3)
        room = plain.PlainRows.of(made.template, made.reader(SOURCE))
        assert room is not None
        text, _ = room.read(block)
        assert len(text.data) + WORD <= len(room.memory.text) and len(text.run_ends) <= len(room.memory.run_ends)
        compiled_way, python, _ = lines_both_ways(made, lines)
        assert compiled_way == python
