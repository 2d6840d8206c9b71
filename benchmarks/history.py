"""Runs a bench and keeps its numbers (make bench-NAME), or compares the newest ones with the baseline (make bench-check).

    python benchmarks/history.py run pack             prints what the bench prints, and appends a line to benchmarks/history/pack.jsonl
    python benchmarks/history.py check [pack …]       exit status 1 if a number is worse than its baseline by more than its noise
    python benchmarks/history.py results              writes the newest numbers into RESULTS.md, between its two marks (make results)

A line has the time, the commit, whether there were edits, the machine, and the JSON object that the bench ends in. A line with "copied" was
written by hand from a report that is older than this history. benchmarks/baseline.json
says which numbers are compared: {bench: {number: {"value": …, "noise": share, "better": "higher"|"lower", "machine": …}}}. A dot in a
number's name goes into an object. Without "machine" a number is a ratio, which is compared on every machine; others only on their own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HISTORY, BASELINE, RESULTS = HERE / "history", HERE / "baseline.json", HERE.parent / "RESULTS.md"
BEGIN, END = "<!-- benches: written by make results -->", "<!-- end of benches -->"
LIST_GPUS = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]


def machine() -> str:
    """What the numbers depend on: processor, cores and GPUs, e.g. "AMD EPYC 7B13, 2 cores"."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # another system, or a processor without a name there
    try:
        cards = subprocess.run(LIST_GPUS, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        cards = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([name, f"{cores} cores", *([f"{len(cards)} x {cards[0]}"] if cards else [])])


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def numbers_of(output: str) -> dict[str, Any] | None:
    """The JSON object on the last line that is not empty; None where there is none."""
    lines = [line for line in output.splitlines() if line.strip()]
    try:
        found = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def run(bench: str, options: Sequence[str]) -> int:
    """Runs a bench and appends its record. The bench's exit status; 1 for one that does not end in a JSON object."""
    script = HERE / f"bench_{bench.replace('-', '_')}.py"
    process = subprocess.Popen([sys.executable, str(script), *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        print(line, end="", flush=True)
        told.append(line)
    if status := process.wait():
        return status
    numbers = numbers_of("".join(told))
    if numbers is None:
        print(
            f"[bench] error: {script.name} did not end in a JSON object, so nothing was kept; next: read its output",
            file=sys.stderr,
        )
        return 1
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "edits": bool(git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/history")),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "options": list(options),
        "numbers": numbers,
    }
    HISTORY.mkdir(exist_ok=True)
    with (HISTORY / f"{bench}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return results()


def results() -> int:
    """Writes the table of the newest numbers into RESULTS.md. 1 if its marks are not there."""
    text = RESULTS.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"[bench] error: {RESULTS.name} has no lines {BEGIN} and {END}; next: add both", file=sys.stderr)
        return 1
    RESULTS.write_text(f"{before}{BEGIN}\n{table()}{END}{after}", encoding="utf-8")
    return 0


def table() -> str:
    """Markdown: the newest record of every bench, for each machine and set of options; below it a table for each group of numbers."""
    lines, below = ["| bench | numbers | commit | machine |", "| --- | --- | --- | --- |"], []
    for file in sorted(HISTORY.glob("*.jsonl")):
        newest = {(r["machine"], *r["options"]): r for r in records(file.stem)}
        for r in newest.values():
            command = f"`make bench-{file.stem}`" + (f" with `{' '.join(r['options'])}`" if r["options"] else "")
            commit = r["commit"][:8] + (" with edits" if r["edits"] else "") + (", copied" if r.get("copied") else "")
            groups = {name: rows for name, value in r["numbers"].items() if (rows := rows_of(value))}
            single = {name: value for name, value in r["numbers"].items() if name not in groups}
            numbers = ", ".join(f"{name} {value}" for name, value in flat(single)) or "below"
            lines.append(f"| {command} | {numbers} | {commit}, {r['time'][:10]} | {r['machine']} |")
            below += [
                line for name, rows in groups.items() for line in group(f"{command}, {r['commit'][:8]}", name, rows)
            ]
    return "\n".join(lines + below) + "\n"


def rows_of(value: object) -> dict[str, Mapping[str, Any]]:
    """The rows of an object of objects, such as the ways that a bench compares. A list of objects is named by their texts. Else {}."""
    if isinstance(value, Sequence) and value and all(isinstance(row, Mapping) for row in value):
        names = [", ".join(text for text in row.values() if isinstance(text, str)) for row in value]
        return {f"{n}. {name}": row for n, (name, row) in enumerate(zip(names, value, strict=True), 1)}
    if isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values()):
        return dict(value)
    return {}


def group(title: str, name: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table with a row for each object and a column for each of its numbers. Texts stay in the history."""
    cells = {row: dict(flat(numbers)) for row, numbers in rows.items()}
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = ["", f"{title}:", "", f"| {' | '.join([name, *columns])} |", "| --- " * (1 + len(columns)) + "|"]
    return [
        *lines,
        *(f"| {' | '.join([row, *(c.get(column, '') for column in columns)])} |" for row, c in cells.items()),
    ]


def flat(numbers: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of each number, truth value and short list of numbers, with a dot between the names of objects."""
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        elif isinstance(value, int | float):
            yield before + name, shown(value)
        elif isinstance(value, list) and 0 < len(value) <= 4 and all(isinstance(one, int | float) for one in value):
            yield before + name, " / ".join(map(shown, value))


def shown(value: float) -> str:
    """A number with four digits, or yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def records(bench: str) -> list[dict[str, Any]]:
    """The records of a bench, the oldest first. Raises ValueError for a damaged line."""
    file = HISTORY / f"{bench}.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def find(numbers: Mapping[str, Any], name: str) -> float | None:
    """A number by its name, in which dots go into objects."""
    found: Any = numbers
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def compare(bench: str, wanted: Mapping[str, Any], here: str) -> Iterator[tuple[bool, str]]:
    """(whether it is worse, a line) for each number of the baseline that a record can be compared with."""
    kept = records(bench)
    for name, rule in wanted.items():
        allowed = [r for r in kept if "machine" not in rule or r["machine"] == rule["machine"]]
        if rule.get("machine", here) != here or not allowed:
            yield False, f"-      {bench:14} {name:28} not measured here; next: make bench-{bench}"
            continue
        value, base, noise = find(allowed[-1]["numbers"], name), float(rule["value"]), float(rule["noise"])
        if value is None:
            yield True, f"GONE   {bench:14} {name:28} the newest record has no such number"
            continue
        change = value / base - 1 if rule["better"] == "higher" else base / value - 1 if value else 0.0
        worse = change < -noise
        yield (
            worse,
            f"{'WORSE' if worse else 'ok':6} {bench:14} {name:28} {value:10.4g} against {base:10.4g}, {change:+.1%}, noise {noise:.0%}",
        )


def check(benches: Sequence[str]) -> int:
    """Compares the newest records with the baseline. 1 if a number is worse by more than its noise, or gone."""
    baseline = json.loads(BASELINE.read_text(encoding="utf-8"))
    if unknown := [b for b in benches if b not in baseline]:
        print(f"[bench] error: no baseline of {unknown[0]}; next: one of {', '.join(baseline)}", file=sys.stderr)
        return 1
    here, worse = machine(), 0
    for bench in benches or baseline:
        for bad, line in compare(bench, baseline[bench], here):
            print(line)
            worse += bad
    if worse:
        print(
            f"[bench] error: {worse} below the baseline; next: find the commit, or change benchmarks/baseline.json with its reason",
            file=sys.stderr,
        )
    return int(worse > 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "check", "results"))
    parser.add_argument("benches", nargs="*", help="run: one bench; check: some of the baseline")
    args, options = parser.parse_known_args(argv)
    if args.command == "check":
        return check([b for name in args.benches for b in name.split()])
    if args.command == "results":
        return results()
    if len(args.benches) != 1:
        parser.error("one bench is expected")
    return run(args.benches[0], options)


if __name__ == "__main__":
    sys.exit(main())
