"""Charts as inline SVG. The page's CSS variables colour them, so they follow its light and dark theme.

In: numbers. Out: SVG strings without scripts or references; `data-points` has the values for the page's tooltip.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MAX_POINTS = 600
SMOOTHED = 0.03
"""The window of a smoothed line, as a share of its points."""


@dataclass(frozen=True)
class Line:
    """One series. `kind` is the CSS class of its line, `dots` marks every point, `spread` has (x, low, high) error bars."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    spread: Sequence[tuple[float, float, float]] = ()


NARROW = (360, 250)
"""Width and height of a chart on a narrow page."""


def lines(series: Sequence[Line], *, width: int, height: int, x_name: str, digits: int = 3) -> str:
    """A line chart of series over a common x axis, with a grid, tick labels and a legend.

    A wide one is drawn twice: once for a narrow page, where its labels would be too small to read.
    """
    wide = _lines(series, width, height, x_name, digits, "wide" if width > 640 else "")
    return (
        wide + _lines(series, *NARROW, x_name, digits, "narrow")
        if width > 640 and any(s.points for s in series)
        else wide
    )


def _lines(series: Sequence[Line], width: int, height: int, x_name: str, digits: int, kind: str) -> str:
    series = [Line(s.name, s.kind, thin(s.points), s.dots, s.spread) for s in series if s.points]
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points if math.isfinite(y)]
    ys += [y for s in series for bar in s.spread for y in bar[1:]] if ys else []
    if not ys:
        return '<p class="none">no points</p>'
    left, right, top, bottom = 52, 12, 10, 34
    x_ticks, y_ticks = ticks(min(xs), max(xs), 8 if width > 640 else 4), ticks(min(ys), max(ys), 5)
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    y1 = y1 if y1 > y0 else y0 + 1

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (width - left - right)

    def py(y: float) -> float:
        return top + (y1 - y) / (y1 - y0) * (height - top - bottom)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        if x0 <= x <= x1:
            parts.append(
                f'<text class="tick" x="{px(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{number(x)}</text>'
            )
    parts.append(f'<text class="axis" x="{width - right}" y="{height - 2}" text-anchor="end">{escape(x_name)}</text>')
    for s in series:
        parts += [
            f'<line class="error {s.kind}" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(low):.1f}" y2="{py(high):.1f}"/>'
            for x, low, high in s.spread
        ]
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in s.points if math.isfinite(y))
        parts.append(f'<polyline class="line {s.kind}" points="{path}"/>')
        if s.dots or len(s.points) == 1:
            parts += [f'<circle class="dot {s.kind}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"/>' for x, y in s.points]
    shown = [{"name": s.name, "points": [[x, round(y, 6)] for x, y in s.points]} for s in series]
    data = {"left": left, "right": width - right, "x0": x0, "x1": x1, "x": x_name, "digits": digits, "series": shown}
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{top}" y2="{height - bottom}" visibility="hidden"/>')
    legend = "".join(f'<span class="key {s.kind}">{escape(s.name)}</span>' for s in series)
    name = escape(" and ".join(s.name for s in series))
    return (
        f'<figure class="{" ".join(filter(None, ("chart", kind)))}"><figcaption>{legend}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" {width_limits(width)} role="img"'
        f' aria-label="{name} over {escape(x_name)}" data-points="{escape(json.dumps(data))}">{"".join(parts)}</svg></figure>'
    )


def bars(values: Sequence[tuple[str, float, str]], *, width: int, height: int, x_name: str) -> str:
    """Vertical bars of (label, value, text of the tooltip), with the value above each bar."""
    if not values:
        return '<p class="none">no values</p>'
    top, bottom = 20, 36
    largest = max(v for _, v, _ in values) or 1
    slot = min(90.0, (width - 4) / len(values))
    parts = [f'<line class="grid" x1="0" x2="{width}" y1="{height - bottom}" y2="{height - bottom}"/>']
    for i, (label, value, title) in enumerate(values):
        tall = (height - top - bottom) * value / largest
        x, y = 2 + i * slot, height - bottom - tall
        parts.append(
            f'<g><title>{escape(title)}</title><rect class="bar" x="{x + slot * 0.1:.1f}" y="{y:.1f}" width="{slot * 0.8:.1f}"'
            f' height="{max(tall, 1):.1f}" rx="2"/><text class="value" x="{x + slot / 2:.1f}" y="{y - 5:.1f}"'
            f' text-anchor="middle">{number(value)}</text><text class="tick" x="{x + slot / 2:.1f}" y="{height - bottom + 15}"'
            f' text-anchor="middle">{escape(label)}</text></g>'
        )
    parts.append(f'<text class="axis" x="{width - 2}" y="{height - 4}" text-anchor="end">{escape(x_name)}</text>')
    return f'<figure class="chart"><svg viewBox="0 0 {width} {height}" {width_limits(width)} role="img">{"".join(parts)}</svg></figure>'


