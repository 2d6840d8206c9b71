"""evaluate/results.json: the scores of a model, and the metrics in evaluate's manifest. Standard library only.

    {"template_sha256": "…", "backend": "hf", "device": "cpu", "dtype": "float32",
     "tasks": {"gsm8k": {"metrics": {"exact_match": {"value": 0.5, "stderr": 0.05, "n": 100, "low": 0.4, "high": 0.6,
                         "interval": "wilson", "higher_is_better": true}},
                         "generation": {…}, "num_fewshot": 0, "samples_sha256": "…", "task_sha256": "…", …}},
     "validation": {"loss": 1.2, "stderr": 0.1, "perplexity": 3.3, "documents": 64, "labels": 5000, …},
     "plain_text": {"loss": 2.9, "perplexity": 18.2, "bits_per_byte": 0.98, "by_kind": {"facts": {…}, …}, …}}

One of AI2's harnesses writes {"harness": "olmo-eval", "tasks": {…}} with fewer facts. The manifest's metrics hold the same
scores: {task: {metric: score}, "validation": {…}, "plain_text": {…}, "asked": {"template_sha256": "…", "tasks": {task: hashes}}}.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from sft.formats.manifest import Manifest
from sft.formats.record import Record, convert, to_json

NAME = "results.json"
SAMPLES = "samples"
"""The folder beside it: one JSONL file for each task (see sft.formats.samples)."""
PLAIN_TEXT = "plain_text.jsonl"
"""The file beside it: the loss of every text that is no chat."""
VALIDATION = "validation.jsonl"
"""The file beside it: the loss of every held-out conversation."""


def _null() -> None:
    """Default of a field that is written as null, where a plain default of None leaves the field out."""


class HasInterval:
    """A number with a 95 % interval from `low` to `high`; both are None where there is none."""

    low: float | None
    high: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The 95 % interval, if there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Score(HasInterval):
    """A metric over n items. low and high are its 95 % interval; `interval` is "wilson" or "normal", or all three are None."""

    value: float
    stderr: float | None
    n: int
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    higher_is_better: bool | None = field(default_factory=_null)


@dataclass(frozen=True)
class TokenCounts:
    """Lengths of replies in tokens. `up_to` has (upper end, replies) of each bin; versions before it left it out."""

    median: int | float
    p90: int
    max: int
    up_to: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How n replies ended. All but n are shares from 0 to 1. A harness that does not report a share leaves it out."""

    n: int
    stop_rate: float
    terminator_rate: float | None = None
    empty: float | None = None
    repeating: float | None = None
    tokens: TokenCounts | None = None


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a task was asked. Of a task that generates nothing, only `multiturn` is known.

    multiturn: worked examples were turns of the conversation. until: strings that ended a reply beside the terminators.
    system_prompt: of the recipe, None where it sets none.
    temperature: 0 is greedy. top_p: None is 1. samples: replies to each question. thinking: None as the template does.
    max_thought_tokens: None, where thoughts have no budget of their own.
    """

    multiturn: bool | None = None
    until: tuple[str, ...] | None = None
    max_reply_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    samples: int | None = None
    thinking: bool | None = None
    system_prompt: str | None = None
    max_thought_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult(Record):
    """One task. `metrics` has the primary metric first. EvaluationHashes are sha256 in hex.

    `task_sha256` covers how the task is asked and scored, `samples_sha256` the documents, prompts and targets.
    """

    NEXT: ClassVar[str] = "remove the file and make evaluate again"
    INDENT: ClassVar[int | None] = 2
    metrics: dict[str, Score]
    generation: Generation | None = None
    num_fewshot: int | None = field(default_factory=_null)
    asking: Asking | None = None
    samples_sha256: str
    task_sha256: str | None
    data_sha256: dict[str, str] | None = None
    lm_eval: str | None = None
    reused_replies: int | None = None
    seconds: float | None = None
    samples: str | None = None

    @property
    def primary(self) -> tuple[str, Score]:
        """The name and score of the primary metric."""
        return next(iter(self.metrics.items()))


@dataclass(frozen=True)
class GroupResult:
    """lm-eval's own mean over the tasks of a group, with its error, and their names."""

    metrics: dict[str, Score]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class PartLoss:
    """Mean loss in nats of a trained token in a part of the held-out conversations; stderr is over `documents` conversations."""

    loss: float
    stderr: float | None
    documents: int
    labels: int


