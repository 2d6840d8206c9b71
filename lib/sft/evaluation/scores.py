"""Scores of a task with their errors, facts about its replies, and the reasons to refuse the scores. Standard library only.

In: lm-eval's output for one task (LmEvalOutput). Out: the records of sft.formats.results and sft.formats.samples.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from sft.common.errors import SftError
from sft.evaluation.statistics import Z95, wilson
from sft.formats.record import Record
from sft.formats.results import Generation, Score, TaskResult, TokenCounts
from sft.formats.samples import Reply, Sample
from sft.recipe.schema import Evaluate

UNCLOSED = "unclosed thought"
"""How a reply ended that stopped inside its thought and has no answer."""
LENGTH_LIMITS = tuple(2**k for k in range(3, 17))
"""Upper ends of the bins of reply lengths, in tokens."""


@dataclass(frozen=True)
class LmEvalOutput:
    """What lm-eval returns for one task.

    `results` is {"metric,filter": value, "metric_stderr,filter": error}; `samples` has one dictionary for each document and
    filter; `config` is the task's configuration; `higher_is_better` is {metric: direction}.
    """

    results: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    higher_is_better: Mapping[str, bool]


def sample_records(samples: Sequence[Mapping[str, Any]], replies: Mapping[str, Sequence[Reply]]) -> list[Sample]:
    """lm-eval's samples as records. `replies` are the generated ones by key; a sample of theirs records how they ended.

    A document with several replies has a list of each fact, and a single reply has the fact itself.
    """
    taken: Counter[tuple[str, str]] = Counter()
    records = []
    for sample in samples:
        arguments = [list(a) for a in sample["arguments"]]
        record = _sample(sample, arguments)
        key = request_key(arguments[0])
        if len(arguments) == 1 and key in replies:
            first, count = taken[sample["filter"], key], len(record.replies)
            taken[sample["filter"], key] += count
            record = _with_endings(record, replies[key][first : first + count])
        records.append(record)
    return records


def _sample(sample: Mapping[str, Any], arguments: Sequence[Sequence[Any]]) -> Sample:
    return Sample(
        doc_id=sample["doc_id"],
        filter=sample["filter"],
        prompt=arguments[0][0],
        target=sample["target"],
        replies=tuple(reply for r in sample["resps"] for reply in (r if isinstance(r, list) else [r])),
        filtered=sample["filtered_resps"],
        scores={metric: sample[metric] for metric in sample["metrics"]},
        doc=sample["doc"],
        of_replies=sample.get("of_replies"),
    )


def _with_endings(sample: Sample, replies: Sequence[Reply]) -> Sample:
    if len(replies) == 1:
        (reply,) = replies
        return replace(
            sample, ended_by=reply.ended_by, tokens=reply.tokens, repeats=reply.repeats, thought=reply.thought
        )
    return replace(
        sample,
        ended_by=tuple(r.ended_by for r in replies),
        tokens=tuple(r.tokens for r in replies),
        repeats=tuple(r.repeats for r in replies),
        thought=tuple(r.thought or "" for r in replies) if any(r.thought for r in replies) else None,
    )


def request_key(request: Sequence[Any]) -> str:
    """sha256 (hex) of a request: a prompt with its generation arguments, or with the continuation to be scored."""
    return hashlib.sha256(
        json.dumps(list(request), sort_keys=True, ensure_ascii=False, default=str).encode()
    ).hexdigest()


def generation(samples: Sequence[Sample]) -> Generation | None:
    """How the replies of a task ended, counted once although several filters score them. None for a task that generates nothing."""
    first = samples[0].filter if samples else ""
    replies = [
        (str(text), ended_by, tokens, repeats)
        for s in samples
        if s.ended_by is not None and s.filter == first
        for text, ended_by, tokens, repeats in zip(
            s.replies, as_tuple(s.ended_by), as_tuple(s.tokens), as_tuple(s.repeats), strict=True
        )
    ]
    if not replies:
        return None
    texts, endings, tokens, repeats = zip(*replies, strict=True)
    n = len(replies)
    return Generation(
        n=n,
        stop_rate=sum(ended_by not in ("length", UNCLOSED) for ended_by in endings) / n,
        terminator_rate=endings.count("terminator") / n,
        empty=sum(not text.strip() and end != UNCLOSED for text, end in zip(texts, endings, strict=True)) / n,
        repeating=sum(repeats) / n,
        tokens=token_counts(tokens),
    )


def token_counts(lengths: Sequence[int]) -> TokenCounts:
    """The distribution of the lengths of replies, in tokens."""
    lengths = sorted(lengths)
    return TokenCounts(
        median=statistics.median(lengths),
        p90=lengths[math.ceil(0.9 * len(lengths)) - 1],
        max=lengths[-1],
        up_to=length_bins(lengths),
    )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A fact about one reply, or a tuple of facts about several, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def length_bins(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(upper end, replies) of each bin, from the first to the last one that is not empty.

    A bin counts the replies that are longer than the upper end before it: [0, 3, 8, 9, 40] gives
    (8, 3), (16, 1), (32, 0), (64, 1).
    """
    bins = [(top, sum(low < n <= top for n in lengths)) for low, top in zip((-1, *LENGTH_LIMITS), LENGTH_LIMITS)]  # noqa: B905
    if beyond := sum(n > LENGTH_LIMITS[-1] for n in lengths):
        bins.append((max(lengths), beyond))
    used = [i for i, (_, n) in enumerate(bins) if n]
    return tuple(bins[used[0] : used[-1] + 1])


