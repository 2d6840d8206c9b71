"""Several sampled replies to each question: mean scores, with an error over questions and replies, and pass@k.

In: lm-eval's output for each draw, which is one reply to every question. Out: one output, whose items are questions.
Standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sft.evaluation.scores import LmEvalOutput, is_number


def combined(outputs: Sequence[LmEvalOutput]) -> LmEvalOutput:
    """One output of several draws; a single one is returned as it is.

    The standard error of a mean is that of the questions' means: they differ by question and by what was sampled, so it holds
    both. A metric that is no mean of its items, such as a corpus BLEU, has the mean of the draws' values and of their errors.
    """
    first = outputs[0]
    if len(outputs) == 1:
        return first
    samples = [_question(same) for same in zip(*(o.samples for o in outputs), strict=True)]
    results: dict[str, Any] = {}
    directions = dict(first.higher_is_better)
    for key in first.results:
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        rows = [s for s in samples if s["filter"] == filter_name and metric in s["of_replies"]]
        of_draws = [float(o.results[key]) for o in outputs]
        results[key] = statistics.fmean(of_draws)
        errors = [e for o in outputs if is_number(e := o.results.get(f"{metric}_stderr,{filter_name}"))]
        results[f"{metric}_stderr,{filter_name}"] = statistics.fmean(errors) if errors else None
        draws = [row["of_replies"][metric] for row in rows]
        if not _is_mean(draws, of_draws):
            continue
        _mean(results, metric, filter_name, [row[metric] for row in rows])
        if all(v in (0, 1) for values in draws for v in values) and first.higher_is_better.get(metric) is not False:
            for k in _ks(len(outputs)):
                name = f"{metric}_pass@{k}"
                directions[name] = True
                for row, values in zip(rows, draws, strict=True):
                    row[name] = pass_at(k, len(values), sum(map(int, values)))
                    row["metrics"].append(name)
                _mean(results, name, filter_name, [row[name] for row in rows])
    return LmEvalOutput(results, samples, first.config, directions)


def pass_at(k: int, n: int, right: int) -> float:
    """The probability that one of k replies, taken from n without replacement, is among the `right` ones (Chen et al. 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def _ks(n: int) -> list[int]:
    """2, 4, 8, … up to n, and n."""
    return sorted({*(2**i for i in range(1, n.bit_length()) if 2**i <= n), n})


def _question(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One sample of several draws of the same document. A score that is a number becomes its mean."""
    first = draws[0]
    of_replies = {metric: [d[metric] for d in draws] for metric in first["metrics"]}
    means = {m: statistics.fmean(map(float, v)) if all(map(is_number, v)) else v for m, v in of_replies.items()}
    return {
        **first,
        "metrics": list(first["metrics"]),
        "resps": [[reply for d in draws for replies in d["resps"] for reply in replies]],
        "filtered_resps": [reply for d in draws for reply in d["filtered_resps"]],
        "of_replies": of_replies,
        **means,
    }


def _is_mean(draws: Sequence[Sequence[Any]], of_draws: Sequence[float]) -> bool:
    """Whether lm-eval's value of every draw is the mean of its items."""
    if not draws or not all(is_number(v) for values in draws for v in values):
        return False
    by_draw = zip(zip(*draws, strict=True), of_draws, strict=True)
    return all(abs(statistics.fmean(map(float, items)) - value) < 1e-9 for items, value in by_draw)


def _mean(results: dict[str, Any], metric: str, filter_name: str, items: Sequence[float]) -> None:
    results[f"{metric},{filter_name}"] = statistics.fmean(items)
    error = statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None
    results[f"{metric}_stderr,{filter_name}"] = error
