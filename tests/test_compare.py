"""sft.evaluation.compare: what scipy would say of the same items, refusals with hashes, the options that differ, the page."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy  # loads scipy.stats at its first use

from conftest import REPO
from published import publish
from sft.common.errors import SftError
from sft.evaluation import compare
from sft.formats import manifest
from sft.formats.comparison import OptionDifference
from sft.formats.lines import read_lines, to_lines
from sft.formats.results import GroupResult, Results, Score, TaskResult
from sft.formats.samples import ConversationLoss, Sample
from sft.reporting import __main__ as drawing
from sft.reporting import comparison, report
from test_report import SCRIPTS, Strict, charts_of

N = 60


def evaluated(run: Path, seed: int, *, lr: float = 1e-3, items: range = range(N), **changes: Any) -> Path:
    """A run with a finished evaluation: right or wrong answers, a graded metric, a whole-set metric, losses."""
    rng = random.Random(seed)
    folder = run / "evaluate"
    (folder / "samples").mkdir(parents=True)
    rows = []
    for i in items:
        scores = {
            "acc": float(rng.random() < 0.3 + 0.1 * seed),
            "grade": round(rng.random(), 3),
            "ppl": [rng.random(), 3],
        }
        rows.append(Sample(doc_id=i, filter="none", prompt=f"<{i}>{changes.get('system', '')}", target="t", doc={"q": i // 2},
                           replies=("r",), filtered=["r"], scores=scores))  # fmt: skip

    def mean(name: str) -> float:
        return sum(r.scores[name] for r in rows) / len(rows)

    n = len(rows)
    metrics = {
        "acc": Score(value=mean("acc"), stderr=0.05, n=n, higher_is_better=True),
        "grade": Score(value=mean("grade"), stderr=0.04, n=n, higher_is_better=False),
        "ppl": Score(value=3.0 + seed, stderr=0.5, n=n, higher_is_better=False),
    }
    task = TaskResult(metrics=metrics, task_sha256=changes.get("task", "t" * 64), samples_sha256=f"{n:064}")
    name = changes.get("name", "zoo")
    Results(template_sha256=changes.get("template", "f" * 64), tasks={name: task}).write(folder / "results.json")
    losses = [ConversationLoss(f"c{i}", rng.uniform(5, 9), 3 + i % 5) for i in range(40)]
    (folder / "samples" / "zoo.jsonl").write_bytes(to_lines(rows))
    (folder / "validation.jsonl").write_bytes(to_lines(losses))
    for stage, config in (("train", {"lr": lr, "model": {"preset": "x"}}), ("evaluate", {"tasks": ["zoo"]})):
        (run / stage).mkdir(exist_ok=True)
        outputs = ["results.json", "samples", "validation.jsonl"] if stage == "evaluate" else []
        publish(run / stage, outputs, config=config)
    return run


def scores_of(run: Path, name: str) -> np.ndarray:
    text = (run / "evaluate/samples/zoo.jsonl").read_text()
    return np.array([json.loads(line)["scores"][name] for line in text.splitlines()])


@pytest.mark.seconds
def test_differences_are_scipys_over_the_same_items(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", 1), evaluated(tmp_path / "b", 3)
    found = {r.metric: r for r in compare.compare([a, b]).rows}
    assert list(found) == ["acc", "grade", "ppl", "loss"]
    acc, grade = (np.subtract(scores_of(b, m), scores_of(a, m)) for m in ("acc", "grade"))
    wins, losses = int((acc > 0).sum()), int((acc < 0).sum())
    assert found["acc"].p == pytest.approx(scipy.stats.binomtest(wins, wins + losses).pvalue)
    assert found["acc"].stderr == pytest.approx(scipy.stats.sem(acc)) and found["acc"].n == N
    wanted = scipy.stats.ttest_rel(scores_of(b, "grade"), scores_of(a, "grade"))
    assert found["grade"].p == pytest.approx(wanted.pvalue) and found["grade"].value == pytest.approx(grade.mean())
    assert found["ppl"].test == "unpaired" and found["ppl"].value == pytest.approx(2)
    assert found["ppl"].p == pytest.approx(2 * scipy.stats.norm.sf(2 / 0.5**0.5), rel=1e-6)
    assert found["loss"].n == 40 and found["loss"].higher_is_better is False


def with_group(run: Path, by_size: bool) -> Path:
    """Two tasks of 40 and 20 of the run's items, and their mean."""
    folder = run / "evaluate"
    whole = Results.read(folder / "results.json").tasks["zoo"]
    rows = read_lines(Sample, folder / "samples" / "zoo.jsonl")
    tasks, values = {}, []
    for name, part in (("large", rows[:40]), ("small", rows[40:])):
        (folder / "samples" / f"{name}.jsonl").write_bytes(to_lines(part))
        values.append(sum(r.scores["acc"] for r in part) / len(part))
        tasks[name] = replace(
            whole, metrics={"acc": Score(value=values[-1], stderr=0.1, n=len(part), higher_is_better=True)}
        )
    mean = (values[0] * 40 + values[1] * 20) / 60 if by_size else sum(values) / 2
    group = GroupResult({"acc": Score(value=mean, stderr=0.1, n=60, higher_is_better=True)}, ("large", "small"))
    Results(template_sha256="f" * 64, tasks=tasks, groups={"both": group}).write(folder / "results.json")
    publish(folder, ["results.json", "samples", "validation.jsonl"], config={"tasks": ["both"]})
    return run


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_compared_by_the_items_of_its_tasks(tmp_path: Path, by_size: bool) -> None:
    a, b = (with_group(evaluated(tmp_path / name, seed), by_size) for name, seed in (("a", 1), ("b", 3)))
    row, large, small = compare.compare([a, b]).rows[:3]
    assert (row.task, row.metric, row.test, row.n) == ("both", "acc", "stratified", 60)
    weights = (40 / 60, 20 / 60) if by_size else (0.5, 0.5)
    d = np.subtract(scores_of(b, "acc"), scores_of(a, "acc"))
    assert row.value == pytest.approx(weights[0] * d[:40].mean() + weights[1] * d[40:].mean())
    errors = [w * scipy.stats.sem(x) for w, x in zip(weights, (d[:40], d[40:]), strict=True)]
    assert row.stderr == pytest.approx(np.hypot(*errors))
    assert row.p == pytest.approx(2 * scipy.stats.norm.sf(abs(row.value) / row.stderr))
    assert row.a == pytest.approx(Results.read(a / "evaluate/results.json").groups["both"].metrics["acc"].value)
    assert (large.task, small.task) == ("large", "small")