def share(parts: Sequence[tuple[str, str, float]]) -> str:
    """One horizontal bar of (name, CSS class, share) parts, with a legend. The shares sum to 1."""
    cells = "".join(
        f'<span class="{kind}" style="width:{100 * value:.2f}%" title="{escape(name)}: {value:.2%}"></span>'
        for name, kind, value in parts
        if value > 0
    )
    legend = "".join(f'<span class="key {kind}">{escape(name)} {value:.1%}</span>' for name, kind, value in parts)
    return f'<div class="share">{cells}</div><div class="legend">{legend}</div>'


def whisker(value: float, low: float | None, high: float | None) -> str:
    """A score between 0 and 1 as a dot on a line, with its interval."""
    width, height, pad = 200, 22, 6

    def px(v: float) -> float:
        return pad + min(1.0, max(0.0, v)) * (width - 2 * pad)

    parts = [f'<line class="grid" x1="{pad}" x2="{width - pad}" y1="11" y2="11"/>']
    parts += [f'<line class="grid" x1="{px(v):.1f}" x2="{px(v):.1f}" y1="8" y2="14"/>' for v in (0, 0.25, 0.5, 0.75, 1)]
    if low is not None and high is not None:
        parts.append(f'<line class="whisker" x1="{px(low):.1f}" x2="{px(high):.1f}" y1="11" y2="11"/>')
    parts.append(f'<circle class="point" cx="{px(value):.1f}" cy="11" r="4.5"/>')
    return (
        f'<svg class="score" viewBox="0 0 {width} {height}" role="img" aria-label="{value:.3f}">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True)
class Interval:
    """A value with its interval; `kind` is a CSS class: good, bad or none."""

    name: str
    value: float
    low: float
    high: float
    kind: str = ""


def intervals(points: Sequence[Interval], *, width: int) -> str:
    """Values with their intervals, one below the other, on one scale that includes zero."""
    row, top, bottom, pad = 28, 8, 26, 12
    left = min(width // 2, 24 + 7 * max(len(p.name) for p in points))
    height = top + row * len(points) + bottom
    grid = ticks(min(0.0, *(p.low for p in points)), max(0.0, *(p.high for p in points)), 7)
    x0, x1 = grid[0], grid[-1] if grid[-1] > grid[0] else grid[0] + 1

    def px(x: float) -> float:
        return left + pad + (x - x0) / (x1 - x0) * (width - left - 2 * pad)

    parts = []
    for x in grid:
        kind = "zero" if x == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{height - 8}" text-anchor="middle">{number(x)}</text>')
    for i, p in enumerate(points):
        y = top + row * (i + 0.5)
        title = f"{p.name}: {p.value:+.4g} [{p.low:+.4g}, {p.high:+.4g}]"
        parts.append(
            f'<g><title>{escape(title)}</title><text class="name" x="{left - 4}" y="{y + 4.5:.1f}" text-anchor="end">{escape(p.name)}</text>'
            f'<line class="whisker {p.kind}" x1="{px(p.low):.1f}" x2="{px(p.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="point {p.kind}" cx="{px(p.value):.1f}" cy="{y:.1f}" r="5"/></g>'
        )
    return f'<figure class="chart"><svg viewBox="0 0 {width} {height}" {width_limits(width)} role="img">{"".join(parts)}</svg></figure>'


def width_limits(width: int) -> str:
    """CSS limits of a chart's width, between which its text is readable. On a narrower page the chart scrolls."""
    return f'style="min-width:{min(0.8 * width, 620):.0f}px;max-width:{1.4 * width:.0f}px"'


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of a group of neighbours, and the last point unchanged."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    return [(g[len(g) // 2][0], sum(y for _, y in g) / len(g)) for g in groups] + [points[-1]]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
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


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, in about `count` steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short form: 1,319; 1.3M; 0.25; 3e-05."""
    size = abs(value)
    if size >= 1e6:
        for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
            if size >= limit:
                return f"{value / limit:.3g}{unit}"
    if size >= 1000 or (value == int(value) and size < 1e6):
        return f"{value:,.0f}"
    return f"{value:.3g}"
