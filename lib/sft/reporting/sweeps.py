"""The scores of a sweep's runs, the best first, through the comparison of any runs. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from sft.common.errors import SftError
from sft.evaluation import compare
from sft.formats import manifest, results
from sft.formats.results import Results
from sft.reporting import comparison


def best_first(runs: Sequence[Path], page: Path) -> str:
    """Compares the runs that have scores against the best one and writes the page, with their curves. Returns what a terminal shows.

    The order is that of the first task's primary metric. "" for fewer than two runs with scores. Only as many as have letters are
    compared; the others are named.
    """
    scored = [run for run in runs if (run / "evaluate" / manifest.NAME).is_file()]
    if len(scored) < 2:
        page.with_suffix(".json").unlink(missing_ok=True)  # of scores that are gone
        return ""
    scored.sort(key=_order)
    shown, rest = scored[: len(compare.LETTERS)], scored[len(compare.LETTERS) :]
    try:
        found = compare.compare(shown)
    except SftError as error:
        return f"the scores cannot be compared: {error}"
    more = [f"not shown, as they are worse: {', '.join(run.name for run in rest)}"] if rest else []
    found.write(page.with_suffix(".json"))
    return "\n".join([compare.text(found), *more, "", comparison.draw(page, shown)])


def _order(run: Path) -> tuple[float, str]:
    """Smaller for a better score; runs without one come last."""
    try:
        tasks = Results.read(run / "evaluate" / results.NAME).tasks
        _, score = next(iter(tasks.values())).primary
    except (OSError, SftError, StopIteration):
        return math.inf, run.name
    return (-score.value if score.higher_is_better else score.value), run.name
