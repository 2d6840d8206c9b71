"""The data of charts, which charts.js in a page draws with Vega-Lite. Standard library only.

{"kind": "lines", "title", "zoom": an overview to zoom in below it, "lines": [{"name", "colour": 0 to 7, "kind": line | thin | dots}],
 "views": [{"name": of the x axis, "x": [], "y": [one list for each line, null where it has no point], "low": [], "high": []}]}
{"kind": "bars", "title", "x", "bars": [{"label", "value", "title"}]}
{"kind": "intervals", "title", "domain": of the x axis or null, "points": [{"name", "value", "low", "high", "kind"}]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_POINTS = 600
"""Points of a line; of more, neighbours become their mean."""
SMOOTHED = 0.03
"""The window of a smoothed line, as a share of its points."""
COLOURS = 8
"""More lines begin with the first colour again."""
Chart = dict[str, Any]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A series over one or several x axes: `points` has those over each axis. `spread` has (x, low, high) error bars."""

    name: str
    points: Mapping[str, Points]
    colour: int = 0
    kind: str = "line"
    spread: Sequence[tuple[float, float, float]] = ()


def lines(title: str, series: Sequence[Line], *, zoom: bool = False) -> Chart | None:
    """Lines over the x axes that the first of them has. None without a point."""
    series = [s for s in series if any(s.points.values())]
    if not series:
        return None
    views = []
    for axis in series[0].points:
        xs, ys = columns([s.points[axis] for s in series])
        views.append({"name": axis, "x": xs, "y": ys})
        if spread := {x: (low, high) for x, low, high in series[0].spread}:
            views[-1] |= {
                "low": [spread.get(x, (None,))[0] for x in xs],
                "high": [spread.get(x, (None,))[-1] for x in xs],
            }
    about = [{"name": s.name, "colour": s.colour % COLOURS, "kind": s.kind} for s in series]
    return {"kind": "lines", "title": title, "zoom": zoom, "lines": about, "views": views}


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


def columns(series: Sequence[Points], most: int = MAX_POINTS) -> tuple[list[float], list[list[float | None]]]:
    """All x of several lines, and the y of each line there. Of many x, groups of neighbours become one with the mean of each line.

    The last x stays as it is. Values that are not finite are left out.
    """
    xs = sorted({x for points in series for x, _ in points})
    size = math.ceil((len(xs) - 1) / most) if len(xs) > most else 1
    groups = [*(xs[i : min(i + size, len(xs) - 1)] for i in range(0, len(xs) - 1, size)), xs[-1:]]
    place = {x: i for i, group in enumerate(groups) for x in group}
    ys: list[list[float | None]] = []
    for points in series:
        found: list[list[float]] = [[] for _ in groups]
        for x, y in points:
            if math.isfinite(y):
                found[place[x]].append(y)
        ys.append([float(f"{sum(values) / len(values):.7g}") if values else None for values in found])
    return [group[len(group) // 2] for group in groups], ys


def smooth(points: Points) -> list[tuple[float, float]]:
    """The mean over a window of SMOOTHED of all points around each point.

    The window narrows towards both ends, so that the curve does not lag behind a falling one.
    """
    half = max(1, round(SMOOTHED * len(points) / 2))
    total, count = [0.0], [0]
    for _, y in points:
        good = math.isfinite(y)
        total.append(total[-1] + (y if good else 0.0))
        count.append(count[-1] + good)
    result = []
    for i, (x, y) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        a, b = i - reach, i + reach + 1
        result.append((x, (total[b] - total[a]) / (count[b] - count[a]) if count[b] > count[a] else y))
    return result


def number(value: float) -> str:
    """A short form: 1,319; 1.3M; 0.25; 3e-05."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:,.0f}" if size >= 1000 or value == int(value) else f"{value:.3g}"
