"""The report's sections about scores: final ones, the worst replies, and those of checkpoints during training.

In: evaluate's results.json and samples, training's evaluations.jsonl and BEST. Out: what the templates show of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from sft.evaluation.scores import as_tuple, is_number
from sft.evaluation.statistics import Z95
from sft.formats import evaluations
from sft.formats.evaluations import Evaluation
from sft.formats.results import Generation, PartLoss, Results, TaskResult, TextLoss, ValidationLoss
from sft.formats.samples import Sample
from sft.reporting import charts
from sft.reporting.charts import Chart, Line
from sft.reporting.page import interval
from sft.reporting.replies import FOLDER, Scored, worst

WORST = 4
"""Replies shown of a task."""


def rows(results: Results) -> list[list[str]]:
    """Every score with its interval, and how replies ended. Groups come before their tasks."""
    found = []
    for task, result in results.scored.items():
        facts = result.generation if isinstance(result, TaskResult) else None
        for i, (name, score) in enumerate(result.metrics.items()):
            error = "–" if score.stderr is None else f"{score.stderr:.4f}"
            found.append([task if i == 0 else "", name, f"{score.value:.4f}", error, interval(score.bounds), f"{score.n:,}",
                          endings(facts) if i == 0 else ""])  # fmt: skip
    return found


def points(results: Results) -> Chart | None:
    """The scores between 0 and 1 with their intervals."""
    found = [
        charts.Interval(f"{task} {name}", score.value, *(score.bounds or (score.value, score.value)))
        for task, result in results.scored.items()
        for name, score in result.metrics.items()
        if 0 <= score.value <= 1
    ]
    return charts.intervals("scores with their 95 % intervals", found, (0, 1))


def endings(facts: Generation | None) -> str:
    """Shares of the replies that stopped, were empty and repeat themselves, as far as the harness reports them."""
    if facts is None:
        return "–"
    shares = ((facts.stop_rate, "stop"), (facts.empty, "empty"), (facts.repeating, "repeat"))
    return ", ".join(f"{share:.0%} {word}" for share, word in shares if share is not None)


def lengths(results: Results) -> list[Chart | None]:
    """A chart of the replies' lengths for each task that has them."""
    found = []
    for task, result in results.tasks.items():
        if result.generation and (tokens := result.generation.tokens) and tokens.up_to:
            bars = [(f"≤{top:,}", n, f"{n:,} replies of at most {top:,} tokens") for top, n in tokens.up_to]
            found.append(charts.bars(f"{task}: replies by length", "tokens", bars))
    return found


def losses(results: Results) -> list[list[str]]:
    """The losses of held-out conversations and of plain text: of all, then of their sources, answers and kinds."""
    found: list[tuple[str, ValidationLoss | TextLoss | PartLoss]] = []
    if loss := results.validation:
        found.append(("validation split", loss))
        found += [(f"source {name}", part) for name, part in (loss.by_source or {}).items()]
        found += [(f"answer {i}", part) for i, part in enumerate(loss.by_turn or (), 1)]
    if text := results.plain_text:
        name = f"plain text, which is no chat: {text.bits_per_byte:.3f} bits a byte"
        found += [(name, text), *((f"plain text: {kind}", part) for kind, part in (text.by_kind or {}).items())]
    return [
        [name, f"{p.loss:.4f}", "–" if p.stderr is None else f"{p.stderr:.4f}", f"{math.exp(min(p.loss, 99)):.3g}", f"{p.labels:,}", f"{p.documents:,}"]
        for name, p in found
    ]  # fmt: skip


def replies(run: Path) -> list[dict[str, Any]]:
    """The worst replies of every task that generates, and the page with all. AI2's harnesses have records of their own."""
    scored, found = Scored(run), []
    for task, result in scored.tasks.items():
        samples = worst(result, scored.samples(task))
        if samples:
            found.append({"name": task, "count": f"{len(samples):,}", "page": quote(f"{FOLDER}/{task}.html"),
                          "worst": [_reply(s) for s in samples[:WORST]]})  # fmt: skip
    return found


def _reply(sample: Sample) -> dict[str, str]:
    values = ", ".join(f"{k} {v:g}" for k, v in sample.scores.items() if is_number(v))
    ended, tokens = (
        " / ".join(map(str, as_tuple(v))) if v is not None else "?" for v in (sample.ended_by, sample.tokens)
    )
    return {"header": f"{sample.doc_id} · {values} · {ended}, {tokens} tokens", "prompt": sample.prompt, "reply": str(sample.replies[0]),
            "target": str(sample.target)}  # fmt: skip


def over_steps(train: Path) -> dict[str, Any] | None:
    """Every task's primary score, and the held-out loss, at the checkpoints that were evaluated."""
    found = evaluations.read(train)
    if not found:
        return None
    columns = [*_task_columns(found), *_loss_columns(found)]
    best = (train / "BEST").read_text().splitlines() if (train / "BEST").is_file() else []
    marked = Markup("{:,} <b>BEST</b>")
    table = [
        [marked.format(e.step) if best[:1] == [f"step{e.step}"] else f"{e.step:,}", *(column.cell(e) for column in columns)] for e in found
    ]  # fmt: skip
    head = ["#step", *(f"#{column.name}" for column in columns)]
    note = f"BEST: {', '.join(best)}" if best else ""
    return {"charts": [c.chart() for c in columns], "head": head, "rows": table, "best": note}


@dataclass(frozen=True)
class _Column:
    """A score over the steps. `points` is {step: (value, standard error, interval)}."""

    task: str
    name: str
    colour: int
    points: Mapping[int, tuple[float, float | None, tuple[float, float] | None]]

    def chart(self) -> Chart | None:
        """The score over the steps with its intervals."""
        spread = [(step, *bounds) for step, (_, _, bounds) in self.points.items() if bounds]
        values = [(float(step), value) for step, (value, _, _) in self.points.items()]
        return charts.lines(self.name, [Line(self.name, values, self.colour, "dots", spread)])

    def cell(self, evaluation: Evaluation) -> str:
        """The cell of one step: the score with its error, or "broken" with the reason as its tooltip."""
        if point := self.points.get(evaluation.step):
            value, stderr, _ = point
            return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
        reason = evaluation.broken.get(self.task, evaluation.failed)
        return Markup('<b class="bad" title="{}">broken</b>').format(reason) if reason else "–"


def _task_columns(found: Sequence[Evaluation]) -> list[_Column]:
    columns = []
    for task in dict.fromkeys(task for e in found for task in e.tasks):
        primary = [(e.step, *next(iter(e.tasks[task].items()))) for e in found if e.tasks.get(task)]
        points = {step: (score.value, score.stderr, score.bounds) for step, _, score in primary}
        columns.append(_Column(task, f"{task} {primary[0][1]}", 0, points))
    return columns


def _loss_columns(found: Sequence[Evaluation]) -> list[_Column]:
    """The losses of held-out conversations and of plain text with value ± 1.96 standard errors."""
    columns = []
    for name, title in (("validation", "validation loss"), ("plain_text", "loss of plain text")):
        losses = [(e.step, loss.loss, loss.stderr) for e in found if (loss := getattr(e, name))]
        points = {n: (x, error, (x - Z95 * error, x + Z95 * error) if error else None) for n, x, error in losses}
        columns += [_Column(name, title, 1, points)] if points else []
    return columns
