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
from sft.formats.lines import to_lines
from sft.formats.results import ValidationLoss
from sft.formats.samples import ConversationLoss

if TYPE_CHECKING:
    from sft.evaluation.recorder import Recorder  # imports torch and lm-eval


class TokenizedConversation(NamedTuple):
    """Token ids of a held-out conversation, and which of them are targets."""

    ids: list[int]
    loss_mask: list[bool]


def validation_loss(
    model: Recorder, folder: Path, limit: int, seq_len: int, file: Path | None = None
) -> ValidationLoss:
    """The loss over the first `limit` conversations, each cut at `seq_len` tokens and at the model's own limit.

    Writes the loss of every conversation to `file`. Raises SftError when no token is trained.
    """
    longest = min(seq_len, model.max_length - 1)  # vLLM wants to add a token: the same cut for every backend
    conversations = read_conversations(folder, limit, longest)
    losses, logged = [], time.monotonic()
    for conversation, (loss, num_targets) in zip(conversations, model.losses(conversations), strict=True):
        losses.append(ConversationLoss(json_hash(conversation)[:16], loss, num_targets))
        if time.monotonic() - logged > LOG_EVERY_S:
            logged = time.monotonic()
            model.log(f"{len(losses):,}/{len(conversations):,} held-out conversations")
    losses = [loss for loss in losses if loss.labels]
    if not losses:
        raise SftError(f"{folder}: no trained token in the first {limit} documents; next: make prepare again")
    if file:
        write_atomic(file, to_lines(losses))
    return summarise(losses)


def read_conversations(folder: Path, limit: int, longest: int) -> list[TokenizedConversation]:
    """The first `limit` conversations of a split, each cut at `longest` tokens."""
    dataset = Dataset.open(folder)
    conversations = []
    for part, start, length in dataset.documents[["part", "start", "length"]][:limit].tolist():
        end = start + min(length, longest)
        conversations.append(
            TokenizedConversation(dataset.ids(part)[start:end].tolist(), dataset.loss_mask(part)[start:end].tolist())
        )
    return conversations


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
