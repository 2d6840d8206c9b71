"""Rows in all layouts, as one of the many ways to write them down as a line of JSON: `lines`."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from chat_samples import any_text, conversations

NAMES = [
    "id",
    "source",
    "tools",
    "system",
    "system_prompt",
    "prompt",
    "completion",
    "input",
    "näme",
    "weight",
    "loss",
    "chat_template_kwargs",
]
extra = st.dictionaries(
    st.sampled_from(NAMES),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), any_text, st.just([1]), st.just({"a": "}"}), st.just([{"name": "f"}]),
        st.just({"a": {"b": []}, "c": ""}),
    ),
    max_size=2,
)  # fmt: skip
ARGUMENTS = [{}, {"x": 1.5, "y": ["é", None]}, {"a": None}, '{"q": "a\\n\\"b", "z": null}', "{}", "", "{", 3]
calls = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": st.sampled_from(["f", "g", ""]), "arguments": st.sampled_from(ARGUMENTS)})},
        optional={"id": st.sampled_from(["c", "", 1]), "type": st.sampled_from(["function", "", "custom"]), "index": st.just(1), "x": st.just(1)},
    ),
    max_size=2,
)  # fmt: skip
fields = st.dictionaries(
    st.sampled_from(
        [
            "functions", "function_calls", "tool_calls", "thinking", "reasoning", "train", "weight", "masked", "name", "value", "from", "content",
            "id", "refusal", "x",
        ]
    ),
    st.one_of(st.none(), any_text, st.sampled_from([0, 1, 2.5, True, []]), calls),
    max_size=2,
)  # fmt: skip


def sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    """A message as ShareGPT files have it."""
    speakers = {"user": "human", "assistant": "gpt", "tool": "observation"}
    renamed = {"role": "from", "content": "value"}
    return {renamed.get(k, k): speakers.get(v, v) if k == "role" else v for k, v in message.items()}


@st.composite
def lines(draw: Any) -> bytes:
    """A row as one of the many ways to write it down."""
    row = draw(conversations(text=any_text, roles=True, tools=True))
    layout = draw(st.sampled_from(["messages"] * 6 + ["conversations", "pair", "instruction"]))
    if draw(st.booleans()):
        row["messages"] = [message | draw(fields) for message in row["messages"]]
    if draw(st.booleans()):
        row["messages"] = [
            m | {"content": None} if "tool_calls" in m or "function_calls" in m else m for m in row["messages"]
        ]
    if layout == "conversations":
        row["conversations"] = list(map(sharegpt, row.pop("messages")))
    elif layout != "messages":
        names = (
            [("prompt", "completion"), ("prompt", "response")]
            if layout == "pair"
            else [("instruction", "output", "input", "system")]
        )
        del row["messages"]
        row |= {name: draw(any_text) for name in draw(st.sampled_from(names))}
    row |= draw(extra)
    keys = draw(st.permutations(sorted(row)))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " :  ")]))
    text = json.dumps({key: row[key] for key in keys}, ensure_ascii=draw(st.booleans()), separators=separators)
    return (draw(st.sampled_from(["", " ", "\t"])) + text + draw(st.sampled_from(["", " ", "\r"]))).encode() + b"\n"
