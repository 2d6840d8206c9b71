"""Values and damages that make fuzz builds its inputs of."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

HANG_S = 60
Strategy = st.SearchStrategy[Any]

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
VALUES: Strategy = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3), max_leaves=6
)
HOSTILE = [
    "", " ", "..", "../x", "/etc/passwd", "~/x", "a b", "a'b", 'a"b', "a\\b", "a\nb", "$(touch CANARY)", "`touch CANARY`", ";touch CANARY",
    "|touch CANARY", "&touch CANARY", ">CANARY", "$$x", "$x", "%s", "{}", "*", "?", "-", "--help", "-rf", "é", "\u202e", "x" * 300, "runs/x/../y",
    "hf://", "gs://", "gs:///x", "s3://b/x", "hf://org/name@", "1e400", "nan", "0", "-1", "true", "#", "=", "a=b", ",", "@x", "x:y", "x//y",
]  # fmt: skip
"""Texts that other programs read otherwise: paths, words of shells, Make and options."""
TEXTS = st.sampled_from(HOSTILE) | st.text(max_size=12)
TOML_VALUES = (
    st.sampled_from(
        [
            "0", "-1", "1e400", "nan", "-inf", "true", '""', "[]", "[[]]", "[1, 'a']", "{}", "{a = 1}", "{a = {b = []}}", "1979-05-27", "07:32:00",
            "1979-05-27T07:32:00Z", "9" * 40, "0xff", "1_000", '"\\u0000"', "'''\n'''", "[{path = 1}]", "[{}]", "1e-320", "-0.0",
        ]
    )
    | st.integers().map(str) | st.floats().map(str) | TEXTS.map(json.dumps)
)  # fmt: skip


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """The bytes with some of them changed, removed, added or cut off; or not damaged at all."""
    for _ in range(draw(st.integers(0, 3))):
        at, size = draw(st.integers(0, len(data))), draw(st.sampled_from([0, 1, 1, 2, 8, 1 << 30]))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + size :]
    return data


@st.composite
def edited(draw: Any, text: str, pieces: Strategy) -> str:
    """The text with pieces put in or in place of others."""
    words = re.findall(r"\w+|\s+|[^\w\s]", text)
    for _ in range(draw(st.integers(0, 4))):
        at, size = draw(st.integers(0, len(words))), draw(st.sampled_from([0, 0, 1, 3, 20]))
        words[at : at + size] = [draw(pieces)]
    return "".join(words)


@st.composite
def changed(draw: Any, value: Any) -> Any:
    """A JSON value with another value or none at some places."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, 2))):
        places = list(_places(value))
        if not places:
            return value
        owner, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 3)) == 0:
            del owner[key]
        else:
            owner[key] = draw(VALUES | TEXTS)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield value, key
        yield from _places(below)
