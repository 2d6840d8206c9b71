"""Conversations in the layouts that public datasets have, for bench_prepare: as rows of a file, and as the ancestor takes them.

In: GSM8K and its words. Out: `LAYOUTS`, by name a function that returns `Layout`: rows for `ours`, and the same conversations as OpenAI
messages with their tools. `JINJA` is a template with thinking and tools, as the chat templates of today's models are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

JINJA = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(open=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.open and message.role == 'user' %}
        {%- set ns.open = false %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thinking = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if not thinking and '</think>' in content %}
            {%- set thinking = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if thinking and loop.index0 > ns.last %}
            {{- '<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
Row = dict[str, Any]


class Layout(NamedTuple):
    """Rows, and the same conversations as messages with tools."""

    rows: list[Row]
    conversations: list[Row]
    suffix: str = "jsonl"


def plain(pairs: Sequence[tuple[str, str]], rng: random.Random, words: Sequence[str]) -> Layout:
    """A question and an answer."""
    rows = [{"messages": [message("user", q), message("assistant", a)]} for q, a in pairs]
    return Layout(rows, rows)


def sharegpt(pairs: Sequence[tuple[str, str]], rng: random.Random, words: Sequence[str]) -> Layout:
    """The same in ShareGPT's names."""
    rows = [
        {"id": i, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for i, (q, a) in enumerate(pairs)
    ]
    return Layout(rows, plain(pairs, rng, words).rows)


def parquet(pairs: Sequence[tuple[str, str]], rng: random.Random, words: Sequence[str]) -> Layout:
    """The same in a Parquet file, with the columns that datasets on the hub have."""
    rows = [
        {"id": f"row-{i}", "messages": row["messages"], "source": "made"}
        for i, row in enumerate(plain(pairs, rng, words).rows)
    ]
    return Layout(rows, rows, "parquet")


def reasoning(pairs: Sequence[tuple[str, str]], rng: random.Random, words: Sequence[str]) -> Layout:
    """Thoughts in a field of their own."""
    rows = []
    for question, answer in pairs:
        thoughts, _, result = answer.partition("#### ")
        rows.append(
            {
                "messages": [
                    message("user", question),
                    {**message("assistant", result), "reasoning_content": thoughts.strip()},
                ]
            }
        )
    return Layout(rows, rows)


def tool_calls(pairs: Sequence[tuple[str, str]], rng: random.Random, words: Sequence[str], calls: int = 1) -> Layout:
    """OpenAI messages of 21 turns with a tools column, a content of null beside some calls, and arguments as JSON text. `calls`: those of each
    message of calls; several have ids, and so have their results."""

    def prose(low: int, high: int) -> str:
        return (
            " ".join(rng.choices(words, k=rng.randint(low, high))).capitalize()
            + f". It is {rng.randint(0, 99999) / 100}."
        )

    rows, conversations = [], []
    for _ in range(len(pairs) // 6):
        properties = {"query": {"type": "string"}, "limit": {"type": "integer"}}
        function = {
            "name": "lookup",
            "description": prose(8, 15),
            "parameters": {"type": "object", "properties": properties},
        }
        tools = [{"type": "function", "function": function}]
        messages, taken = [message("system", prose(20, 60))], [message("system", "")]
        taken[0] = messages[0]
        while len(messages) < 21:
            arguments = [{"query": prose(2, 6), "limit": rng.randint(1, 50)} for _ in range(calls)]
            ids = [{"id": f"call_{len(messages)}_{i}"} if calls > 1 else {} for i in range(calls)]
            content = prose(5, 20) if rng.random() < 0.5 else ""
            results = [
                {
                    **message(
                        "tool", json.dumps([{"id": rng.randint(0, 9999), "text": prose(5, 30)} for _ in range(3)])
                    ),
                    **({"tool_call_id": one["id"]} if one else {}),
                }
                for one in ids
            ]
            question, answer = message("user", prose(10, 80)), message("assistant", prose(30, 150))
            for into, as_text, said in ((messages, True, content or None), (taken, False, content)):
                made = [
                    {
                        **one,
                        "type": "function",
                        "function": {"name": "lookup", "arguments": json.dumps(given) if as_text else given},
                    }
                    for one, given in zip(ids, arguments, strict=True)
                ]
                into += [question, {"role": "assistant", "content": said, "tool_calls": made}, *results, answer]
        rows.append({"messages": messages, "tools": tools})
        conversations.append({"messages": taken, "tools": tools})
    return Layout(rows, conversations)


def parallel_calls(pairs: Sequence[tuple[str, str]], rng: random.Random, words: Sequence[str]) -> Layout:
    """Two calls with ids in each message of calls, in a Parquet file."""
    return tool_calls(pairs, rng, words, calls=2)._replace(suffix="parquet")


def message(role: str, content: str) -> Row:
    return {"role": role, "content": content}


LAYOUTS: dict[str, Callable[[Sequence[tuple[str, str]], random.Random, Sequence[str]], Layout]] = {
    "plain": plain, "sharegpt": sharegpt, "parquet": parquet, "reasoning": reasoning, "tool_calls": tool_calls,
    "parallel_calls": parallel_calls,
}  # fmt: skip


def write(layout: Layout, repeats: int, file: Path) -> None:
    """Writes the rows `repeats` times."""
    if layout.suffix == "jsonl":
        lines = "".join(json.dumps(row) + "\n" for row in layout.rows)
        with file.open("w") as out:
            for _ in range(repeats):
                out.write(lines)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.concat_tables([pa.Table.from_pylist(layout.rows)] * repeats), file, row_group_size=10_000)
