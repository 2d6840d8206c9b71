"""The learning-rate range test (Smith 2017, arXiv 1506.01186, section 3.3): make lr-range RECIPE=x

In:  a run with a finished sync. The rate rises from a low to a high bound, by the same factor at every step, from the run's
     first weights and over its own batches.
Out: `Range`: the points and a suggested range of rates. It stops early once the loss is four times its lowest (as fastai's `lr_find`
     does) or not finite.

The suggestion follows fastai's `lr_find`: from `steep`, where the smoothed loss falls fastest against the logarithm of the rate, to
`minimum`, a tenth of the rate at the lowest smoothed loss. Smoothing is the mean over a tenth of the steps around each, so that
the curve does not lag behind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sft.common.errors import SftError
from sft.runner.cli import RunOptions
from sft.training.trials import Measured, open_trial

DIVERGED = 4.0
"""A loss so many times above its lowest ends the ramp."""
FELL = 0.01
"""A suggestion needs a smoothed loss that falls by at least this share."""


@dataclass(frozen=True)
class Range:
    """What the ramp showed. `low` to `high` is the suggested range of peak rates."""

    points: Sequence[Measured]
    smoothed: Sequence[float]
    low: float
    high: float
    still_falling: bool  # at the highest rate that was tried

    @property
    def line(self) -> str:
        """The suggestion in words."""
        more = "; the loss still falls at the highest rate: raise HIGH=" if self.still_falling else ""
        return f"suggested [train] lr: {self.low:.1e} to {self.high:.1e}{more}"


def rates(low: float, high: float, steps: int) -> list[float]:
    """`steps` rates from `low` to `high`, each the same factor above the one before."""
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def smooth(losses: Sequence[float], half: int) -> list[float]:
    """The mean over `half` values on either side, fewer towards both ends."""
    reach = [min(half, i, len(losses) - 1 - i) for i in range(len(losses))]
    return [sum(losses[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def suggest(points: Sequence[Measured]) -> Range:
    """The suggested range. Raises SftError where no rate lowered the loss."""
    points = [p for p in points if math.isfinite(p.loss)]
    half = max(1, len(points) // 20)
    smoothed = smooth([p.loss for p in points], half)
    best = min(range(len(points)), key=smoothed.__getitem__, default=0)
    if best <= 2 * half or smoothed[best] > (1 - FELL) * smoothed[half]:
        raise SftError(
            f"no rate up to {points[-1].lr if points else 0:.1e} lowered the loss by {FELL:.0%} in {len(points)} steps; next: raise HIGH= or"
            " STEPS=, lower LOW=, or make overfit, which says whether loss, mask and optimizer work"
        )
    logs = [math.log10(p.lr) for p in points]

    def slope(i: int) -> float:
        a, b = i - half, min(i + half, len(points) - 1)
        return (smoothed[b] - smoothed[a]) / (logs[b] - logs[a])

    steep = points[min(range(half, best + 1), key=slope)].lr
    tenth = points[best].lr / 10
    return Range(points, smoothed, min(steep, tenth), max(steep, tenth), best >= len(points) - 1 - half)


def lr_range(options: RunOptions, low: float, high: float, steps: int) -> Range | None:
    """Runs the ramp on every rank. Rank 0 gets the result, the others None. Raises SftError for bounds without a ramp."""
    if not 0 < low < high or steps < 20:
        raise SftError(
            f"LOW={low:g} HIGH={high:g} STEPS={steps}: 0 < LOW < HIGH and 20 steps are needed; next: correct it"
        )
    points: list[Measured] = []
    ramp = rates(low, high, steps)
    with open_trial("lr-range", options, steps, lambda train, *_: dataclasses.replace(train, steps=steps)) as trial:
        lowest = math.inf
        for (number, batches), lr in zip(trial.batches(), ramp, strict=False):
            now = trial.step(number, batches, lr)
            points.append(now)
            trial.progress(now)
            recent = [p.loss for p in points[-5:]]
            lowest = min(lowest, sum(recent) / len(recent))
            if not math.isfinite(now.loss) or sum(recent) / len(recent) > DIVERGED * lowest:
                trial.say(f"stopped: the loss diverged at a rate of {lr:.1e}")
                break
        return suggest(points) if trial.world.is_rank0 else None
