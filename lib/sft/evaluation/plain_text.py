"""The loss of a model on texts that are no chat: what it knew before it was trained on conversations, and may forget.

In:  a JSONL file of `text` and perhaps `kind`: plain_text.jsonl beside this module, or one of the recipe's. Out: the mean loss of a token, its
perplexity and bits per byte, by kind too, and the loss of every text.

Every token of a text is scored, in lm-eval's windows where a text is longer than the model's context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sft.common.errors import SftError
from sft.common.files import hash_file, write_atomic
from sft.evaluation.scores import json_hash
from sft.evaluation.validation import perplexity, summarise
from sft.formats.lines import to_lines
from sft.formats.record import Record
from sft.formats.results import PartLoss, TextLoss
from sft.formats.samples import ConversationLoss, PlainTextLoss

if TYPE_CHECKING:
    from sft.evaluation.recorder import Recorder  # imports torch and lm-eval

Window = tuple[list[int], list[bool]]
"""Token ids, and which of them are scored."""


@dataclass(frozen=True)
class _Text(Record):
    NEXT: ClassVar[str] = "correct the line; a text has the fields text and kind"
    text: str
    kind: str = ""


def plain_text_loss(model: Recorder, texts: Path, file: Path | None = None) -> TextLoss:
    """The loss over all texts. Writes the loss of every text to `file`. Raises SftError for a file without texts."""
    found = [t for t in read_texts(texts) if t.text]
    if not found:
        raise SftError(f"{texts}: no text; next: correct [evaluate] plain_text, or set it to ''")
    windows = [_windows(model, t.text) for t in found]
    losses = model.losses([window for of_text in windows for window in of_text])
    items = []
    for text, of_text in zip(found, windows, strict=True):
        sums = [next(losses) for _ in of_text]
        total, labels = math.fsum(loss for loss, _ in sums), sum(n for _, n in sums)
        items.append(PlainTextLoss(json_hash(text.text)[:16], text.kind, total, labels, len(text.text.encode())))
    if file:
        write_atomic(file, to_lines(items))
    return _summary(items, hash_file(texts))


def read_texts(file: Path) -> list[_Text]:
    """The texts of a file. Raises SftError with the line's number for a line that is none."""
    found = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if line.strip():
            found.append(_Text.from_bytes(line, f"{file}:{number}"))
    return found


def _windows(model: Recorder, text: str) -> list[Window]:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # start-up: lm-eval takes seconds

    ids = model.tokenizer.encode(text, add_special_tokens=False, verbose=False)  # a long text has several windows
    pairs = get_rolling_token_windows(
        ids,
        prefix_token=model.prefix_token_id,
        max_seq_len=model.max_length - 1,  # vLLM wants to add a token: the same windows for every backend
        context_len=1,
    )
    disjoint = map(make_disjoint_window, pairs)
    return [([*context, *scored], [False] * len(context) + [True] * len(scored)) for context, scored in disjoint]


def _summary(items: list[PlainTextLoss], sha256: str) -> TextLoss:
    whole = summarise([ConversationLoss(i.item, i.loss, i.labels) for i in items])
    size = sum(i.bytes for i in items)
    kinds = sorted({i.kind for i in items})
    return TextLoss(
        loss=whole.loss,
        stderr=whole.stderr,
        low=whole.low,
        high=whole.high,
        perplexity=perplexity(whole.loss),
        bits_per_byte=whole.loss * whole.labels / math.log(2) / size,
        documents=whole.documents,
        labels=whole.labels,
        bytes=size,
        by_kind={kind: _of_kind(items, kind) for kind in kinds} if len(kinds) > 1 else None,
        sha256=sha256,
    )


def _of_kind(items: list[PlainTextLoss], kind: str) -> PartLoss:
    part = summarise([ConversationLoss(i.item, i.loss, i.labels) for i in items if i.kind == kind])
    return PartLoss(part.loss, part.stderr, part.documents, part.labels)
