"""Scores out of what AI2's harnesses return: the same results.json as lm-eval's, by the same rules, or none.

In:  runs/<run>/.jobs/evaluate-returned, fetched by sft.launch: asked.json names the folder of every task asked for. In it
     are olmo-eval's metrics.json and predictions/, or oe-eval's task-NNN-…-metrics.json and …-predictions.jsonl
Out: results.json, samples/<task>.jsonl: the harness's own predictions, with doc, target and scores as lm-eval's have them

n and the standard error are recomputed from the predictions, one line each; a metric that they do not hold has no error.
A task that did not return, whole or in part, or returned twice, without instances, predictions, reply texts or its primary metric, with failures,
empty replies, replies that do not stop or a score that is not finite is broken. oe-eval and older versions of olmo-eval do not say how a
reply ended: then no stop rate is told.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.common.errors import SftError
from sft.evaluation.files import refuse_not_finite, write_json, write_lines
from sft.evaluation.scores import is_number, json_hash, token_facts
from sft.evaluation.statistics import Z95, wilson
from sft.formats.harness import ASKED, IDENTITY, RETURNED, AskedTasks

if TYPE_CHECKING:
    from sft.recipe.schema import Evaluate
    from sft.runner.stage import Result, Stage

PARTS = {"mmlu": 57, "mmlu_pro": 14, "bbh": 27, "minerva_math": 7}
"""Of how many tasks these consist in oe-eval, in every variant (its configs/task_suites.py)."""


@dataclass(frozen=True)
class Task:
    """One task as a harness reports it; a score that it gives as null is NaN."""

    name: str
    scores: dict[str, float]
    primary: str
    instances: int
    predictions: Path | None
    hash: str | None


def collect(stage: Stage) -> Result:
    """The stage's body for a harness that ran on Beaker. Raises SftError naming every broken task."""
    from sft.runner.stage import Result

    options = stage.recipe.evaluate
    folder = returned(stage.run, stage.identity, options.harness)
    asked = AskedTasks.read(folder / ASKED).folders
    tasks, broken = (_olmo_eval if options.harness == "olmo-eval" else _oe_eval)(folder, asked)
    results: dict[str, Any] = {}
    files: set[str] = set()
    (stage.out / "samples").mkdir(exist_ok=True)
    for task in tasks:
        file = f"samples/{_file_name(task.name)}.jsonl"
        if file in files:
            broken.append(f"{task.name}: returned twice")
            continue
        files.add(file)
        rows = list(_rows(task.predictions)) if task.predictions else []
        metrics, facts = _metrics(task, rows), _endings(rows)
        if problems := _problems(task, rows, options, facts):
            broken.append(f"{task.name}: {'; '.join(problems)}")
            continue
        items = [_item(row, metrics) for row in rows]
        results[task.name] = {"metrics": metrics, **facts, "task_sha256": task.hash, "samples": file,
                              "samples_sha256": json_hash([[i["doc"], i["target"]] for i in items])}  # fmt: skip
        write_lines(stage.out / file, items)
        name, score = next(iter(metrics.items()))
        error = f" ± {score['stderr']:.3f}" if score["stderr"] is not None else ""
        stage.log(f"{task.name}: {name} {score['value']:.3f}{error}, n {score['n']}")
    if broken:
        raise SftError(
            "broken tasks have no score:\n  " + "\n  ".join(broken) + f"\nwhat the harness returned is in {folder}"
        )
    report = {"harness": options.harness, "tasks": results}
    refuse_not_finite(report)
    write_json(stage.out / "results.json", report)
    found = {name: r["metrics"] for name, r in results.items()}
    hashes = {name: {k: r[k] for k in ("task_sha256", "samples_sha256")} for name, r in results.items()}
    return Result(outputs=["results.json", "samples"], metrics={**found, "asked": {"tasks": hashes}})


def returned(run: Path, identity: str, harness: str) -> Path:
    """What the harness returned for this evaluation. Raises SftError when nothing has."""
    folder = run / ".jobs" / RETURNED
    mark = folder / IDENTITY
    if not mark.is_file() or mark.read_text() != identity:
        raise SftError(
            f"{folder}: {harness} runs on Beaker and has returned nothing for this evaluation; next: make evaluate with"
            " a CLUSTER whose launcher is beaker, or make collect"
        )
    return folder


