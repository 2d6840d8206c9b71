"""train/metrics.jsonl, one record per line, and the metrics in train's manifest. Standard library only.

    {"attempt": 1, "from_step": 0, "ranks": 8, "device": "NVIDIA H100", "peak_tflops": 989.4, "mfu": "…formula…"}
    {"initial_validation_loss": 2.4, "sources": {…}}
    {"step": 1, "loss": 2.1, "lr": 1e-06, …}
    {"step": 2, …}

Every attempt writes a header and then its steps. The validation loss of the starting weights comes before the first step. A resume removes the steps after the one that it continues from, so
the steps read like those of an uninterrupted run. Each checkpoint has a copy of the records up to it,
train/.metrics/step<N>-<first 16 hex digits of its sha256>.jsonl. A resume restores the records from the copy where the
file differs. JSON has no NaN and no infinity: such numbers are written as "nan",
"inf" and "-inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_type_hints

from sft.formats.manifest import Manifest
from sft.formats.packs import StepSummary
from sft.formats.record import Record

NAME = "metrics.jsonl"
COPIES = ".metrics"
"""The folder of the copies of metrics.jsonl in train's folder."""
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_HEADER = b'{"attempt"'
_INITIAL = b'{"initial_validation_loss"'


@dataclass(frozen=True)
class _Numbers(Record):
    """A record whose numbers may be NaN or infinite."""

    @classmethod
    def parse(cls, value: Any) -> Self:
        return super().parse(_from_words(value))

    def to_value(self) -> dict[str, Any]:
        return dict(_to_words(super().to_value()))

    def to_bytes(self) -> bytes:
        """One line."""
        return json.dumps(self.to_value()).encode() + b"\n"


@dataclass(frozen=True)
class Attempt(_Numbers):
    """The header of an attempt: the last finished step it started from, its ranks and the device of rank 0."""

    NEXT: ClassVar[str] = "remove this line from the file"
    attempt: int
    from_step: int
    ranks: int
    device: str
    peak_tflops: float | None  # of one GPU; None = not known, or a CPU
    mfu: str  # the formula of the steps' `mfu`
    steps: int | None = None  # that the whole training will have
    continues: str | None = None  # the step of another run that this run goes on from, as its recipe names it
    options: Mapping[str, Any] | None = None  # of [train], those that the state of the optimizer depends on
    recompute: str | None = None  # what the backward pass computes again
    out_of_memory: str | None = None  # the step of an earlier attempt after which it computes more of it again


@dataclass(frozen=True)
class InitialValidation(_Numbers):
    """The validation loss of the weights that training starts from: that of step 0."""

    NEXT: ClassVar[str] = "remove this line from the file"
    initial_validation_loss: float
    sources: Mapping[str, float] | None = None  # loss by source
    after_step: int | None = None  # where the run continues another one: the steps and the tokens before it
    after_tokens: int | None = None


@dataclass(frozen=True)
class SaveTimes:
    """A finished checkpoint: its step, the seconds that saving took, and the seconds that training waited for it."""

    step: int
    seconds: float
    blocked_s: float


@dataclass(frozen=True)
class Chart:
    """Marks a number of a step, or several by name, that the report draws under this title."""

    title: str


@dataclass(frozen=True)
class StepRecord(_Numbers):
    """One training step. Optional fields are absent where they were not measured.

    The trackers get every field. The report draws those with a `Chart`.
    """

    NEXT: ClassVar[str] = "remove this line from the file"
    step: int  # number of finished steps
    loss: float  # mean over the trained tokens of the global batch, without the sources' weights
    lr: Annotated[float, Chart("learning rate")]
    grad_norm: Annotated[float, Chart("gradient norm")]  # before clipping
    labels: int  # trained tokens of the global batch
    tokens: int  # consumed since step 0, padding excluded
    tokens_per_s: Annotated[float, Chart("tokens per second")]
    padding: float  # share of the batch's positions
    imbalance_expected: float  # share of the ranks' time spent waiting, computed from the documents' lengths
    seconds: float
    validation_loss: float | None = None
    validation_sources: Mapping[str, float] | None = None
    imbalance: Annotated[float | None, Chart("idle share of ranks")] = None  # the same share, measured
    skipped: bool | None = None  # True when the guard kept the weights unchanged
    sources: Mapping[str, float] | None = None  # loss by source, without weights
    weighted_loss: Annotated[float | None, Chart("weighted loss")] = (
        None  # with the sources' loss_weight: what is minimised
    )
    mfu: Annotated[float | None, Chart("model FLOPs utilisation")] = None
    memory_gb: Annotated[float | None, Chart("peak memory of a GPU, GB")] = None  # allocated on rank 0, 10^9 bytes
    memory_reserved_gb: float | None = None
    checkpoint: SaveTimes | None = None  # a save that ended since the last record
    grad_norms: Annotated[Mapping[str, float] | None, Chart("gradient norm by group of layers")] = None
    update_ratios: Annotated[Mapping[str, float] | None, Chart("update-to-weight ratio by group of layers")] = None

    @classmethod
    def charts(cls) -> dict[str, str]:
        """{field: title} of the numbers with a `Chart`."""
        hints = get_type_hints(cls, include_extras=True)
        extras = [(name, extra) for name, hint in hints.items() for extra in getattr(hint, "__metadata__", ())]
        return {name: extra.title for name, extra in extras if isinstance(extra, Chart)}


