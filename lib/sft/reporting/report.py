"""The report: one HTML page over whatever stages of a run are done.

In:  runs/<run>/*/manifest.json, and beside them dataset.json, preview.json, metrics.jsonl, gate.json, results.json.
Out: index.html: figures, loss curve, data and packing, trained tokens, scores with their intervals, the manifest chain.
     It asks nothing of the network (its content security policy forbids it), works from file:// and follows the reader's
     light or dark theme.
Run: make report RECIPE=…, or python stages/report.py runs/<run>.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.formats import dataset, manifest, preview
from sft.formats import gate as gate_format
from sft.formats import metrics as metrics_format
from sft.formats import results as results_format
from sft.formats.dataset import DatasetInfo
from sft.formats.gate import ConvertMetrics, GateRecord
from sft.formats.manifest import Manifest
from sft.formats.metrics import Attempt, MetricsRecord, StepRecord, TrainMetrics, read_metrics
from sft.formats.preview import Preview
from sft.formats.record import Record
from sft.formats.results import SAMPLES, EvaluateMetrics, Results
from sft.recipe import schema
from sft.reporting import charts, comparison
from sft.reporting.charts import Line, number
from sft.reporting.page import TEXT, clip, document, table
from sft.reporting.scores import interval, over_steps, replies, scores

if TYPE_CHECKING:
    from sft.runner.stage import Result, Stage

Format = TypeVar("Format", bound=Record)
PREVIEWS = 6
SMALL = (  # what metrics.jsonl may hold besides the loss
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_s", "tokens per second"),
    ("mfu", "model FLOPs utilisation"),
    ("memory_gb", "peak memory of a GPU, GB"),
    ("imbalance", "idle share of ranks"),
)


def report(stage: Stage) -> Result:
    from sft.runner.stage import Result

    text = page(stage.run)
    write_atomic(stage.out / "index.html", text.encode())
    stage.log(f"{stage.run / 'report' / 'index.html'}: {len(text):,} bytes")
    return Result(outputs=["index.html"])


def page(run: Path) -> str:
    """The page of a run's folder. Raises SftError when no stage is done."""
    done = manifests(run)
    if not done:
        raise SftError(f"{run}: no stage is done, so there is nothing to report; next: make prepare")
    train = train_metrics(done, run)
    records = read_metrics(run / "train" / metrics_format.NAME) if train else []
    sections: list[tuple[str, str]] = [("Summary", tiles(done, run))]
    makers: list[tuple[str, Callable[[], str]]] = [
        ("Training", lambda: curves(records) if records else ""),
        ("Scores", lambda: scores(results(run)) if "evaluate" in done else ""),
        ("Scores over steps", lambda: over_steps(run / "train")),
        ("Compared", lambda: comparison.in_report(run) if "evaluate" in done else ""),
        ("Replies", lambda: replies(run / "evaluate" / SAMPLES, results(run)) if "evaluate" in done else ""),
        ("Export", lambda: export(run) if "convert" in done else ""),
        ("Data", lambda: data(run, train) if "prepare" in done else ""),
        ("Trained tokens", lambda: previews(run) if "prepare" in done else ""),
        ("Chain", lambda: chain(done)),
        ("Recipe", lambda: recipe(done)),
    ]
    sections += [(title, body) for title, make in makers if (body := make())]
    missing = [s for s in schema.STAGES if s not in done]
    note = f'<p class="note">Not done yet: {", ".join(missing)}.</p>' if missing else ""
    return document(run.name, sections, note)


def manifests(run: Path) -> dict[str, Manifest]:
    """The whole manifests of a run, in the order of the stages; torn ones count as absent."""
    found = {}
    for stage in schema.STAGES:
        try:
            found[stage] = manifest.load(run / stage / manifest.NAME)
        except (FileNotFoundError, SftError):
            continue
    return found


def results(run: Path) -> Results:
    """The scores of evaluate, which is done. Raises SftError naming the file."""
    file = run / "evaluate" / results_format.NAME
    try:
        return Results.read(file)
    except FileNotFoundError as error:
        raise SftError(f"{file}: {error.strerror}; next: make verify") from None


def train_metrics(done: Mapping[str, Manifest], run: Path) -> TrainMetrics | None:
    """The metrics of train, which is done. Raises SftError for damaged ones."""
    return TrainMetrics.of(done["train"], str(run / "train" / manifest.NAME)) if "train" in done else None


