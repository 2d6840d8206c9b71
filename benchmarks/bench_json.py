"""What our own JSON reader is worth: lines of JSON to columns of texts, against libraries.

    PYTHONPATH=lib python benchmarks/bench_json.py [--rows 20000] [--rounds 5] [--gsm8k FILE]

In: GSM8K as plain rows, as rows with thoughts, and tool dialogues made of its words (`prepare_layouts`). Out: a table of MB of JSON per CPU
second, and one JSON object on the last line. Every method reads the same lines in one process and ends with the texts and roles of all messages:

* ours: `PlainRows` up to `Messages`, the texts of calls and tools included. It counts every field, and finds fields that are there twice;
* orjson: `orjson.loads`, then a Python loop that appends role and content of each message to lists. Nothing is checked or counted;
* orjson alone: without the loop. It ends with Python objects and is the least that any way through orjson takes;
* msgspec and simdjson, where they are installed: typed decoding of the same two fields; parsing and the same loop;
* pyarrow: `pyarrow.json.read_json` with one thread. It infers types: objects of all rows get the fields of all others, so it could not be used for
  calls.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from bench_prepare import SHARED, TEMPLATE, table_for
from prepare_layouts import LAYOUTS
from sft.data.fast.plain import PlainRows
from sft.data.tokenize import Encoder
from sft.sources.blocks import LineBlock

BLOCK = 500
"""Rows a block."""
Reader = Callable[[list[bytes]], Any]


def ours(tokenizer: Path) -> Reader:
    """Our reader of one source."""
    encoder = Encoder(tokenizer, table_for("rows.jsonl", TEMPLATE), lambda name: Path(name))
    rows = PlainRows.of(encoder.template, encoder.reader(encoder.prepare.sources[0]))
    assert rows is not None

    def read(lines: list[bytes]) -> None:
        block = LineBlock.of(b"".join(lines))
        rows._learn_names(block.first_row())
        messages = rows._read_lines(block)
        assert messages is not None and messages.is_plain.all()

    return read


def walk(rows: list[Any]) -> tuple[list[str], list[str]]:
    """Roles and contents of all messages."""
    roles, texts = [], []
    for row in rows:
        for message in row["messages"]:
            roles.append(message["role"])
            texts.append(message["content"])
    return roles, texts


def with_arrow(lines: list[bytes]) -> Any:
    import pyarrow.json as pj

    data = b"".join(lines)
    options = pj.ReadOptions(use_threads=False, block_size=len(data) + 1)
    return pj.read_json(io.BytesIO(data), read_options=options)


def readers(tokenizer: Path) -> dict[str, Reader]:
    made: dict[str, Reader] = {
        "ours": ours(tokenizer),
        "orjson": lambda lines: walk(list(map(orjson.loads, lines))),
        "orjson alone": lambda lines: list(map(orjson.loads, lines)),
        "pyarrow": with_arrow,
    }
    try:
        import msgspec

        message = msgspec.defstruct("Message", [("role", str), ("content", str | None, None)])
        row = msgspec.defstruct("Row", [("messages", list[message])])  # type: ignore[valid-type]  # made at run time: msgspec is no package of ours
        decode = msgspec.json.Decoder(row).decode
        made["msgspec"] = lambda lines: [[(m.role, m.content) for m in decode(line).messages] for line in lines]
    except ImportError:
        pass
    try:
        import simdjson

        def parse(lines: list[bytes]) -> None:
            for line in lines:  # a parser owns the row that it read last
                walk([simdjson.Parser().parse(line, True)])

        made["simdjson"] = parse
    except ImportError:
        pass
    return made


def speed(read: Reader, blocks: list[list[bytes]], rounds: int) -> float:
    """MB of JSON per CPU second, the median of the rounds after one that warms up."""
    size, found = sum(len(line) for block in blocks for line in block) / 1e6, []
    for _ in range(rounds + 1):
        began = time.process_time()
        for block in blocks:
            read(block)
        found.append(size / (time.process_time() - began))
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "dolma2-tokenizer")
    parser.add_argument("--gsm8k", type=Path, default=SHARED / "gsm8k" / "train.jsonl")
    args = parser.parse_args()
    pairs = [(row["question"], row["answer"]) for row in map(json.loads, args.gsm8k.read_text().splitlines())]
    words = " ".join(text for pair in pairs for text in pair).split()
    methods, summary = readers(args.tokenizer), {}
    print(f"{'MB/s per CPU second':20}" + "".join(f"{name:>14}" for name in methods))
    for layout in ("plain", "reasoning", "tool_calls"):
        rows = LAYOUTS[layout](pairs, random.Random(1), words).rows
        lines = [
            json.dumps(rows[i % len(rows)]).encode() + b"\n"
            for i in range(args.rows // (20 if layout == "tool_calls" else 1))
        ]
        blocks = [lines[i : i + BLOCK] for i in range(0, len(lines), BLOCK)]
        found = {name: speed(read, blocks, args.rounds) for name, read in methods.items()}
        print(f"{layout:20}" + "".join(f"{value:14.0f}" for value in found.values()), flush=True)
        summary[layout] = {name: round(found["ours"] / value, 2) for name, value in found.items() if name != "ours"}
    print(json.dumps({"ours_by": summary}))


if __name__ == "__main__":
    main()
