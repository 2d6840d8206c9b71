"""An evaluation here against lm_eval's own command line on the same export and tasks: the same scores, and the time of both.

In:  an export (default runs/smoke/convert/model: make convert RECIPE=smoke) and tasks or groups. Out: a line for each run, and one JSON
     object on the last line; exit status 1 if a score or an error of an item, a task or a group differs.
     Both are processes of their own, run in turn, so that both pay their start. On a busy machine the CPU seconds tell more than the wall time.
Run: make bench-evaluate, or .venv/bin/python benchmarks/bench_evaluate.py [--model FOLDER] [--tasks a,b] [--limit N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parents[1]
OURS = """
import json, sys
from pathlib import Path
from sft.evaluation import evaluate
from sft.recipe.schema import Evaluate, Hardware
model, tasks, names, limit, out = sys.argv[1:]
options = Evaluate(tasks=tuple(names.split(",")), limit=int(limit), min_stop_rate=0, max_empty_fraction=1)
evaluate.go_offline(options, Path(tasks), Path(out) / "work")
found = evaluate.run_tasks(evaluate.open_model(Path(model), options, Hardware(), ""), options, Path(tasks), {}, Path(out), print)
assert not found.broken, found.broken
scores = {name: {m: [s.value, s.stderr] for m, s in r.metrics.items()} for name, r in {**found.results, **found.groups}.items()}
(Path(out) / "scores.json").write_text(json.dumps(scores))
"""
TOLERANCE = 1e-9
"""Of a mean and its error, which are summed in another order."""
Values = dict[tuple[str, ...], float]
Compared = dict[str, Values]


def main() -> int:
    """Measures both, alternately, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPO / "runs/smoke/convert/model", help="a Hugging Face folder")
    parser.add_argument("--tasks", default="smoke_generate,smoke_choice", help="tasks that name their own stop strings")
    parser.add_argument("--limit", type=int, default=0, help="documents of a task; 0 = all")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument(
        "--their-batch", default="16", help="lm_eval's --batch_size; auto tries 64 rows of a full context first"
    )
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        print(f"{args.model}: no export; next: make convert RECIPE=smoke, or --model FOLDER", file=sys.stderr)
        return 2
    wall: dict[str, list[float]] = {"ours": [], "lm_eval": []}
    cpu: dict[str, list[float]] = {"ours": [], "lm_eval": []}
    differ: list[str] = []
    for number in range(args.rounds):
        found: dict[str, Compared] = {}
        order: list[tuple[str, Callable[..., Compared]]] = [("lm_eval", theirs), ("ours", ours)]
        for name, measure in order[:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as out:
                began, used = time.monotonic(), cpu_seconds()
                found[name] = measure(args, Path(out))
                wall[name].append(time.monotonic() - began)
                cpu[name].append(cpu_seconds() - used)
            print(f"round {number + 1}: {name} {wall[name][-1]:.1f} s, {cpu[name][-1]:.1f} CPU s", flush=True)
        differ += differences(found["ours"], found["lm_eval"])
    print("\n".join(differ[:20]), end="\n" if differ else "")
    result: dict[str, Any] = {}
    for unit, seconds in (("wall_s", wall), ("cpu_s", cpu)):
        result |= {f"{name}_{unit}": round(median(values), 1) for name, values in seconds.items()}
        pairs = zip(seconds["ours"], seconds["lm_eval"], strict=True)
        result[f"ratio_{unit}"] = round(median(a / b for a, b in pairs), 3)
    counts = {f"{kind}s": len(values) for kind, values in found["ours"].items()}
    print(json.dumps({**result, **counts, "differ": len(differ)}))
    return int(bool(differ))


def cpu_seconds() -> float:
    """CPU seconds of the processes that have ended."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(args: argparse.Namespace, out: Path) -> Compared:
    """This project's evaluation."""
    tasks = str(REPO / "recipes/tasks")
    start([sys.executable, "-c", OURS, str(args.model), tasks, args.tasks, str(args.limit), str(out)])
    compared: Compared = {"item": {}, "mean": {}, "error": {}}
    for file in out.glob("samples/*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            for name, value in row["scores"].items():
                add_item(compared, file.stem, row, name, value)
    for task, metrics in json.loads((out / "scores.json").read_text()).items():
        for name, (value, error) in metrics.items():
            metric, _, filter_name = name.partition(",")
            compared["mean"][task, f"{metric},{filter_name or 'none'}"] = value
            if error is not None:
                compared["error"][task, f"{metric},{filter_name or 'none'}"] = error
    return compared


def theirs(args: argparse.Namespace, out: Path) -> Compared:
    """lm_eval's own command line, with the same template, seed and dtype."""
    start([
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={args.model},dtype=float32", "--tasks", args.tasks,
        "--include_path", str(REPO / "recipes/tasks"), "--batch_size", args.their_batch, "--device", "cpu", "--seed", "1234",
        "--apply_chat_template", "--fewshot_as_multiturn", "--log_samples", "--output_path", str(out),
        *(["--limit", str(args.limit)] if args.limit else []),
    ])  # fmt: skip
    compared: Compared = {"item": {}, "mean": {}, "error": {}}
    for file in out.rglob("samples_*.jsonl"):
        task = file.stem.removeprefix("samples_").rpartition("_")[0]
        for row in map(json.loads, file.read_text().splitlines()):
            for name in row["metrics"]:
                add_item(compared, task, row, name, row[name])
    (results,) = out.rglob("results_*.json")
    for task, values in json.loads(results.read_text())["results"].items():
        for name, value in values.items():
            metric, comma, filter_name = name.partition(",")
            if comma and isinstance(value, (int, float)):
                kind = "error" if metric.endswith("_stderr") else "mean"
                compared[kind][task, f"{metric.removesuffix('_stderr')},{filter_name}"] = value
    return compared


def start(command: list[str]) -> None:
    """Runs a command. Raises SystemExit with the end of what it said when it fails."""
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"}, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command[:4])} … failed:\n{ran.stderr[-3000:]}")


def add_item(compared: Compared, task: str, row: dict[str, Any], metric: str, value: Any) -> None:
    """Adds the scores of one document: a number, or a list of numbers."""
    for i, one in enumerate(value if isinstance(value, list) else [value]):
        compared["item"][task, str(row["doc_id"]), f"{metric},{row['filter']}", str(i)] = float(one)


def differences(ours: Compared, theirs: Compared) -> list[str]:
    """A line for every value that differs, or that only one of the two has."""
    found = []
    for kind in ours:
        for key in sorted(ours[kind].keys() | theirs[kind].keys()):
            a, b = ours[kind].get(key), theirs[kind].get(key)
            if a is None or b is None or abs(a - b) > TOLERANCE:
                found.append(f"{kind} {' '.join(key)}: ours {a}, lm_eval's {b}")
    return found


if __name__ == "__main__":
    sys.exit(main())
