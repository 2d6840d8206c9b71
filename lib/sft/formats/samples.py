"""Records of single items of an evaluation, all JSONL. Standard library only.

evaluate/samples/<task>.jsonl    Sample, or HarnessSample by one of AI2's harnesses; SampleItem reads both
evaluate/validation.jsonl        ConversationLoss
evaluate/plain_text.jsonl        PlainTextLoss
samples/<task>.incomplete.jsonl  UnscoredReply: the replies of a task that a signal interrupted
work/<task>.replies.jsonl        Reply or Likelihood: the model's answers, which the next attempt reuses
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sft.formats.record import FormatError, Record, build, to_json

_NEXT = "remove evaluate's folder and make evaluate again"


@dataclass(frozen=True, kw_only=True)
class Sample(Record):
    """What lm-eval asked of one document and what it scored, after one filter.

    `replies` are texts, or (log-likelihood, is greedy) of each choice. A generated reply has `ended_by` ("terminator",
    "stop string", "length" or "unclosed thought"), its tokens, whether it repeats itself and its `thought`, which is not scored:
    lists for several replies. `of_replies` has the scores of each of several sampled replies; `scores` are their means.
    """

    NEXT: ClassVar[str] = _NEXT
    doc_id: int
    filter: str
    prompt: str
    target: Any
    replies: tuple[Any, ...]
    filtered: Any
    scores: dict[str, Any]
    doc: Any
    ended_by: str | tuple[str, ...] | None = None
    tokens: int | tuple[int, ...] | None = None
    repeats: bool | tuple[bool, ...] | None = None
    thought: str | tuple[str, ...] | None = None
    of_replies: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class HarnessSample(Record):
    """A harness's own record of one document, with what a comparison of runs needs."""

    record: dict[str, Any]
    doc: Any
    target: Any
    scores: dict[str, float]

    def to_value(self) -> dict[str, Any]:
        """The prompt is null: the harness does not record it."""
        named = {"filter": "none", "doc": self.doc, "target": self.target, "prompt": None, "scores": self.scores}
        return {**self.record, **named}


@dataclass(frozen=True, kw_only=True)
class SampleItem(Record):
    """The part that Sample and HarnessSample have in common. `scores` is None in early records of a harness."""

    NEXT: ClassVar[str] = _NEXT
    filter: str = "none"
    prompt: str | None = None
    target: Any = None
    scores: dict[str, Any] | None = None
    doc: Any = None

    @classmethod
    def parse(cls, value: Any) -> Self:
        if not isinstance(value, dict):
            raise FormatError("an object is expected")
        if "scores" not in value:
            return cls()
        return build(cls, {k: value[k] for k in ("filter", "prompt", "target", "scores", "doc") if k in value}, "")


@dataclass(frozen=True)
class ConversationLoss(Record):
    """Loss in nats, summed over the `labels` trained tokens of a held-out conversation. `item` hashes its ids and loss mask."""

    NEXT: ClassVar[str] = _NEXT
    item: str
    loss: float
    labels: int


@dataclass(frozen=True)
class PlainTextLoss(Record):
    """Loss in nats, summed over the `labels` tokens of a text of `bytes` bytes. `item` hashes the text."""

    NEXT: ClassVar[str] = _NEXT
    item: str
    kind: str
    loss: float
    labels: int
    bytes: int


@dataclass(frozen=True)
class Reply(Record):
    """A generated reply. `key` hashes the prompt with its generation arguments; `tokens` counts without the terminator.

    `text` is what is scored; `thought` is the text before it up to </think>, None without one.
    """

    key: str
    text: str
    ended_by: str
    tokens: int
    repeats: bool
    thought: str | None = None


@dataclass(frozen=True)
class Likelihood(Record):
    """(log-likelihood of a continuation, whether it is the greedy one). `key` hashes the prompt with the continuation."""

    key: str
    likelihood: tuple[float, bool]


@dataclass(frozen=True)
class Answer(Record):
    """Reads a line of work/<task>.replies.jsonl."""

    answer: Reply | Likelihood

    @classmethod
    def parse(cls, value: Any) -> Self:
        is_likelihood = isinstance(value, dict) and "likelihood" in value
        return cls(Likelihood.parse(value) if is_likelihood else Reply.parse(value))

    def to_value(self) -> dict[str, Any]:
        return self.answer.to_value()


@dataclass(frozen=True)
class UnscoredReply(Record):
    """An answer of a task that did not finish."""

    prompt: str
    answer: Reply | Likelihood

    def to_value(self) -> dict[str, Any]:
        answer = {k: v for k, v in to_json(self.answer).items() if k != "key"}
        return {"incomplete": True, "prompt": self.prompt, **answer}
