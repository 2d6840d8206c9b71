"""runs/<run>/.jobs/evaluate-returned: what an AI2 harness returned, and what it was asked for. Standard library only.

    identity        the identity (sha256) of the evaluation that the results belong to
    asked.json      {"<task asked for>": "<folder of the results that hold it>", …}
    <folder>/…      the results of one Beaker task, in the harness's own layout

The launcher writes it when the experiment has ended. The evaluate stage reads it. The harnesses define their own files: of
those, the fields that results.json needs are declared here, and the others are skipped. Only a prediction keeps all its fields.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from sft.formats.record import FormatError, Record, build, convert

RETURNED = "evaluate-returned"
ASKED = "asked.json"
IDENTITY = "identity"


@dataclass(frozen=True)
class AskedTasks(Record):
    """asked.json: for each requested task, the folder of its results."""

    NEXT: ClassVar[str] = "make evaluate again"
    INDENT: ClassVar[int | None] = None
    ASCII: ClassVar[bool] = True
    END: ClassVar[str] = ""
    folders: dict[str, str]

    @classmethod
    def parse(cls, value: Any) -> Self:
        return cls(convert(value, dict[str, str], "tasks"))

    def to_value(self) -> dict[str, Any]:
        return dict(self.folders)


@dataclass(frozen=True)
class HarnessRecord(Record):
    """Base of what a harness writes. It writes null for a value that it does not have."""

    NEXT: ClassVar[str] = "make evaluate again"
    SKIPS_UNKNOWN: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class OlmoEvalTask(HarnessRecord):
    """A task in olmo-eval's metrics.json. `metrics` is {metric: {scorer: score}}, `primary_metric` is "metric:scorer"."""

    task: str
    task_hash: str | None = None
    metrics: dict[str, dict[str, Any]] | None = None
    primary_metric: str | None = None
    num_instances: int | None = None


@dataclass(frozen=True, kw_only=True)
class OlmoEvalMetrics(HarnessRecord):
    """metrics.json of olmo-eval. `summary` has the names of the requested suites."""

    tasks: tuple[OlmoEvalTask, ...] | None = None
    errors: tuple[Any, ...] | None = None
    summary: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class OeEvalMetadata(HarnessRecord):
    """`alias` is the name that oe-eval gives to a task."""

    alias: str | None = None


@dataclass(frozen=True, kw_only=True)
class OeEvalConfig(HarnessRecord):
    """How oe-eval asked a task."""

    primary_metric: str | None = None
    metadata: OeEvalMetadata | None = None


@dataclass(frozen=True, kw_only=True)
class OeEvalMetrics(HarnessRecord):
    """task-NNN-…-metrics.json of oe-eval. `metrics` is {metric: score}; it also has values that are no scores."""

    task_name: str | None = None
    task_hash: str | None = None
    task_config: OeEvalConfig | None = None
    metrics: dict[str, Any] | None = None
    num_instances: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelOutput(HarnessRecord):
    """A reply, or a given text whose likelihood was measured. olmo-eval has `text`, oe-eval `continuation`."""

    text: str | None = None
    continuation: str | None = None
    finish_reason: str | None = None
    completion_tokens: int | None = None
    sum_logits: float | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction(HarnessRecord):
    """A line of predictions.jsonl: one instance. `record` is the whole line as it is.

    olmo-eval writes {metric: {scorer: score}} as `instance_metrics`, oe-eval {metric: score} as `metrics`.
    """

    doc_id: Any = None
    native_id: Any = None
    label: Any = None
    instance_metrics: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    model_output: tuple[ModelOutput, ...] | None = None
    record: dict[str, Any]

    @classmethod
    def parse(cls, value: Any) -> Self:
        if not isinstance(value, dict):
            raise FormatError("an object is expected")
        return replace(build(cls, {**value, "record": {}}, ""), record=value)
