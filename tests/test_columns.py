"""Plain rows of Parquet and Arrow, read by compiled code from their columns, make what Python objects make of them."""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import COMPILED, SOURCE, any_text, both_ways, encoder, make_tokenizer, turns
from jinja_samples import THINKER
from sft.data import align
from sft.data.fast.columns import find_roles, read_columns
from sft.data.fast.json_rows import FieldNames
from sft.data.fast.messages import LIST, SourceNames
from sft.data.fast.turns import write_documents
from sft.data.tokenize import Encoder
from sft.recipe.schema import Source
from sft.sources import input_files
from sft.sources.blocks import ColumnBlock, read_blocks

pytestmark = pytest.mark.compile

ROLES = ["user", "assistant", "system", "environment", "tool", "nobody", ""]
TYPES = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("columns") / "tokenizer")


@pytest.fixture(scope="module")
def encoders(folder: Path) -> Any:
    made: dict[str, Encoder] = {}
    return lambda name: made.setdefault(name, encoder(folder, name)) if name not in made else made[name]


FUNCTION = pa.struct([("name", pa.string()), ("arguments", pa.string())])
CALL = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", FUNCTION), ("index", pa.int64())])
calls = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from(["c", "", None]),
            "type": st.sampled_from(["function", None]),
            "function": st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["f", "g"]),
                    "arguments": st.sampled_from(['{"a": "é", "b": null}', "{}", "", "{", None]),
                }
            ),
            "index": st.sampled_from([None, None, 1]),
        }
    ),
    max_size=2,
)
tools = st.one_of(st.none(), st.none(), any_text, st.just('[{"name": "f"}]'))
TEXT_COLUMNS = ["system", "prompt", "completion", "input", "source"]
PAIRS = [("prompt", "completion"), ("instruction", "output", "input"), ("instruction", "response", "context", "system")]


@st.composite
def batches(draw: Any) -> ColumnBlock:
    """A record batch of conversations, with nulls in any place, and perhaps a slice of a larger one."""
    text = draw(st.sampled_from(TYPES))
    maybe = st.one_of(st.none(), any_text)
    fields: dict[str, tuple[pa.DataType, Any]] = {
        "role": (draw(st.sampled_from(TYPES)), st.sampled_from([*ROLES[:2] * 4, *ROLES, None])),
        "content": (draw(st.sampled_from(TYPES)), st.one_of(any_text, any_text, any_text, st.none())),
    }
    more = {
        "functions": (text, maybe), "function_calls": (text, maybe), "name": (text, maybe), "thinking": (text, maybe),
        "train": (pa.bool_(), st.one_of(st.none(), st.booleans())), "weight": (pa.int64(), st.one_of(st.none(), st.sampled_from([0, 1]))),
        "masked": (pa.float64(), st.one_of(st.none(), st.sampled_from([0.0, 1.0, 0.5]))),
        "tool_calls": (pa.list_(CALL), st.one_of(st.none(), st.none(), calls)), "value": (pa.null(), st.none()),
    }  # fmt: skip
    for name in draw(st.lists(st.sampled_from(sorted(more)), unique=True, max_size=3)):
        fields[name] = more[name]
    if draw(st.booleans()) and draw(st.booleans()):
        fields.pop(draw(st.sampled_from(["role", "content"])))
    message = st.fixed_dictionaries({name: values for name, (_, values) in fields.items()})
    often = [message] * 6 + [st.none()]
    rows = draw(st.lists(st.one_of(*[st.lists(st.one_of(*often), max_size=4)] * 6, st.none()), min_size=1, max_size=6))
    order = draw(st.permutations(sorted(fields)))
    struct = pa.struct([(name, fields[name][0]) for name in order])
    listed = draw(st.sampled_from([pa.list_, pa.large_list]))(struct)
    columns: dict[str, pa.Array] = {"messages": pa.array(rows, type=listed)}
    if draw(st.booleans()):
        columns["tools"] = pa.array([draw(tools) for _ in rows], type=pa.string())
    for name in draw(st.lists(st.sampled_from(TEXT_COLUMNS), unique=True, max_size=4)):
        columns[name] = pa.array([draw(maybe) for _ in rows], type=text)
    if draw(st.integers(0, 3)) == 0:
        del columns["messages"]
        columns |= {name: pa.array([draw(maybe) for _ in rows], type=text) for name in draw(st.sampled_from(PAIRS))}
    if draw(st.booleans()):
        columns["id"] = pa.array(list(range(len(rows))))
    batch = pa.RecordBatch.from_pydict(columns)
    start = draw(st.integers(0, len(rows) - 1))
    return ColumnBlock(batch.slice(start, draw(st.integers(1, len(rows)))), 5)


