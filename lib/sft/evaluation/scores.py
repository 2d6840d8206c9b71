"""What is made of a task's samples: scores with their errors, how replies ended, and why a task would mislead.

In: lm-eval's results and samples of one task. Out: JSON-ready dicts for results.json and the samples file.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sft.evaluation.statistics import Z95, wilson

if TYPE_CHECKING:
    from sft.recipe.schema import Evaluate

UNCLOSED = "unclosed thought"  # how a reply ended that never came to its answer
LENGTH_LIMITS = tuple(2**k for k in range(3, 17))  # upper ends of the bins of reply lengths, in tokens


def sample_rows(
    samples: Sequence[Mapping[str, Any]], replies: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """What is kept of lm-eval's samples. Generated ones say how they ended, as a list where a document has several replies."""
    taken: Counter[tuple[str, str]] = Counter()
    rows = []
    for sample in samples:
        arguments = [list(a) for a in sample["arguments"]]
        row = _row(sample, arguments)
        key = reply_key(arguments[0])
        if len(arguments) == 1 and "ended_by" in (replies.get(key) or [{}])[0]:
            first = taken[sample["filter"], key]
            taken[sample["filter"], key] += len(row["replies"])
            facts = replies[key][first : first + len(row["replies"])]
            for name in ("ended_by", "tokens", "repeats"):
                row[name] = facts[0][name] if len(facts) == 1 else [f[name] for f in facts]
        rows.append(row)
    return rows


