"""compare/<other runs>.json: the scores of runs against those of the first, item by item. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sft.formats.record import Record
from sft.formats.results import HasInterval

_FIRST = ("task", "metric", "run", "higher_is_better", "a", "b")
"""The fields that a row of the file begins with."""


@dataclass(frozen=True)
class Difference(HasInterval):
    """b - a over n items, with its standard error, its 95 % interval (low, high) and the p value of `test`.

    A number is None where it cannot be computed, such as the interval of a single item.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    test: str


@dataclass(frozen=True, kw_only=True)
class ScoreDifference(Difference):
    """One metric of one run against the first run.

    `run` is an index into Comparison.runs. `a` and `b` are the scores of the first run and of this one on the n common
    items. `corrected` is p after Holm's correction over all differences. `mark` has a star for each level of
    significance that it reaches.
    """

    task: str
    metric: str
    run: int
    higher_is_better: bool | None
    a: float
    b: float
    corrected: float | None
    mark: str

    @property
    def verdict(self) -> str:
        """'better', 'worse', or '' for a difference that is not significant and for a metric without a direction."""
        if not self.mark or self.higher_is_better is None:
            return ""
        return "better" if (self.value > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class OptionDifference:
    """An option or input file that is not the same in all runs: its value in each run."""

    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Comparison(Record):
    """The first of `runs` is the baseline. `notes` say what could not be compared."""

    NEXT: ClassVar[str] = "make compare again"
    runs: tuple[str, ...]
    notes: tuple[str, ...]
    rows: tuple[ScoreDifference, ...]
    fields: tuple[OptionDifference, ...]

    def to_value(self) -> dict[str, Any]:
        value = super().to_value()
        value["rows"] = [{**{name: row[name] for name in _FIRST}, **row} for row in value["rows"]]
        return value
