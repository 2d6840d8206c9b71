"""Compares the scores of runs item by item: differences with their errors, and the options that differ.

In:  evaluate's results.json, samples/ and validation.jsonl of each run; all their manifests.
Out: a JSON-ready dict (see `compare`), and the same as lines for a terminal. The first run is the one compared with.

Only the same questions are compared: a task whose hash differs, or a prompt that does (another template, system prompt or
few-shot choice), is refused with both hashes; of item sets that differ the common items are compared, and that is said.
Standard library only. Run: make compare A=run1 B=run2 [C="run3 run4"] [ANYWAY=1 compares different prompts too]
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.evaluation.scores import is_number, json_hash
from sft.evaluation.statistics import Z95, Difference, holm, paired, paired_ratio
from sft.formats import manifest
from sft.recipe import schema

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MARKS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))


def compare(runs: Sequence[Path], anyway: bool = False) -> dict[str, Any]:
    """{"runs": [name…], "notes": […], "rows": […], "fields": [{"field", "values": [one per run]}]}

    A row: task, metric, higher_is_better, run (index), n, a, b (scores on the common items), value (b - a), stderr, low,
    high, p, test, corrected (p after Holm over all rows), mark. Raises SftError when the runs answer other questions.
    """
    made = [_Evaluated(run) for run in runs]
    notes: list[str] = []
    rows = [row for i, b in enumerate(made[1:], 1) for row in _rows(made[0], b, i, notes, anyway)]
    if not rows:
        names = "; ".join(f"{e.name}: {', '.join(e.results['tasks'])}" for e in made)
        raise SftError(f"no task in common ({names}); next: evaluate them with the same [evaluate] tasks")
    tested = [row for row in rows if row["p"] is not None]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["corrected"] = corrected
        row["mark"] = next((mark for limit, mark in MARKS if corrected < limit), "")
    order = {(row["task"], row["metric"]): i for i, row in reversed(list(enumerate(rows)))}
    rows.sort(key=lambda row: (order[row["task"], row["metric"]], row["run"]))
    return {"runs": [e.name for e in made], "notes": notes, "rows": rows, "fields": differing_fields(runs)}


class _Evaluated:
    """A run's finished evaluation, its bytes as the manifest has them."""

    def __init__(self, run: Path) -> None:
        self.name, self.folder = run.name, run / "evaluate"
        file = self.folder / manifest.NAME
        try:
            broken = manifest.broken_outputs(self.folder, manifest.load(file).outputs)
        except FileNotFoundError:
            raise SftError(f"{file}: not there: {run.name} has no scores; next: make {file}") from None
        if broken:
            raise SftError("\n".join(broken) + f"\nnext: remove {file} and make it again")
        self.results = json.loads((self.folder / "results.json").read_bytes())

    def items(self, task: str) -> dict[str, dict[str, dict[str, Any]]]:
        """{filter: {item: row}}. An item is named by its document and target; repeated ones are numbered."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for row in _lines(self.folder / self.results["tasks"][task].get("samples", f"samples/{task}.jsonl")):
            if "scores" not in row:
                return {}  # another harness's own records, of an earlier version
            of_filter = found.setdefault(row["filter"], {})
            of_filter[_fresh(json_hash([row["doc"], row["target"]])[:16], of_filter)] = row
        return found

    def conversations(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for row in _lines(self.folder / "validation.jsonl"):
            found[_fresh(row["item"], found)] = row
        return found


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _fresh(name: str, taken: Mapping[str, Any]) -> str:
    number = 1
    while (full := f"{name}-{number}") in taken:
        number += 1
    return full


def _rows(a: _Evaluated, b: _Evaluated, run: int, notes: list[str], anyway: bool) -> Iterator[dict[str, Any]]:
    """The comparisons of one run with the first. Raises SftError naming the hashes that differ."""
    problems: list[str] = []
    for one, other in ((a, b), (b, a)):
        if alone := [t for t in one.results["tasks"] if t not in other.results["tasks"]]:
            notes.append(f"only in {one.name}, not compared: {', '.join(alone)}")
    rows: list[dict[str, Any]] = []
    for task in (t for t in a.results["tasks"] if t in b.results["tasks"]):
        ours, theirs = a.results["tasks"][task], b.results["tasks"][task]
        if ours["task_sha256"] != theirs["task_sha256"]:
            problems.append(f"{task}: {_hashes('task_sha256', ours, theirs)}")
        items, others = a.items(task), b.items(task)
        for metric, score in ours["metrics"].items():
            if metric not in theirs["metrics"]:
                continue
            name, _, kind = metric.partition(",")
            mine, yours = items.get(kind or "none", {}), others.get(kind or "none", {})
            if not (mine and yours):  # no items: whole scores, unpaired
                n = (score["n"], theirs["metrics"][metric]["n"])
                found = _unpaired(score, theirs["metrics"][metric], min(n), same=n[0] == n[1])
                if n[0] != n[1]:
                    notes.append(f"{task} {metric}: of {n[0]} items in {a.name} and {n[1]} in {b.name}: not tested")
                at = [score["value"], theirs["metrics"][metric]["value"]]
                rows.append(_row(task, metric, run, at, found, score.get("higher_is_better")))
                continue
            common = [item for item in mine if item in yours]
            if not common:
                problems.append(f"{task}: no item in common: {_hashes('samples_sha256', ours, theirs)}")
                break
            changed = sum(mine[i]["prompt"] != yours[i]["prompt"] for i in common)
            if metric == next(iter(ours["metrics"])):
                if changed:
                    problems.append(f"{task}: {changed} of {len(common)} prompts differ")
                if len(common) < max(len(mine), len(yours)):
                    notes.append(
                        f"{task}: only the {len(common)} common items of {len(mine)} in {a.name} and {len(yours)} in {b.name}"
                    )
            values = [[rows[i]["scores"].get(name) for i in common] for rows in (mine, yours)]
            whole = [[row["scores"].get(name) for row in rows.values()] for rows in (mine, yours)]
            means = (_is_mean(whole[0], score["value"]), _is_mean(whole[1], theirs["metrics"][metric]["value"]))
            if all(means):
                found = paired(values[0], values[1])
                at = [math.fsum(v) / len(v) for v in values]
            else:  # a metric of the whole set, like a corpus perplexity
                same = len(common) == len(mine) == len(yours)
                found = _unpaired(score, theirs["metrics"][metric], len(common), same)
                at = [score["value"], theirs["metrics"][metric]["value"]]
            rows.append(_row(task, metric, run, at, found, score.get("higher_is_better")))
    if problems and a.results.get("template_sha256") != b.results.get("template_sha256"):
        problems.append(_hashes("template_sha256", a.results, b.results))
    if problems and not anyway:
        raise SftError(
            f"{a.name} and {b.name} were not asked the same:\n  "
            + "\n  ".join(problems)
            + "\nnext: make the same tasks of"
            " both, with one template and system prompt, or compare nevertheless with ANYWAY=1"
        )
    notes += [f"{b.name} was asked something else: {p}" for p in problems]
    yield from rows
    mine, yours = a.conversations(), b.conversations()
    if common := [item for item in mine if item in yours]:
        if len(common) < max(len(mine), len(yours)):
            notes.append(f"validation: only the {len(common)} common conversations of {len(mine)} and {len(yours)}")
        labels = [mine[i]["labels"] for i in common]
        losses = [[rows[i]["loss"] for i in common] for rows in (mine, yours)]
        found = paired_ratio(losses[0], losses[1], labels)
        yield _row("validation", "loss", run, [math.fsum(x) / sum(labels) for x in losses], found, False)
    elif mine and yours:
        notes.append(f"validation: no conversation in common with {b.name} (another split or tokenizer): not compared")


def _hashes(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    return f"{name} {str(a.get(name))[:12]} and {str(b.get(name))[:12]}"


def _row(
    task: str, metric: str, run: int, at: Sequence[float], found: Difference, higher_is_better: bool | None
) -> dict[str, Any]:
    row = {"task": task, "metric": metric, "run": run, "higher_is_better": higher_is_better, "a": at[0], "b": at[1]}
    return {**row, **asdict(found), "corrected": None, "mark": ""}


def _is_mean(items: Sequence[Any], value: float) -> bool:
    return all(map(is_number, items)) and math.isclose(math.fsum(items) / len(items), value, rel_tol=1e-9, abs_tol=1e-9)


def _unpaired(a: Mapping[str, Any], b: Mapping[str, Any], n: int, same: bool) -> Difference:
    """Whole scores: only of the same items is a difference the models', and tested."""
    value = b["value"] - a["value"]
    if not same or a["stderr"] is None or b["stderr"] is None or not (a["stderr"] or b["stderr"]):
        return Difference(value, None, None, None, None, n, "none")
    error = math.hypot(a["stderr"], b["stderr"])
    p = math.erfc(abs(value) / error / math.sqrt(2))
    return Difference(value, error, value - Z95 * error, value + Z95 * error, p, n, "unpaired")


