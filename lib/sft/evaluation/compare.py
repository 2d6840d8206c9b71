"""Compares the scores of runs item by item: differences with their errors, and the options that differ.

In:  evaluate's results.json, samples/ and validation.jsonl of each run; all their manifests.
Out: a Comparison (sft.formats.comparison), and the same as lines for a terminal. The first run is the baseline.

Only answers to the same questions are compared. A task whose hash differs, or a prompt that does (another template, system
prompt or choice of few-shot examples), is refused with both hashes. Of different sets of items the common ones are compared,
and a note says so.
Standard library only. Run: make compare A=run1 B=run2 [C="run3 run4"] [ANYWAY=1 compares different prompts too]
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from sft.common.errors import SftError
from sft.evaluation.scores import is_number, json_hash
from sft.evaluation.statistics import Z95, holm, paired, paired_ratio, stratified
from sft.formats import manifest
from sft.formats import results as results_format
from sft.formats.comparison import Comparison, Difference, OptionDifference, ScoreDifference
from sft.formats.lines import read_lines
from sft.formats.results import Results, Score
from sft.formats.samples import ConversationLoss, PlainTextLoss, SampleItem
from sft.recipe import schema

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))


def compare(runs: Sequence[Path], anyway: bool = False) -> Comparison:
    """Compares all runs with the first. Raises SftError when they answered different questions, unless `anyway`."""
    baseline, *others = [Evaluated(run) for run in runs]
    rows: list[ScoreDifference] = []
    notes: list[str] = []
    for index, other in enumerate(others, 1):
        found = _compare_runs(baseline, other, index, anyway)
        rows += found.rows
        notes += found.notes
    if not rows:
        names = "; ".join(f"{e.name}: {', '.join(e.results.tasks)}" for e in (baseline, *others))
        raise SftError(f"no task in common ({names}); next: evaluate them with the same [evaluate] tasks")
    return Comparison(
        runs=tuple(run.name for run in runs),
        notes=tuple(notes),
        rows=tuple(_ordered(_corrected(rows))),
        fields=tuple(differing_options(runs)),
    )


def _corrected(rows: Sequence[ScoreDifference]) -> list[ScoreDifference]:
    """The rows with Holm's correction over all that have a p value, and their stars."""
    corrected = iter(holm([row.p for row in rows if row.p is not None]))
    result = []
    for row in rows:
        if row.p is not None:
            p = next(corrected)
            row = replace(row, corrected=p, mark=next((mark for limit, mark in STARS if p < limit), ""))
        result.append(row)
    return result


def _ordered(rows: Sequence[ScoreDifference]) -> list[ScoreDifference]:
    """The rows of one metric under one another, metrics in the order of their first row."""
    first: dict[tuple[str, str], int] = {}
    for row in rows:
        first.setdefault((row.task, row.metric), len(first))
    return sorted(rows, key=lambda row: (first[row.task, row.metric], row.run))


class Evaluated:
    """A run's finished evaluation. Its files are verified against the manifest."""

    def __init__(self, run: Path) -> None:
        """Raises SftError when the run has no scores or a file was altered."""
        self.name, self.folder = run.name, run / "evaluate"
        file = self.folder / manifest.NAME
        try:
            broken = manifest.broken_outputs(self.folder, manifest.load(file).outputs)
        except FileNotFoundError:
            raise SftError(f"{file}: not there: {run.name} has no scores; next: make {file}") from None
        if broken:
            raise SftError("\n".join(broken) + f"\nnext: remove {file} and make it again")
        self.results = Results.read(self.folder / results_format.NAME)
        self._items: dict[str, dict[str, dict[str, SampleItem]]] = {}

    def items(self, task: str) -> dict[str, dict[str, SampleItem]]:
        """{filter: {item: sample}}. Document and target name an item; repeated items are numbered."""
        if task not in self._items:
            self._items[task] = self._read_items(task)
        return self._items[task]

    def _read_items(self, task: str) -> dict[str, dict[str, SampleItem]]:
        found: dict[str, dict[str, SampleItem]] = {}
        file = self.results.tasks[task].samples or f"{results_format.SAMPLES}/{task}.jsonl"
        for sample in read_lines(SampleItem, self.folder / file):
            if sample.scores is None:
                return {}
            of_filter = found.setdefault(sample.filter, {})
            of_filter[_numbered(json_hash([sample.doc, sample.target])[:16], of_filter)] = sample
        return found

    def conversations(self) -> dict[str, ConversationLoss]:
        """{item: loss} of the held-out conversations; repeated ones are numbered."""
        found: dict[str, ConversationLoss] = {}
        for loss in read_lines(ConversationLoss, self.folder / results_format.VALIDATION):
            found[_numbered(loss.item, found)] = loss
        return found

    def texts(self) -> dict[str, PlainTextLoss]:
        """{item: loss} of the texts that are no chat; repeated ones are numbered."""
        found: dict[str, PlainTextLoss] = {}
        for loss in read_lines(PlainTextLoss, self.folder / results_format.PLAIN_TEXT):
            found[_numbered(loss.item, found)] = loss
        return found