def _row(sample: Mapping[str, Any], arguments: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {
        "doc_id": sample["doc_id"],
        "filter": sample["filter"],
        "prompt": arguments[0][0],
        "target": sample["target"],
        "replies": [reply for r in sample["resps"] for reply in (r if isinstance(r, list) else [r])],
        "filtered": sample["filtered_resps"],
        "scores": {metric: sample[metric] for metric in sample["metrics"]},
        "doc": sample["doc"],
    }


def reply_key(request: Sequence[Any]) -> str:
    """Names a prompt with its generation arguments, or with the continuation whose likelihood is asked."""
    return hashlib.sha256(
        json.dumps(list(request), sort_keys=True, ensure_ascii=False, default=str).encode()
    ).hexdigest()


def generation_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stop rate, empty and repeating replies, lengths, of a task that generates; nothing for the others."""
    first = rows[0]["filter"] if rows else ""
    made = [
        (str(text), *facts)
        for r in rows
        if "ended_by" in r and r["filter"] == first
        for text, *facts in zip(
            r["replies"], *(_listed(r[name]) for name in ("ended_by", "tokens", "repeats")), strict=True
        )
    ]
    if not made:
        return {}
    texts, ends, tokens, circles = zip(*made, strict=True)
    count = len(made)
    return {
        "generation": {
            "n": count,
            "stop_rate": sum(by not in ("length", UNCLOSED) for by in ends) / count,
            "terminator_rate": ends.count("terminator") / count,
            "empty": sum(not text.strip() and by != UNCLOSED for text, by in zip(texts, ends, strict=True)) / count,
            "repeating": sum(circles) / count,
            "tokens": token_facts(tokens),
        }
    }


def token_facts(tokens: Sequence[int]) -> dict[str, Any]:
    """How replies' lengths in tokens are spread."""
    lengths = sorted(tokens)
    return {
        "median": statistics.median(lengths),
        "p90": lengths[math.ceil(0.9 * len(lengths)) - 1],
        "max": lengths[-1],
        "up_to": length_bins(lengths),
    }


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def length_bins(lengths: Sequence[int]) -> list[list[int]]:
    """[upper end, replies of at most that many tokens and more than the last end's] from the first used bin to the last."""
    bins = [[top, sum(low < n <= top for n in lengths)] for low, top in zip((-1, *LENGTH_LIMITS), LENGTH_LIMITS)]  # noqa: B905
    if beyond := sum(n > LENGTH_LIMITS[-1] for n in lengths):
        bins.append([max(lengths), beyond])
    used = [i for i, (_, n) in enumerate(bins) if n]
    return bins[used[0] : used[-1] + 1]


def scores(raw: Mapping[str, Any]) -> dict[str, Any]:
    """{metric or "metric,filter": {"value", "stderr", "low", "high", "n", "interval", "higher_is_better"}}, primary first.

    The interval of a share of right answers is Wilson's, which keeps its width at 0 and 1 where a standard error is 0;
    the others are value ± 1.96 standard errors.
    """
    found: dict[str, Any] = {}
    for key, value in raw["results"].items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        items = [s[metric] for s in raw["samples"] if s["filter"] == kind and metric in s]
        n = len(items)
        stderr = raw["results"].get(f"{metric}_stderr,{kind}")
        score: dict[str, Any] = {"value": float(value), "stderr": float(stderr) if is_number(stderr) else None, "n": n}
        if n and all(is_number(i) and i in (0, 1) for i in items) and abs(sum(items) / n - score["value"]) < 1e-9:
            score["low"], score["high"] = wilson(score["value"], n)
            score["interval"] = "wilson"
        elif score["stderr"] is not None:
            score["low"], score["high"] = value - Z95 * score["stderr"], value + Z95 * score["stderr"]
            score["interval"] = "normal"
        score["higher_is_better"] = raw["higher_is_better"].get(metric)
        found[metric if kind == "none" else f"{metric},{kind}"] = score
    order = [m["metric"] for m in raw["config"].get("metric_list") or []]
    rank = {metric: i for i, metric in enumerate(order)}
    return dict(sorted(found.items(), key=lambda item: rank.get(item[0].partition(",")[0], len(order))))


def problems_of(
    result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], options: Evaluate, documents: int
) -> list[str]:
    """Why a task's numbers would mislead; empty when they do not. `documents` = how many were asked."""
    problems = []
    if not rows:
        return ["no samples"]
    if not result["metrics"]:
        problems.append("no metric")
    for name, score in result["metrics"].items():
        if not math.isfinite(score["value"]):
            problems.append(f"{name} is {score['value']}")
        if score["n"] != documents:
            problems.append(f"{documents - score['n']} of {documents} documents failed: they have no {name}")
    if bad := [r["doc_id"] for r in rows if not finite(r["replies"])]:
        problems.append(
            f"{len(bad)} of {len(rows)} documents have a likelihood that is not finite, the first is {bad[0]}"
        )
    facts = result.get("generation")
    if facts:
        if facts["empty"] > options.max_empty_fraction:
            problems.append(
                f"{facts['empty']:.0%} of {facts['n']} replies are empty, max_empty_fraction is {options.max_empty_fraction:g}"
            )
        if facts["stop_rate"] < options.min_stop_rate:
            problems.append(
                f"{facts['stop_rate']:.0%} of {facts['n']} replies stop by themselves, min_stop_rate is {options.min_stop_rate:g}"
            )
    return problems


def headline(result: Mapping[str, Any]) -> str:
    """One line for people: the task's first metric with its interval, and the stop rate."""
    name, score = next(iter(result["metrics"].items()))
    text = f"{name} {score['value']:.3f}"
    if "low" in score:
        text += f" [{score['low']:.3f}, {score['high']:.3f}]"
    if score["stderr"] is not None:
        text += f" ± {score['stderr']:.3f}"
    text += f", n {score['n']}"
    if facts := result.get("generation"):
        text += f", {facts['stop_rate']:.0%} stop, {facts['tokens']['median']:g} tokens at the median"
    return text


def samples_hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """Names what was asked: documents, prompts and targets in order."""
    return json_hash([[s["doc_hash"], s["prompt_hash"], s["target_hash"]] for s in samples])


def json_hash(value: Any) -> str:
    """sha256 (hex) of a value as JSON; functions count by their names."""
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, default=lambda o: getattr(o, "__name__", type(o).__name__)
    )
    return hashlib.sha256(text.encode()).hexdigest()


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not (isinstance(value, float) and math.isnan(value))


def finite(value: Any) -> bool:
    """No NaN and no infinity anywhere in nested lists; minus infinity is a likelihood of zero, which no softmax gives."""
    if isinstance(value, (list, tuple)):
        return all(finite(v) for v in value)
    return not isinstance(value, float) or math.isfinite(value)