@settings(max_examples=400, deadline=None)
@given(piece=batches())
def test_both_ways_make_the_same(encoders: Any, piece: ColumnBlock) -> None:
    compiled, python, _ = both_ways(encoders("olmo"), piece)
    assert compiled == python


@pytest.mark.parametrize("name", COMPILED)
@settings(max_examples=25, deadline=None)
@given(piece=batches())
def test_both_ways_make_the_same_under_every_template(encoders: Any, name: str, piece: ColumnBlock) -> None:
    compiled, python, _ = both_ways(encoders(name), piece)
    assert compiled == python


@pytest.mark.parametrize(
    ("value", "is_read"),
    [
        ("s" * 200, True),
        (3, True),
        ("s" * 201, False),
        ("é" * 150, False),
        ({"a": 1}, False),
        (["a"], False),
        (b"a", False),
    ],
)
def test_a_harmless_column_of_long_texts_or_objects_is_left_to_python(encoders: Any, value: Any, is_read: bool) -> None:
    rows = [{"messages": turns(("user", "a"), ("assistant", "b")), "source": value}]
    fields = [{"messages": [*turns(("user", "a")), {"role": "assistant", "content": "b", "source": value}]}]
    for batch in (rows, fields):
        compiled, python, count = both_ways(encoders("olmo"), ColumnBlock.of(batch))
        assert compiled == python and count == is_read


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"messages": turns(("user", "é" * rng.randint(0, 99)), ("assistant", "b" * rng.randint(0, 99)))}
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_the_rows_of_files_are_plain_and_keep_their_numbers(encoders: Any, tmp_path: Path, kind: str) -> None:
    rows = rows_of(500)
    rows[123]["messages"][1]["role"] = "wizard"
    table = pa.Table.from_pylist([{**row, "id": i} for i, row in enumerate(rows)])
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=70)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    (file,) = input_files.resolve(Source(path=path.name), lambda p: tmp_path / p, tmp_path / "cache").files
    numbers, odd = [], []
    for chunk in input_files.cut(file):
        for piece in read_blocks(chunk):
            made, others = encoders("olmo").encode_plain(piece, SOURCE)
            assert made is not None
            numbers += (made.rows + piece.first).tolist()
            odd += [piece.first + i for i in others]
            compiled, python, _ = both_ways(encoders("olmo"), piece)
            assert compiled == python
    assert odd == [123] and numbers == [i for i in range(500) if i != 123]


@pytest.mark.parametrize(
    "where", ["the only text", "the first half of a character here, the second there", "under a null"]
)
def test_bytes_that_are_no_unicode_are_left_to_python(encoders: Any, where: str) -> None:
    """As a broken writer makes them: pyarrow itself does not look."""
    first, second = {"the only text": (b"\xff", b"b"), "under a null": (b"a", b"b")}.get(where, (b"\xc3", b"\xa9"))
    texts = pa.array([b"u", first, second, b"d"]).view(pa.string())
    if where == "under a null":
        raw = pa.array([b"u", b"\xff", b"b", b"d"])
        valid = pa.array([True, False, True, True]).buffers()[1]
        texts = pa.Array.from_buffers(pa.string(), 4, [valid, *raw.buffers()[1:]])
    roles = pa.array(["user", "assistant"] * 2)
    struct = pa.StructArray.from_arrays([roles, texts], ["role", "content"])
    batch = pa.RecordBatch.from_pydict({"messages": pa.ListArray.from_arrays([0, 2, 4], struct)})
    piece = ColumnBlock(batch, 0)
    compiled, python, plain = both_ways(encoders("olmo"), piece)
    assert compiled == python and plain == 0


