"""Scores from the output of AI2's harnesses: the same results.json as lm-eval's, by the same rules, or none.

In:  runs/<run>/.jobs/evaluate-returned, fetched by sft.launch: asked.json names the folder of every requested task, which holds
     olmo-eval's metrics.json and predictions/, or oe-eval's task-NNN-…-metrics.json and …-predictions.jsonl
Out: results.json, samples/<task>.jsonl: the harness's own predictions, with doc, target and scores like lm-eval's

n and the standard error are computed again from the predictions, one line each. A metric that they do not hold has no error.
A task is broken when it did not return, returned in part or twice, has no instances, predictions, reply texts or primary
metric, failed, or has empty replies, replies that do not stop, or a score that is not finite. oe-eval and older versions of
olmo-eval do not record how a reply ended: then there is no stop rate.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.evaluation.scores import (
    check_finite,
    is_number,
    json_hash,
    token_counts,
    too_few_stop,
    too_many_empty,
    with_interval,
)
from sft.formats import results as results_format
from sft.formats.harness import (
    ASKED,
    IDENTITY,
    RETURNED,
    AskedTasks,
    HarnessRecord,
    OeEvalConfig,
    OeEvalMetrics,
    OlmoEvalMetrics,
    Prediction,
)
from sft.formats.job import FOLDER
from sft.formats.lines import to_lines
from sft.formats.results import Generation, Results, Score, TaskResult
from sft.formats.samples import HarnessSample
from sft.recipe.schema import Evaluate
from sft.runner.stage import Result, Stage

PARTS = {"mmlu": 57, "mmlu_pro": 14, "bbh": 27, "minerva_math": 7}
"""The number of oe-eval's tasks that one of these becomes, in every variant (oe-eval's configs/task_suites.py)."""

H = TypeVar("H", bound=HarnessRecord)


@dataclass(frozen=True)
class ReturnedTask:
    """One task as a harness reports it. A score that the harness gives as null is NaN."""

    name: str
    scores: dict[str, float]
    primary: str
    instances: int
    predictions: Path | None
    hash: str | None

    @property
    def samples(self) -> str:
        """The file of its samples, relative to results.json."""
        return f"{results_format.SAMPLES}/{_file_name(self.name)}.jsonl"


def collect(stage: Stage) -> Result:
    """The stage for a harness that ran on Beaker. Raises SftError that lists every broken task."""
    options = stage.recipe.evaluate
    folder = returned(stage.run, stage.identity, options.harness)
    tasks, broken = read_returned(folder, options.harness)
    results: dict[str, TaskResult] = {}
    files: set[str] = set()
    (stage.out / results_format.SAMPLES).mkdir(exist_ok=True)
    for task in tasks:
        if task.samples in files:
            broken.append(f"{task.name}: returned twice")
            continue
        files.add(task.samples)
        predictions = list(_predictions(task.predictions)) if task.predictions else []
        facts = _generation(predictions)
        if problems := _problems(task, predictions, options, facts):
            broken.append(f"{task.name}: {'; '.join(problems)}")
            continue
        results[task.name] = _result(task, predictions, facts, stage.out)
        name, score = results[task.name].primary
        error = f" ± {score.stderr:.3f}" if score.stderr is not None else ""
        stage.log(f"{task.name}: {name} {score.value:.3f}{error}, n {score.n}")
    if broken:
        raise SftError(
            "broken tasks have no score:\n  " + "\n  ".join(broken) + f"\nthe output of the harness is in {folder}"
        )
    report = Results(harness=options.harness, tasks=results)
    check_finite(report)
    report.write(stage.out / results_format.NAME)
    written = sorted(name for name in files if (stage.out / name).is_file())
    return Result(outputs=[results_format.NAME, *written], metrics=report.metrics.to_value())


def returned(run: Path, identity: str, harness: str) -> Path:
    """The folder of the harness's output for this evaluation. Raises SftError when there is none."""
    folder = run / FOLDER / RETURNED
    mark = folder / IDENTITY
    if not mark.is_file() or mark.read_bytes() != identity.encode():
        raise SftError(
            f"{folder}: {harness} runs on Beaker and has returned nothing for this evaluation; next: make evaluate with"
            " a CLUSTER whose launcher is beaker, or make collect"
        )
    return folder


def read_returned(folder: Path, harness: str) -> tuple[list[ReturnedTask], list[str]]:
    """(tasks, failures) in a harness's output. Raises SftError for a file that is damaged or missing."""
    file = folder / ASKED
    try:
        folders = AskedTasks.read(file).folders
    except FileNotFoundError:
        raise SftError(f"{file}: missing; next: {AskedTasks.NEXT}") from None
    return (_olmo_eval if harness == "olmo-eval" else _oe_eval)(folder, folders)


