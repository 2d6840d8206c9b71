"""The curves of trainings: of one for its report, and of several over each other, with the options that differ. No scores are needed.

In:  train/metrics.jsonl of each run, also of one that still trains; the manifests of finished stages.
Out: `compare` the numbers, `text` a table for a terminal, charts for pages. Standard library only.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.common import columns
from sft.common.errors import SftError
from sft.evaluation.compare import LETTERS, differing_options, show
from sft.formats import metrics
from sft.formats.comparison import OptionDifference
from sft.formats.metrics import Attempt, InitialValidation, MetricsRecord, StepRecord
from sft.reporting import charts
from sft.reporting.charts import Chart, Line, Points
from sft.runner import continuation

AXES = ("step", "tokens", "hours of training")
MOST_SOURCES = 24
"""Sources with a curve. The table of a comparison has all."""
Value = Callable[[StepRecord], float | None]


@dataclass(frozen=True)
class Training:
    """A run's steps so far. `hours` are those of all steps before and with each step."""

    name: str
    steps: Sequence[StepRecord]
    hours: Sequence[float]
    start: InitialValidation | None = None

    def points(self, value: Value, start: float | None = None) -> Points:
        """(step, tokens, hours, value) where it was measured. `start` is that of the weights that training started from."""
        before = self.start or InitialValidation(0.0)
        first = [] if start is None else [(before.after_step or 0, before.after_tokens or 0, 0.0, start)]
        found = [*first, *((s.step, s.tokens, h, value(s)) for s, h in zip(self.steps, self.hours, strict=True))]
        return [(step, tokens, hours, y) for step, tokens, hours, y in found if y is not None and math.isfinite(y)]

    def losses(self, source: str = "") -> Points:
        """The training loss of all data or of a source."""
        return self.points(lambda s: (s.sources or {}).get(source) if source else s.loss)

    def validations(self, source: str = "") -> Points:
        """The validation loss of all data or of a source, from the starting weights on."""
        start = {**(self.start.sources or {}), "": self.start.initial_validation_loss} if self.start else {}
        return self.points(
            lambda s: (s.validation_sources or {}).get(source) if source else s.validation_loss, start.get(source)
        )

    @property
    def sources(self) -> list[str]:
        """The sources with a loss of their own."""
        return list(dict.fromkeys(n for s in self.steps for n in (*(s.sources or ()), *(s.validation_sources or ()))))

    @property
    def loss(self) -> float:
        """The smoothed training loss at the end."""
        return _last(charts.smooth(self.losses()))

    @property
    def validation(self) -> float:
        """The last validation loss; NaN if there is none."""
        return _last(self.points(lambda s: s.validation_loss))

    @property
    def best(self) -> float:
        """What trainings are ordered by: the validation loss, else the training loss. Lower is better."""
        return self.validation if math.isfinite(self.validation) else self.loss


@dataclass(frozen=True)
class Compared:
    """Trainings, the best first, and the options in which they differ."""

    trainings: Sequence[Training]
    options: Sequence[OptionDifference]


def _last(points: Points) -> float:
    return points[-1][-1] if points else math.nan


def training(run: Path) -> Training:
    """The training of a run. Raises SftError where it has no steps yet."""
    found = of_records(run.name, joined(run))
    if not found.steps:
        raise SftError(f"{run / 'train' / metrics.NAME}: no steps yet; next: make train for {run.name}")
    return found


def joined(run: Path) -> list[MetricsRecord]:
    """The records of a run's training, behind those of the trainings that it continues with the same data, as far as they are
    on this machine: their steps, and the validation of their starting weights."""
    records = metrics.read_metrics(run / "train" / metrics.NAME)
    first = next((r for r in records if isinstance(r, Attempt)), None)
    if first is None or not first.continues or not first.from_step:
        return records
    other = continuation.run_of(first.continues)
    earlier = joined(run.parent / other) if other else []
    before = [r for r in earlier if isinstance(r, InitialValidation) or (isinstance(r, StepRecord) and r.step <= first.from_step)]  # fmt: skip
    if not any(isinstance(r, StepRecord) for r in before):
        return records
    return [*before, *(r for r in records if not isinstance(r, InitialValidation))]


def of_records(name: str, records: Sequence[MetricsRecord]) -> Training:
    steps = [r for r in records if isinstance(r, StepRecord)]
    hours = [seconds / 3600 for seconds in itertools.accumulate(step.seconds for step in steps)]
    return Training(name, steps, hours, metrics.initial_validation(records))


def compare(runs: Sequence[Path]) -> Compared:
    """The trainings of these runs, the best first. Raises SftError."""
    found = sorted(((training(run), run) for run in runs), key=lambda item: (math.isnan(item[0].best), item[0].best))
    return Compared([t for t, _ in found], differing_options([run for _, run in found]))


