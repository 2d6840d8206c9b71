"""The learning-rate range test as a page and as a picture in a terminal.

In:  the points of `sft.training.lr_range`. Out: runs/<run>/lr-range/index.html; a line of blocks.
"""

from __future__ import annotations

from pathlib import Path

from sft.common.files import write_atomic
from sft.reporting import charts
from sft.reporting.charts import Line
from sft.reporting.page import document, part
from sft.training.lr_range import Range

BLOCKS = "▁▂▃▄▅▆▇█"
DERIVED = (
    "The rate rose by the same factor at every step, from the run's first weights (Smith 2017, arXiv 1506.01186, section 3.3). The suggested"
    " range has two ends, as fastai's lr_find suggests them: the rate at which the smoothed loss falls fastest, and a tenth of the rate at which it"
    " is lowest. Smoothed is the mean over a tenth of the steps around each. A short ramp says nothing about long trainings: take a rate"
    " in the range as the peak, and compare runs (make sweep)."
)


def page(run: str, found: Range) -> str:
    """The page."""
    rates = [p.lr for p in found.points]
    bottom = min(found.smoothed)
    lines = [
        Line("loss", [(p.lr, p.loss) for p in found.points], 0, "thin"),
        Line("smoothed", list(zip(rates, found.smoothed, strict=True))),
        Line("suggested range", [(found.low, bottom), (found.high, bottom)], 1, "dots"),
    ]
    chart = charts.lines("loss over the learning rate", lines, ("learning rate",), log_x=True)
    tiles = [("suggested learning rate", f"{found.low:.1e} to {found.high:.1e}", "peak rates, [train] lr"),
             ("lowest smoothed loss", f"{bottom:.3f}", f"from {found.smoothed[0]:.3f}"),
             ("steps", str(len(rates)), f"from {rates[0]:.1e} to {rates[-1]:.1e}")]  # fmt: skip
    note = "The loss still falls at the highest rate: raise HIGH=." if found.still_falling else ""
    sections = {"Learning rate": part("tiles", tiles, note) + part("chart", chart) + part("note", DERIVED)}
    return document(f"{run}: learning rate", sections)


def write(run: Path, found: Range) -> Path:
    """Writes the page of a run's folder. Returns the file."""
    file = run / "lr-range" / "index.html"
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, page(run.name, found).encode())
    return file


def picture(found: Range, width: int = 60) -> list[str]:
    """Three lines: the smoothed loss as blocks, the suggested range below it, and the rates at both ends."""
    count = len(found.points)
    places = [round(i * (count - 1) / (width - 1)) for i in range(width)]
    values = [found.smoothed[i] for i in places]
    low, high = min(values), max(found.smoothed[0], min(values) * 1.001)  # what diverges is cut at the first loss
    heights = [min(1.0, (v - low) / (high - low)) for v in values]
    blocks = "".join(BLOCKS[round(h * (len(BLOCKS) - 1))] for h in heights)
    marks = "".join("=" if found.low <= found.points[i].lr <= found.high else " " for i in places)
    first, last = f"{found.points[0].lr:.0e}", f"{found.points[-1].lr:.0e}"
    return [f"loss  {blocks}", f"lr    {marks}".rstrip(), f"      {first}{last.rjust(width - len(first))}"]
