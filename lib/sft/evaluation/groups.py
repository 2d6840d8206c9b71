"""Scores of groups of tasks (mmlu, bbh, leaderboard): lm-eval's own mean over their tasks, with its error.

In: lm-eval's groups and the results of their tasks. Out: a GroupResult for every group that defines a mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.api.group import Group

from sft.evaluation.scores import is_number, with_interval
from sft.formats.results import GroupResult, Score, TaskResult


def group_results(groups: Mapping[str, Group], results: Mapping[str, TaskResult]) -> dict[str, GroupResult]:
    """The scores of the groups whose tasks all have scores; a mean over some of them would be another number."""
    flat = {name: _as_lm_eval(result) for name, result in results.items()}
    found = {}
    for name, group in groups.items():
        members = [task.task_name for task in group.get_all_tasks()]
        if group.has_aggregation and all(member in results for member in members):
            metrics = _scores(group.aggregate(flat), [results[m] for m in members])
            if metrics:
                found[name] = GroupResult(metrics, tuple(members))
    return found


def _as_lm_eval(result: TaskResult) -> Any:
    """A result as lm-eval holds it: {"acc,none": value, "acc_stderr,none": error, "sample_len": n}."""
    values: dict[str, Any] = {"sample_len": next(iter(result.metrics.values())).n}
    for key, score in result.metrics.items():
        metric, _, filter_name = key.partition(",")
        values[f"{metric},{filter_name or 'none'}"] = score.value
        values[f"{metric}_stderr,{filter_name or 'none'}"] = "N/A" if score.stderr is None else score.stderr
    return values


def _scores(aggregated: Mapping[str, Any], members: list[TaskResult]) -> dict[str, Score]:
    counts = aggregated.get("sample_count", {})
    found = {}
    for key, value in aggregated.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        name = metric if filter_name == "none" else key
        error = aggregated.get(f"{metric}_stderr,{filter_name}")
        directions = {m.metrics[name].higher_is_better for m in members if name in m.metrics}
        score = Score(
            value=float(value),
            stderr=float(error) if is_number(error) else None,
            n=counts[key],
            higher_is_better=directions.pop() if len(directions) == 1 else None,
        )
        found[name] = with_interval(score, is_share=False)
    return found
