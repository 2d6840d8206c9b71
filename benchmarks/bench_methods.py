"""Methods of training compared at equal tokens: full training, LoRA, frozen embeddings and NEFTune, on GSM8K with SmolLM2-135M.

In:  a folder with what recipes/smollm2-methods.toml names. Every run is `make train` of that recipe, so a run that is finished is not
     made again, and the same command goes on after an interruption.
Out: a line for every run, a table, and one JSON object on the last line; exit status 1 where a run failed.
Run: DATA=folder make bench-methods, or .venv/bin/python benchmarks/bench_methods.py --data FOLDER [--runs FOLDER] [--seeds N] [--jobs N]

A seed is that of the first adapters and of the order of packs; all runs have the same held-out problems. An interval is Student's, over
seeds: it says how far another seed would move the loss, not how other held-out problems would. The difference from full training is of
runs with the same seed, which saw the same packs in the same order.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sft.evaluation.statistics import t_quantile
from sft.formats import manifest
from sft.formats.metrics import TrainMetrics
from sft.recipe import recipe

REPO = Path(__file__).resolve().parents[1]
RECIPE = REPO / "recipes" / "smollm2-methods.toml"
METHODS = {
    "full": (),
    "LoRA": ("method=lora", "lr=1e-3"),
    "frozen embeddings": ("freeze=embeddings",),
    "NEFTune": ("neftune_alpha=5",),
}
"""The fields of each method beyond the recipe's."""


@dataclass(frozen=True)
class Done:
    """A finished run."""

    method: str
    seed: int
    loss: float  # of the held-out problems after the last step
    before: float | None  # of the starting weights, where it was measured
    tokens: int
    tokens_per_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("DATA"), help="folder of smollm2/ and gsm8k/")
    parser.add_argument("--runs", type=Path, default=REPO / "runs", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    if args.data is None or not (args.data / "smollm2" / "config.json").is_file():
        print(f"{args.data}: no smollm2/config.json in it; next: read {RECIPE}, then --data FOLDER", file=sys.stderr)
        return 2
    todo = [(method, seed) for seed in range(1, args.seeds + 1) for method in METHODS]
    with ThreadPoolExecutor(args.jobs) as pool:  # the first run alone: the others refer to its data
        first = run(args, *todo[0])
        found = [first, *pool.map(lambda job: run(args, *job), todo[1:])]
    finished = [done for done in found if done]
    print(table(finished))
    rows = {method: summary(finished, method) for method in METHODS}
    before = next((d.before for d in finished if d.before is not None), None)
    print(json.dumps({"bench": "methods", "recipe": RECIPE.stem, "before": before, "methods": rows}))
    return int(len(finished) < len(todo))


def run(args: argparse.Namespace, method: str, seed: int) -> Done | None:
    """Makes a run and prints its line. None where it failed."""
    overrides = (*METHODS[method], f"train.seed={seed}", f"train.data_seed={seed}")
    if method != "full" or seed > 1:  # all start from the same weights
        overrides += ("validate_start=false",)
    name = recipe.load(RECIPE, overrides).run
    command = [
        "make",
        "--no-print-directory",
        "train",
        f"RECIPE={RECIPE.stem}",
        f"RUNS={args.runs}",
        f"DATA={args.data}",
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    args.runs.mkdir(parents=True, exist_ok=True)
    with (args.runs / f"{name}.log").open("ab") as log:
        code = subprocess.run(
            [*command, *overrides], cwd=REPO, env=clean, stdout=log, stderr=log, check=False
        ).returncode
    if code:
        print(f"{method}, seed {seed}: failed, exit status {code}; next: read {args.runs / name}.log", flush=True)
        return None
    file = args.runs / name / "train" / manifest.NAME
    metrics = TrainMetrics.of(manifest.load(file), str(file))
    assert metrics.validation_loss is not None
    done = Done(
        method, seed, metrics.validation_loss, metrics.initial_validation_loss, metrics.tokens, metrics.tokens_per_s
    )
    before = f"{done.before:.4f} to " if done.before is not None else ""
    print(f"{method}, seed {seed}: held-out loss {before}{done.loss:.4f}, {done.tokens:,} tokens", flush=True)
    return done


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval (Student). NaN of one value."""
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), t_quantile(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def summary(found: Sequence[Done], method: str) -> dict[str, Any]:
    """The numbers of a method over its finished runs."""
    mine = {d.seed: d for d in found if d.method == method}
    full = {d.seed: d.loss for d in found if d.method == "full"}
    if not mine:
        return {"runs": 0}
    differences = [d.loss - full[seed] for seed, d in mine.items() if seed in full]
    return {
        "runs": len(mine),
        "losses": [d.loss for d in mine.values()],
        "loss": interval([d.loss for d in mine.values()]),
        "difference": interval(differences) if differences and method != "full" else None,
        "tokens": fmean(d.tokens for d in mine.values()),
        "tokens_per_s": fmean(d.tokens_per_s for d in mine.values()),
    }


def table(found: Sequence[Done]) -> str:
    lines = [f"{'method':18}  runs  held-out loss, 95 %  difference from full     tokens/s"]
    for method in METHODS:
        s = summary(found, method)
        if s["runs"]:
            loss = "{:.4f} +- {:.4f}".format(*s["loss"])
            difference = "{:+.4f} +- {:.4f}".format(*s["difference"]) if s["difference"] else ""
            lines.append(f"{method:18}  {s['runs']:4}  {loss:19}  {difference:20}  {s['tokens_per_s']:11.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
