"""The report's sections about scores: final ones, replies, and those of checkpoints during training.

In: results.json as a dict, the samples folder, the training folder. Out: HTML of one section each, '' where there is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sft.common.jsonl import json_lines
from sft.reporting import charts
from sft.reporting.charts import Line
from sft.reporting.page import clip, table

SAMPLES = 4  # sample replies shown per task


def scores(results: Mapping[str, Any]) -> str:
    """Every score with its interval; how replies ended, and how long they were."""
    rows = []
    for task, result in results.get("tasks", {}).items():
        facts = result.get("generation", {})
        told = (("stop_rate", "stop"), ("empty", "empty"), ("repeating", "repeat"))  # another harness may know less
        ended = ", ".join(f"{facts[key]:.0%} {word}" for key, word in told if key in facts) or "–"
        for i, (name, score) in enumerate(result["metrics"].items()):
            drawn = (
                charts.whisker(score["value"], score.get("low"), score.get("high")) if 0 <= score["value"] <= 1 else ""
            )
            error = "–" if score["stderr"] is None else f"{score['stderr']:.4f}"
            rows.append(
                [
                    escape(task) if i == 0 else "",
                    escape(name),
                    f"<b>{score['value']:.4f}</b>",
                    error,
                    interval(score),
                    drawn,
                    f"{score['n']:,}",
                    ended if i == 0 else "",
                ]
            )
    body = table(
        ["task", "metric", "score", "standard error", "95 % interval", "0 to 1", "n", "replies"],
        rows,
        numbers=(2, 3, 4, 6),
    )
    lengths = [
        (task, bins)
        for task, result in results.get("tasks", {}).items()
        if (bins := result.get("generation", {}).get("tokens", {}).get("up_to"))
    ]
    if lengths:
        cells = "".join(
            f"<div><h3>{escape(task)}: replies by length</h3>{length_bars(bins)}</div>" for task, bins in lengths
        )
        body += f'<div class="row">{cells}</div>'
    if found := results.get("validation"):
        loss, perplexity = interval(found), interval(found, "perplexity_")
        body += (
            f"<p>Validation split: loss <b>{found['loss']:.4f}</b> ± {found['stderr'] or 0:.4f} ({loss}), perplexity"
            f" <b>{found['perplexity']:.2f}</b> ({perplexity}), over {found['labels']:,} trained tokens of {found['documents']:,} conversations.</p>"
        )
    return body


def length_bars(bins: Sequence[Sequence[int]]) -> str:
    bars = [(f"≤{top:,}", n, f"{n:,} replies of at most {top:,} tokens") for top, n in bins]
    return charts.bars(bars, width=max(320, 56 * len(bars)), height=190, x_name="tokens")


def replies(folder: Path) -> str:
    """A few samples of every task that generates, right and wrong ones alike: the first of the file."""
    parts = []
    for file in sorted(folder.glob("*.jsonl")):
        samples = [s for s in json_lines(file) if "ended_by" in s][:SAMPLES]
        for sample in samples:
            marks = ", ".join(f"{k} {v:g}" for k, v in sample["scores"].items() if isinstance(v, (int, float)))
            parts.append(
                f'<article class="chat"><header>{escape(file.stem)} · {escape(marks)} · {escape(_all(sample["ended_by"]))},'
                f" {_all(sample['tokens'])} tokens</header><pre>{clip(sample['prompt'])}<mark>{clip(str(sample['replies'][0]))}</mark></pre>"
                f"<footer>wanted: {clip(str(sample['target']))}</footer></article>"
            )
    return f'<div class="cards">{"".join(parts)}</div>' if parts else ""


def _all(value: Any) -> str:
    return " / ".join(map(str, value)) if isinstance(value, list) else str(value)


def over_steps(train: Path) -> str:
    """How every task's first score, and the held-out loss, moved over the checkpoints that were evaluated."""
    records = [r for r in json_lines(train / "evaluations.jsonl") if "step" in r]
    if not records:
        return ""
    best = (train / "BEST").read_text().splitlines() if (train / "BEST").is_file() else []
    drawn, shown = [], {}
    for task in dict.fromkeys(t for r in records for t in r["tasks"]):
        found = [(r["step"], *next(iter(r["tasks"][task].items()))) for r in records if r["tasks"].get(task)]
        name = f"{task} {found[0][1]}"
        shown[name] = {step: score for step, _, score in found}
        spread = [(step, s["low"], s["high"]) for step, _, s in found if "low" in s]
        points = [(step, s["value"]) for step, _, s in found]
        drawn.append(charts.lines([Line(name, "one", points, True, spread)], width=360, height=190, x_name="step"))
    if losses := [(r["step"], r["validation"]) for r in records if r.get("validation")]:
        shown["validation loss"] = {step: {"value": v["loss"], "stderr": v["stderr"]} for step, v in losses}
        spread = [(n, v["loss"] - 1.96 * v["stderr"], v["loss"] + 1.96 * v["stderr"]) for n, v in losses if v["stderr"]]
        line = Line("validation loss", "two", [(n, v["loss"]) for n, v in losses], True, spread)
        drawn.append(charts.lines([line], width=360, height=190, x_name="step"))
    rows = []
    for r in records:
        cells = [f"{r['step']:,}" + (" <b>BEST</b>" if best[:1] == [f"step{r['step']}"] else "")]
        for name, by_step in shown.items():
            score, broken = by_step.get(r["step"]), r.get("broken", {}).get(name.split(" ")[0], r.get("failed"))
            error = f" ± {score['stderr']:.4f}" if score and score.get("stderr") is not None else ""
            why = f'<b class="bad" title="{escape(broken)}">broken</b>' if broken else "–"
            cells.append(f"{score['value']:.4f}{error}" if score else why)
        rows.append(cells)
    note = f'<p class="note">BEST: {escape(", ".join(best))}</p>' if best else ""
    body = "".join(f"<div>{chart}</div>" for chart in drawn)
    return f'<div class="row">{body}</div>{table(["step", *shown], rows, numbers=range(len(shown) + 1))}{note}'


def interval(score: Mapping[str, Any], of: str = "") -> str:
    return f"{score[f'{of}low']:.3f} to {score[f'{of}high']:.3f}" if f"{of}low" in score else "no interval"
