"""Replies to read: a page for each task of a run, and those of several runs side by side.

In:  evaluate's results.json and samples of a run, and of its baseline or of other runs.
Out: replies/<task>.html in the report's folder, and the data of the viewer in a page: the browser filters, searches and exports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.evaluation.scores import as_tuple, is_number, json_hash
from sft.formats import manifest
from sft.formats.lines import read_lines
from sft.formats.results import NAME, SAMPLES, Results, TaskResult
from sft.formats.samples import Sample
from sft.recipe.recipe import BASELINE
from sft.reporting.page import render

FOLDER = "replies"
MOST_BYTES = 24_000_000
"""Of a page's items. What comes last in their order is left out, which the page says."""
CUT = ("length", "unclosed thought")
Samples = Mapping[str, Sample]
"""By question."""


class Scored:
    """The results and samples of a run; none of a run that is not evaluated, or by a harness of AI2, whose records are others."""

    def __init__(self, run: Path) -> None:
        self.run = run
        found = None
        if (file := run / "evaluate" / manifest.NAME).is_file():
            if broken := manifest.broken_outputs(file.parent, manifest.load(file).outputs):
                raise SftError(f"{broken[0]}; next: make verify RUN={run.name}")
            found = Results.read(file.with_name(NAME))
        self.tasks: Mapping[str, TaskResult] = found.tasks if found and found.harness is None else {}

    def samples(self, task: str) -> Samples:
        """Those of the primary metric's filter."""
        if task not in self.tasks:
            return {}
        result = self.tasks[task]
        wanted = result.primary[0].partition(",")[2] or "none"
        file = self.run / "evaluate" / (result.samples or f"{SAMPLES}/{task}.jsonl")
        return {_key(s): s for s in read_lines(Sample, file) if s.filter == wanted}


def write(run: Path, target: Path) -> list[str]:
    """Writes the pages of a run's tasks under `target` and returns their names."""
    scored, baseline = Scored(run), Scored(run.with_name(run.name + BASELINE))
    names = []
    for task, result in scored.tasks.items():
        if samples := scored.samples(task):
            name = f"{FOLDER}/{task}.html"
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target / name, page(run.name, task, result, samples, baseline.samples(task)).encode())
            names.append(name)
    return names


def page(run: str, task: str, result: TaskResult, samples: Samples, before: Samples) -> str:
    """The HTML of one task, beside the baseline's replies where there are some."""
    columns = [samples, before] if before else [samples]
    found = items(task, result, columns, flagged=1)
    names = [run, run + BASELINE][: len(columns)]
    facts = [("run", run), *([("against", run + BASELINE)] if before else [])]
    data = {"columns": names, "changed": "changed since the baseline", "tasks": [found]}
    return render("replies.html.jinja", ["replies.js"], title=task, facts=facts, items=data)


def side_by_side(runs: Sequence[Path]) -> dict[str, Any] | None:
    """The replies of several runs to the tasks that two or more of them have; None where there are none."""
    scored = [Scored(run) for run in runs]
    results = {task: result for s in scored for task, result in s.tasks.items()}
    shared = [task for task in results if sum(task in s.tasks for s in scored) > 1]
    found = (items(t, results[t], [s.samples(t) for s in scored], len(scored), 1 / len(shared)) for t in shared)
    tasks = [task for task in found if task["items"]]
    columns = {"columns": [run.name for run in runs], "changed": "not the same score in all"}
    return {**columns, "tasks": tasks} if tasks else None


def items(
    task: str, result: TaskResult, columns: Sequence[Samples], flagged: int, share: float = 1.0
) -> dict[str, Any]:
    """The items of a task: those that changed first, then the worst. `flagged`: how many columns make an item wrong or cut.

    The first column of a page of one run has its samples whole, so that its export is theirs. Others leave out the documents.
    """
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = sorted(([column.get(key) for column in columns] for key in keys), key=lambda row: _order(result, row))
    shown, left = [], MOST_BYTES * share
    for row in rows:
        known = [s for s in row[:flagged] if s]
        item = {
            "rows": [_row(s, whole=flagged == 1 and i == 0) for i, s in enumerate(row)],
            "wrong": any(is_wrong(result, s) for s in known), "cut": any(map(is_cut, known)), "changed": _changed(result, row),
        }  # fmt: skip
        left -= len(json.dumps(item))
        if left < 0:
            break
        shown.append(item)
    return {"name": task, "items": shown, "left": len(keys) - len(shown)}


def _row(sample: Sample | None, *, whole: bool) -> dict[str, Any] | None:
    if sample is None:
        return None
    return {k: v for k, v in sample.to_value().items() if whole or k not in ("doc", "filtered", "of_replies")}


def score(result: TaskResult, sample: Sample) -> float | None:
    """The primary metric of an item, signed so that more is better."""
    name, about = result.primary
    value = sample.scores.get(name.partition(",")[0])
    return (float(value) if about.higher_is_better is not False else -float(value)) if is_number(value) else None


def is_wrong(result: TaskResult, sample: Sample) -> bool:
    value = score(result, sample)
    return value is not None and value < (1 if result.primary[1].higher_is_better is not False else 0)


def is_cut(sample: Sample) -> bool:
    return sample.ended_by is not None and any(end in CUT for end in as_tuple(sample.ended_by))


def worst(result: TaskResult, samples: Samples) -> list[Sample]:
    """The samples of generated replies, those with the lowest score first, of these the ones that were cut."""
    found = [s for s in samples.values() if s.ended_by is not None]
    return sorted(found, key=lambda s: _order(result, [s]))


def _changed(result: TaskResult, row: Sequence[Sample | None]) -> bool:
    return len({score(result, s) for s in row if s}) > 1


def _order(result: TaskResult, row: Sequence[Sample | None]) -> tuple[bool, float, bool]:
    values = [value for s in row if s and (value := score(result, s)) is not None]
    return not _changed(result, row), min(values, default=0.0), not any(is_cut(s) for s in row if s)


def _key(sample: Sample) -> str:
    return f"{sample.doc_id} {json_hash([sample.doc, sample.target])[:16]}"