def scores(output: LmEvalOutput) -> dict[str, Score]:
    """{metric or "metric,filter": score} in the order of the task's metric list: the first is the primary one."""
    found: dict[str, Score] = {}
    for key, value in output.results.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        items = [s[metric] for s in output.samples if s["filter"] == filter_name and metric in s]
        error = output.results.get(f"{metric}_stderr,{filter_name}")
        score = Score(value=float(value), stderr=float(error) if is_number(error) else None, n=len(items),
                      higher_is_better=output.higher_is_better.get(metric))  # fmt: skip
        is_share = bool(items) and all(is_number(i) and i in (0, 1) for i in items)
        mean_matches = is_share and abs(sum(items) / len(items) - score.value) < 1e-9
        found[metric if filter_name == "none" else f"{metric},{filter_name}"] = with_interval(score, mean_matches)
    order = [m["metric"] for m in output.config.get("metric_list") or []]
    rank = {metric: i for i, metric in enumerate(order)}
    return dict(sorted(found.items(), key=lambda item: rank.get(item[0].partition(",")[0], len(order))))


def with_interval(score: Score, is_share: bool) -> Score:
    """The score with its 95 % interval, if it can have one.

    A share of right answers has Wilson's interval, which keeps its width at 0 and 1 where the standard error is 0. Any other
    score has value ± 1.96 standard errors.
    """
    if is_share:
        low, high = wilson(score.value, score.n)
        return replace(score, low=low, high=high, interval="wilson")
    if score.stderr is None:
        return score
    half = Z95 * score.stderr
    return replace(score, low=score.value - half, high=score.value + half, interval="normal")


def problems_of(result: TaskResult, samples: Sequence[Sample], options: Evaluate, documents: int) -> list[str]:
    """The reasons why a task's scores would mislead. `documents` is how many were requested."""
    if not samples:
        return ["no samples"]
    problems = [] if result.metrics else ["no metric"]
    for name, score in result.metrics.items():
        if not math.isfinite(score.value):
            problems.append(f"{name} is {score.value}")
        if score.n != documents:
            problems.append(f"{documents - score.n} of {documents} documents failed: they have no {name}")
    if bad := [s.doc_id for s in samples if not_finite(s.replies)]:
        problems.append(
            f"{len(bad)} of {len(samples)} documents have a likelihood that is not finite, the first is {bad[0]}"
        )
    if (facts := result.generation) and facts.empty is not None and facts.empty > options.max_empty_fraction:
        problems.append(too_many_empty(facts.empty, facts.n, options))
    if facts and facts.stop_rate < options.min_stop_rate:
        problems.append(too_few_stop(facts, options))
    return problems


def too_many_empty(share: float, n: int, options: Evaluate) -> str:
    """The reason for a task with too many empty replies."""
    return f"{share:.0%} of {n} replies are empty, max_empty_fraction is {options.max_empty_fraction:g}"


def too_few_stop(facts: Generation, options: Evaluate) -> str:
    """The reason for a task with too few replies that stop."""
    return (
        f"{facts.stop_rate:.0%} of {facts.n} replies stop by themselves, min_stop_rate is {options.min_stop_rate:g}: the others"
        " are cut by length, and a cut reply is scored as if it were complete; next: raise [evaluate] max_reply_tokens, or lower"
        " min_stop_rate"
    )


def summary(result: TaskResult) -> str:
    """One line for people: the primary metric with its interval, and the stop rate."""
    name, score = result.primary
    text = f"{name} {score.value:.3f}"
    if score.low is not None:
        text += f" [{score.low:.3f}, {score.high:.3f}]"
    if score.stderr is not None:
        text += f" ± {score.stderr:.3f}"
    text += f", n {score.n}"
    if (facts := result.generation) and facts.tokens:
        text += f", {facts.stop_rate:.0%} stop, {facts.tokens.median:g} tokens at the median"
    return text


def samples_hash(samples: Iterable[Mapping[str, Any]]) -> str:
    """sha256 (hex) of what lm-eval asked: documents, prompts and targets in order."""
    return json_hash([[s["doc_hash"], s["prompt_hash"], s["target_hash"]] for s in samples])


def json_hash(value: Any) -> str:
    """sha256 (hex) of a value as JSON; functions count by their names."""
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, default=lambda o: getattr(o, "__name__", type(o).__name__)
    )
    return hashlib.sha256(text.encode()).hexdigest()


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number other than NaN; True and False are numbers."""
    return isinstance(value, (int, float)) and not (isinstance(value, float) and math.isnan(value))


def not_finite(value: Any, where: str = "") -> str | None:
    """The place and value of the first NaN or infinity in nested lists and mappings; None without one.

    Minus infinity counts: it is a likelihood of zero, which no softmax gives.
    """
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{where}: {value}"
    if isinstance(value, Mapping):
        parts: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    else:
        return None
    return next((found for name, part in parts if (found := not_finite(part, f"{where}.{name}"))), None)


def check_finite(results: Record) -> None:
    """Raises SftError that names a score that is not finite, in results or in an evaluation."""
    if found := not_finite(results.to_value(), "results"):
        raise SftError(f"{found} is not a score")
