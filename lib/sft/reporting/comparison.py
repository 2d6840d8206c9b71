"""The page of a comparison of runs: scores item by item, curves over each other, replies side by side; and its short form in the report.

In:  the folders of the runs, and the Comparison of their scores where all have some.
Out: one HTML page. `save` and `draw` need the standard library only; the page is drawn by the environment's Python.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sft.common.errors import SftError
from sft.common.paths import REPO
from sft.evaluation.compare import LETTERS, compare, footnote, p_text, show
from sft.formats import manifest, metrics
from sft.formats.comparison import Comparison, OptionDifference, ScoreDifference
from sft.recipe.recipe import BASELINE
from sft.reporting import charts, trainings
from sft.reporting.charts import Chart

KINDS = {"better": "good", "worse": "bad"}
"""CSS class of each verdict."""


def save(comparison: Comparison, folder: Path) -> Path:
    """Writes <others>.json into the folder. Returns the page that belongs to it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{_name(comparison.runs[1:])}.json"
    comparison.write(file)
    return file.with_suffix(".html")


def curves_page(runs: Sequence[Path]) -> Path:
    """The page of runs of which not all have scores."""
    return runs[0] / "compare" / f"{_name([run.name for run in runs[1:]])}-training.html"


def _name(others: Sequence[str]) -> str:
    name = "+".join(others)
    return name if len(name) <= 150 else f"{name[:130]}+{len(others)}-runs"


def draw(page: Path, runs: Sequence[Path]) -> str:
    """Has the environment write the page; returns its name, or why there is none. Raises SftError where that fails."""
    python = REPO / ".venv" / "bin" / "python"
    if not python.exists():
        return f"no page: it is drawn by the packages of .venv, which is not there; next: make setup, then compare again ({page})"
    page.parent.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", "sft.reporting", "--", str(page), *map(str, runs)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(REPO / "lib")}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SftError(f"{page}: not drawn: {done.stderr.strip()[-2000:]}")
    return str(page)


def of_trainings(runs: Sequence[Path], page: Path) -> str:
    """What a terminal shows of the runs that have steps, with the name of their page; "" for fewer than two of them."""
    trained = with_steps(runs)
    return f"{trainings.text(trainings.compare(trained))}\n\n{draw(page, trained)}" if len(trained) > 1 else ""


def with_steps(runs: Sequence[Path]) -> list[Path]:
    return [run for run in runs if (run / "train" / metrics.NAME).is_file()]


def difference_charts(comparison: Comparison) -> list[Chart]:
    """The differences with their intervals: those of shares, and those of losses and other scales."""
    many, found = len(comparison.runs) > 2, []
    for title, are_shares in (("Scores from 0 to 1", True), ("Losses and other scales", False)):
        points = [
            charts.Interval(f"{r.task} {r.metric}" + (f" · {LETTERS[r.run]}" if many else ""), r.value, *r.bounds, KINDS.get(r.verdict, ""))
            for r in comparison.rows
            if r.bounds and is_share(r) == are_shares
        ]  # fmt: skip
        found.append(charts.intervals(f"{title}: difference from A with its 95 % interval", points))
    return [chart for chart in found if chart]


def is_share(row: ScoreDifference) -> bool:
    """Whether the two scores are between 0 and 1."""
    return row.task not in ("validation", "plain text") and min(row.a, row.b) >= 0 and max(row.a, row.b) <= 1


def score_rows(comparison: Comparison) -> list[list[str]]:
    """One row for each metric and run; a task's name is only in its first row."""
    rows = []
    for task, found in itertools.groupby(comparison.rows, key=lambda row: row.task):
        for i, r in enumerate(found):
            error = "–" if r.stderr is None else f"{r.stderr:.4f}"
            bounds = "–" if r.bounds is None else f"{r.low:+.4f} to {r.high:+.4f}"
            rows.append([task if i == 0 else "", r.metric, LETTERS[r.run], f"{r.n:,}", f"{r.a:.4f}", f"{r.b:.4f}", f"{r.value:+.4f}", error,
                         bounds, p_text(r.p), f"{r.mark} {r.verdict}".strip()])  # fmt: skip
    return rows


def option_rows(options: Sequence[OptionDifference]) -> list[list[str]]:
    return [[option.field, *map(show, option.values)] for option in options]


def of_scores(comparison: Comparison, *, plots: bool = True) -> dict[str, object]:
    """What the page and the report show of the differences of scores."""
    return {"notes": comparison.notes, "charts": difference_charts(comparison) if plots else [], "rows": score_rows(comparison),
            "footnote": footnote(comparison)}  # fmt: skip


def with_baseline(run: Path) -> Comparison | None:
    """The differences to the model that training started from, item by item; None without its scores (make baseline)."""
    baseline = run.with_name(run.name + BASELINE)
    return compare([baseline, run]) if (baseline / "evaluate" / manifest.NAME).is_file() else None


def in_report(run: Path) -> list[Comparison]:
    """The comparisons with this run as the first one. Raises SftError for a damaged one."""
    return [Comparison.read(file) for file in sorted((run / "compare").glob("*.json"))]
