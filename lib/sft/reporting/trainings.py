"""Compares trainings: their loss and validation curves over each other, and the options that differ. No scores are needed.

In:  train/metrics.jsonl of each run, also of one that still trains; the manifests of finished stages.
Out: `compare` the numbers, `text` a table for a terminal, `html` a page that loads nothing from the network. Standard library only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from sft.common import columns
from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.evaluation.compare import LETTERS, differing_options, show
from sft.formats import metrics
from sft.formats.comparison import OptionDifference
from sft.formats.metrics import StepRecord
from sft.reporting import charts
from sft.reporting.charts import Line
from sft.reporting.page import document, table

COLOURS = 8
"""Runs with a colour of their own; more runs begin with the first colour again."""
AXES: dict[str, str] = {"step": "step", "tokens": "tokens", "hours": "hours of training"}


@dataclass(frozen=True)
class Training:
    """A run's steps so far. `hours` are those of all steps before and with each step."""

    name: str
    steps: Sequence[StepRecord]
    hours: Sequence[float]

    def points(self, axis: str, value: Callable[[StepRecord], float | None]) -> list[tuple[float, float]]:
        """(x, y) of the steps that have the value."""
        xs = self.hours if axis == "hours" else [float(getattr(s, axis)) for s in self.steps]
        found = ((x, value(s)) for x, s in zip(xs, self.steps, strict=True))
        return [(x, y) for x, y in found if y is not None and math.isfinite(y)]

    @property
    def loss(self) -> float:
        """The smoothed training loss at the end."""
        return _last(charts.smooth(self.points("step", lambda s: s.loss)))

    @property
    def validation(self) -> float:
        """The last validation loss; NaN if there is none."""
        return _last(self.points("step", lambda s: s.validation_loss))

    @property
    def best(self) -> float:
        """What trainings are ordered by: the validation loss, else the training loss. Lower is better."""
        return self.validation if math.isfinite(self.validation) else self.loss


@dataclass(frozen=True)
class Compared:
    """Trainings, the best first, and the options in which they differ."""

    trainings: Sequence[Training]
    options: Sequence[OptionDifference]


def _last(points: Sequence[tuple[float, float]]) -> float:
    return points[-1][1] if points else math.nan


def training(run: Path) -> Training:
    """The training of a run. Raises SftError where it has no steps yet."""
    steps = metrics.read_steps(run / "train" / metrics.NAME)
    if not steps:
        raise SftError(f"{run / 'train' / metrics.NAME}: no steps yet; next: make train for {run.name}")
    return Training(run.name, steps, [s / 3600 for s in itertools.accumulate(r.seconds for r in steps)])


def compare(runs: Sequence[Path]) -> Compared:
    """The trainings of these runs, the best first. Raises SftError."""
    found = sorted(((training(run), run) for run in runs), key=lambda item: _order(item[0].best))
    return Compared([t for t, _ in found], differing_options([run for _, run in found]))


def _order(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def text(compared: Compared) -> str:
    """A table for a terminal, then the options that differ."""
    rows = [("RUN", "", "STEP", "LOSS", "VALIDATION", "TOKENS/S")]
    for letter, t in zip(_letters(), compared.trainings, strict=False):
        rows.append(
            (t.name, letter, str(t.steps[-1].step), f"{t.loss:.4f}", _number(t.validation), f"{_speed(t):,.0f}")
        )
    lines = [columns.table(rows, right=(2, 3, 4, 5))]
    for option in compared.options:
        lines.append(columns.cut(f"{option.field}: {' | '.join(show(v) for v in option.values)}", columns.WIDTH))
    return "\n".join(lines)


def html(compared: Compared) -> str:
    """The page: tables, then curves over steps, tokens and time."""
    title = (
        f"{len(compared.trainings)} trainings"
        if len(compared.trainings) > 2
        else " and ".join(t.name for t in compared.trainings)
    )
    sections = [
        ("Trainings", _table(compared)),
        *((f"Over {name}", _curves(compared.trainings, axis)) for axis, name in AXES.items()),
    ]
    if sources := _sources(compared.trainings):
        sections.append(("By source", sources))
    sections.append(("Options", _options(compared)))
    return document(title, sections)


def _table(compared: Compared) -> str:
    rows = [
        [
            f'<span class="key c{i % COLOURS}">{letter}</span>', escape(t.name), f"{t.steps[-1].step:,}", f"{t.steps[-1].tokens:,}",
            f"{t.loss:.4f}", _number(t.validation), f"{_speed(t):,.0f}", f"{t.hours[-1]:.2f}",
        ]
        for i, (letter, t) in enumerate(zip(_letters(), compared.trainings, strict=False))
    ]  # fmt: skip
    head = ["", "run, the best first", "steps", "tokens", "loss", "validation loss", "tokens/s", "hours"]
    return table(head, rows, numbers=range(2, 8))


def _curves(trainings: Sequence[Training], axis: str) -> str:
    """Smoothed training losses, and validation losses where there are some."""
    parts = ""
    losses = [
        Line(t.name, f"c{i % COLOURS}", charts.smooth(t.points(axis, lambda s: s.loss)))
        for i, t in enumerate(trainings)
    ]
    validation = [
        Line(t.name, f"c{i % COLOURS}", t.points(axis, lambda s: s.validation_loss), dots=True)
        for i, t in enumerate(trainings)
    ]
    for title, lines in (("training loss, smoothed", losses), ("validation loss", validation)):
        if any(line.points for line in lines):
            parts += f"<h3>{title}</h3>" + charts.lines(lines, width=1040, height=320, x_name=AXES[axis], digits=4)
    return parts


def _sources(trainings: Sequence[Training]) -> str:
    """The validation loss of every source at the end, one column for each training; "" where sources were not measured."""
    last = [next((s.validation_sources for s in reversed(t.steps) if s.validation_sources), {}) for t in trainings]
    names = list(dict.fromkeys(name for found in last for name in found))
    rows = [[escape(name), *(_number(found.get(name, math.nan)) for found in last)] for name in names]
    return (
        table(["source", *itertools.islice(_letters(), len(trainings))], rows, numbers=range(1, len(trainings) + 1))
        if rows
        else ""
    )


def _options(compared: Compared) -> str:
    if not compared.options:
        return '<p class="none">no option differs in the finished stages</p>'
    rows = [[f"<code>{escape(o.field)}</code>", *(escape(show(v)) for v in o.values)] for o in compared.options]
    return table(["option", *itertools.islice(_letters(), len(compared.trainings))], rows)


def _letters() -> Iterable[str]:
    """A, B, … Z, A2, B2, …"""
    yield from LETTERS
    for number in itertools.count(2):
        yield from (f"{letter}{number}" for letter in LETTERS)


def _speed(t: Training) -> float:
    timed = t.steps[1:] or t.steps
    seconds = sum(s.seconds for s in timed)
    return sum(s.tokens_per_s * s.seconds for s in timed) / seconds if seconds else 0.0


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def write(runs: Sequence[Path], page: Path) -> str:
    """Writes the page of the runs that have steps. Returns what a terminal shows; "" for fewer than two of them."""
    trained = [run for run in runs if (run / "train" / metrics.NAME).is_file()]
    if len(trained) < 2:
        return ""
    compared = compare(trained)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, html(compared).encode())
    return f"{text(compared)}\n\n{page}"