def _result(task: ReturnedTask, predictions: Sequence[Prediction], facts: Generation | None, out: Path) -> TaskResult:
    """The result of a task that is not broken; writes its samples."""
    metrics = _metrics(task, predictions)
    samples = [_sample(p, metrics) for p in predictions]
    write_atomic(out / task.samples, to_lines(samples))
    return TaskResult(
        metrics=metrics,
        generation=facts,
        task_sha256=task.hash,
        samples=task.samples,
        samples_sha256=json_hash([[s.doc, s.target] for s in samples]),
    )


# --- the harnesses' own files -------------------------------------------------------------------------------------------


def _olmo_eval(folder: Path, requested: Mapping[str, str]) -> tuple[list[ReturnedTask], list[str]]:
    """(tasks, failures) of olmo-eval's metrics.json: metrics are {metric: {scorer: score}}, the primary "metric:scorer".

    The summary has the name of a requested suite, and `tasks` has the suite's tasks.
    """
    folder = folder / next(iter(requested.values()), "")
    data = _read(OlmoEvalMetrics, folder / "metrics.json")
    failures = [f"the harness failed: {json.dumps(e)[:300]}" for e in data.errors or ()]
    files = sorted((folder / "predictions").rglob("*-predictions.jsonl"))
    tasks = []
    for entry in data.tasks or ():
        name = entry.task
        scores = _numbers({f"{m}:{s}": v for m, by in (entry.metrics or {}).items() for s, v in by.items()})
        # the file has the task's name with other characters replaced, sometimes followed by the end of its hash
        wanted = _file_name(name)
        stems = {wanted, *([f"{wanted}_{entry.task_hash[-6:]}"] if entry.task_hash else [])}
        found = [f for f in files if _file_name(f.name.removesuffix("-predictions.jsonl")) in stems]
        primary = entry.primary_metric or (next(iter(scores)) if len(scores) == 1 else "")
        tasks.append(ReturnedTask(name, scores, primary, entry.num_instances or 0, found[0] if found else None,
                                 entry.task_hash))  # fmt: skip
    known = {t.name for t in tasks} | set(data.summary or {})
    failures += [_missing(name) for name in requested if name not in known]
    return tasks, failures


def _oe_eval(folder: Path, requested: Mapping[str, str]) -> tuple[list[ReturnedTask], list[str]]:
    """(tasks, failures) of oe-eval: a file of metrics for each task, "primary_score" beside the metrics with names.

    One requested task may become several, such as the subjects of MMLU. They keep the harness's names (alias).
    """
    tasks, failures = [], []
    for name, where in requested.items():
        files = sorted((folder / where).rglob("*-metrics.json"))
        failures += _absent(name, files)
        for file in files:
            data = _read(OeEvalMetrics, file)
            config = data.task_config or OeEvalConfig()
            alias = (config.metadata and config.metadata.alias) or data.task_name or file.name
            scores = _numbers(data.metrics or {})
            primary = config.primary_metric
            if primary not in scores:
                primary = "primary_score"
            elif scores[primary] == scores.get("primary_score") and primary != "primary_score":
                del scores["primary_score"]  # a copy of the primary metric
            predictions = file.with_name(file.name.removesuffix("-metrics.json") + "-predictions.jsonl")
            tasks.append(ReturnedTask(name if len(files) == 1 else alias, scores, primary, data.num_instances or 0,
                                     predictions if predictions.is_file() else None, data.task_hash))  # fmt: skip
    return tasks, failures


def _absent(name: str, files: Sequence[Path]) -> list[str]:
    """The failure of a requested task with missing files. oe-eval numbers the tasks that it makes of one, from 0."""
    if not files:
        return [_missing(name)]
    numbers = {int(match[1]) for file in files if (match := re.match(r"task-(\d+)-", file.name))}
    count = max(PARTS.get(name.split(":")[0], 0), max(numbers, default=0) + 1)
    if len(files) >= count:
        return []
    gaps = [str(n) for n in range(count) if n not in numbers]
    return [f"{name}: {len(files)} of its {count} tasks returned; missing are the numbers {', '.join(gaps[:8])}"]


def _missing(name: str) -> str:
    return f"{name}: was requested and did not return"


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are numbers. null becomes NaN, so that no other metric takes its place."""
    return {
        k: math.nan if v is None else _float(v) for k, v in metrics.items() if v is None or isinstance(v, (int, float))
    }


def _float(value: float) -> float:
    """A number as a float; a whole number beyond its range is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _read(kind: type[H], file: Path) -> H:
    """A harness's file. Raises SftError for one that is damaged or missing."""
    try:
        return kind.read(file)
    except FileNotFoundError:
        raise SftError(f"{file}: the harness returned none; next: read its log, make evaluate again") from None


