"""The benches run, at a small size, and end in the JSON object that is read from them."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import prepare_layouts
from patience import PATIENCE
from sft.data.tokenize import Encoder
from sft.recipe import presets
from sft.recipe.schema import Prepare, Source
from training import SERVER

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CPU = ["--device", "cpu", "--seq-len", "64", "--no-compile"]


def run_here(script: str, options: list[str], out: Path) -> None:
    """The program, in this process. Tiny models get a small vocabulary: their embeddings would be most of the work."""
    presets.PRESETS.update({n: replace(c, vocab_size=1024) for n, c in presets.PRESETS.items() if n.endswith("-tiny")})
    sys.argv = [script, *options]
    with out.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.path.insert(0, str(Path(script).parent))
        torch.set_num_threads(1)  # no threads that a fork would wait for
        subprocess.run = forked  # type: ignore[assignment]
        runpy.run_path(script, run_name="__main__")
        sys.stdout.flush()


def forked(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """A part of a bench that is a program of its own: a fork of the bench, which has imported torch already."""
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            sys.argv = command[1:]
            status = 1
            try:
                runpy.run_path(command[1], run_name="__main__")
                sys.stdout.flush()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        return subprocess.CompletedProcess(command, status, out.read(), "")


def run(bench: str, options: list[str], out: Path) -> dict[str, Any]:
    """The object that a bench ends in. Its process is forked from one that has imported torch already."""
    process = SERVER.Process(target=run_here, args=(str(ROOT / "benchmarks" / f"bench_{bench}.py"), options, out))
    process.start()
    process.join(timeout=PATIENCE)
    assert process.exitcode == 0, out.read_text()
    return json.loads(out.read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("bench", "options", "keys"),
    [
        ("pack", ["--documents", "4000", "--others", "300", "--large", "5000"], {"ratio_to_olmo_core", "packs_equal", "seconds_1m", "seconds_20m"}),
        ("balance", ["--steps", "2"], {"idle_8x8", "idle_32x4"}),
        ("loader", ["--tokens", "2000000"], {"tokens_per_s"}),
        ("gpu", [*CPU, "--presets", "olmo3-tiny", "--steps", "2", "--microbatches", "1", "--no-tests"], {"models", "failed", "attention_error", "loss_error"}),
        ("peers", [*CPU, "--preset", "olmo3-tiny", "--packs", "2", "--way", "ours, eager"], {"trained_tokens_per_s", "tflops", "start_s"}),
        ("convert", ["--preset", "olmo3-tiny", "--other", "olmo2-tiny", "--minutes", "0", "--vocab", "2000"], {"peak_rss_gb", "ratio_to_copy", "ratio_to_olmo_core"}),
    ],
)  # fmt: skip
def test_a_bench_ends_in_its_numbers(bench: str, options: list[str], keys: set[str], tmp_path: Path):
    numbers = run(bench, options, tmp_path / "out")
    assert keys <= numbers.keys()
    if bench == "pack" and numbers["packs_equal"] is not None:
        assert numbers["packs_equal"] and numbers["ratio_to_olmo_core"] > 1


PAIRS = [(f"What is {i} + {i}?", f"{i} + {i} = {2 * i}.\nThe answer is {2 * i}.\n#### {2 * i}") for i in range(300)]
TOKENIZER = ROOT / "recipes/smoke/tokenizer"


def test_the_bench_of_preparing_compares_the_same_tokens(tmp_path: Path):
    """Two layouts, each with two tokenizers. The test after it reads every layout."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS))
    shutil.copytree(TOKENIZER, tmp_path / "other")
    (tmp_path / "other/chat_template.jinja").write_text(prepare_layouts.JINJA)
    options = {
        "cores": "1", "tokens": "5e4", "dialogues": "40", "ancestor-tokens": "5e3", "rounds": "1",
        "layouts": "parquet tool_calls", "layout-tokens": "1e4", "layout-rounds": "1", "layout-sample": "2",
        "tokenizer": TOKENIZER, "qwen3": tmp_path / "other", "gsm8k": file,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split(" "))]
    numbers = run("prepare", words, tmp_path / "out")
    assert {"ratio_to_ancestor", "share_of_floor", "share_of_floor_with_checksum", "tokens_per_s"} <= numbers.keys()
    assert len(numbers["layouts"]) == 10
    for figures in numbers["data"].values():
        speeds = figures["clock"]["speeds"]
        assert speeds["ours"] >= speeds["ours_with_checksum"] > 0
        assert figures["cpu_time"]["ratio_to_ancestor"] > 1


@pytest.mark.parametrize("name", prepare_layouts.LAYOUTS)
def test_every_row_of_a_layout_is_trained(name: str, tmp_path: Path):
    layout = prepare_layouts.LAYOUTS[name](PAIRS[:12], random.Random(1), ["one", "two"])
    file = tmp_path / f"rows.{layout.suffix}"
    prepare_layouts.write(layout, 2, file)
    rows = file.read_text().splitlines() if layout.suffix == "jsonl" else pq.read_table(file).to_pylist()
    source = Source(path=file.name)
    encoder = Encoder(TOKENIZER, Prepare(tokenizer="t", template="olmo", sources=(source,)))
    encoded = encoder.encode([json.loads(row) if isinstance(row, str) else row for row in rows], source)
    assert not encoded.rejects and len(encoded.lengths) == 2 * len(layout.conversations) > 0