def _numbered(name: str, taken: Mapping[str, Any]) -> str:
    number = 1
    while (full := f"{name}-{number}") in taken:
        number += 1
    return full


# --- two runs -----------------------------------------------------------------------------------------------------------


class _Findings(NamedTuple):
    """What a comparison found. `problems` are the signs that the two runs answered different questions."""

    rows: list[ScoreDifference]
    notes: list[str]
    problems: list[str]


def _compare_runs(a: Evaluated, b: Evaluated, run: int, anyway: bool) -> _Findings:
    """Run number `run`, b, against the baseline a. Raises SftError with the hashes that differ."""
    found = [_compare_task(task, a, b, run) for task in a.results.tasks if task in b.results.tasks]
    problems = [problem for f in found for problem in f.problems]
    if problems and a.results.template_sha256 != b.results.template_sha256:
        problems.append(_hashes("template_sha256", a.results, b.results))
    if problems and not anyway:
        raise SftError(
            f"{a.name} and {b.name} did not answer the same questions:\n  " + "\n  ".join(problems) + "\nnext: evaluate"
            " both on the same tasks, with one template and system prompt, or compare them nevertheless with ANYWAY=1"
        )
    groups, loss, text_loss = _compare_groups(a, b, run), _compare_losses(a, b, run), _compare_texts(a, b, run)
    notes = [
        *_unshared(a, b),
        *(note for f in found for note in f.notes),
        *(f"{b.name} did not answer the questions of {a.name}: {problem}" for problem in problems),
        *groups.notes,
        *loss.notes,
        *text_loss.notes,
    ]
    return _Findings([row for f in (groups, *found, loss, text_loss) for row in f.rows], notes, problems)


def _unshared(a: Evaluated, b: Evaluated) -> list[str]:
    """Notes about tasks that only one of the runs has."""
    notes = []
    for one, other in ((a, b), (b, a)):
        if alone := [task for task in one.results.tasks if task not in other.results.tasks]:
            notes.append(f"only in {one.name}, not compared: {', '.join(alone)}")
    return notes


def _compare_task(task: str, a: Evaluated, b: Evaluated, run: int) -> _Findings:
    """Every metric of a task that both runs have."""
    rows, notes, problems = [], [], []
    result_a, result_b = a.results.tasks[task], b.results.tasks[task]
    if result_a.task_sha256 != result_b.task_sha256:
        problems.append(f"{task}: {_hashes('task_sha256', result_a, result_b)}")
    for metric in (name for name in result_a.metrics if name in result_b.metrics):
        one, other = _metric_items(task, metric, a), _metric_items(task, metric, b)
        common = [item for item in one.items if item in other.items]
        if one.items and other.items and not common:
            problems.append(f"{task}: no item in common: {_hashes('samples_sha256', result_a, result_b)}")
            break
        if not common:
            tested = _without_items(one.score, other.score)
            if one.score.n != other.score.n:
                notes.append(
                    f"{task} {metric}: {one.score.n} items in {a.name} and {other.score.n} in {b.name}: not tested"
                )
        else:
            tested = _with_items(one, other, common)
        if common and metric == next(iter(result_a.metrics)):
            if changed := sum(one.items[i].prompt != other.items[i].prompt for i in common):
                problems.append(f"{task}: {changed} of {len(common)} prompts differ")
            if len(common) < max(len(one.items), len(other.items)):
                notes.append(
                    f"{task}: only the {len(common)} common items of {len(one.items)} in {a.name} and {len(other.items)} in {b.name}"
                )
        rows.append(_row(task, metric, run, tested, one.score.higher_is_better))
    return _Findings(rows, notes, problems)


