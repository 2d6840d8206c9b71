"""An evaluation here against lm_eval's own command line on the same export and tasks: the same scores of every item, and the wall time.

In:  an export (default runs/smoke/convert/model: make convert RECIPE=smoke) and task files. Out: one JSON object on the last line; exit
     status 1 if a score of an item differs. Both are processes of their own, so that both pay their start.
Run: make bench-evaluate, or .venv/bin/python benchmarks/bench_evaluate.py [--model FOLDER] [--tasks a,b] [--limit N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parents[1]
OURS = """
import sys
from pathlib import Path
from sft.evaluation import evaluate
from sft.recipe.schema import Evaluate, Hardware
model, tasks, names, limit, out = sys.argv[1:]
options = Evaluate(tasks=tuple(names.split(",")), limit=int(limit), min_stop_rate=0, max_empty_fraction=1)
evaluate.go_offline(options, Path(tasks), Path(out) / "work")
evaluate.run_tasks(evaluate.open_model(Path(model), options, Hardware(), ""), options, Path(tasks), {}, Path(out), print)
"""
Scores = dict[tuple[str, int], dict[str, Any]]


def main() -> int:
    """Measures both, alternately, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPO / "runs/smoke/convert/model", help="a Hugging Face folder")
    parser.add_argument("--tasks", default="smoke_generate,smoke_choice", help="tasks that name their own stop strings")
    parser.add_argument("--limit", type=int, default=0, help="documents of a task; 0 = all")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        print(f"{args.model}: no export; next: make convert RECIPE=smoke, or --model FOLDER", file=sys.stderr)
        return 2
    seconds: dict[str, list[float]] = {"ours": [], "lm_eval": []}
    differ = 0
    for _ in range(args.rounds):
        found = {}
        for name, measure in (("lm_eval", theirs), ("ours", ours)):
            with tempfile.TemporaryDirectory() as out:
                began = time.monotonic()
                measure(args, Path(out))
                seconds[name].append(time.monotonic() - began)
                found[name] = scores(Path(out), args.tasks.split(","))
        differ += sum(found["ours"].get(item) != value for item, value in found["lm_eval"].items())
        differ += len(found["ours"].keys() ^ found["lm_eval"].keys())
    result = {name: round(median(values), 2) for name, values in seconds.items()}
    ratio = result["ours"] / result["lm_eval"]
    print(json.dumps({**result, "ratio": round(ratio, 3), "items": len(found["ours"]), "differ": differ}))
    return int(differ > 0)


def ours(args: argparse.Namespace, out: Path) -> None:
    """This project's evaluation."""
    command = [
        sys.executable,
        "-c",
        OURS,
        str(args.model),
        str(REPO / "recipes/tasks"),
        args.tasks,
        str(args.limit),
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True)


def theirs(args: argparse.Namespace, out: Path) -> None:
    """lm_eval's own command line, with the same template, seed and dtype."""
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={args.model},dtype=float32", "--tasks", args.tasks,
        "--include_path", str(REPO / "recipes/tasks"), "--batch_size", "auto", "--device", "cpu", "--seed", "1234", "--apply_chat_template",
        "--fewshot_as_multiturn", "--log_samples", "--output_path", str(out), *(["--limit", str(args.limit)] if args.limit else []),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


def scores(out: Path, tasks: list[str]) -> Scores:
    """{(task, document): scores} from the samples of either."""
    found: Scores = {}
    for task in tasks:
        for file in (*out.rglob(f"samples_{task}_*.jsonl"), *out.glob(f"samples/{task}.jsonl")):
            for line in file.read_text().splitlines():
                row = json.loads(line)
                names = row["metrics"] if "metrics" in row else row["scores"]
                values = row if "metrics" in row else row["scores"]
                item = found.setdefault((task, row["doc_id"]), {})
                item |= {f"{name},{row['filter']}": float(values[name]) for name in names}
    return found


if __name__ == "__main__":
    sys.exit(main())