def tiles(done: Mapping[str, Manifest], run: Path) -> str:
    """The figures that a reader looks for first."""
    made: list[tuple[str, str, str]] = []
    metrics = {stage: m.metrics for stage, m in done.items()}
    train = train_metrics(done, run)
    if train:
        made.append(("training loss", f"{train.loss:.3f}", f"from {train.first_loss:.3f}"))
    if train and train.validation_loss is not None:
        made.append(("validation loss", f"{train.validation_loss:.3f}", f"from {train.first_validation_loss:.3f}"))
    evaluated = EvaluateMetrics.of(done["evaluate"], f"{run}/evaluate").tasks if "evaluate" in done else {}
    for task, found in [item for item in evaluated.items() if item[1]][:3]:
        name, score = next(iter(found.items()))
        made.append((task, f"{score.value:.3f}", f"{name}, {interval(score.bounds)}, n {score.n:,}"))
    converted = ConvertMetrics.of(done["convert"], run / "convert" / manifest.NAME) if "convert" in done else None
    if converted:
        made.append(("parameters", number(converted.parameters), "in the checkpoint"))
    if train:
        again = f", {train.attempts} attempts" if train.attempts > 1 else ""
        made.append(("tokens trained on", number(train.tokens), f"{train.final_step:,} steps" + again))
        used = f", MFU {train.mfu:.1%}" if train.mfu is not None else ""
        made.append(("speed", number(train.tokens_per_s), "tokens per second" + used))
        made.append(("pack fill", f"{train.data.fill:.1%}", f"{train.data.packs:,} packs of {train.data.seq_len:,}"))
    prepared = metrics.get("prepare", {})
    if "documents" in prepared:
        made.append(("conversations", number(prepared["documents"]), f"{number(prepared['tokens'])} tokens"))
    if converted:
        gate = converted.gate
        made.append(("export check", "passed", f"logits within {gate.max_difference:.0e} of {gate.max_logit:.1f}"))
    cells = "".join(
        f'<div class="tile"><b>{escape(v)}</b><i>{escape(n)}</i><small>{escape(d)}</small></div>' for n, v, d in made
    )
    return f'<div class="tiles">{cells}</div>' if cells else f"<p>{escape(str(run))}</p>"


def curves(records: Sequence[MetricsRecord]) -> str:
    """Training and validation loss, then learning rate, gradient norm and speed as small charts."""

    steps = [r for r in records if isinstance(r, StepRecord)]

    def points(name: str) -> list[tuple[float, float]]:
        found = ((r.step, getattr(r, name)) for r in steps)
        return [(step, value) for step, value in found if value is not None and math.isfinite(value)]

    loss, validation = points("loss"), points("validation_loss")
    series = [Line("training loss", "raw", loss), Line("smoothed", "one", charts.smooth(loss))]
    if validation:
        series.append(Line("validation loss", "two", validation, dots=True))
    small = []
    for name, title in SMALL:
        if found := points(name):
            small.append(charts.lines([Line(title, "one", found)], width=360, height=190, x_name="step", digits=6))
    notes = []
    if skipped := sum(1 for r in steps if r.skipped):
        notes.append(f"Steps skipped because their loss or gradient was a spike or not finite: {skipped}.")
    if resumed := [r.from_step for r in records if isinstance(r, Attempt) and r.attempt > 1]:
        notes.append(f"Attempts: {len(resumed) + 1}, continued from step {', '.join(f'{n:,}' for n in resumed)}.")
    note = "".join(f'<p class="note">{text}</p>' for text in notes)
    large = charts.lines(series, width=1040, height=340, x_name="step", digits=4)
    return f'{large}<div class="row">{"".join(small)}</div>{note}'


def export(run: Path) -> str:
    """What the gate compared, and the greedy replies."""
    gate = GateRecord.read(run / "convert" / gate_format.NAME)
    logits, tensors = gate.logits, gate.tensors
    kl = logits.rounding_kl
    rounding = "not measured" if kl is None else f"KL divergence {kl:.1e} nats a token" if kl else "none: float32"
    facts = [
        ("tensors", f"{tensors.count:,}, {number(tensors.bytes)} bytes of {tensors.dtype}: complete, finite, as in the checkpoint"),
        ("logits", f"largest difference {logits.max_difference:.2e} at logits up to {logits.max_logit:.2f}, argmax equal in"
                   f" {logits.argmax_agreement:.1%} of {logits.rows} positions"),
        ("compared on", f"packed conversations of {', '.join(f'{n:,}' for n in logits.documents)} tokens, {logits.layers} layers"),
        ("cost of rounding", rounding),
        ("stops on", ", ".join(str(i) for i in gate.tokenizer.stop_ids)),
    ]  # fmt: skip
    body = table(["", ""], [[escape(k), escape(v)] for k, v in facts], head=False)
    for chat in gate.chats or ():
        ended = "stopped by itself" if chat.stopped else "did not stop by itself"
        body += (
            f'<article class="chat"><header>greedy reply, {chat.tokens} tokens, {ended}</header>'
            f"<pre>{clip(chat.prompt)}<mark>{clip(chat.reply)}</mark></pre></article>"
        )
    return body


