"""Strings, values and lines of JSON read in compiled code: what Python's json reads, or nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sft.chat.values import is_empty
from sft.data.compiled import WORD, compiled
from sft.data.fast import json_text
from sft.data.fast.json_rows import FieldNames, read_rows
from sft.data.fast.json_text import Buffer
from sft.data.fast.messages import (
    CALLS,
    CONTENT,
    FUNCTIONS,
    LIST,
    MAX_MESSAGES,
    NONE,
    PASSED,
    ROLE_NAMES,
    TOOLS,
    Messages,
    Names,
    SourceNames,
)

pytestmark = pytest.mark.compile

READ_STRING, SKIP_VALUE, FIND_NAME = (json_text.read_string, json_text.skip_value, json_text.find_name)


def buffer(data: bytes) -> Buffer:
    return Buffer.of(np.frombuffer(bytearray(data + b"\n") + bytes(2 * WORD), dtype=np.uint8))


@compiled
def read_string(source: Any, target: Any) -> Any:
    return READ_STRING(source, 1, target, 0)


@compiled
def skip_value(source: Any, target: Any) -> Any:
    return SKIP_VALUE(source, 0, target, 0)


@compiled
def find_name(data: Any, end: int, names: Any) -> int:
    return FIND_NAME(data, 0, end, names)


def string(written: bytes) -> bytes | None:
    """What is read of a JSON string with its quotes."""
    source, target = buffer(written), buffer(bytes(len(written)))
    end, size = read_string(source, target)
    assert end in (NONE, len(written))
    return None if end == NONE else target.bytes[:size].tobytes()


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40), ascii_only=st.booleans())
@example(text='\x00\x1f\x7f"\\/\b\f\n\r\t\u07ff\u0800\uffff\U00010000\U0010ffff', ascii_only=True)
def test_a_string_is_read_as_python_reads_it(text: str, ascii_only: bool) -> None:
    assert string(json.dumps(text, ensure_ascii=ascii_only).encode()) == text.encode()


@pytest.mark.parametrize(
    "written",
    [
        rb'"\ud83e"',  # half of a surrogate pair, and the other half
        rb'"\udd8a"',
        rb'"\ud83e\u0041"',
        rb'"\ud83ex"',
        rb'"\x41"',
        rb'"\u12g4"',
        b'"\x01"',
        b'"open',
    ],
)
def test_a_string_that_is_no_json_or_no_unicode_is_not_read(written: bytes) -> None:
    assert string(written) is None


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)  # fmt: skip


def skipped(written: str) -> tuple[int, bool]:
    """Where a value ends in its text and " ,", and whether it holds something."""
    end, held = skip_value(buffer((written + " ,").encode()), buffer(bytes(len(written) + 64)))
    return int(end), bool(held)


@settings(max_examples=300, deadline=None)
@given(value=values, indent=st.sampled_from([None, 1]))
@example(value={"": [], "a": {"b": {}, "c": [[]]}}, indent=None)
def test_any_value_is_skipped_and_one_that_holds_something_is_noticed(value: Any, indent: int | None) -> None:
    written = json.dumps(value, indent=indent).replace("\n", "\t")
    assert skipped(written) == (len(written.encode()), not is_empty(value))


@settings(max_examples=400, deadline=None)
@given(value=values, data=st.data())
def test_a_damaged_value_is_skipped_only_if_python_reads_it(value: Any, data: Any) -> None:
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    text = (
        text[:at]
        + data.draw(st.sampled_from(["", "{", "}", "[", "]", ",", ":", '"', "0", "-", ".", "e", "x"]))
        + text[at + data.draw(st.integers(0, 2)) :]
    )
    end, _ = skipped(text)
    if end != NONE:
        json.loads(text.encode()[:end])


@pytest.mark.parametrize(
    "written", ["01", "-", "1.", ".5", "1e", "1e+", "[", "{", "nul", "True", "x", "", "NaN", "[1,]", '{"a":1,}', '{,"a":1}', '{"a"}', "[,1]", "[}", '{"a":1]', "[" * 61 + "]" * 61]
)  # fmt: skip
def test_a_value_that_is_no_json_is_not_skipped(written: str) -> None:
    assert skipped(written)[0] == NONE


def test_a_name_is_found_when_all_of_it_agrees() -> None:
    names = Names.of(["role", "content", "", "rol"])
    for index, name in enumerate(("role", "content", "", "rol")):
        assert find_name(buffer(name.encode()).bytes, len(name), names) == index
    for name in ("roles", "ro", "Role", "contenT"):
        assert find_name(buffer(name.encode()).bytes, len(name), names) == NONE


def rows(*lines: str) -> list[list[tuple[str, str | None, str | None, str | None]] | None]:
    """The role and the texts of each message of each line; None for a row that is not plain."""
    data = "".join(line + "\n" for line in lines).encode()
    source, target = buffer(data), buffer(bytes(len(data)))
    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 10)
    messages = Messages.empty(len(ends), MAX_MESSAGES + 2, target.words)
    names = SourceNames({"messages": LIST, "tools": TOOLS}, {"id": PASSED}, {"score": PASSED})
    read_rows(source, ends, FieldNames.of(names), target, messages)

    def text(message: int, field: int) -> str | None:
        start, end = messages.spans[message, field]
        return None if start == NONE else target.bytes[start:end].tobytes().decode()

    found: list[Any] = []
    for row, is_plain in enumerate(messages.is_plain.tolist()):
        mine = range(messages.first[row], messages.first[row + 1])
        assert is_plain or not mine
        fields = (CONTENT, FUNCTIONS, CALLS)
        read = [(ROLE_NAMES[messages.roles[m]], *(text(m, field) for field in fields)) for m in mine]
        found.append(read if is_plain else None)
    return found


def test_rows_keep_their_own_messages_whatever_is_between_them() -> None:
    plain = '{"messages": [{"role": "user", "content": "a\\n"}, {"content": "b", "role": "assistant", "function_calls": "f()"}]}'
    last = '{"id": 7, "messages": [{"role": "system", "functions": "[]", "content": "é"}], "tools": null}'
    broken = (
        plain.replace("}]}", "}]"),
        plain.replace("user", "wizard"),
        "",
        "[]",
        plain.replace("]}", '], "tools": 1.}'),
    )
    users = [("user", "a\n", None, None), ("assistant", "b", None, "f()")]
    assert rows(plain, *broken, last, plain) == [users, *[None] * len(broken), [("system", "é", "[]", None)], users]
