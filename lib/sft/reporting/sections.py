"""The report's sections about training, the export and the data.

In: records of sft.formats. Out: the HTML of one section each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from sft.formats.dataset import DatasetInfo
from sft.formats.gate import GateRecord
from sft.formats.metrics import Attempt, MetricsRecord, StepRecord, validation_losses
from sft.formats.packs import StepSummary
from sft.formats.preview import Preview, Segment
from sft.reporting import charts
from sft.reporting.charts import Line, number
from sft.reporting.page import TEXT, clip, table

PREVIEWS = 6
"""Conversations shown with their trained tokens."""


def curves(records: Sequence[MetricsRecord]) -> str:
    """Training and validation loss, then small charts of the other numbers. A number that was not measured has none."""
    steps = [r for r in records if isinstance(r, StepRecord)]

    def points(name: str) -> list[tuple[float, float]]:
        found = ((r.step, getattr(r, name)) for r in steps)
        return [(step, value) for step, value in found if value is not None and math.isfinite(value)]

    loss = points("loss")
    validation: list[tuple[float, float]] = [(x, y) for x, y in validation_losses(records) if math.isfinite(y)]
    series = [Line("training loss", "raw", loss), Line("smoothed", "one", charts.smooth(loss))]
    if validation:
        series.append(Line("validation loss", "two", validation, dots=True))
    small = []
    for name, title in StepRecord.charts().items():
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


def export(gate: GateRecord) -> str:
    """What the gate compared, and the greedy replies."""
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


def data(info: DatasetInfo, packs: StepSummary | None) -> str:
    """Sources and lengths of the dataset, and how its packs are filled."""
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
    return body + (_packs(packs) if packs else "")


def _packs(packs: StepSummary) -> str:
    """What the positions of the packs hold, and what is lost by long documents."""
    trained = packs.trained_tokens / max(1, packs.tokens + packs.padding)
    parts = [
        ("trained tokens", "one", trained),
        ("context", "raw", 1 - packs.padding_fraction - trained),
        ("padding", "two", packs.padding_fraction),
    ]
    return (
        f"<h3>What the positions of the run's packs hold</h3>{charts.share(parts)}"
        f'<p class="note">{packs.documents_per_pack:.1f} conversations a pack; {packs.long_documents:,} longer than'
        f" {packs.seq_len:,} tokens ({escape(str(packs.long_documents_policy))}), which loses"
        f" {packs.tokens_lost_fraction:.2%} of the tokens and {packs.trained_tokens_lost_fraction:.2%} of the"
        " trained ones</p>"
    )


def previews(preview: Preview) -> str:
    """The first conversations, with the tokens that are trained marked."""
    parts = [
        f'<article class="chat"><pre>{_document(segments)}</pre></article>' for segments in preview.documents[:PREVIEWS]
    ]
    if not parts:
        return ""
    return (
        '<p class="note">Marked: what the loss is computed on. <span class="special">Coloured</span>: special tokens; the same'
        f' characters written in a message stay plain.</p><div class="cards">{"".join(parts)}</div>'
    )


def _document(segments: Sequence[Segment]) -> str:
    """The first characters of a conversation as HTML."""
    left, text = TEXT, ""
    for trained, run in itertools.groupby(segments, key=lambda segment: segment.trained):
        shown = ""
        for segment in run:
            part = escape(segment.text[:left]) if left > 0 else ""
            left -= len(segment.text)
            shown += f'<span class="special">{part}</span>' if segment.special and part else part
        text += f"<mark>{shown}</mark>" if trained and shown else shown
    is_complete = left >= 0 and segments and segments[-1].end
    return text + ('<span class="end">■ end of document</span>' if is_complete else " …")