def _olmo_eval(folder: Path, asked: Mapping[str, str]) -> tuple[list[Task], list[str]]:
    """(tasks, failures) of olmo-eval's metrics.json: metrics are {metric: {scorer: score}}, the primary "metric:scorer".

    A suite that was asked for is named by the summary, its tasks by themselves.
    """
    folder = folder / next(iter(asked.values()))
    data = _read(folder / "metrics.json")
    failures = [f"the harness failed: {json.dumps(e)[:300]}" for e in data.get("errors") or []]
    files = sorted((folder / "predictions").rglob("*-predictions.jsonl"))
    tasks = []
    for entry in data.get("tasks") or []:
        name = str(entry["task"])
        scores = _numbers({f"{m}:{s}": v for m, by in (entry.get("metrics") or {}).items() for s, v in by.items()})
        # the file's name is the task's, made safe, and the end of its hash
        wanted = _file_name(name)
        ends = {wanted, *([f"{wanted}_{entry['task_hash'][-6:]}"] if entry.get("task_hash") else [])}
        found = [f for f in files if _file_name(f.name.removesuffix("-predictions.jsonl")) in ends]
        primary = entry.get("primary_metric") or (next(iter(scores)) if len(scores) == 1 else "")
        tasks.append(Task(name, scores, primary, int(entry.get("num_instances") or 0), found[0] if found else None,
                          entry.get("task_hash")))  # fmt: skip
    known = {t.name for t in tasks} | set(data.get("summary") or {})
    failures += [_missing(name) for name in asked if name not in known]
    return tasks, failures


def _oe_eval(folder: Path, asked: Mapping[str, str]) -> tuple[list[Task], list[str]]:
    """(tasks, failures) of oe-eval: a file of metrics for each task, "primary_score" beside the metrics it names.

    What was asked for may be several tasks to the harness, like the subjects of MMLU: they keep the harness's names (alias).
    """
    tasks, failures = [], []
    for name, where in asked.items():
        files = sorted((folder / where).rglob("*-metrics.json"))
        failures += _absent(name, files)
        for file in files:
            data = _read(file)
            config = data.get("task_config") or {}
            alias = (config.get("metadata") or {}).get("alias") or data.get("task_name") or file.name
            scores = _numbers(data.get("metrics") or {})
            primary = config.get("primary_metric")
            if primary not in scores:
                primary = "primary_score"
            elif scores[primary] == scores.get("primary_score") and primary != "primary_score":
                del scores["primary_score"]  # the same, said twice
            predictions = file.with_name(file.name.removesuffix("-metrics.json") + "-predictions.jsonl")
            tasks.append(Task(name if len(files) == 1 else str(alias), scores, primary, int(data.get("num_instances") or 0),
                              predictions if predictions.is_file() else None, data.get("task_hash")))  # fmt: skip
    return tasks, failures


def _absent(name: str, files: Sequence[Path]) -> list[str]:
    """What is told of a task whose files are not all there; oe-eval numbers the tasks that it makes of one, from 0."""
    if not files:
        return [_missing(name)]
    numbers = {int(match[1]) for file in files if (match := re.match(r"task-(\d+)-", file.name))}
    count = max(PARTS.get(name.split(":")[0], 0), max(numbers, default=0) + 1)
    if len(files) >= count:
        return []
    gaps = [str(n) for n in range(count) if n not in numbers]
    return [f"{name}: {len(files)} of its {count} tasks returned, without number {', '.join(gaps[:8])}"]


def _missing(name: str) -> str:
    return f"{name}: was asked for and did not return"


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are a number or should be one: null is NaN, so that no other metric takes its place."""
    return {
        k: math.nan if v is None else float(v) for k, v in metrics.items() if v is None or isinstance(v, (int, float))
    }


def _metrics(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{metric: {"value", "stderr", "n", "low", "high", "interval"}}, the primary one first."""
    found = {}
    for name in sorted(task.scores, key=lambda n: (n != task.primary, n)):
        value, items = float(task.scores[name]), [v for row in rows if (v := _value(row, name)) is not None]
        score: dict[str, Any] = {"value": value, "stderr": None, "n": len(items) or task.instances}
        same = bool(items) and abs(sum(items) / len(items) - value) < 1e-6  # a mean of what the predictions hold
        if same and len(items) > 1:
            score["stderr"] = statistics.stdev(items) / math.sqrt(len(items))
        if same and all(v in (0, 1) for v in items):
            score["low"], score["high"] = wilson(value, len(items))
            score["interval"] = "wilson"
        elif score["stderr"] is not None:
            score["low"], score["high"] = value - Z95 * score["stderr"], value + Z95 * score["stderr"]
            score["interval"] = "normal"
        found[name] = score
    return found