def _compare_groups(a: Evaluated, b: Evaluated, run: int) -> _Findings:
    """The mean of every group that both runs have, paired by the items of its tasks."""
    rows, notes = [], []
    groups_a, groups_b = a.results.groups or {}, b.results.groups or {}
    for group in (name for name in groups_a if name in groups_b):
        one, other = groups_a[group], groups_b[group]
        if one.tasks != other.tasks:
            notes.append(f"{group}: its tasks differ ({len(one.tasks)} and {len(other.tasks)}): not compared")
            continue
        for metric in (name for name in one.metrics if name in other.metrics):
            members = [(_metric_items(task, metric, a), _metric_items(task, metric, b)) for task in one.tasks]
            score_a, score_b = one.metrics[metric], other.metrics[metric]
            tested = _paired_group(members, score_a, score_b)
            if tested is None:
                tested = _without_items(score_a, score_b)
                notes.append(
                    f"{group} {metric}: its tasks have no paired items, or their mean is of another kind: not paired"
                )
            rows.append(_row(group, metric, run, tested, score_a.higher_is_better))
    return _Findings(rows, notes, [])


def _compare_losses(a: Evaluated, b: Evaluated, run: int) -> _Findings:
    """The loss on the held-out conversations that both runs have."""
    losses_a, losses_b = a.conversations(), b.conversations()
    common = [item for item in losses_a if item in losses_b]
    notes = []
    if losses_a and losses_b and not common:
        notes.append(f"validation: no conversation in common with {b.name} (another split or tokenizer): not compared")
    if not common:
        return _Findings([], notes, [])
    if len(common) < max(len(losses_a), len(losses_b)):
        notes.append(f"validation: only the {len(common)} common conversations of {len(losses_a)} and {len(losses_b)}")
    num_targets = [losses_a[item].labels for item in common]
    sums_a, sums_b = ([losses[item].loss for item in common] for losses in (losses_a, losses_b))
    difference = paired_ratio(sums_a, sums_b, num_targets)
    tested = _Tested(difference, math.fsum(sums_a) / sum(num_targets), math.fsum(sums_b) / sum(num_targets))
    return _Findings([_row("validation", "loss", run, tested, False)], notes, [])


def _compare_texts(a: Evaluated, b: Evaluated, run: int) -> _Findings:
    """The loss on the texts that both runs have: of a token, or in bits per byte where their tokenizers differ."""
    texts_a, texts_b = a.texts(), b.texts()
    common = [item for item in texts_a if item in texts_b]
    if not common:
        return _Findings([], ["plain text: no text in common: not compared"] if texts_a and texts_b else [], [])
    notes = []
    if len(common) < max(len(texts_a), len(texts_b)):
        notes.append(f"plain text: only the {len(common)} common texts of {len(texts_a)} and {len(texts_b)}")
    same_tokens = all(texts_a[item].labels == texts_b[item].labels for item in common)
    weights = [texts_a[i].labels if same_tokens else texts_a[i].bytes * math.log(2) for i in common]
    sums_a, sums_b = ([texts[item].loss for item in common] for texts in (texts_a, texts_b))
    total = math.fsum(weights)
    tested = _Tested(paired_ratio(sums_a, sums_b, weights), math.fsum(sums_a) / total, math.fsum(sums_b) / total)
    return _Findings([_row("plain text", "loss" if same_tokens else "bits per byte", run, tested, False)], notes, [])


# --- one metric ---------------------------------------------------------------------------------------------------------


