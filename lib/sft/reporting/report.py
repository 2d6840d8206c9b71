"""The report: one HTML page on the stages of a run that are done.

In:  runs/<run>/*/manifest.json, and beside them dataset.json, preview.json, metrics.jsonl, gate.json, results.json.
Out: index.html: figures, loss curve, data and packing, trained tokens, scores with their intervals, the chain of manifests.
     It loads nothing from the network (its content security policy forbids it), works from file:// and follows the reader's
     light or dark theme.
Run: make report RECIPE=…, or python stages/report.py runs/<run>.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from html import escape
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.formats.manifest import Manifest, Provenance
from sft.formats.metrics import LOST
from sft.formats.results import SAMPLES
from sft.recipe import schema
from sft.reporting import comparison, replies, scores, sections
from sft.reporting.charts import number
from sft.reporting.page import document, table
from sft.reporting.run_files import RunFiles
from sft.reporting.scores import interval
from sft.runner.stage import Result, Stage

Tile = tuple[str, str, str]
"""Name, value and detail of a figure."""


def report(stage: Stage) -> Result:
    """The stage: writes the page."""
    text = page(stage.run)
    write_atomic(stage.out / "index.html", text.encode())
    found = RunFiles(stage.run).results
    pages = replies.write(stage.run, found, stage.out) if found else []
    stage.log(f"{stage.run / 'report' / 'index.html'}: {len(text):,} bytes")
    return Result(outputs=["index.html", *pages])


def page(folder: Path) -> str:
    """The page of a run's folder. Raises SftError when no stage is done, or a file is damaged."""
    run = RunFiles(folder)
    if not run.done:
        raise SftError(f"{folder}: no stage is done, so there is nothing to report; next: make prepare")
    parts = [
        ("Summary", tiles(run)),
        ("Training", sections.curves(run.steps) if run.steps else ""),
        ("Scores", scores.scores(run.results) if run.results else ""),
        ("Scores over steps", scores.over_steps(folder / "train")),
        ("Against the baseline", comparison.with_baseline(folder) if run.results else ""),
        ("Compared", comparison.in_report(folder) if run.results else ""),
        ("Replies", scores.replies(folder / "evaluate" / SAMPLES, run.results) if run.results else ""),
        ("Export", sections.export(run.gate) if run.gate else ""),
        ("Data", sections.data(run.dataset, run.train.data if run.train else None) if run.dataset else ""),
        ("Trained tokens", sections.previews(run.preview) if run.preview else ""),
        ("Chain", chain(run.done)),
        ("Recipe", recipe(run.done)),
    ]
    missing = [s for s in schema.STAGES if s not in run.done]
    note = f'<p class="note">Not done yet: {", ".join(missing)}.</p>' if missing else ""
    return document(folder.name, [(title, body) for title, body in parts if body], note)


def tiles(run: RunFiles) -> str:
    """The most important figures: (name, value, detail) of each."""
    found = [*_loss_tiles(run), *_score_tiles(run), *_size_tiles(run)]
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><i>{escape(name)}</i><small>{escape(detail)}</small></div>'
        for name, value, detail in found
    )
    return f'<div class="tiles">{cells}</div>' if cells else f"<p>{escape(str(run.folder))}</p>"


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


def chain(done: Mapping[str, Manifest]) -> str:
    """The digest of every stage's result, the results that it was made from, and when and where it was made."""
    rows = []
    for stage, made in done.items():
        about = made.provenance or Provenance()
        size = sum(o.bytes for o in made.outputs)
        inputs = []
        for entry in made.inputs:
            upstream = entry.manifest.split("/")[1] if entry.manifest else ""
            unchanged = not upstream or (upstream in done and done[upstream].digest == entry.sha256)
            mark = "" if unchanged else ' <b class="bad">changed since</b>'
            inputs.append(f"<code>{escape(upstream or entry.name)}</code> <code>{entry.sha256[:10]}</code>{mark}")
        commit = escape(about.git[:10])
        rows.append(
            [
                f"<b>{stage}</b>",
                f"<code>{made.digest[:10]}</code>",
                "<br>".join(inputs) or "–",
                number(size),
                duration(about),
                escape(about.host),
                f"<code>{commit}</code>" + (" + edits" if about.dirty else ""),
            ]
        )
    return table(["stage", "digest", "made from", "bytes", "time", "host", "commit"], rows, numbers=(3, 4))


def recipe(done: Mapping[str, Manifest]) -> str:
    """The options of every stage."""
    parts = []
    for stage, made in done.items():
        text = json.dumps(made.config, indent=2, ensure_ascii=False)
        parts.append(f"<details><summary>{stage}</summary><pre>{escape(text)}</pre></details>")
    return "".join(parts)


def duration(about: Provenance) -> str:
    """The hours, minutes and seconds that a stage took."""
    try:
        seconds = (datetime.fromisoformat(about.finished) - datetime.fromisoformat(about.started)).total_seconds()
    except (ValueError, TypeError):
        return "–"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"
