"""The benches run, at a small size, and end in the JSON object that is read from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CPU = ["--device", "cpu", "--seq-len", "256", "--no-compile"]


def run(bench: str, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{bench}.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("bench", "options", "keys"),
    [
        ("pack", ["--documents", "4000", "--others", "300", "--large", "5000"], {"ratio_to_olmo_core", "packs_equal", "seconds_1m", "seconds_20m"}),
        ("balance", ["--steps", "2"], {"idle_8x8", "idle_32x4"}),
        ("loader", ["--tokens", "2000000"], {"tokens_per_s"}),
        ("gpu", [*CPU, "--presets", "olmo3-tiny", "--steps", "2", "--no-tests"], {"models", "failed", "attention_error", "loss_error"}),
        ("peers", [*CPU, "--preset", "olmo3-tiny", "--batch", "1", "2", "--packs", "2"], {"ratio_to", "ways"}),
        ("convert", ["--preset", "olmo3-tiny", "--other", "olmo2-tiny", "--minutes", "0"], {"peak_rss_gb", "ratio_to_copy", "ratio_to_olmo_core"}),
    ],
)  # fmt: skip
def test_a_bench_ends_in_its_numbers(bench: str, options: list[str], keys: set[str]):
    numbers = run(bench, options)
    assert keys <= numbers.keys()
    if bench == "pack" and numbers["packs_equal"] is not None:
        assert numbers["packs_equal"] and numbers["ratio_to_olmo_core"] > 1


def test_the_bench_of_preparing_compares_the_same_tokens(tmp_path: Path):
    rows = [
        {"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}.\nThe answer is {2 * i}."}
        for i in range(300)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--cores",
        "1",
        "--tokens",
        "2e5",
        "--rounds",
        "1",
        "--tokenizer",
        str(ROOT / "recipes/smoke/tokenizer"),
        "--gsm8k",
        str(file),
    ]
    numbers = run("prepare", options)
    assert {"ratio_to_ancestor", "share_of_floor", "share_of_floor_with_checksum", "tokens_per_s"} <= numbers.keys()
    for figures in numbers["data"].values():
        speeds = figures["clock"]["speeds"]
        assert speeds["ours"] >= speeds["ours_with_checksum"] > 0 and figures["clock"]["ratio_to_ancestor"] > 1