def test_what_is_compiled_beforehand_is_all_that_is_needed(folder: Path) -> None:
    made = encoder(folder)
    made.compile(["parquet"])
    functions: list[Any] = [find_roles, write_documents, align.align_tokens]
    known = [len(function.signatures) for function in functions]
    rows = rows_of(60)
    for row in rows[:20]:
        row["messages"][0]["functions"] = "[]"
    for some in (rows, rows[20:], [{"messages": turns(("user", ""), ("assistant", ""))}] * 3):
        both_ways(made, ColumnBlock.of(some))
    for text in TYPES:
        struct = pa.struct([("content", text), ("role", text)])
        array = pa.array([row["messages"] for row in rows], type=pa.large_list(struct))
        both_ways(made, ColumnBlock(pa.RecordBatch.from_pydict({"messages": array}), 0))
    assert [len(function.signatures) for function in functions] == known


def test_renamed_columns_and_those_that_must_be_empty(encoders: Any) -> None:
    rows = [{"turns": row["messages"], "tools": None if i % 2 else "[]"} for i, row in enumerate(rows_of(6))]
    renamed = Source(path="x", columns={"messages": "turns"})
    piece = ColumnBlock(pa.RecordBatch.from_pylist(rows), 0)
    assert both_ways(encoders("olmo"), piece, renamed)[2] == 6
    assert (
        encoders("olmo").encode_plain(piece, SOURCE) == (None, list(range(6)))
        or both_ways(encoders("olmo"), piece)[2] == 0
    )


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["text"]),
        pa.array([["a", "b"]]),
        pa.array([[{"role": "user", "content": 3}]]),
        pa.array([[{"role": 1, "content": "x"}]]),
        pa.array([{"role": "user"}]),
        pa.array([None]),
    ],
)
def test_columns_of_other_types_are_no_messages(encoders: Any, array: pa.Array) -> None:
    batch = pa.RecordBatch.from_arrays([array], ["messages"])
    names = SourceNames({"messages": LIST}, {}, {})
    found = read_columns(batch, names, FieldNames.of(names))
    assert found is None or not found.messages.is_plain.any()
    compiled, python, plain = both_ways(encoders("olmo"), ColumnBlock(batch, 0))
    assert compiled == python and plain == 0


def test_a_column_that_is_there_twice_is_left_to_python() -> None:
    array = pa.array([[{"role": "user", "content": "x"}]])
    names = SourceNames({"messages": LIST}, {}, {})
    assert (
        read_columns(pa.RecordBatch.from_arrays([array, array], ["messages"] * 2), names, FieldNames.of(names)) is None
    )


def test_rows_are_taken_from_columns_of_any_type() -> None:
    batch = pa.RecordBatch.from_arrays(
        [pa.array(["q", "r", "s"], pa.string_view()), pa.array([1, 2, 3])], names=["prompt", "id"]
    )
    assert ColumnBlock(batch, 5).batch([2, 0]).rows == [{"prompt": "s", "id": 3}, {"prompt": "q", "id": 1}]


CALLING = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
PLAIN: dict[str, list[dict[str, Any]]] = {
    "calls and tools": [
        {
            "messages": [
                *turns(("system", "s"), ("user", "a")),
                {"role": "assistant", "content": None, "tool_calls": [CALLING]},
                *turns(("tool", "r"), ("assistant", "b")),
            ],
            "tools": '[{"name": "f"}]',
        }
    ],
    "flags": [{"messages": [*turns(("user", "a")), {"role": "assistant", "content": "b", "weight": 1}]}],
    "prompt and completion": [{"prompt": "p", "completion": "c", "system": "s"}],
    "an instruction": [{"instruction": "i", "input": "x", "output": "o"}],
    "ShareGPT": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
}


@pytest.mark.parametrize("rows", PLAIN.values(), ids=PLAIN.keys())
def test_these_columns_need_no_python_objects(encoders: Any, rows: list[dict[str, Any]]) -> None:
    compiled, python, count = both_ways(encoders("olmo"), ColumnBlock.of(rows * 2))
    assert compiled == python and count == 2


def with_calls(*calls: dict[str, Any], **columns: Any) -> dict[str, Any]:
    asked = [{"role": "assistant", "content": None, "tool_calls": [*calls]}, *turns(("tool", "1"), ("assistant", "b"))]
    return {"messages": [*turns(("user", "q")), *asked], **columns}


def a_call(arguments: Any, **fields: Any) -> dict[str, Any]:
    return {"function": {"name": "f", "arguments": arguments}, **fields}