def _predictions(file: Path) -> Iterator[Prediction]:
    """The instances of a task. Raises SftError, with the number of the line, for a damaged one."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Prediction.from_bytes(line, f"{file}:{number}")


# --- scores and facts of one task ---------------------------------------------------------------------------------------


def _metrics(task: ReturnedTask, predictions: Sequence[Prediction]) -> dict[str, Score]:
    """{metric: score}, the primary one first."""
    return {
        name: _score(task, name, [v for p in predictions if (v := _value(p, name)) is not None])
        for name in sorted(task.scores, key=lambda n: (n != task.primary, n))
    }


def _score(task: ReturnedTask, name: str, items: Sequence[float]) -> Score:
    """The harness's value of a metric. Its error comes from the items, if the value is their mean."""
    value = float(task.scores[name])
    is_mean = bool(items) and abs(sum(items) / len(items) - value) < 1e-6
    stderr = statistics.stdev(items) / math.sqrt(len(items)) if is_mean and len(items) > 1 else None
    score = Score(value=value, stderr=stderr, n=len(items) or task.instances)
    return with_interval(score, is_share=is_mean and all(v in (0, 1) for v in items))


def _value(prediction: Prediction, metric: str) -> float | None:
    """An instance's number for a metric. olmo-eval nests it by scorer, oe-eval does not."""
    name, _, scorer = metric.partition(":")
    at = (prediction.instance_metrics or prediction.metrics or {}).get(name)
    value = at.get(scorer or name) if isinstance(at, Mapping) else at
    return _float(value) if is_number(value) else None


def _sample(prediction: Prediction, metrics: Mapping[str, Score]) -> HarnessSample:
    doc = prediction.doc_id if prediction.native_id is None else prediction.native_id
    scores = {name: value for name in metrics if (value := _value(prediction, name)) is not None}
    return HarnessSample(record=prediction.record, doc=doc, target=prediction.label, scores=scores)


def _generation(predictions: Sequence[Prediction]) -> Generation | None:
    """Stop rate and lengths, if every generated reply says how it ended, as in newer versions of olmo-eval."""
    outputs = [o for p in predictions if not _is_choice(p) for o in p.model_output or ()]
    if not outputs or not all(o.finish_reason for o in outputs):
        return None
    stops = sum(o.finish_reason != "length" for o in outputs)
    lengths = [o.completion_tokens for o in outputs if o.completion_tokens is not None]
    tokens = token_counts(lengths) if len(lengths) == len(outputs) else None
    return Generation(n=len(outputs), stop_rate=stops / len(outputs), tokens=tokens)


def _problems(
    task: ReturnedTask, predictions: Sequence[Prediction], options: Evaluate, facts: Generation | None
) -> list[str]:
    """The reasons why a task is broken."""
    problems = []
    if facts and facts.stop_rate < options.min_stop_rate:
        problems.append(too_few_stop(facts, options))
    if not task.scores:
        problems.append("no metric")
    if not task.instances:
        problems.append("no instances")
    if not predictions:
        problems.append("no predictions")
    elif len(predictions) != task.instances:
        problems.append(f"{len(predictions)} predictions of {task.instances} instances")
    if task.scores and task.primary not in task.scores:
        problems.append(f"the primary metric {task.primary or '(the harness names none)'} is missing")
    problems += [f"{name} is {value}" for name, value in task.scores.items() if not math.isfinite(value)]
    found = [_replies(p) for p in predictions if not _is_choice(p)]
    texts = [text for texts in found for text in texts or [""]]
    empty = sum(not text.strip() for text in texts)
    if found and not any(found):
        problems.append("no reply text found in its predictions")
    elif texts and empty / len(texts) > options.max_empty_fraction:
        problems.append(too_many_empty(empty / len(texts), len(texts), options))
    return problems


def _replies(prediction: Prediction) -> list[str]:
    """The generated texts of a prediction: olmo-eval's `text`, oe-eval's `continuation`."""
    texts = [o.continuation if o.text is None else o.text for o in prediction.model_output or ()]
    return [text for text in texts if text is not None]


def _is_choice(prediction: Prediction) -> bool:
    """Whether the harness scored the likelihoods of given texts: it wrote no text, or the label is the index of a text."""
    outputs = prediction.model_output or ()
    if not outputs or any(o.sum_logits is None for o in outputs):
        return False
    label = prediction.label
    return not _replies(prediction) or (len(outputs) > 1 and isinstance(label, int) and 0 <= label < len(outputs))


def _file_name(task: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", task)
