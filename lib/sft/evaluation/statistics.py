"""Intervals and paired tests of scores. Standard library only, so that `make compare` needs no environment.

In: shares, or two lists of scores of the same items in the same order. Out: intervals, differences with standard errors, p values.
The unit tests compare the functions with scipy; for Newcombe's interval they check its coverage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sft.formats.comparison import Difference

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n independent trials (Wilson 1927)."""
    z = Z95 * Z95 / n
    middle = (share + z / 2) / (1 + z)
    half = Z95 / (1 + z) * math.sqrt(share * (1 - share) / n + z / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """The mean of b - a over the items, and its standard error.

    If every score is 0 or 1, the interval is Newcombe's and p is McNemar's exact one (binomial over the items on which a and
    b disagree). Otherwise both are those of the paired t test.
    """
    n = len(a)
    d = [y - x for x, y in zip(a, b, strict=True)]
    mean = math.fsum(d) / n
    binary = all(x in (0, 1) for x in (*a, *b))
    better, worse = sum(x > 0 for x in d), sum(x < 0 for x in d)
    p = mcnemar(better, worse) if binary else None
    if n < 2:
        return Difference(mean, None, None, None, p, n, "mcnemar" if binary else "none")
    stderr = math.sqrt(math.fsum((x - mean) ** 2 for x in d) / (n - 1) / n)
    if p is not None:
        both = sum(x == y == 1 for x, y in zip(a, b, strict=True))
        return Difference(mean, stderr, *newcombe(both, better, worse, n - both - better - worse), p, n, "mcnemar")
    return _with_interval(mean, stderr, n)


def newcombe(both: int, better: int, worse: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares of the same items (Newcombe 1998, Statistics in Medicine 17:2635, method 10).

    The counts are of items that are right in both, only in the second (better), only in the first (worse), and in neither. The
    interval is built from Wilson's intervals of the two shares: it keeps its width where two systems agree on every item and
    the standard error is 0.
    """
    n = both + better + worse + neither
    first, second = (both + worse) / n, (both + better) / n
    (low_1, high_1), (low_2, high_2) = wilson(first, n), wilson(second, n)
    margins = (both + better) * (worse + neither) * (both + worse) * (better + neither)
    related = float(both * neither - better * worse)
    if related > 0:
        related = max(0.0, related - n / 2)  # for continuity
    phi = related / math.sqrt(margins) if margins else 0.0

    def away(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    value = second - first
    return value - away(second - low_2, high_1 - first), value + away(high_2 - second, first - low_1)


def paired_ratio(a: Sequence[float], b: Sequence[float], weights: Sequence[float]) -> Difference:
    """sum(b) / sum(weights) - sum(a) / sum(weights), with items as clusters.

    For a loss per token over conversations: a and b are summed losses, the weights are numbers of tokens. The standard error
    is the linearised one of a ratio (Cochran 1977, 6.3).
    """
    n, total = len(a), math.fsum(weights)
    value = (math.fsum(b) - math.fsum(a)) / total
    if n < 2:
        return Difference(value, None, None, None, None, n, "none")
    spread = math.fsum((y - x - value * w) ** 2 for x, y, w in zip(a, b, weights, strict=True))
    return _with_interval(value, math.sqrt(spread * n / (n - 1)) / total, n)


def stratified(strata: Sequence[tuple[float, Sequence[float], Sequence[float]]]) -> Difference:
    """The weighted sum over strata (weight, a, b) of the mean of b - a over a stratum's items, which are paired.

    For a group of tasks: the tasks are fixed and their items are sampled, so the squared standard errors of the tasks' mean
    differences add up with the squared weights. The interval and p are those of a normal distribution.
    """
    found = [(weight, paired(a, b)) for weight, a, b in strata]
    n = sum(d.n for _, d in found)
    value = math.fsum(weight * d.value for weight, d in found)
    if any(d.stderr is None for _, d in found):  # a task with a single item
        return Difference(value, None, None, None, None, n, "none")
    stderr = math.sqrt(math.fsum((weight * (d.stderr or 0.0)) ** 2 for weight, d in found))
    p = math.erfc(abs(value) / stderr / math.sqrt(2)) if stderr else float(value == 0)
    return Difference(value, stderr, value - Z95 * stderr, value + Z95 * stderr, p, n, "stratified")


def _with_interval(value: float, stderr: float, n: int) -> Difference:
    p = t_test(value / stderr, n - 1) if stderr else (1.0 if value == 0 else 0.0)
    half = t_quantile(0.975, n - 1) * stderr
    return Difference(value, stderr, value - half, value + half, p, n, "t")


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p of McNemar's test: on items where two systems disagree, each is equally likely to be right."""
    n, k = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


def t_test(t: float, df: int) -> float:
    """Two-sided p of Student's t: the regularised incomplete beta function I_x(df/2, 1/2) at x = df / (df + t²)."""
    return _beta(df / (df + t * t), df / 2, 0.5) if math.isfinite(t) else 0.0


def t_quantile(q: float, df: int) -> float:
    """Quantile q > 1/2 of Student's t, by bisection."""
    low, high = 0.0, 1.0
    while 1 - t_test(high, df) / 2 < q:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - t_test(middle, df) / 2 < q else (low, middle)
    return (low + high) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for multiple comparisons (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = largest
    return corrected


def _beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function by its continued fraction (Lentz's method; DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    tiny = 1e-300
    c, d, result = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny), 1.0
    result = d
    for m in range(1, 10_000):
        for top in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + top * d or tiny)
            c = 1 + top / c or tiny
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * result / a
