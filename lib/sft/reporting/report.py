"""The report: one HTML page on the stages of a run that are done, and a page for each task's replies.

In:  runs/<run>/*/manifest.json, and beside them dataset.json, preview.json, metrics.jsonl, gate.json, results.json, samples.
Out: index.html: figures, curves, data and packing, trained tokens, scores with their intervals, the worst replies, the chain of
     manifests. It loads nothing (its content security policy forbids it), works from file:// and follows the reader's theme.
Run: make report RECIPE=…, or python stages/report.py runs/<run>.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.evaluation.compare import LETTERS
from sft.formats.manifest import Manifest, Provenance
from sft.formats.metrics import LOST, Attempt
from sft.formats.packs import StepSummary
from sft.formats.preview import Segment
from sft.recipe import schema
from sft.reporting import charts, comparison, replies, scores, trainings
from sft.reporting.charts import Chart, number
from sft.reporting.page import TEXT, document, interval, part
from sft.reporting.run_files import RunFiles
from sft.runner.stage import Result, Stage

Tile = tuple[str, str, str]  # name, value and detail of a figure
PREVIEWS = 6
"""Conversations shown with their trained tokens."""


def report(stage: Stage) -> Result:
    """The stage: writes the pages."""
    text = page(stage.run)
    write_atomic(stage.out / "index.html", text.encode())
    pages = replies.write(stage.run, stage.out) if RunFiles(stage.run).results else []
    stage.log(f"{stage.run / 'report' / 'index.html'}: {len(text):,} bytes")
    return Result(outputs=["index.html", *pages])


def page(folder: Path) -> str:
    """The page of a run's folder. Raises SftError when no stage is done, or a file is damaged."""
    run = RunFiles(folder)
    if not run.done:
        raise SftError(f"{folder}: no stage is done, so there is nothing to report; next: make prepare")
    found, packs = run.results, run.train.data if run.train else None
    missing = [s for s in schema.STAGES if s not in run.done]
    figures = [*_loss_tiles(run), *_score_tiles(run), *_size_tiles(run)]
    steps = scores.over_steps(folder / "train")
    sections = {
        "Summary": part("tiles", figures, f"Not done yet: {', '.join(missing)}." if missing else ""),
        "Training": part("training", trainings.of_one(run.steps)) if run.steps else "",
        "Sources": part("sources", run.train.sources, LOST) if run.train and run.train.sources else "",
        "Scores": part("scores", scores.rows(found), scores.points(found), scores.lengths(found), scores.losses(found)) if found else "",
        "Scores over steps": part("over_steps", steps) if steps else "",
        "Against the baseline": _against_baseline(folder) if found else "",
        "Compared": _compared(folder) if found else "",
        "Replies": part("replies", worst) if found and (worst := scores.replies(folder)) else "",
        "Export": part("export", run.gate) if run.gate else "",
        "Data": part("data", run.dataset, _lengths(run), packs, _held(packs)) if run.dataset else "",
        "Trained tokens": part("previews", list(map(_preview, run.preview.documents[:PREVIEWS]))) if run.preview else "",
        "Chain": part("table", ["stage", "digest", "made from", "#bytes", "#time", "host", "commit"], _chain(run.done)),
        "Recipe": part("folded", [(s, json.dumps(m.config, indent=2, ensure_ascii=False)) for s, m in run.done.items()]),
    }  # fmt: skip
    return document(folder.name, sections, facts=list(_facts(run)))


def _facts(run: RunFiles) -> Iterator[tuple[str, str]]:
    """The header: what was trained on what, when and where."""
    config = {stage: made.config for stage, made in run.done.items()}
    model = config.get("train", {}).get("model", {})
    random = "none: random weights" if "train" in config else ""
    base = config.get("sync", {}).get("base") or model.get("base") or random
    data = ", ".join(s.path for s in run.dataset.sources) if run.dataset else ""
    headers = [r for r in run.steps if isinstance(r, Attempt)]
    last = max((m.provenance.finished for m in run.done.values() if m.provenance), default="")
    about = {"preset": model.get("preset", ""), "base": base, "template": config.get("prepare", {}).get("template", ""), "data": data,
             "trained on": f"{headers[-1].ranks} × {headers[-1].device}" if headers else "", "finished": last[:16].replace("T", " ")}  # fmt: skip
    yield from ((name, str(value)) for name, value in about.items() if value)


def _loss_tiles(run: RunFiles) -> Iterator[Tile]:
    if train := run.train:
        yield "training loss", f"{train.loss:.3f}", f"from {train.first_loss:.3f}"
        for use in train.sources or ():
            if use.lost >= LOST:
                yield f"{use.lost:.0%} lost", use.source, "of its trained tokens, to seq_len or to skipped steps"
        if train.validation_loss is not None:
            yield "validation loss", f"{train.validation_loss:.3f}", f"from {train.validation_before:.3f}"


