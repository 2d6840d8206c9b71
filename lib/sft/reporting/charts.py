"""The data of charts, which charts.js in a page draws with Vega-Lite. Standard library only.

{"kind": "lines", "title", "zoom": an overview to zoom in below it, "axes": names of the x axes, "log_x": they are logarithmic,
 "lines": [{"name", "colour": 0 to 7, "kind": line | thin | dots, "points": [[x of each axis …, y], …], "spread": [[x, low, high], …]}]}
{"kind": "bars", "title", "x", "bars": [{"label", "value", "title"}]}
{"kind": "intervals", "title", "domain": of the x axis or null, "points": [{"name", "value", "low", "high", "kind"}]}
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_POINTS = 600
"""Points of a line; of more, neighbours become their mean."""
SMOOTHED = 0.03
"""The window of a smoothed line, as a share of its points."""
COLOURS = 8
"""More lines begin with the first colour again."""
Chart = dict[str, Any]
Points = Sequence[tuple[float, ...]]
"""The x of each axis, then y."""


@dataclass(frozen=True)
class Line:
    """A series. `spread` has (x, low, high) error bars."""

    name: str
    points: Points
    colour: int = 0
    kind: str = "line"
    spread: Points = ()


def lines(
    title: str, series: Sequence[Line], axes: Sequence[str] = ("step",), *, zoom: bool = False, log_x: bool = False
) -> Chart | None:
    """Lines over one or several x axes, which are logarithmic with `log_x`. None without a point."""
    found = [{**vars(s), "colour": s.colour % COLOURS, "points": thin(s.points)} for s in series if s.points]
    chart = {
        "kind": "lines",
        "title": title,
        "zoom": zoom,
        "axes": axes,
        "lines": found,
        **({"log_x": True} if log_x else {}),
    }
    return chart if found else None


def bars(title: str, x: str, values: Sequence[tuple[str, float, str]]) -> Chart | None:
    """Vertical bars of (label, value, text of the tooltip)."""
    found = [{"label": label, "value": value, "title": text} for label, value, text in values]
    return {"kind": "bars", "title": title, "x": x, "bars": found} if found else None


@dataclass(frozen=True)
class Interval:
    """A value with its interval; `kind` is good, bad or empty."""

    name: str
    value: float
    low: float
    high: float
    kind: str = ""


def intervals(title: str, points: Sequence[Interval], domain: tuple[float, float] | None = None) -> Chart | None:
    """Values with their intervals, one below the other."""
    return (
        {"kind": "intervals", "title": title, "domain": domain, "points": [vars(p) for p in points]} if points else None
    )


def thin(points: Points) -> Points:
    """At most MAX_POINTS points and the last one: each the mean of a group of neighbours, at the x of the middle one."""
    size = math.ceil((len(points) - 1) / MAX_POINTS) if len(points) > MAX_POINTS else 1
    groups = [points[i : min(i + size, len(points) - 1)] for i in range(0, len(points) - 1, size)]
    means = [(*g[len(g) // 2][:-1], sum(p[-1] for p in g) / len(g)) for g in groups]
    return [tuple(float(f"{value:.10g}") for value in point) for point in (*means, points[-1])]


def smooth(points: Points) -> Points:
    """The mean over a window of SMOOTHED of all points around each point.

    The window narrows towards both ends, so that the curve does not lag behind a falling one.
    """
    half = max(1, round(SMOOTHED * len(points) / 2))
    total = [0.0, *itertools.accumulate(p[-1] if math.isfinite(p[-1]) else 0.0 for p in points)]
    count = [0, *itertools.accumulate(math.isfinite(p[-1]) for p in points)]
    result = []
    for i, point in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        a, b = i - reach, i + reach + 1
        result.append(
            (*point[:-1], (total[b] - total[a]) / (count[b] - count[a]) if count[b] > count[a] else point[-1])
        )
    return result


def number(value: float) -> str:
    """A short form: 1,319; 1.3M; 0.25; 3e-05."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:,.0f}" if size >= 1000 or value == int(value) else f"{value:.3g}"