@dataclass(frozen=True)
class UploadSummary:
    """The address that permanent checkpoints were uploaded to, the steps that are there, and the steps that are
    missing."""

    where: str
    steps: tuple[str, ...]
    missing: tuple[str, ...]


LOST = 0.1
"""A source that lost this share of its trained tokens is reported."""


@dataclass(frozen=True)
class SourceUse:
    """What training made of one source's trained tokens, which are called labels here."""

    source: str
    labels: int  # in the dataset
    truncated: int  # of these, how many packing left out
    seen: int  # in the steps of the run, over all epochs
    skipped: int  # of these, how many were in steps that the guard skipped
    documents: int = 0  # in the dataset
    loss_weight: float = 1.0  # the factor on the loss of its trained tokens
    first_loss: float | None = None  # mean over its trained tokens in the first step that had some
    last_loss: float | None = None

    @property
    def lost(self) -> float:
        """The share of the labels that never changed a weight."""
        kept = (1 - self.truncated / self.labels if self.labels else 1.0) * (
            1 - self.skipped / self.seen if self.seen else 1.0
        )
        return 1 - kept


@dataclass(frozen=True)
class TrainMetrics(_Numbers):
    """The metrics in train's manifest. Losses are those of the first and the last step; speeds are means over time."""

    NEXT: ClassVar[str] = "make train again"
    final_step: int
    checkpoint: str  # name of the final step's folder
    loss: float
    first_loss: float
    tokens: int
    tokens_per_s: float
    skipped_steps: int
    attempts: int
    data: StepSummary
    mfu: float | None = None
    validation_loss: float | None = None
    first_validation_loss: float | None = None  # of the first step that was validated
    remote: UploadSummary | None = None
    sources: tuple[SourceUse, ...] | None = None
    initial_validation_loss: float | None = None  # of the weights that training started from
    stopped: str | None = None  # why training ended before its last step: "early_stopping" or "max_minutes"
    max_minutes: float | None = None  # the limit that ended it
    continues: str | None = None  # the step of another run that this one went on from
    out_of_memory: str | None = None  # the step after which training started again with more recomputation

    @property
    def validation_before(self) -> float | None:
        """The validation loss that `validation_loss` is compared with: that of the starting weights, if it was measured."""
        return self.first_validation_loss if self.initial_validation_loss is None else self.initial_validation_loss

    @classmethod
    def of(cls, made: Manifest, name: str) -> TrainMetrics:
        """From train's manifest. `name` is the file for the error message. Raises SftError."""
        return cls.from_value(made.metrics, f"{name}: metrics")


MetricsRecord = Attempt | InitialValidation | StepRecord


def read_metrics(file: Path, last: int | None = None) -> list[MetricsRecord]:
    """The records of a metrics file in their order; none when the file is missing.

    `last`: all headers and the initial validation, but only the steps among that many last lines. A line that a kill cut short is not JSON and is
    skipped. Raises SftError, with the line's number, for a wrong record.
    """
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    records: list[MetricsRecord] = []
    for number, line in enumerate(lines, 1):
        kind = _kind(line)
        if last is not None and kind is StepRecord and number < len(lines) - last:
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        records.append(kind.from_value(value, f"{file}:{number}"))
    return records


def _kind(line: bytes) -> type[Attempt] | type[InitialValidation] | type[StepRecord]:
    return Attempt if line.startswith(_HEADER) else InitialValidation if line.startswith(_INITIAL) else StepRecord


def read_steps(file: Path) -> list[StepRecord]:
    """The steps of a metrics file."""
    return [r for r in read_metrics(file) if isinstance(r, StepRecord)]


def read_attempts(file: Path) -> list[Attempt]:
    """The headers of a metrics file."""
    return [r for r in read_metrics(file) if isinstance(r, Attempt)]


def _to_words(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _to_words(v) for k, v in value.items()}
    return value


def _from_words(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _from_words(v) for k, v in value.items()}
    return _WORDS.get(value, value) if isinstance(value, str) else value


def initial_validation(records: Sequence[MetricsRecord]) -> InitialValidation | None:
    """The validation of the starting weights; None where it was not measured."""
    return next((r for r in records if isinstance(r, InitialValidation)), None)
