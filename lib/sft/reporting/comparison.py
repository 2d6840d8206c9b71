"""The HTML page of a comparison of runs, and its short form in the report.

In: a Comparison of sft.evaluation.compare. Out: HTML text that loads nothing from the network. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.evaluation.compare import LETTERS, compare, footnote, p_text, show
from sft.formats import manifest
from sft.formats.comparison import Comparison, ScoreDifference
from sft.recipe.recipe import BASELINE
from sft.reporting import charts
from sft.reporting.page import document, table

KINDS = {"better": "good", "worse": "bad"}
"""CSS class of each verdict."""


def write(comparison: Comparison, folder: Path) -> Path:
    """Writes <others>.json and <others>.html into the folder; returns the page."""
    folder.mkdir(exist_ok=True)
    name = "+".join(comparison.runs[1:])
    if len(name) > 150:
        name = name[:130] + f"+{len(comparison.runs) - 1}-runs"
    comparison.write(folder / f"{name}.json")
    page = folder / f"{name}.html"
    write_atomic(page, html(comparison).encode())
    return page


def html(comparison: Comparison) -> str:
    """The complete page."""
    names = comparison.runs
    sections = [("Runs", runs(names)), ("Differences", differences(comparison)), ("Options", options(comparison))]
    notes = "".join(f'<p class="note bad">{escape(note)}</p>' for note in comparison.notes)
    return document(f"{', '.join(names[1:])} against {names[0]}", sections, notes)


def runs(names: Sequence[str]) -> str:
    """The letter of each run."""
    rows = [[LETTERS[i], escape(name) + (" (the baseline)" if i == 0 else "")] for i, name in enumerate(names)]
    return table(["", "run"], rows)


def differences(comparison: Comparison) -> str:
    """Plots of the differences with their intervals, one of shares and one of losses and other scales, then the table."""
    many = len(comparison.runs) > 2
    plots = ""
    for title, are_shares in (("Scores from 0 to 1", True), ("Losses and other scales", False)):
        points = [
            charts.Interval(
                f"{r.task} {r.metric}" + (f" · {LETTERS[r.run]}" if many else ""),
                r.value,
                *r.bounds,
                KINDS.get(r.verdict, ""),
            )
            for r in comparison.rows
            if r.bounds and is_share(r) == are_shares
        ]
        if points:
            plots += f"<h3>{title}: difference from A with its 95 % interval</h3>" + charts.intervals(
                points, width=1040
            )
    return plots + score_table(comparison) + f'<p class="note">{escape(footnote(comparison))}</p>'


def is_share(row: ScoreDifference) -> bool:
    """Whether the two scores are between 0 and 1."""
    return row.task != "validation" and min(row.a, row.b) >= 0 and max(row.a, row.b) <= 1


def score_table(comparison: Comparison) -> str:
    """One row for each metric and run; a task's name is only in its first row."""
    rows = []
    before = ""
    for r in comparison.rows:
        kind = KINDS.get(r.verdict, "")
        verdict = f'<b class="{kind}">{escape(r.mark)}&nbsp;{r.verdict}</b>' if kind else escape(r.mark)
        rows.append(
            [
                "" if r.task == before else escape(r.task),
                escape(r.metric),
                LETTERS[r.run],
                f"{r.n:,}",
                f"{r.a:.4f}",
                f"{r.b:.4f}",
                f"<b>{r.value:+.4f}</b>",
                "–" if r.stderr is None else f"{r.stderr:.4f}",
                "–" if r.bounds is None else f"{r.low:+.4f} to {r.high:+.4f}",
                p_text(r.p),
                verdict,
            ]
        )
        before = r.task
    head = ["task", "metric", "run", "n", "A", "run’s", "difference", "standard error", "95 % interval", "p", ""]
    return table(head, rows, numbers=(3, 4, 5, 6, 7, 8, 9))


def options(comparison: Comparison) -> str:
    """The options that differ, with one column for each run."""
    if not comparison.fields:
        return '<p class="none">no option differs</p>'
    rows = [[f"<code>{escape(f.field)}</code>", *(escape(show(v)) for v in f.values)] for f in comparison.fields]
    return table(["option", *LETTERS[: len(comparison.runs)]], rows)


def with_baseline(run: Path) -> str:
    """The differences to the model that training started from, item by item; '' without its scores (make baseline)."""
    baseline = run.with_name(run.name + BASELINE)
    if not (baseline / "evaluate" / manifest.NAME).is_file():
        return ""
    try:
        found = compare([baseline, run])
    except SftError as error:
        return f'<p class="bad">{escape(str(error))}</p>'
    notes = "".join(f'<p class="note bad">{escape(note)}</p>' for note in found.notes)
    return notes + score_table(found)


def in_report(run: Path) -> str:
    """The comparisons with this run as the baseline: the scores and options of each, for its report."""
    parts = []
    for file in sorted((run / "compare").glob("*.json")):
        try:
            found = Comparison.read(file)
        except (OSError, SftError) as error:
            parts.append(f'<p class="bad">{escape(str(error))}</p>')
            continue
        names = ", ".join(f"{LETTERS[i]} = {name}" for i, name in enumerate(found.runs))
        parts.append(f"<h3>{escape(names)}</h3>" + score_table(found) + options(found))
    return "".join(parts)