def test_three_runs_are_compared_with_the_first_and_marks_are_corrected_for_all(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / n, seed) for n, seed in (("a", 0), ("b", 5), ("c", 7))]
    rows = compare.compare(runs).rows
    assert [(r.metric, r.run) for r in rows[:4]] == [("acc", 1), ("acc", 2), ("grade", 1), ("grade", 2)]
    p = [r.p for r in rows]
    assert min(r.corrected for r in rows) == pytest.approx(min(p) * len(p))
    assert rows[1].mark == "***" and rows[1].verdict == "better"
    assert all(bool(r.mark) == (r.corrected < 0.05) for r in rows)
    assert replace(rows[1], higher_is_better=False).verdict == "worse"


def test_only_common_items_count_and_that_is_reported(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", 1), evaluated(tmp_path / "b", 3, items=range(20))
    found = compare.compare([a, b])
    assert found.rows[0].n == 20
    whole = next(r for r in found.rows if r.metric == "ppl")  # of other items in each run: no test can be made
    assert (whole.value, whole.stderr, whole.p, whole.mark) == (2, None, None, "")
    assert found.rows[0].a == pytest.approx(scores_of(a, "acc")[:20].mean())
    assert found.notes == ("zoo: only the 20 common items of 60 in a and 20 in b",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "u" * 64}, "zoo: task_sha256 tttttttttttt and uuuuuuuuuuuu"),
        ({"system": "!", "template": "g" * 64}, "zoo: 60 of 60 prompts differ\n  template_sha256 ffffffffffff and gggggggggggg"),
        ({"items": range(100, 120)}, "zoo: no item in common: samples_sha256 0{12} and 0{12}"),
        ({"name": "other"}, "no task in common .a: zoo; b: other."),
    ],
)  # fmt: skip
def test_runs_that_answered_different_questions_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    a, b = evaluated(tmp_path / "a", 1), evaluated(tmp_path / "b", 3, **change)
    if change.get("name"):
        (b / "evaluate/validation.jsonl").unlink()
        file = b / "evaluate/manifest.json"
        record = manifest.load(file)
        replace(record, outputs=tuple(o for o in record.outputs if "valid" not in o.path)).write(file)
    with pytest.raises(SftError, match=message):
        compare.compare([a, b])
    if "task" in change or "system" in change:
        notes = compare.compare([a, b], anyway=True).notes
        assert notes and all(n.startswith("b did not answer the questions of a: ") for n in notes)