class _MetricItems(NamedTuple):
    """A metric of one run: its score and the samples that it was computed from, by item."""

    name: str
    score: Score
    items: dict[str, SampleItem]

    def values(self, items: Sequence[str]) -> list[Any]:
        """The metric's value of each item; None for an item without one."""
        return [(self.items[item].scores or {}).get(self.name) for item in items]

    def is_mean(self) -> bool:
        """Whether the score is the mean of the items' values, and not a metric of the set, like a corpus perplexity."""
        values = self.values(list(self.items))
        return all(map(is_number, values)) and math.isclose(
            math.fsum(values) / len(values), self.score.value, rel_tol=1e-9, abs_tol=1e-9
        )


def _metric_items(task: str, metric: str, run: Evaluated) -> _MetricItems:
    """A task's metric in a run, with its items where the harness left some."""
    name, _, filter_name = metric.partition(",")
    score = run.results.tasks[task].metrics.get(metric) or Score(value=math.nan, stderr=None, n=0)
    return _MetricItems(name, score, run.items(task).get(filter_name or "none", {}))


class _Tested(NamedTuple):
    """A difference, and the two scores that it is between."""

    difference: Difference
    a: float
    b: float


def _with_items(a: _MetricItems, b: _MetricItems, common: Sequence[str]) -> _Tested:
    """A paired test on the common items. A metric of the set is tested without its items."""
    if not (a.is_mean() and b.is_mean()):
        same = len(common) == len(a.items) == len(b.items)
        return _Tested(_unpaired(a.score, b.score, len(common), same), a.score.value, b.score.value)
    values_a, values_b = a.values(common), b.values(common)
    n = len(common)
    return _Tested(paired(values_a, values_b), math.fsum(values_a) / n, math.fsum(values_b) / n)


def _paired_group(members: Sequence[tuple[_MetricItems, _MetricItems]], a: Score, b: Score) -> _Tested | None:
    """A test of a group's mean on the common items of its tasks. None where the group's score is no mean of its tasks' scores."""
    by_size = _is_weighted(members, a, b, lambda score: score.n)
    if not by_size and not _is_weighted(members, a, b, lambda _: 1):
        return None
    strata = []
    for one, other in members:
        common = [item for item in one.items if item in other.items]
        if not common or not (one.is_mean() and other.is_mean()):
            return None
        strata.append((len(common) if by_size else 1, one.values(common), other.values(common)))
    total = sum(weight for weight, _, _ in strata)
    difference = stratified([(weight / total, x, y) for weight, x, y in strata])
    means = [math.fsum(w / total * math.fsum(values[i]) / len(values[i]) for w, *values in strata) for i in (0, 1)]
    return _Tested(difference, means[0], means[1])


def _is_weighted(
    members: Sequence[tuple[_MetricItems, _MetricItems]], a: Score, b: Score, weight: Callable[[Score], int]
) -> bool:
    """Whether both scores of a group are the mean of its tasks' scores with these weights."""
    for scores, of_group in (([m[0].score for m in members], a), ([m[1].score for m in members], b)):
        total = sum(map(weight, scores))
        mean = math.fsum(weight(s) * s.value for s in scores) / total if total else math.nan
        if not math.isclose(mean, of_group.value, rel_tol=1e-9, abs_tol=1e-9):
            return False
    return True


def _without_items(a: Score, b: Score) -> _Tested:
    """A test of the scores alone, for a harness that left no items."""
    return _Tested(_unpaired(a, b, min(a.n, b.n), same=a.n == b.n), a.value, b.value)


def _unpaired(a: Score, b: Score, n: int, same: bool) -> Difference:
    """A z test of two scores. Scores of different items are not tested: their difference is not only the models'."""
    value = b.value - a.value
    if not same or a.stderr is None or b.stderr is None or not (a.stderr or b.stderr):
        return Difference(value, None, None, None, None, n, "none")
    error = math.hypot(a.stderr, b.stderr)
    p = math.erfc(abs(value) / error / math.sqrt(2))
    return Difference(value, error, value - Z95 * error, value + Z95 * error, p, n, "unpaired")


def _row(task: str, metric: str, run: int, tested: _Tested, higher_is_better: bool | None) -> ScoreDifference:
    return ScoreDifference(
        task=task, metric=metric, run=run, higher_is_better=higher_is_better, a=tested.a, b=tested.b,
        **asdict(tested.difference), corrected=None, mark="",
    )  # fmt: skip


