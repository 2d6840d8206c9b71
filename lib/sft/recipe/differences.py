"""The table of what a base and a recipe say differently. Standard library only.

field     base   recipe          write in [model]
n_layers  4      n_layers = 2    n_layers = 4, or remove n_layers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from sft.common.columns import table

_ROWS = 12


@dataclass(frozen=True)
class Difference:
    """A row of the table. `write`: what to write, and where the heading does not say it, in which file."""

    field: str
    base: str
    recipe: str
    write: str = ""


def mismatch(problem: str, rows: Sequence[Difference], then: str, heads: tuple[str, ...] = ()) -> str:
    """A message: what is wrong, the table, and what to do. `heads` replaces the first headings. An empty last column is left out."""
    usual = ("field", "base", "recipe", "write in [model]")
    cells = [(*heads, *usual[len(heads) :]), *map(astuple, rows[:_ROWS])]
    if not any(row.write for row in rows):
        cells = [row[:-1] for row in cells]
    lines = [problem, *([table(cells, width=10_000)] if rows else [])]
    if len(rows) > _ROWS:
        lines.append(f"and {len(rows) - _ROWS} more")
    return "\n".join([*lines, f"next: {then}"])