def _score_tiles(run: RunFiles) -> Iterator[Tile]:
    """The primary metric of the first three tasks."""
    tasks = [item for item in run.results.tasks.items() if item[1].metrics] if run.results else []
    for task, result in tasks[:3]:
        name, score = result.primary
        yield task, f"{score.value:.3f}", f"{name}, {interval(score.bounds)}, n {score.n:,}"


def _size_tiles(run: RunFiles) -> Iterator[Tile]:
    """Parameters, tokens, speed, packs, data and the gate."""
    if convert := run.convert:
        yield "parameters", number(convert.parameters), "in the checkpoint"
    if train := run.train:
        attempts = f", {train.attempts} attempts" if train.attempts > 1 else ""
        if train.stopped:
            why = f"{train.max_minutes:g} minutes" if train.max_minutes else "early stopping: no lower validation loss"
            yield "stopped early", f"{train.final_step:,}", f"of {train.data.steps:,} steps: {why}"
        yield "tokens trained on", number(train.tokens), f"{train.final_step:,} steps{attempts}"
        mfu = f", MFU {train.mfu:.1%}" if train.mfu is not None else ""
        yield "speed", number(train.tokens_per_s), f"tokens per second{mfu}"
        yield "pack fill", f"{train.data.fill:.1%}", f"{train.data.packs:,} packs of {train.data.seq_len:,}"
    if run.dataset:
        split = run.dataset.splits["data"]
        yield "conversations", number(split.documents), f"{number(split.tokens)} tokens"
    if convert:
        gate = convert.gate
        yield "export check", "passed", f"logits within {gate.max_difference:.0e} of {gate.max_logit:.1f}"


def _against_baseline(folder: Path) -> Markup:
    try:
        found = comparison.with_baseline(folder)
    except SftError as error:
        return part("note", str(error), "bad")
    return part("differences", comparison.of_scores(found)) if found else Markup()


def _compared(folder: Path) -> Markup:
    """The comparisons with this run as the first one: the scores and options of each."""
    try:
        found = comparison.in_report(folder)
    except (OSError, SftError) as error:
        return part("note", str(error), "bad")
    body = Markup()
    for c in found:
        letters = LETTERS[: len(c.runs)]
        body += part("heading", ", ".join(f"{letter} = {name}" for letter, name in zip(letters, c.runs, strict=True)))
        body += part("differences", comparison.of_scores(c, plots=False))
        body += part("options", comparison.option_rows(c.fields), letters)
    return body


def _lengths(run: RunFiles) -> Chart | None:
    up_to = run.dataset.lengths.up_to if run.dataset else ()
    bars = [(f"≤{limit:,}", n, f"{n:,} conversations, {tokens:,} tokens") for limit, n, tokens in up_to]
    return charts.bars("conversations by length", "tokens", bars)


def _held(packs: StepSummary | None) -> Chart | None:
    """What the positions of the packs hold."""
    if packs is None:
        return None
    trained = packs.trained_tokens / max(1, packs.tokens + packs.padding)
    shares = {
        "trained tokens": trained,
        "context": 1 - packs.padding_fraction - trained,
        "padding": packs.padding_fraction,
    }
    points = [charts.Interval(f"{name} {value:.1%}", value, 0, value) for name, value in shares.items()]
    return charts.intervals("what the positions of the run's packs hold, as shares", points, (0, 1))


def _preview(segments: Sequence[Segment]) -> tuple[Any, bool]:
    """The first characters of a conversation: [(is trained, [(text, is special), …]), …], and whether that is all of it."""
    left, runs = TEXT, []
    for trained, run in itertools.groupby(segments, key=lambda segment: segment.trained):
        shown = []
        for segment in run:
            if left > 0:
                shown.append((segment.text[:left], segment.special))
            left -= len(segment.text)
        if shown:
            runs.append((trained, shown))
    return runs, left >= 0 and bool(segments and segments[-1].end)


def _chain(done: Mapping[str, Manifest]) -> list[list[str]]:
    """The digest of every stage's result, the results that it was made from, and when and where it was made."""
    code, rows = Markup("<code>{}</code>"), []
    for stage, made in done.items():
        about = made.provenance or Provenance()
        inputs = []
        for entry in made.inputs:
            upstream = entry.manifest.split("/")[1] if entry.manifest else ""
            unchanged = not upstream or (upstream in done and done[upstream].digest == entry.sha256)
            mark = Markup("" if unchanged else ' <b class="bad">changed since</b>')
            inputs.append(
                Markup("{} {}{}").format(code.format(upstream or entry.name), code.format(entry.sha256[:10]), mark)
            )
        commit = code.format(about.git[:10]) + (" + edits" if about.dirty else "")
        rows.append([stage, code.format(made.digest[:10]), Markup("<br>").join(inputs) or "–", number(sum(o.bytes for o in made.outputs)),
                     _duration(about), about.host, commit])  # fmt: skip
    return rows


def _duration(about: Provenance) -> str:
    """The hours, minutes and seconds that a stage took."""
    try:
        seconds = (datetime.fromisoformat(about.finished) - datetime.fromisoformat(about.started)).total_seconds()
    except (ValueError, TypeError):
        return "–"
    return str(timedelta(seconds=round(seconds)))