def _value(row: Mapping[str, Any], metric: str) -> float | None:
    """An instance's number for a metric: olmo-eval nests it by scorer, oe-eval does not."""
    name, _, scorer = metric.partition(":")
    at = (row.get("instance_metrics") or row.get("metrics") or {}).get(name)
    value = at.get(scorer or name) if isinstance(at, Mapping) else at
    return float(value) if value is not None and is_number(value) else None


def _item(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction with what `make compare` asks of an item. Its prompt is not in the harness's record of replies."""
    doc = row.get("doc_id") if row.get("native_id") is None else row["native_id"]
    scores = {name: value for name in metrics if (value := _value(row, name)) is not None}
    return {**row, "filter": "none", "doc": doc, "target": row.get("label"), "prompt": None, "scores": scores}


def _endings(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"generation": n, stop rate, lengths} where every generated reply says how it ended, as newer olmo-eval's do."""
    made = [o for row in rows if not _is_choice(row) for o in row.get("model_output") or [] if isinstance(o, Mapping)]
    if not made or not all(o.get("finish_reason") for o in made):
        return {}
    stops = sum(o["finish_reason"] != "length" for o in made)
    facts: dict[str, Any] = {"n": len(made), "stop_rate": stops / len(made)}
    if all(isinstance(o.get("completion_tokens"), int) for o in made):
        facts["tokens"] = token_facts([o["completion_tokens"] for o in made])
    return {"generation": facts}


def _problems(task: Task, rows: Sequence[Mapping[str, Any]], options: Evaluate, facts: Mapping[str, Any]) -> list[str]:
    problems = []
    if facts and (rate := facts["generation"]["stop_rate"]) < options.min_stop_rate:
        problems.append(
            f"{rate:.0%} of {facts['generation']['n']} replies stop by themselves, min_stop_rate is {options.min_stop_rate:g}"
        )
    if not task.scores:
        problems.append("no metric")
    if not task.instances:
        problems.append("no instances")
    if not rows:
        problems.append("no predictions")
    elif len(rows) != task.instances:
        problems.append(f"{len(rows)} predictions of {task.instances} instances")
    if task.scores and task.primary not in task.scores:
        problems.append(f"the primary metric {task.primary or '(the harness names none)'} is missing")
    problems += [f"{name} is {value}" for name, value in task.scores.items() if not math.isfinite(value)]
    found = [_replies(row) for row in rows if not _is_choice(row)]
    texts = [text for texts in found for text in texts or [""]]
    empty = sum(not text.strip() for text in texts)
    if found and not any(found):
        problems.append("no reply text found in its predictions")
    elif texts and empty / len(texts) > options.max_empty_fraction:
        problems.append(
            f"{empty / len(texts):.0%} of {len(texts)} replies are empty, max_empty_fraction is {options.max_empty_fraction:g}"
        )
    return problems


def _replies(row: Mapping[str, Any]) -> list[str]:
    """The generated texts of a prediction: olmo-eval's `text`, oe-eval's `continuation`."""
    outputs = [o for o in row.get("model_output") or [] if isinstance(o, Mapping)]
    texts = [next((o[key] for key in ("text", "continuation") if o.get(key) is not None), None) for o in outputs]
    return [str(text) for text in texts if text is not None]


def _is_choice(row: Mapping[str, Any]) -> bool:
    """Whether likelihoods of given texts were scored: no text was written, or the label is the number of one of several."""
    outputs = row.get("model_output") or []
    if not outputs or not all(isinstance(o, Mapping) and "sum_logits" in o for o in outputs):
        return False
    label = row.get("label")
    return not _replies(row) or (len(outputs) > 1 and isinstance(label, int) and 0 <= label < len(outputs))


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise SftError(f"{file}: the harness returned none; next: read its log, make evaluate again") from None
    except ValueError as e:
        raise SftError(f"{file}: cannot be read ({e}); next: make evaluate again") from None
    if not isinstance(data, dict):
        raise SftError(f"{file}: not a table; next: make evaluate again")
    return data


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(file), 1):
        try:
            row = json.loads(line)
        except ValueError as e:
            raise SftError(f"{file}:{number}: cannot be read ({e}); next: make evaluate again") from None
        yield row if isinstance(row, dict) else {}


def _lines(file: Path) -> Iterable[str]:
    with file.open(encoding="utf-8") as f:
        yield from (line for line in f if line.strip())


def _file_name(task: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", task)
