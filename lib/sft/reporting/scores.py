"""The report's sections about scores: final ones, replies, and those of checkpoints during training.

In: evaluate's results.json and samples, training's evaluations.jsonl and BEST. Out: the HTML of a section, '' if there is nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sft.evaluation.statistics import Z95
from sft.formats import evaluations
from sft.formats.evaluations import Evaluation
from sft.formats.lines import read_lines
from sft.formats.results import Generation, Results, Score, TaskResult, ValidationLoss
from sft.formats.samples import Sample
from sft.reporting import charts
from sft.reporting.charts import Line
from sft.reporting.page import clip, table

SAMPLES = 4
"""Sample replies shown of a task."""
Bounds = tuple[float, float]


def scores(results: Results) -> str:
    """Every score with its interval; how replies ended, and their lengths. Groups come before their tasks."""
    rows = []
    for task, result in results.scored.items():
        facts = result.generation if isinstance(result, TaskResult) else None
        for i, (name, score) in enumerate(result.metrics.items()):
            rows.append(
                [
                    escape(task) if i == 0 else "",
                    escape(name),
                    f"<b>{score.value:.4f}</b>",
                    "–" if score.stderr is None else f"{score.stderr:.4f}",
                    interval(score.bounds),
                    charts.whisker(score.value, score.low, score.high) if 0 <= score.value <= 1 else "",
                    f"{score.n:,}",
                    endings(facts) if i == 0 else "",
                ]
            )
    head = ["task", "metric", "score", "standard error", "95 % interval", "0 to 1", "n", "replies"]
    body = table(head, rows, numbers=(2, 3, 4, 6))
    lengths = [
        f"<div><h3>{escape(task)}: replies by length</h3>{length_bars(tokens.up_to)}</div>"
        for task, result in results.tasks.items()
        if result.generation and (tokens := result.generation.tokens) and tokens.up_to
    ]
    if lengths:
        body += f'<div class="row">{"".join(lengths)}</div>'
    loss = results.validation
    return body + (validation_sentence(loss) + loss_parts(loss) if loss else "")


def endings(facts: Generation | None) -> str:
    """Shares of the replies that stopped, were empty and repeat themselves, as far as the harness reports them."""
    if facts is None:
        return "–"
    shares = ((facts.stop_rate, "stop"), (facts.empty, "empty"), (facts.repeating, "repeat"))
    return ", ".join(f"{share:.0%} {word}" for share, word in shares if share is not None)


def validation_sentence(loss: ValidationLoss) -> str:
    """One sentence on the loss of the validation split."""
    return (
        f"<p>Validation split: loss <b>{loss.loss:.4f}</b> ± {loss.stderr or 0:.4f} ({interval(loss.bounds)}), perplexity"
        f" <b>{loss.perplexity:.2f}</b> ({interval(loss.perplexity_bounds)}), over {loss.labels:,} trained tokens of"
        f" {loss.documents:,} conversations.</p>"
    )


def loss_parts(loss: ValidationLoss) -> str:
    """The held-out loss by source and by the position of the answer, where there are several."""
    parts = [(f"source {name}", part) for name, part in (loss.by_source or {}).items()]
    parts += [(f"answer {i}", part) for i, part in enumerate(loss.by_turn or (), 1)]
    if not parts:
        return ""
    rows = [[escape(name), f"{p.loss:.4f}", "–" if p.stderr is None else f"{p.stderr:.4f}", f"{p.labels:,}", f"{p.documents:,}"]
            for name, p in parts]  # fmt: skip
    head = ["held-out loss of", "loss", "standard error", "trained tokens", "conversations"]
    return table(head, rows, numbers=range(1, 5))


def length_bars(bins: Iterable[tuple[int, int]]) -> str:
    """A bar chart of (upper end in tokens, replies)."""
    bars = [(f"≤{top:,}", n, f"{n:,} replies of at most {top:,} tokens") for top, n in bins]
    return charts.bars(bars, width=max(320, 56 * len(bars)), height=190, x_name="tokens")


def replies(folder: Path, results: Results) -> str:
    """The first few samples of every task that generates, right and wrong ones alike.

    AI2's harnesses have records of their own, which are not shown.
    """
    parts = []
    for file in sorted(folder.glob("*.jsonl")) if results.harness is None else ():
        samples = [s for s in read_lines(Sample, file) if s.ended_by is not None][:SAMPLES]
        parts += [_reply(file.stem, sample) for sample in samples]
    note = '<p class="note">All items, with filters and a search: <code>replies/&lt;task&gt;.html</code> beside this page.</p>'
    return f'{note}<div class="cards">{"".join(parts)}</div>' if parts else ""


def _reply(task: str, sample: Sample) -> str:
    shown = ", ".join(f"{k} {v:g}" for k, v in sample.scores.items() if isinstance(v, (int, float)))
    return (
        f'<article class="chat"><header>{escape(task)} · {escape(shown)} · {escape(_joined(sample.ended_by))},'
        f" {_joined(sample.tokens)} tokens</header><pre>{clip(sample.prompt)}<mark>{clip(str(sample.replies[0]))}</mark></pre>"
        f"<footer>target: {clip(str(sample.target))}</footer></article>"
    )


def _joined(value: Any) -> str:
    """A fact about one reply, or those about several."""
    return " / ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# --- during training ----------------------------------------------------------------------------------------------------


def over_steps(train: Path) -> str:
    """Every task's primary score, and the held-out loss, at the checkpoints that were evaluated."""
    found = evaluations.read(train)
    if not found:
        return ""
    columns = [*_task_columns(found), *_loss_column(found)]
    best = (train / "BEST").read_text().splitlines() if (train / "BEST").is_file() else []
    rows = []
    for evaluation in found:
        is_best = best[:1] == [f"step{evaluation.step}"]
        rows.append(
            [
                f"{evaluation.step:,}" + (" <b>BEST</b>" if is_best else ""),
                *(column.cell(evaluation) for column in columns),
            ]
        )
    note = f'<p class="note">BEST: {escape(", ".join(best))}</p>' if best else ""
    charts_ = "".join(f"<div>{column.chart()}</div>" for column in columns)
    body = table(["step", *(column.name for column in columns)], rows, numbers=range(len(columns) + 1))
    return f'<div class="row">{charts_}</div>{body}{note}'


