"""A page for each task to read its replies: prompts, thoughts, scores, how replies ended, and what changed since the baseline.

In:  evaluate's results.json and samples of a run, and of its baseline if it has one.
Out: replies/<task>.html in the report's folder: filters, a search, and an export of the shown items as JSONL. It loads nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from sft.common.files import write_atomic
from sft.evaluation.scores import as_tuple, is_number, json_hash
from sft.formats import manifest
from sft.formats.lines import read_lines
from sft.formats.results import NAME, SAMPLES, Results, TaskResult
from sft.formats.samples import Sample
from sft.recipe.recipe import BASELINE
from sft.reporting.page import STYLE

FOLDER = "replies"
MOST = 2000
"""Items on a page; more would make a browser slow."""
CUT = ("length", "unclosed thought")


@dataclass(frozen=True)
class Reply:
    """One reply as the page shows it."""

    text: str
    ended: str
    tokens: int | None
    repeats: bool
    thought: str


@dataclass(frozen=True)
class Item:
    """One question with its replies. `before` is the baseline's reply, where it differs."""

    id: int
    prompt: str
    target: str
    replies: tuple[Reply, ...]
    scores: tuple[tuple[str, str], ...]
    wrong: bool
    cut: bool
    changed: bool
    before: str | None


def write(run: Path, results: Results, target: Path) -> list[str]:
    """Writes the pages of a run's tasks under `target` and returns their names. AI2's harnesses have records of their own."""
    if results.harness is not None:
        return []
    baseline = run.with_name(run.name + BASELINE)
    before = _results(baseline)
    names = []
    for task, result in results.tasks.items():
        earlier = _samples(baseline, task, before.tasks[task]) if before and task in before.tasks else {}
        samples = _samples(run, task, result)
        if not samples:
            continue
        text = page(run.name, task, result, list(samples.values()), baseline.name if earlier else "", earlier)
        name = f"{FOLDER}/{task}.html"
        (target / FOLDER).mkdir(parents=True, exist_ok=True)
        write_atomic(target / name, text.encode())
        names.append(name)
    return names


def page(
    run: str, task: str, result: TaskResult, samples: Sequence[Sample], baseline: str, before: Mapping[str, Sample]
) -> str:
    """The HTML of one task."""
    shown = samples[:MOST]
    items = [_item(sample, result, before.get(_key(sample))) for sample in shown]
    rows = [s.to_value() for s in shown]
    return _template().render(
        run=run, task=task, baseline=baseline, items=items, rows=rows, total=len(samples), style=STYLE
    )


@functools.cache
def _template() -> jinja2.Template:
    """The page. Every text of a model or data set is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("replies.html.jinja")


def _item(sample: Sample, result: TaskResult, before: Sample | None) -> Item:
    primary, score = result.primary
    metric = primary.partition(",")[0]
    value = sample.scores.get(metric)
    wrong = is_number(value) and (value < 1 if score.higher_is_better is not False else value > 0)
    changed = before is not None and before.scores.get(metric) != value
    endings = as_tuple(sample.ended_by) if sample.ended_by is not None else ()
    return Item(
        id=sample.doc_id,
        prompt=sample.prompt,
        target=str(sample.target),
        replies=_replies(sample),
        scores=tuple((k, f"{v:g}") for k, v in sample.scores.items() if is_number(v)),
        wrong=wrong,
        cut=any(e in CUT for e in endings),
        changed=changed,
        before=" / ".join(map(str, before.replies))
        if before is not None and before.replies != sample.replies
        else None,
    )


def _replies(sample: Sample) -> tuple[Reply, ...]:
    """The replies with their facts; choices of given texts with their likelihoods as one text."""
    if sample.ended_by is None:
        return (Reply("\n".join(map(str, sample.replies)), "likelihoods", None, False, ""),)
    count = len(sample.replies)
    facts = (sample.ended_by, sample.tokens, sample.repeats, sample.thought)
    columns = [as_tuple(f) if f is not None else (None,) * count for f in facts]
    return tuple(
        Reply(str(text), ended, tokens, bool(repeats), thought or "")
        for text, ended, tokens, repeats, thought in zip(sample.replies, *columns, strict=True)
    )


def _results(run: Path) -> Results | None:
    """A run's results; None where it has none."""
    folder = run / "evaluate"
    if not manifest.is_whole(folder):
        return None
    return Results.read(folder / NAME)


def _samples(run: Path, task: str, result: TaskResult) -> dict[str, Sample]:
    """The samples of the primary metric's filter, by question."""
    wanted = result.primary[0].partition(",")[2] or "none"
    file = run / "evaluate" / (result.samples or f"{SAMPLES}/{task}.jsonl")
    found: dict[str, Sample] = {}
    for sample in read_lines(Sample, file):
        if sample.filter == wanted:
            found[_key(sample)] = sample
    return found


def _key(sample: Sample) -> str:
    return f"{sample.doc_id} {json_hash([sample.doc, sample.target])[:16]}"