def differing_fields(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Options and input files, in the order of the stages, whose values are not the same in all runs."""
    found: dict[str, list[Any]] = {}
    for i, run in enumerate(runs):
        for stage in schema.STAGES:
            try:
                made = manifest.load(run / stage / manifest.NAME)
            except FileNotFoundError:
                continue
            leaves = dict(_leaves(made.config, stage))
            leaves |= {f"{stage}: {e.file}": f"sha256 {e.sha256[:10]}" for e in made.inputs if e.file}
            for name, value in leaves.items():
                found.setdefault(name, [None] * len(runs))[i] = value
    differ = [(name, values) for name, values in found.items() if any(v != values[0] for v in values)]
    order = {stage: i for i, stage in enumerate(schema.STAGES)}
    differ.sort(key=lambda item: order[item[0].replace(":", ".").split(".")[0]])
    return [{"field": name, "values": values} for name, values in differ]


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}")
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{name}.{i}")
    else:
        yield name, value


def verdict(row: Mapping[str, Any]) -> str:
    """'better', 'worse', or '' where the difference is not significant or the metric has no direction."""
    if not row["mark"] or row["higher_is_better"] is None:
        return ""
    return "better" if (row["value"] > 0) == row["higher_is_better"] else "worse"


def p_text(p: float | None) -> str:
    return "–" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def footnote(comparison: Mapping[str, Any]) -> str:
    tested = sum(row["p"] is not None for row in comparison["rows"])
    return (
        f"Item by item. Where answers are right or wrong: McNemar's exact test and Newcombe's interval; elsewhere the paired t test's; a z test for scores of a whole set or without items. * corrected p < 0.05,"
        f" ** < 0.01, *** < 0.001 (Holm's correction for {tested} comparison{'s' if tested != 1 else ''})."
    )


def text(comparison: Mapping[str, Any], colour: bool = False) -> str:
    """The comparison as lines for a terminal."""
    names = comparison["runs"]
    width = max(len(n) for n in names)
    lines = [f"{LETTERS[i]}  {name:{width}}" + ("  the baseline" if i == 0 else "") for i, name in enumerate(names)]
    lines += ["", *(f"note: {note}" for note in comparison["notes"]), *([""] if comparison["notes"] else [])]
    head = ["task", "metric", "", "n", "A", "other", "difference", "std. error", "95 % interval", "p", "", ""]
    table = []
    for row in comparison["rows"]:
        digits = 4 if max(abs(row["a"]), abs(row["b"])) < 100 else 2
        interval = "–" if row["low"] is None else f"{row['low']:+.{digits}f} to {row['high']:+.{digits}f}"
        error = "–" if row["stderr"] is None else f"{row['stderr']:.{digits}f}"
        table.append(
            [row["task"], row["metric"], LETTERS[row["run"]], f"{row['n']:,}", f"{row['a']:.{digits}f}", f"{row['b']:.{digits}f}",
             f"{row['value']:+.{digits}f}", error, interval, p_text(row["p"]), row["mark"], verdict(row)]
        )  # fmt: skip
    lines += aligned(head, table, left=(0, 1, 2, 10, 11))
    if colour:
        for word, code in (("better", 32), ("worse", 31)):
            lines = [f"\x1b[{code}m{line}\x1b[0m" if line.endswith(word) else line for line in lines]
    lines += ["", footnote(comparison), ""]
    if comparison["fields"]:
        fields = [[f["field"], *(show(v) for v in f["values"])] for f in comparison["fields"]]
        lines += aligned(["options that differ", *LETTERS[: len(names)]], fields, left=range(len(names) + 1))
    else:
        lines.append("no option differs")
    return "\n".join(line.rstrip() for line in lines)


def show(value: Any) -> str:
    """An option's value; long ones are cut."""
    shown = (
        "–" if value is None else value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    )
    return shown if len(shown) <= 48 else shown[:45] + "…"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] | range) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
