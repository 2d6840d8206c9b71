"""Values of JSON, copied by compiled code, are those that Python's json writes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chat_samples import any_text
from sft.data.compiled import WORD
from sft.data.fast.json_copy import MOST_NAMES, copy_value
from sft.data.fast.json_text import MAX_DEPTH, Buffer
from sft.data.fast.messages import NONE

pytestmark = pytest.mark.compile
NAMES = np.empty((MAX_DEPTH + 1, MOST_NAMES + 1, 2), dtype=np.int64)


def copied(text: str, takes_null: bool = True, as_pairs: bool = False) -> str | None:
    """What compiled code writes, or None where it leaves the value to Python."""
    raw = text.encode()
    source = Buffer.of(np.frombuffer(bytearray(raw + b"\0" + bytes(WORD)), dtype=np.uint8))
    target = Buffer.of(np.zeros(6 * len(raw) + 2 * WORD, dtype=np.uint8))
    at, to = copy_value(source, 0, target, 0, NAMES, takes_null, as_pairs)
    return None if at == NONE or at != len(raw) else target.bytes[:to].tobytes().decode()


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**18), 10**18), st.floats(allow_nan=False, allow_infinity=False), any_text
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(any_text, inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(value=values, ascii=st.booleans(), separators=st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " :\t")]))
def test_a_copy_is_what_json_writes(value: Any, ascii: bool, separators: tuple[str, str]) -> None:
    made = copied(json.dumps(value, ensure_ascii=ascii, separators=separators))
    assert made is None or made == json.dumps(value, ensure_ascii=False)


@settings(max_examples=150, deadline=None)
@given(text=st.text('{}[]",:\\u0019.-eE ntrue', max_size=12))
@example("1.50")
@example("-0")
@example("0.0001")
@example('{"a": 1, "\\u0061": 2}')
@example("01")
@example("123456789012345.5")
def test_what_is_no_json_is_not_copied(text: str) -> None:
    made = copied(text)
    if made is not None:
        assert made == json.dumps(json.loads(text), ensure_ascii=False)


@pytest.mark.parametrize(
    "value",
    [
        {"query": "a b", "limit": 5, "x": [1.5, -2, True, None, {}, []], "é": {"nested": {"deep": "\n\t\"\\\u0001/"}}},
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["a"], "minimum": 0.25}}}],
        {},
        [],
        "text",
        0,
        123456789012345,
    ],
    ids=["arguments", "tools", "object", "list", "text", "zero", "integer"],
)  # fmt: skip
def test_what_datasets_hold_is_copied(value: Any) -> None:
    for text in (
        json.dumps(value),
        json.dumps(value, ensure_ascii=False, indent=1),
        json.dumps(value, separators=(",", ":")),
    ):
        assert copied(text) == json.dumps(value, ensure_ascii=False)


def test_names_that_are_twice_and_nulls_are_left_to_python() -> None:
    for text in (
        '{"a": 1, "a": 1}',
        '{"b": {"a": 1, "c": {}, "a": 1}}',
        json.dumps({str(i): i for i in range(MOST_NAMES + 1)}),
    ):
        assert copied(text) is None
    assert copied('[{"a": 1}, {"a": 2}, {"b": {"a": 3}, "a": 4}]') is not None
    assert copied('{"a": null}', takes_null=False) is None


def test_arguments_are_written_as_pairs() -> None:
    assert copied('{"a":1,"b":{"a":"x"}, "c" : [2,3]}', as_pairs=True) == 'a=1, b={"a": "x"}, c=[2, 3]'
    assert copied("{}", as_pairs=True) == ""
    assert copied('{"a":1,"a":2}', as_pairs=True) is None
    assert copied('{"\\u0061":1, "\\n":2}', as_pairs=True) == "a=1, \n=2"
    assert copied('{"a":1,"\\u0061":2}', as_pairs=True) is None