def text(compared: Compared) -> str:
    """A table for a terminal, then the options that differ."""
    rows = [("RUN", "", "STEP", "LOSS", "VALIDATION", "TOKENS/S")]
    for letter, t in zip(letters(), compared.trainings, strict=False):
        rows.append(
            (t.name, letter, str(t.steps[-1].step), f"{t.loss:.4f}", _number(t.validation), f"{_speed(t):,.0f}")
        )
    lines = [columns.table(rows, right=(2, 3, 4, 5))]
    for option in compared.options:
        lines.append(columns.cut(f"{option.field}: {' | '.join(show(v) for v in option.values)}", columns.WIDTH))
    return "\n".join(lines)


def over_each_other(trainings: Sequence[Training]) -> list[Chart]:
    """Training losses, smoothed, and validation losses, of all data and of every source, with a line for each training."""
    found = []
    for source in ["", *dict.fromkeys(name for t in trainings for name in t.sources)][: MOST_SOURCES + 1]:
        of = f" of {source}" if source else ""
        losses = [Line(t.name, charts.smooth(t.losses(source)), i) for i, t in enumerate(trainings)]
        validations = [Line(t.name, t.validations(source), i, "dots") for i, t in enumerate(trainings)]
        found += [charts.lines(f"training loss{of}, smoothed", losses, AXES, zoom=not source),
                  charts.lines(f"validation loss{of}", validations, AXES, zoom=not source)]  # fmt: skip
    return [chart for chart in found if chart]


def of_one(records: Sequence[MetricsRecord]) -> dict[str, Any]:
    """The charts of one training: losses, losses by source, and the other numbers of a step. What was not measured has none."""
    t = of_records("", records)
    sources = list(enumerate(t.sources[:MOST_SOURCES]))
    lines = [Line("training loss", t.losses(), 0, "thin"), Line("smoothed", charts.smooth(t.losses())),
             Line("validation loss", t.validations(), 1, "dots")]  # fmt: skip
    by_source = [charts.lines("training loss by source, smoothed", [Line(s, charts.smooth(t.losses(s)), i) for i, s in sources], AXES),
                 charts.lines("validation loss by source", [Line(s, t.validations(s), i, "dots") for i, s in sources], AXES)]  # fmt: skip
    small = [charts.lines(title, _lines(t, name, title)) for name, title in StepRecord.charts().items()]
    return {
        "loss": charts.lines("loss", lines, AXES, zoom=True),
        "sources": by_source,
        "small": small,
        "notes": list(_notes(records, t)),
    }


def _lines(t: Training, field: str, title: str) -> list[Line]:
    """The line of a number of a step, or one for each name of a mapping."""
    values = [getattr(step, field) for step in t.steps]
    names = list(dict.fromkeys(name for value in values if isinstance(value, Mapping) for name in value))
    if not names:
        return [Line(title, t.points(operator.attrgetter(field)))]
    return [Line(name, t.points(functools.partial(_named, field, name)), i) for i, name in enumerate(names)]


def _named(field: str, name: str, step: StepRecord) -> float | None:
    """A value of a mapping of a step."""
    value: float | None = (getattr(step, field) or {}).get(name)
    return value


def _notes(records: Sequence[MetricsRecord], t: Training) -> Iterable[str]:
    if (count := len(t.steps)) > charts.MAX_POINTS:
        yield f"Of {count:,} steps each point of a curve is the mean of {math.ceil(count / charts.MAX_POINTS)}."
    if len(t.sources) > MOST_SOURCES:
        yield f"{MOST_SOURCES} of {len(t.sources)} sources have a curve."
    if skipped := sum(1 for r in t.steps if r.skipped):
        yield f"Steps skipped because their loss or gradient was a spike or not finite: {skipped}."
    first = next((r for r in records if isinstance(r, Attempt)), None)
    if first and first.continues:
        if not first.from_step:
            yield f"It continues {first.continues} with other data or another order of them: its steps count from 0."
        elif t.steps and t.steps[0].step <= first.from_step:
            yield f"It continues {first.continues}: the curves up to step {first.from_step:,} are of that run."
        else:
            yield f"It continues {first.continues}, whose metrics are not here: the curves begin there."
    if resumed := [r.from_step for r in records if isinstance(r, Attempt) and r.attempt > 1]:
        yield f"Attempts: {len(resumed) + 1}, continued from step {', '.join(f'{n:,}' for n in resumed)}."


HEAD = ["", "run", "#steps", "#tokens", "#loss", "#validation loss", "#tokens/s", "#hours"]


def table(trainings: Sequence[Training], marks: Mapping[str, str]) -> list[list[str]]:
    """A row for each training with the letter of its run."""
    return [
        [marks[t.name], t.name, f"{t.steps[-1].step:,}", f"{t.steps[-1].tokens:,}", f"{t.loss:.4f}", _number(t.validation), f"{_speed(t):,.0f}",
         f"{t.hours[-1]:.2f}"]
        for t in trainings
    ]  # fmt: skip


def sources(trainings: Sequence[Training]) -> list[list[str]]:
    """The last validation loss of every source, a column for each training; empty where sources were not measured."""
    last = [next((s.validation_sources for s in reversed(t.steps) if s.validation_sources), {}) for t in trainings]
    names = dict.fromkeys(name for found in last for name in found)
    return [[name, *(_number(found.get(name, math.nan)) for found in last)] for name in names]


def letters() -> Iterable[str]:
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
