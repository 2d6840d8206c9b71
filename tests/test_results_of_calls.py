"""Results of calls, in compiled code and in Python alike: their order under a template that writes no ids, and their roles."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import SOURCE, both_ways, encoder, make_tokenizer, text_of, turns
from jinja_samples import TEXTS, THINKER
from sft.chat import probe
from sft.chat.calls import check_results
from sft.chat.rows import RowReader
from sft.chat.values import BadRow
from sft.data import accounting
from sft.data.tokenize import Encoder
from sft.recipe.schema import Prepare
from sft.sources.blocks import ColumnBlock, LineBlock

pytestmark = pytest.mark.compile
ONLY_TOOLS = THINKER.replace("('tool', 'environment')", "('tool',)").replace(" or not loop.first %}", " %}")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_tokenizer(tmp_path_factory.mktemp("results") / "tokenizer")

    def find(name: str) -> Path:
        texts = {**TEXTS, "only tools": ONLY_TOOLS}
        (file := folder / name).write_text(texts[name.removesuffix(".jinja")])
        return file

    @functools.cache
    def get(name: str) -> Encoder:
        return encoder(folder, name, find)

    return get


def call(name: str, number: str | None = None) -> dict[str, Any]:
    return {
        **({"id": number} if number else {}),
        "type": "function",
        "function": {"name": name, "arguments": '{"x": 1}'},
    }


def calls(*made: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(made)}


def result(number: str | None = None, name: str | None = None) -> dict[str, Any]:
    fields = {"tool_call_id": number, "name": name}
    return {"role": "tool", "content": "1", **{field: value for field, value in fields.items() if value}}


def conversation(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*turns(("user", "q")), *messages, *turns(("assistant", "a"))]}


A, B = call("f", "a"), call("f", "b")
IN_ORDER = {
    "ids": [calls(A, B), result("a"), result("b")],
    "one call": [calls(A), result("a")],
    "names": [calls(call("f"), call("g")), result(name="f"), result(name="g")],
    "neither": [calls(A, B), result(), result()],
    "the same id twice": [calls(A, A), result("a"), result("a")],
    "other ids": [calls(A, B), result("y"), result("x")],
    "calls after results": [calls(A), result("a"), calls(B), result("b")],
    "two messages of calls": [calls(A), calls(B), result("a"), result("b")],
    "a missing last one": [calls(A, B), result("a")],
}
OUT_OF_ORDER = {
    "ids": [calls(A, B), result("b"), result("a")],
    "names": [calls(call("f"), call("g")), result(name="g"), result(name="f")],
    "a missing first one": [calls(A, B), result("b")],
    "one twice": [calls(A, B), result("a"), result("a")],
    "two messages of calls": [calls(A), calls(B), result("b"), result("a")],
    "the second of two messages of calls": [calls(A), calls(B), result("b")],
    "two calls, and then another one": [calls(call("f"), call("g")), calls(call("g")), result(name="g")],
    "more results than calls": [calls(A), result("a"), result("a")],
}


@pytest.mark.parametrize("columns", [False, True], ids=["lines", "columns"])
@pytest.mark.parametrize("template", ["olmo", "thinker.jinja"])
def test_results_out_of_order_reject_the_row(encoders: Any, template: str, columns: bool) -> None:
    made = encoders(template)
    rows = [conversation(*messages) for messages in (*IN_ORDER.values(), *OUT_OF_ORDER.values())]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    block = ColumnBlock.of(rows) if columns else LineBlock.of(lines)
    for _ in range(2):
        compiled, python, _ = both_ways(made, block)
        assert compiled == python
    rejects = made.encode(rows, SOURCE).rejects
    assert [reject.row for reject in rejects] == list(range(len(IN_ORDER), len(rows)))
    assert {reject.reason for reject in rejects} == {"order_of_results"}
    assert "result of the call 'b'" in rejects[0].detail and "next: put the results" in rejects[0].detail


@pytest.mark.parametrize("columns", [False, True], ids=["lines", "columns"])
@pytest.mark.parametrize("template", ["olmo", "thinker.jinja"])
def test_calls_whose_results_are_in_order_are_read_by_compiled_code(
    encoders: Any, template: str, columns: bool
) -> None:
    doubtful = ("other ids", "two messages of calls")  # Python reads these
    rows = [conversation(*messages) for name, messages in IN_ORDER.items() if name not in doubtful]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    compiled, python, count = both_ways(encoders(template), ColumnBlock.of(rows) if columns else LineBlock.of(lines))
    assert compiled == python and count == len(rows)


some_calls = st.lists(
    st.builds(call, st.sampled_from("fg"), st.sampled_from(["a", "b", "é", None])), min_size=1, max_size=3
)
some_results = st.builds(result, st.sampled_from(["a", "b", "é", "x", None]), st.sampled_from(["f", "g", None, None]))
messages = st.one_of(
    some_calls.map(lambda made: calls(*made)), some_results, some_results, st.sampled_from(turns(("user", "u")))
)


@pytest.mark.parametrize("template", ["olmo", "thinker.jinja"])
@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.lists(messages, max_size=6), min_size=1, max_size=4), columns=st.booleans())
def test_both_ways_judge_the_same(encoders: Any, template: str, rows: list[Any], columns: bool) -> None:
    made = [conversation(*row) for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in made).encode()
    compiled, python, _ = both_ways(encoders(template), ColumnBlock.of(made) if columns else LineBlock.of(lines))
    assert compiled == python


def test_a_template_that_writes_ids_or_names_takes_any_order(encoders: Any) -> None:
    swapped = [calls(call("f", "a"), call("g", "b")), result("b", "g"), result("a", "f")]
    assert not encoders("olmo").reader(SOURCE).writes_ids
    check_results(swapped, names_are_written=True)
    with pytest.raises(BadRow):
        check_results(swapped, names_are_written=False)
    with pytest.raises(BadRow):
        check_results([calls(A, B), result("b", "f"), result("a", "f")], names_are_written=True)


@pytest.mark.parametrize("columns", [False, True], ids=["lines", "columns"])
@pytest.mark.parametrize("role", ["function", "environment", "ipython"])
def test_a_role_of_results_that_the_template_lacks_is_its_tool(encoders: Any, role: str, columns: bool) -> None:
    made = encoders("only tools.jinja")
    assert made.reader(SOURCE).renamed_roles == {
        "developer": "system", "function": "tool", "ipython": "tool", "environment": "tool"
    }  # fmt: skip
    rows = [conversation(calls(A), {**result("a"), "role": role}) for _ in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    compiled, python, _ = both_ways(made, ColumnBlock.of(rows) if columns else LineBlock.of(lines))
    assert compiled == python
    encoded = made.encode(rows, SOURCE)
    assert not encoded.rejects
    assert text_of(made, encoded) == text_of(made, made.encode([conversation(calls(A), result("a"))], SOURCE))


def test_a_role_that_the_recipe_trains_keeps_its_name() -> None:
    prepare = Prepare(tokenizer="t", sources=(SOURCE,), train_roles=("assistant", "environment"))
    reader = RowReader(prepare, SOURCE, renamed_roles={"environment": "tool", "function": "tool"})
    assert reader.renamed_roles == {"function": "tool"}


def test_a_name_that_the_template_does_not_write_is_not_counted_as_read(encoders: Any) -> None:
    made = encoders("only tools.jinja")
    assert not made.template.written_names()
    rows = [conversation(calls(A), result("a", "f")) for _ in range(2)]
    made.take_counts(SOURCE)
    assert not made.encode(rows, SOURCE).rejects
    fields = accounting.describe(SOURCE, made.take_counts(SOURCE), made.template.written_names())
    assert {"messages.name", "messages.tool_call_id"} <= fields.harmless.keys()


def test_no_made_up_text_of_the_probe_is_a_part_of_another() -> None:
    texts = [value for value in vars(probe).values() if isinstance(value, str) and value.startswith("qjzx")]
    assert len(texts) > 4
    assert not [(a, b) for a in texts for b in texts if a is not b and a in b]