def data(run: Path, train: TrainMetrics | None) -> str:
    """Sources, lengths, and what packing makes of them."""
    info = read_format(DatasetInfo, run / "prepare" / dataset.NAME)
    rows = [
        [
            escape(s.path),
            f"{s.documents:,}",
            f"{s.tokens:,}",
            f"{s.labels / max(1, s.tokens):.1%}",
            f"{s.rejected:,}",
        ]
        for s in info.sources
    ]
    body = table(["source", "conversations", "tokens", "trained", "rejected"], rows, numbers=(1, 2, 3, 4))
    lengths = info.lengths
    bars = [(f"≤{limit:,}", n, f"{n:,} conversations, {tokens:,} tokens") for limit, n, tokens in lengths.up_to]
    body += "<h3>Conversations by length</h3>" + charts.bars(bars, width=1040, height=220, x_name="tokens")
    body += (
        f'<p class="note">median {lengths.p50:,}, 99th percentile {lengths.p99:,}, longest {lengths.max:,} tokens</p>'
    )
    if plan := train.data if train else None:
        trained = plan.trained_tokens / max(1, plan.tokens + plan.padding)
        rest = 1 - plan.padding_fraction - trained
        parts = [
            ("trained tokens", "one", trained),
            ("context", "raw", rest),
            ("padding", "two", plan.padding_fraction),
        ]
        body += "<h3>What the positions of the run's packs hold</h3>" + charts.share(parts)
        body += (
            f'<p class="note">{plan.documents_per_pack:.1f} conversations a pack; {plan.long_documents:,} longer than'
            f" {plan.seq_len:,} tokens ({escape(str(plan.long_documents_policy))}), which loses"
            f" {plan.tokens_lost_fraction:.2%} of the tokens and {plan.trained_tokens_lost_fraction:.2%} of the"
            " trained ones</p>"
        )
    return body


def previews(run: Path) -> str:
    """The first conversations with the tokens that are trained on marked."""
    found = read_format(Preview, run / "prepare" / preview.NAME)
    parts = []
    for segments in found.documents[:PREVIEWS]:
        budget, text = TEXT, ""
        for trained, run_of in itertools.groupby(segments, key=lambda segment: segment.trained):
            shown = ""
            for segment in run_of:
                piece = escape(segment.text[:budget])
                budget -= len(segment.text)
                shown += f'<span class="special">{piece}</span>' if segment.special and piece else piece
            text += f"<mark>{shown}</mark>" if trained and shown else shown
        whole = budget >= 0 and segments and segments[-1].end
        end = '<span class="end">■ end of document</span>' if whole else " …"
        parts.append(f'<article class="chat"><pre>{text}{end}</pre></article>')
    return (
        '<p class="note">Marked: what the loss is computed on. <span class="special">Coloured</span>: special tokens; the same'
        f' characters written in a message stay plain.</p><div class="cards">{"".join(parts)}</div>'
        if parts
        else ""
    )


def chain(done: Mapping[str, Manifest]) -> str:
    """Which result was made from which: keys, digests, where and when."""
    rows = []
    for stage, made in done.items():
        about = made.provenance or {}
        size = sum(o.bytes for o in made.outputs)
        inputs = []
        for entry in made.inputs:
            upstream = entry.manifest.split("/")[1] if entry.manifest else ""
            whole = not upstream or (upstream in done and done[upstream].digest == entry.sha256)
            mark = "" if whole else ' <b class="bad">changed since</b>'
            inputs.append(f"<code>{escape(upstream or entry.name)}</code> <code>{entry.sha256[:10]}</code>{mark}")
        commit = escape(str(about.get("git", ""))[:10])
        rows.append(
            [
                f"<b>{stage}</b>",
                f"<code>{made.digest[:10]}</code>",
                "<br>".join(inputs) or "–",
                number(size),
                duration(about),
                escape(str(about.get("host", ""))),
                f"<code>{commit}</code>" + (" + edits" if about.get("dirty") else ""),
            ]
        )
    return table(["stage", "digest", "made from", "bytes", "time", "host", "commit"], rows, numbers=(3, 4))


def recipe(done: Mapping[str, Manifest]) -> str:
    parts = []
    for stage, made in done.items():
        text = json.dumps(made.config, indent=2, ensure_ascii=False)
        parts.append(f"<details><summary>{stage}</summary><pre>{escape(text)}</pre></details>")
    return "".join(parts)


def duration(about: Mapping[str, Any]) -> str:
    try:
        seconds = (datetime.fromisoformat(about["finished"]) - datetime.fromisoformat(about["started"])).total_seconds()
    except (KeyError, ValueError, TypeError):
        return "–"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"


def read_format(kind: type[Format], file: Path) -> Format:
    """A file of a stage that is done. Raises SftError naming it."""
    try:
        return kind.read(file)
    except OSError as error:
        raise SftError(f"{file}: {error}; next: make verify") from None


def read(file: Path) -> Any:
    """A JSON file of a stage that is done. Raises SftError naming it."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SftError(f"{file}: {error}; next: make verify") from None