class _Column:
    """A score over the steps. `points` is {step: (value, standard error, interval)}."""

    def __init__(
        self, task: str, name: str, kind: str, points: Mapping[int, tuple[float, float | None, Bounds | None]]
    ) -> None:
        self.task, self.name, self.kind, self.points = task, name, kind, points

    def chart(self) -> str:
        """The score over the steps with its intervals."""
        spread = [(step, *bounds) for step, (_, _, bounds) in self.points.items() if bounds]
        points = [(step, value) for step, (value, _, _) in self.points.items()]
        line = Line(self.name, self.kind, points, True, spread)
        return charts.lines([line], width=360, height=190, x_name="step")

    def cell(self, evaluation: Evaluation) -> str:
        """The cell of one step: the score with its error, or "broken" with the reason as its tooltip."""
        if point := self.points.get(evaluation.step):
            value, stderr, _ = point
            return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
        reason = evaluation.broken.get(self.task, evaluation.failed)
        return f'<b class="bad" title="{escape(reason)}">broken</b>' if reason else "–"


def _task_columns(found: Sequence[Evaluation]) -> list[_Column]:
    columns = []
    for task in dict.fromkeys(task for e in found for task in e.tasks):
        primary: list[tuple[int, str, Score]] = [
            (e.step, *next(iter(e.tasks[task].items()))) for e in found if e.tasks.get(task)
        ]
        points = {step: (score.value, score.stderr, score.bounds) for step, _, score in primary}
        columns.append(_Column(task, f"{task} {primary[0][1]}", "one", points))
    return columns


def _loss_column(found: Sequence[Evaluation]) -> list[_Column]:
    """The held-out loss with value ± 1.96 standard errors."""
    points = {}
    for e in found:
        if loss := e.validation:
            half = Z95 * loss.stderr if loss.stderr else None
            bounds = (loss.loss - half, loss.loss + half) if half else None
            points[e.step] = (loss.loss, loss.stderr, bounds)
    return [_Column("validation", "validation loss", "two", points)] if points else []


def interval(bounds: Bounds | None) -> str:
    """A 95 % interval with three digits."""
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "no interval"
