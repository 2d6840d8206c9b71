"""The benches of packing, balance, loading and converting run, at a small size, and end in the JSON object that is read from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("bench", "options", "keys"),
    [
        ("pack", ["--documents", "4000", "--others", "300", "--large", "5000"], {"ratio_to_olmo_core", "packs_equal", "seconds_1m", "seconds_20m"}),
        ("balance", ["--steps", "2"], {"idle_8x8", "idle_32x4"}),
        ("loader", ["--tokens", "2000000"], {"tokens_per_s"}),
        ("convert", ["--preset", "olmo3-tiny", "--other", "olmo2-tiny", "--minutes", "0"], {"peak_rss_gb", "ratio_to_copy", "ratio_to_olmo_core"}),
    ],
)  # fmt: skip
def test_a_bench_ends_in_its_numbers(bench: str, options: list[str], keys: set[str]):
    command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{bench}.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert keys <= numbers.keys()
    if bench == "pack" and numbers["packs_equal"] is not None:
        assert numbers["packs_equal"] and numbers["ratio_to_olmo_core"] > 1
