"""gate.json: what the gate compared before an export was published, and the metrics in convert's manifest.

    {"gate": "full", "tensors": {"count", "bytes", "dtype"}, "tokenizer": {"canaries", "stop_ids"},
     "logits": {"max_difference", "max_logit", …}, "chats": [{"prompt", "reply", "tokens", "stopped"}], "summary": {…}}

The fast gate compares the logits of a few layers, and writes no "chats". Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sft.formats.manifest import Manifest
from sft.formats.record import Record, to_json

NAME = "gate.json"


@dataclass(frozen=True)
class TensorCheck:
    """All tensors of the export equal the checkpoint's in `dtype`. `bytes` is their size."""

    count: int
    bytes: int
    dtype: str


@dataclass(frozen=True)
class TokenizerCheck:
    """Number of canary texts whose ids agree, and the ids on which generate() stops."""

    canaries: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LogitCheck:
    """The logits of the training code's model against those of transformers, over the same packed documents.

    `max_difference` and `max_logit` are absolute values; `argmax_agreement` is the share of rows with the same best token.
    `rounding_kl` is what the export's dtype costs, in nats per token: 0 for float32, None where it was not measured.
    `documents` has the length of each document in tokens, `tokens` is their sum, `rows` the number of compared positions.
    `layers` is the number of compared layers, `which` has their indices.
    """

    max_difference: float
    max_logit: float
    rounding_kl: float | None
    argmax_agreement: float
    documents: tuple[int, ...]
    tokens: int
    rows: int
    layers: int
    which: tuple[int, ...]


@dataclass(frozen=True)
class MergeCheck:
    """The logits of the merged weights against those of the base with separate adapters, both in fp32. `matrices` have an adapter."""

    max_difference: float
    max_logit: float
    matrices: int


@dataclass(frozen=True)
class GreedyReply:
    """A greedy reply to one of the fixed questions. `tokens` is its length; `stopped`: it ends with a stop id."""

    prompt: str
    reply: str
    tokens: int
    stopped: bool


@dataclass(frozen=True)
class GateSummary:
    """The figures that go into convert's manifest. `greedy_stopped`: all replies stop; None for the fast gate."""

    gate: str
    max_difference: float
    max_logit: float
    rounding_kl: float | None
    layers: int
    tokens: int
    greedy_stopped: bool | None


@dataclass(frozen=True, kw_only=True)
class GateRecord(Record):
    """The complete record. `gate` is "full" or "fast"; `chats` is None for the fast gate."""

    NEXT: ClassVar[str] = "make convert again"
    INDENT: ClassVar[int | None] = 2
    gate: str
    tensors: TensorCheck
    tokenizer: TokenizerCheck
    logits: LogitCheck
    chats: tuple[GreedyReply, ...] | None = None
    summary: GateSummary
    merge: MergeCheck | None = None

    @classmethod
    def of(
        cls,
        gate: str,
        tensors: TensorCheck,
        tokenizer: TokenizerCheck,
        logits: LogitCheck,
        chats: tuple[GreedyReply, ...] | None,
    ) -> GateRecord:
        """The record with its summary."""
        summary = GateSummary(
            gate=gate,
            max_difference=logits.max_difference,
            max_logit=logits.max_logit,
            rounding_kl=logits.rounding_kl,
            layers=logits.layers,
            tokens=logits.tokens,
            greedy_stopped=None if chats is None else all(chat.stopped for chat in chats),
        )
        return cls(gate=gate, tensors=tensors, tokenizer=tokenizer, logits=logits, chats=chats, summary=summary)


@dataclass(frozen=True)
class CarriedTemplate:
    """The chat template in the export: its name, "as trained" for the trained one, and the sha256 (hex) of its text."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ConvertMetrics(Record):
    """The metrics in convert's manifest. `parameters` counts the checkpoint's, `bytes` is the size of the exported weights.

    `model_commit`: the hub's commit of the step that was converted, where MODEL= names one there.
    """

    NEXT: ClassVar[str] = "make convert again"
    step: int
    parameters: int
    bytes: int
    template: CarriedTemplate
    gate: GateSummary
    model_commit: str = ""

    @classmethod
    def of(cls, made: Manifest, name: str | Path) -> ConvertMetrics:
        """From convert's manifest; `name` appears in the error message. Raises SftError."""
        return cls.from_value(made.metrics, f"{name}: metrics")

    def to_metrics(self) -> dict[str, Any]:
        return dict(to_json(self))