def test_records_of_another_harness_are_compared_as_whole_scores(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", 1), evaluated(tmp_path / "b", 3)
    for run in (a, b):
        (run / "evaluate/samples/zoo.jsonl").write_text('{"native_id": 1, "metrics": {}}\n')
        file = run / "evaluate/manifest.json"
        outputs = manifest.describe(run / "evaluate", ["results.json", "samples", "validation.jsonl"])
        replace(manifest.load(file), outputs=outputs).write(file)
    acc = compare.compare([a, b]).rows[0]
    assert (acc.test, acc.n, acc.stderr) == ("unpaired", 60, pytest.approx(0.05 * 2**0.5))
    assert acc.p == pytest.approx(2 * scipy.stats.norm.sf(abs(acc.value) / acc.stderr))


@pytest.mark.seconds
def test_make_compare_needs_no_environment_and_writes_the_page(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 3), ("c", 5)):
        evaluated(tmp_path / name, seed)
    command = [
        sys.executable,
        "-S",
        "-m",
        "sft",
        "compare",
        "--runs",
        str(tmp_path),
        "--a",
        "a",
        "--b",
        "b",
        "--c",
        "c",
    ]
    done = subprocess.run(command, cwd=REPO, env={"PYTHONPATH": "lib"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{tmp_path}/a/compare/b+c.html\n") and "\x1b" not in done.stdout
    assert (tmp_path / "a/compare/b+c.json").is_file()
    done = subprocess.run(
        [*command, "--b", "d"], cwd=REPO, env={"PYTHONPATH": "lib"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "B=d: no such run" in done.stderr


def test_without_an_environment_the_comparison_says_what_its_page_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "REPO", tmp_path)
    told = comparison.draw(tmp_path / "a/compare/b.html", [tmp_path / "a", tmp_path / "b"])
    assert told.startswith("no page: ") and "next: make setup" in told and not (tmp_path / "a").exists()


def test_scores_that_were_altered_or_are_not_there_are_refused(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", 1), evaluated(tmp_path / "b", 3)
    (b / "evaluate/samples/zoo.jsonl").write_text("")
    with pytest.raises(SftError, match=r"zoo.jsonl"):
        compare.compare([a, b])
    (b / "evaluate/manifest.json").unlink()
    with pytest.raises(SftError, match="b has no scores; next: make"):
        compare.compare([a, b])


def test_options_that_differ_are_named_and_those_that_do_not_are_not(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / n, 1, lr=lr) for n, lr in (("a", 1e-3), ("b", 1e-4))]
    found = compare.compare(runs)
    assert found.fields == (OptionDifference("train.lr", (0.001, 0.0001)),)
    text = compare.text(found)
    lines = text.splitlines()
    assert lines[0] == "A  a  the baseline" and "train.lr" in text and "0.0001" in text
    table = [line for line in lines if line.startswith(("task", "zoo", "validation"))]
    ends = {line.index("95 % interval") + len("95 % interval") for line in table[:1]}
    assert all(line[: next(iter(ends))].rstrip()[-1].isdigit() for line in table[1:])  # columns stand under their heads


def test_a_stage_that_a_baseline_has_not_is_one_line(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / n, 1, lr=lr) for n, lr in (("a", 1e-3), ("base", 1e-3), ("b", 1e-4))]
    (runs[1] / "train/manifest.json").unlink()
    assert compare.differing_options(runs[:2]) == [OptionDifference("train", ("made", "not made"))]
    assert compare.differing_options(runs) == [
        OptionDifference("train", ("made", "not made", "made")),
        OptionDifference("train.lr", (0.001, None, 0.0001)),
    ]


def test_the_page_is_whole_and_the_report_shows_the_comparison(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / n, seed, lr=seed) for n, seed in (("a", 0), ("b<i>", 7), ("c", 2))]
    file = comparison.save(found := compare.compare(runs), runs[0] / "compare")
    drawing.main([str(file), *map(str, runs)])
    text = SCRIPTS.sub("", file.read_text())
    parsed = Strict(text.replace("<!doctype html>", ""))
    assert "b<i>" in parsed.text and '<td class="good">*** better</td>' in text and "train.lr" in parsed.text
    charts = charts_of(text)
    assert sum(len(chart["points"]) for chart in charts) == sum(row.bounds is not None for row in found.rows) == 8
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")
    for run in runs[:2]:
        (run / "train/manifest.json").unlink()  # the report shows its metrics, which these runs do not have
    assert "<h2>Compared</h2>" in report.page(runs[0]) and "<h2>Compared</h2>" not in report.page(runs[1])


def test_replies_stand_side_by_side_and_those_that_changed_come_first(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / n, seed) for n, seed in (("a", 1), ("b", 3))]
    for run in runs:  # a task whose samples are elsewhere has no replies
        found = Results.read(run / "evaluate/results.json")
        replace(found, tasks={"none": found.tasks["zoo"], **found.tasks}).write(run / "evaluate/results.json")
        file = run / "evaluate/manifest.json"
        outputs = manifest.describe(run / "evaluate", ["results.json", "samples", "validation.jsonl"])
        replace(manifest.load(file), outputs=outputs).write(file)
    page = drawing.page(runs, compare.compare(runs))
    shown = json.loads(re.search(r'<script type="application/json" id="items">(.*?)</script>', page, re.S)[1])
    assert shown["columns"] == ["a", "b"] and [t["name"] for t in shown["tasks"]] == ["zoo"]
    items = shown["tasks"][0]["items"]
    changed = [item["changed"] for item in items]
    scores = {item["rows"][0]["doc_id"]: [row["scores"]["acc"] for row in item["rows"]] for item in items}
    assert scores == {
        i: [x, y] for i, (x, y) in enumerate(zip(scores_of(runs[0], "acc"), scores_of(runs[1], "acc"), strict=True))
    }
    assert changed == sorted(changed, reverse=True) and sum(changed) == sum(x != y for x, y in scores.values()) > 0
