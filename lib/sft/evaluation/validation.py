"""The loss of a model on held-out conversations.

In:  prepare's validation split. Out: the mean loss of a trained token with its error, and the loss of every conversation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.data.dataset import Dataset
from sft.evaluation.batches import LOG_EVERY_S
from sft.evaluation.scores import json_hash
from sft.evaluation.statistics import Z95
from sft.formats.dataset import DatasetInfo
from sft.formats.lines import to_lines
from sft.formats.results import PartLoss, ValidationLoss
from sft.formats.samples import ConversationLoss

if TYPE_CHECKING:
    from sft.evaluation.recorder import Recorder  # imports torch and lm-eval


MOST_TURNS = 8
"""Positions of answers that have a loss of their own; the last one counts all later ones, too."""


class TokenizedConversation(NamedTuple):
    """Token ids of a held-out conversation, which of them are targets, and the number of its source."""

    ids: list[int]
    loss_mask: list[bool]
    source: int


def validation_loss(
    model: Recorder, folder: Path, limit: int, seq_len: int, file: Path | None = None
) -> ValidationLoss:
    """The loss over the first `limit` conversations, each cut at `seq_len` tokens and at the model's own limit.

    Writes the loss of every conversation to `file`. Raises SftError when no token is trained.
    """
    longest = min(seq_len, model.max_length - 1)  # vLLM wants to add a token: the same cut for every backend
    conversations = read_conversations(folder, limit, longest)
    losses: list[ConversationLoss] = []
    by_source: dict[int, list[ConversationLoss]] = {}
    by_turn: dict[int, list[ConversationLoss]] = {}
    logged = time.monotonic()
    questions = [(c.ids, c.loss_mask) for c in conversations]
    for c, found in zip(conversations, model.shared_losses(questions), strict=True):
        if found:
            item = json_hash([c.ids, c.loss_mask])[:16]
            losses.append(ConversationLoss(item, math.fsum(found), len(found)))
            by_source.setdefault(c.source, []).append(losses[-1])
            for turn, part in by_turns(c.loss_mask, found).items():
                by_turn.setdefault(turn, []).append(ConversationLoss(item, math.fsum(part), len(part)))
        if time.monotonic() - logged > LOG_EVERY_S:
            logged = time.monotonic()
            model.log(f"{len(losses):,}/{len(conversations):,} held-out conversations")
    if not losses:
        raise SftError(f"{folder}: no trained token in the first {limit} documents; next: make prepare again")
    if file:
        write_atomic(file, to_lines(losses))
    names = source_names(folder.parent) if len(by_source) > 1 else {}
    return replace(
        summarise(losses),
        by_source={names.get(n, str(n)): _part(by_source[n]) for n in sorted(by_source)}
        if len(by_source) > 1
        else None,
        by_turn=tuple(_part(by_turn[k]) for k in sorted(by_turn)) if len(by_turn) > 1 else None,
    )


def by_turns(loss_mask: Sequence[bool], losses: Sequence[float]) -> dict[int, list[float]]:
    """The losses of a conversation's targets by the answer that they belong to: 0 is the first one.

    An answer is a run of targets: of the mask 0 1 1 0 0 1 the losses a b c give {0: [a, b], 1: [c]}.
    """
    found: dict[int, list[float]] = {}
    remaining, turn, before = iter(losses), -1, False
    for is_target in loss_mask[1:]:
        turn += is_target and not before
        before = is_target
        if is_target:
            found.setdefault(min(turn, MOST_TURNS - 1), []).append(next(remaining))
    return found


def source_names(prepared: Path) -> dict[int, str]:
    """{number: path} of the mix's sources; empty without dataset.json."""
    try:
        return {i: source.path for i, source in enumerate(DatasetInfo.of(prepared).sources)}
    except (OSError, SftError):
        return {}


def read_conversations(folder: Path, limit: int, longest: int) -> list[TokenizedConversation]:
    """The first `limit` conversations of a split, each cut at `longest` tokens."""
    dataset = Dataset.open(folder)
    conversations = []
    for part, start, length, source in dataset.documents[["part", "start", "length", "source"]][:limit].tolist():
        end = start + min(length, longest)
        ids, loss_mask = dataset.ids[part][start:end].tolist(), dataset.loss_masks[part][start:end].tolist()
        conversations.append(TokenizedConversation(ids, loss_mask, source))
    return conversations


def _part(losses: Sequence[ConversationLoss]) -> PartLoss:
    whole = summarise(losses)
    return PartLoss(whole.loss, whole.stderr, whole.documents, whole.labels)


def summarise(losses: Sequence[ConversationLoss]) -> ValidationLoss:
    """The mean over all trained tokens. Its standard error is that of a ratio with conversations as clusters (Cochran 1977, 6.3)."""
    n, num_targets = len(losses), sum(c.labels for c in losses)
    mean = sum(c.loss for c in losses) / num_targets
    result = ValidationLoss(loss=mean, stderr=None, perplexity=perplexity(mean), documents=n, labels=num_targets)
    if n < 2:
        return result
    spread = sum((c.loss - mean * c.labels) ** 2 for c in losses)
    stderr = math.sqrt(spread * n / (n - 1)) / num_targets
    low, high = mean - Z95 * stderr, mean + Z95 * stderr
    return replace(
        result, stderr=stderr, low=low, high=high, perplexity_low=perplexity(low), perplexity_high=perplexity(high)
    )


def perplexity(loss: float) -> float:
    """exp(loss), finite for every finite loss."""
    return math.exp(min(loss, 700.0))