@dataclass(frozen=True, kw_only=True)
class ValidationLoss(HasInterval):
    """Mean loss in nats of a trained token over `documents` conversations with `labels` trained tokens.

    stderr is over conversations. The 95 % intervals are None for a single conversation. by_source: where there are several.
    by_turn: of the first, second, … trained answer of a conversation, the last one with all that follow it.
    """

    loss: float
    stderr: float | None
    perplexity: float
    documents: int
    labels: int
    low: float | None = None
    high: float | None = None
    perplexity_low: float | None = None
    perplexity_high: float | None = None
    by_source: dict[str, PartLoss] | None = None
    by_turn: tuple[PartLoss, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TextLoss(HasInterval):
    """Mean loss in nats of a token of texts that are no chat: `labels` tokens and `bytes` bytes of `documents` texts.

    Every token of a text is scored, after the tokenizer's begin-of-text or end-of-text token. `bits_per_byte` does not depend on
    the tokenizer. stderr is over texts. by_kind: where there are several kinds.
    """

    loss: float
    stderr: float | None
    low: float | None = None
    high: float | None = None
    perplexity: float
    bits_per_byte: float
    documents: int
    labels: int
    bytes: int
    by_kind: dict[str, PartLoss] | None = None
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TaskHashes:
    """What a task was scored on (see TaskResult)."""

    task_sha256: str | None
    data_sha256: dict[str, str] | None = None
    samples_sha256: str


@dataclass(frozen=True, kw_only=True)
class Results(Record):
    """All scores of a model. `harness` is None for lm-eval, which runs in this environment.

    `backend_reason` says why it was that backend; `processes` each held a copy of the model.
    """

    NEXT: ClassVar[str] = "make evaluate again"
    INDENT: ClassVar[int | None] = 2
    HARNESS_FIELDS: ClassVar[tuple[str, ...]] = ("metrics", "generation", "task_sha256", "samples", "samples_sha256")
    harness: str | None = None
    template_sha256: str | None = None
    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    backend_reason: str | None = None
    processes: int | None = None
    tasks: dict[str, TaskResult]
    groups: dict[str, GroupResult] | None = None
    validation: ValidationLoss | None = None
    plain_text: TextLoss | None = None

    def to_value(self) -> dict[str, Any]:
        value = super().to_value()
        if self.harness:
            for name, task in value["tasks"].items():
                value["tasks"][name] = {k: task[k] for k in self.HARNESS_FIELDS if k in task}
                _drop_direction(task["metrics"])
        return value

    @property
    def scored(self) -> dict[str, TaskResult | GroupResult]:
        """Groups and tasks by name, groups first."""
        return {**(self.groups or {}), **self.tasks}

    @property
    def metrics(self) -> EvaluateMetrics:
        """The metrics for evaluate's manifest."""
        hashes = {
            name: TaskHashes(task_sha256=t.task_sha256, data_sha256=t.data_sha256, samples_sha256=t.samples_sha256)
            for name, t in self.tasks.items()
        }
        scores = {name: scored.metrics for name, scored in self.scored.items()}
        return EvaluateMetrics(
            scores,
            self.validation,
            EvaluationHashes(template_sha256=self.template_sha256, tasks=hashes),
            self.plain_text,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationHashes:
    """What decides the prompts and scores of an evaluation. A harness does not know the template."""

    template_sha256: str | None = None
    tasks: dict[str, TaskHashes]


@dataclass(frozen=True)
class EvaluateMetrics(Record):
    """The metrics in evaluate's manifest. `hashes` is the key `asked`, which manifests of the first version do not have.

    `model_commit`: the hub's commit of the model that was scored, where MODEL= names one there.
    """

    NEXT: ClassVar[str] = "make evaluate again"
    tasks: dict[str, dict[str, Score]]
    validation: ValidationLoss | None = None
    hashes: EvaluationHashes | None = None
    plain_text: TextLoss | None = None
    model_commit: str = ""

    @classmethod
    def of(cls, made: Manifest, name: str) -> EvaluateMetrics:
        """From evaluate's manifest; `name` appears in the error message. Raises SftError."""
        return cls.from_value(made.metrics, f"{name}: metrics")

    @classmethod
    def parse(cls, value: Any) -> Self:
        tasks = convert(value, dict[str, Any], "metrics")
        validation, hashes, plain_text = (tasks.pop(name, None) for name in ("validation", "asked", "plain_text"))
        commit = convert(tasks.pop("model_commit", ""), str, "model_commit")
        return cls(
            convert(tasks, dict[str, dict[str, Score]], "tasks"),
            convert(validation, ValidationLoss | None, "validation"),
            convert(hashes, EvaluationHashes | None, "asked"),
            convert(plain_text, TextLoss | None, "plain_text"),
            commit,
        )

    def to_value(self) -> dict[str, Any]:
        value: dict[str, Any] = to_json(self.tasks)
        if self.hashes and not self.hashes.template_sha256:  # of a harness
            for metrics in value.values():
                _drop_direction(metrics)
        more = {
            "validation": self.validation,
            "plain_text": self.plain_text,
            "asked": self.hashes,
            "model_commit": self.model_commit,
        }
        return {**value, **{name: to_json(part) for name, part in more.items() if part}}


def _drop_direction(metrics: dict[str, dict[str, Any]]) -> None:
    """A harness does not say in which direction a metric is better."""
    for score in metrics.values():
        del score["higher_is_better"]