def _hashes(name: str, a: Any, b: Any) -> str:
    return f"{name} {str(getattr(a, name))[:12]} and {str(getattr(b, name))[:12]}"


# --- options and text ---------------------------------------------------------------------------------------------------


def differing_options(runs: Sequence[Path]) -> list[OptionDifference]:
    """Options and input files that are not the same in all runs, in the order of the stages. A stage that some runs have not, such as the
    training of a baseline, is one line, and its options are compared over the others."""
    differ: list[OptionDifference] = []
    for stage in schema.STAGES:
        options = [_options(run, stage) for run in runs]
        having = [one for one in options if one is not None]
        if 0 < len(having) < len(runs):
            differ.append(OptionDifference(stage, tuple("not made" if one is None else "made" for one in options)))
        for name in dict.fromkeys(name for one in having for name in one):
            if any(one.get(name) != having[0].get(name) for one in having):
                differ.append(OptionDifference(name, tuple((one or {}).get(name) for one in options)))
    return differ


def _options(run: Path, stage: str) -> dict[str, Any] | None:
    """The options and input files of a finished stage; None where there is none."""
    try:
        made = manifest.load(run / stage / manifest.NAME)
    except FileNotFoundError:
        return None
    files = {f"{stage}: {e.file}": f"sha256 {e.sha256[:10]}" for e in made.inputs if e.file}
    return dict(_leaves(made.config, stage)) | files


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name with dots, value) of every option in a configuration."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}")
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{name}.{i}")
    else:
        yield name, value


def p_text(p: float | None) -> str:
    """A p value with four digits."""
    return "–" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def footnote(comparison: Comparison) -> str:
    """Which tests were made, and what the stars mean."""
    n = sum(row.p is not None for row in comparison.rows)
    return (
        "Runs are compared item by item. Right or wrong answers: McNemar's exact test and Newcombe's interval. Other scores of"
        " items: the paired t test and its interval. Groups of tasks: the paired differences of their tasks, as strata. Scores of a"
        " complete set, and scores without items: a z test."
        f" * corrected p < 0.05, ** < 0.01, *** < 0.001 (Holm's correction for {n} comparison{'s' if n != 1 else ''})."
    )


def text(comparison: Comparison, colour: bool = False) -> str:
    """The comparison as lines for a terminal."""
    names = comparison.runs
    width = max(len(n) for n in names)
    lines = [f"{LETTERS[i]}  {name:{width}}" + ("  the baseline" if i == 0 else "") for i, name in enumerate(names)]
    lines += ["", *(f"note: {note}" for note in comparison.notes), *([""] if comparison.notes else [])]
    head = ["task", "metric", "", "n", "A", "other", "difference", "std. error", "95 % interval", "p", "", ""]
    table = []
    for row in comparison.rows:
        digits = 4 if max(abs(row.a), abs(row.b)) < 100 else 2
        interval = "–" if row.low is None else f"{row.low:+.{digits}f} to {row.high:+.{digits}f}"
        error = "–" if row.stderr is None else f"{row.stderr:.{digits}f}"
        table.append(
            [row.task, row.metric, LETTERS[row.run], f"{row.n:,}", f"{row.a:.{digits}f}", f"{row.b:.{digits}f}",
             f"{row.value:+.{digits}f}", error, interval, p_text(row.p), row.mark, row.verdict]
        )  # fmt: skip
    lines += aligned(head, table, left=(0, 1, 2, 10, 11))
    if colour:
        for word, code in (("better", 32), ("worse", 31)):
            lines = [f"\x1b[{code}m{line}\x1b[0m" if line.endswith(word) else line for line in lines]
    lines += ["", footnote(comparison), ""]
    if comparison.fields:
        fields = [[f.field, *(show(v) for v in f.values)] for f in comparison.fields]
        lines += aligned(["options that differ", *LETTERS[: len(names)]], fields, left=range(len(names) + 1))
    else:
        lines.append("no option differs")
    return "\n".join(line.rstrip() for line in lines)


def show(value: Any) -> str:
    """An option's value, cut to 48 characters."""
    if value is None:
        return "–"
    shown = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 48 else shown[:45] + "…"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] | range) -> list[str]:
    """Lines of a table; the columns in `left` are aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
