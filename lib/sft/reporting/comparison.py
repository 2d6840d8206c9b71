"""The HTML page of a comparison of runs, and its short form in the report.

In: what sft.evaluation.compare found. Out: HTML text that asks nothing of the network. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sft.common.files import write_atomic
from sft.evaluation.compare import LETTERS, footnote, p_text, show, verdict
from sft.reporting import charts
from sft.reporting.page import document, table


def write(comparison: Mapping[str, Any], folder: Path) -> Path:
    """Writes <others>.json and <others>.html into the folder; returns the page."""
    folder.mkdir(exist_ok=True)
    name = "+".join(comparison["runs"][1:])
    if len(name) > 150:
        name = name[:130] + f"+{len(comparison['runs']) - 1}-runs"
    write_atomic(folder / f"{name}.json", json.dumps(comparison, indent=1, ensure_ascii=False).encode() + b"\n")
    page = folder / f"{name}.html"
    write_atomic(page, html(comparison).encode())
    return page


def html(comparison: Mapping[str, Any]) -> str:
    names = comparison["runs"]
    sections = [("Runs", runs(names)), ("Differences", differences(comparison)), ("Options", options(comparison))]
    notes = "".join(f'<p class="note bad">{escape(note)}</p>' for note in comparison["notes"])
    return document(f"{', '.join(names[1:])} against {names[0]}", sections, notes)


def runs(names: Sequence[str]) -> str:
    rows = [[LETTERS[i], escape(name) + (" (the baseline)" if i == 0 else "")] for i, name in enumerate(names)]
    return table(["", "run"], rows)


def differences(comparison: Mapping[str, Any]) -> str:
    """A plot of the differences with their intervals, shares apart from losses and other scales, then the table."""
    many = len(comparison["runs"]) > 2
    plots = ""
    for title, are_shares in (("Scores from 0 to 1", True), ("Losses and other scales", False)):
        rows = [r for r in comparison["rows"] if is_share(r) == are_shares and r["low"] is not None]
        points = [
            charts.Interval(
                f"{r['task']} {r['metric']}" + (f" · {LETTERS[r['run']]}" if many else ""),
                r["value"], r["low"], r["high"], {"better": "good", "worse": "bad"}.get(verdict(r), ""),
            )
            for r in rows
        ]  # fmt: skip
        if points:
            plots += f"<h3>{title}: difference from A with its 95 % interval</h3>" + charts.intervals(
                points, width=1040
            )
    return plots + score_table(comparison) + f'<p class="note">{escape(footnote(comparison))}</p>'


def is_share(row: Mapping[str, Any]) -> bool:
    return row["task"] != "validation" and min(row["a"], row["b"]) >= 0 and max(row["a"], row["b"]) <= 1


def score_table(comparison: Mapping[str, Any]) -> str:
    rows = []
    before = ""
    for r in comparison["rows"]:
        kind = {"better": "good", "worse": "bad"}.get(verdict(r), "")
        said = f'<b class="{kind}">{escape(r["mark"])}&nbsp;{verdict(r)}</b>' if kind else escape(r["mark"])
        rows.append(
            [
                "" if r["task"] == before else escape(r["task"]),
                escape(r["metric"]),
                LETTERS[r["run"]],
                f"{r['n']:,}",
                f"{r['a']:.4f}",
                f"{r['b']:.4f}",
                f"<b>{r['value']:+.4f}</b>",
                "–" if r["stderr"] is None else f"{r['stderr']:.4f}",
                "–" if r["low"] is None else f"{r['low']:+.4f} to {r['high']:+.4f}",
                p_text(r["p"]),
                said,
            ]
        )
        before = r["task"]
    head = ["task", "metric", "run", "n", "A", "run’s", "difference", "standard error", "95 % interval", "p", ""]
    return table(head, rows, numbers=(3, 4, 5, 6, 7, 8, 9))


def options(comparison: Mapping[str, Any]) -> str:
    if not comparison["fields"]:
        return '<p class="none">no option differs</p>'
    rows = [
        [f"<code>{escape(f['field'])}</code>", *(escape(show(v)) for v in f["values"])] for f in comparison["fields"]
    ]
    return table(["option", *LETTERS[: len(comparison["runs"])]], rows)


def in_report(run: Path) -> str:
    """The comparisons that were made of a run, newest options and scores of each, for its report."""
    parts = []
    for file in sorted((run / "compare").glob("*.json")):
        try:
            found = json.loads(file.read_bytes())
            names = ", ".join(f"{LETTERS[i]} = {name}" for i, name in enumerate(found["runs"]))
            parts.append(f"<h3>{escape(names)}</h3>" + score_table(found) + options(found))
        except (OSError, ValueError, KeyError):
            parts.append(f'<p class="bad">{escape(file.name)} is torn; next: make compare again</p>')
    return "".join(parts)