def with_ids() -> dict[str, Any]:
    """Two calls and their results, with ids: their order is checked."""
    row = with_calls(a_call("{}", id="a"), a_call("{}", id="b"))
    row["messages"][2:3] = [{"role": "tool", "content": "1", "tool_call_id": number} for number in "ab"]
    return row


OFFERED = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"q": {"type": "string"}}}}}
OTHER = {"type": "function", "function": {"name": "g", "parameters": {"properties": {"n": {"type": "integer"}}}}}
CALLS_OF_COLUMNS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "nulls that Arrow adds": ([with_calls(a_call("{}", id="a")), with_calls(a_call('{"x": null}', type="function"))], 2),
    "nulls that Arrow adds beside ids": ([with_ids(), with_calls(a_call("{}", type="function"))], 2),
    "arguments as objects": ([with_calls(a_call({"x": 1, "y": "a\"b"})), with_calls(a_call({"x": 2, "y": "\u0007"}))], 2),
    "null in arguments": ([with_calls(a_call({"x": 1, "y": None})), with_calls(a_call({"x": 1, "y": "b"}))], 1),
    "NaN in arguments": ([with_calls(a_call({"x": float("nan")})), with_calls(a_call({"x": 0.5}))], 1),
    "dates in arguments": ([with_calls(a_call({"x": datetime.date(2026, 1, 1)}))], 0),
    "a name twice in arguments": ([with_calls(a_call('{"x": 1, "x": 2}')), with_calls(a_call('{"x": 1}'))], 1),
    "tools with nulls that Arrow adds": ([with_calls(a_call("{}"), tools=[OFFERED]), with_calls(a_call("{}"), tools=[OTHER])], 2),
    "tools as text": ([with_calls(a_call("{}"), tools=json.dumps([OFFERED])), with_calls(a_call("{}"), tools="")], 2),
    "tools as texts": ([with_calls(a_call("{}"), tools=[json.dumps(OFFERED)])], 1),
    "functions": ([with_calls(a_call("{}"), functions=json.dumps([OFFERED["function"]]))], 1),
    "tools that are no JSON": ([with_calls(a_call("{}"), tools="[")], 0),
}  # fmt: skip


@pytest.mark.parametrize("template", ["olmo", "thinker.jinja"])
@pytest.mark.parametrize("kind", CALLS_OF_COLUMNS)
def test_calls_and_tools_of_columns_are_those_that_python_reads(tmp_path: Path, kind: str, template: str) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    (file := tmp_path / "thinker.jinja").write_text(THINKER)
    rows, plain = CALLS_OF_COLUMNS[kind]
    made = encoder(tmp_path / "tokenizer", template, lambda _: file)
    for _ in range(2):
        compiled, python, count = both_ways(made, ColumnBlock.of(rows * 4))  # a form is learnt from several rows
        assert compiled == python and count == 4 * plain


def test_calls_as_text_in_a_column_are_read_or_left_to_python(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    made = encoder(tmp_path / "tokenizer", "olmo", lambda name: Path(name))
    twice = json.dumps([a_call("{}", id="a")]).replace('"id"', '"id": "b", "id"')
    long = json.dumps([a_call({"x": 10**20 + 1})])  # a JSON reader may make a float of it
    for text, plain in (
        (json.dumps([a_call("{}")]), 1), (twice, 0), (long, 0), (" [ ] ", 0), ('[{"id": "c', 0), ("{}", 0), ("null", 0),
    ):  # fmt: skip
        row = with_calls()
        row["messages"][1]["tool_calls"] = text
        compiled, python, count = both_ways(made, ColumnBlock.of([row]))
        assert compiled == python and count == plain, text


def test_calls_that_are_not_utf8_are_left_to_python(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    made = encoder(tmp_path / "tokenizer", "olmo", lambda name: Path(name))
    rows = pa.Table.from_pylist([with_calls(a_call('{"x": "@@"}')), with_calls(a_call("{}"))]).to_batches()[0]
    broken = pa.ipc.read_record_batch(
        pa.py_buffer(rows.serialize().to_pybytes().replace(b"@@", b"\xff\xff")), rows.schema
    )
    compiled, python, count = both_ways(made, ColumnBlock(broken, 0))
    assert compiled == python and count == 0
    assert [reject.reason for reject in ColumnBlock(broken, 0).batch().rejects] == ["unreadable_value"]
