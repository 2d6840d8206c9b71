"""The files of an evaluation (sft.formats): their bytes, files of earlier versions, and one clear error for a wrong one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sft.common.errors import SftError
from sft.formats import evaluations, manifest
from sft.formats.comparison import Comparison
from sft.formats.evaluations import Evaluation
from sft.formats.lines import read_lines, to_lines
from sft.formats.results import EvaluateMetrics, Generation, Results, Score, TaskResult, TokenCounts, ValidationLoss
from sft.formats.samples import Answer, HarnessSample, Likelihood, Reply, Sample, SampleItem

SCORE = Score(value=0.5, stderr=0.25, n=4, low=0.15, high=0.85, interval="wilson", higher_is_better=None)
LOSS = ValidationLoss(loss=1.5, stderr=None, perplexity=4.5, documents=1, labels=9)
FACTS = Generation(n=4, stop_rate=1.0, tokens=TokenCounts(median=8, p90=9, max=9, up_to=((8, 3), (16, 1))))
TASK = TaskResult(metrics={"acc": SCORE}, generation=FACTS, num_fewshot=0, samples_sha256="a", task_sha256="b",
                  data_sha256={"test": "c"}, lm_eval="0.4", reused_replies=0, seconds=2.5)  # fmt: skip
RESULTS = Results(
    template_sha256="t", backend="hf", device="cpu", dtype="float32", tasks={"zoo": TASK}, validation=LOSS
)


def test_results_of_lm_eval_have_the_keys_of_every_version_in_their_order(tmp_path: Path) -> None:
    RESULTS.write(tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text()
    value = json.loads(text)
    assert list(value) == ["template_sha256", "backend", "device", "dtype", "tasks", "validation"]
    assert list(value["tasks"]["zoo"]) == ["metrics", "generation", "num_fewshot", "samples_sha256", "task_sha256",
                                           "data_sha256", "lm_eval", "reused_replies", "seconds"]  # fmt: skip
    score = '{"value": 0.5, "stderr": 0.25, "n": 4, "low": 0.15, "high": 0.85, "interval": "wilson", "higher_is_better": null}'
    assert json.dumps(value["tasks"]["zoo"]["metrics"]["acc"]) == score
    assert value["validation"] == {"loss": 1.5, "stderr": None, "perplexity": 4.5, "documents": 1, "labels": 9}
    assert text == json.dumps(value, indent=2) + "\n" and Results.read(tmp_path / "results.json") == RESULTS


def test_results_of_a_harness_have_fewer_keys(tmp_path: Path) -> None:
    task = TaskResult(metrics={"acc": SCORE}, task_sha256=None, samples="samples/zoo.jsonl", samples_sha256="a")
    results = Results(harness="oe-eval", tasks={"zoo": task})
    value = results.to_value()
    assert list(value) == ["harness", "tasks"]
    assert list(value["tasks"]["zoo"]) == ["metrics", "task_sha256", "samples", "samples_sha256"]
    assert "higher_is_better" not in value["tasks"]["zoo"]["metrics"]["acc"]
    assert Results.from_value(value, "results.json") == results
    metrics = results.metrics.to_value()
    assert metrics["asked"] == {"tasks": {"zoo": {"task_sha256": None, "samples_sha256": "a"}}}
    assert (
        "higher_is_better" not in metrics["zoo"]["acc"] and EvaluateMetrics.from_value(metrics, "") == results.metrics
    )


def test_metrics_of_the_manifest_are_scores_by_task_the_loss_and_hashes() -> None:
    value = RESULTS.metrics.to_value()
    assert list(value) == ["zoo", "validation", "asked"] and list(value["asked"]) == ["template_sha256", "tasks"]
    assert list(value["asked"]["tasks"]["zoo"]) == ["task_sha256", "data_sha256", "samples_sha256"]
    made = manifest.Manifest(1, "evaluate", "x", "k", {}, (), (), value)
    assert EvaluateMetrics.of(made, "x") == RESULTS.metrics


def test_files_of_the_first_version_are_read() -> None:
    score = {"value": 0.5, "stderr": 0.1, "n": 25}
    tokens = {"median": 8.5, "p90": 12, "max": 16}
    task = {"metrics": {"acc": score}, "task_sha256": "b", "samples_sha256": "a", "num_fewshot": None,
            "generation": {"n": 25, "stop_rate": 1.0, "terminator_rate": 1.0, "empty": 0, "repeating": 0, "tokens": tokens}}  # fmt: skip
    old = Results.from_value({"template_sha256": "t", "device": "cpu", "dtype": "float32", "tasks": {"zoo": task}}, "")
    assert old.tasks["zoo"].metrics["acc"].bounds is None and old.validation is None
    assert EvaluateMetrics.from_value({"zoo": {"acc": score}}, "").hashes is None


def test_a_wrong_field_is_named_with_the_next_command(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(RESULTS.to_bytes().decode().replace('"n": 4', '"n": "4"', 1))
    with pytest.raises(
        SftError, match=r"results.json: damaged: tasks.zoo.*n: a whole number.*next: make evaluate again"
    ):
        Results.read(file)


def test_evaluations_are_lines_in_the_order_of_steps(tmp_path: Path) -> None:
    first = Evaluation(step=100, checkpoint="c", settings="s", tasks={}, failed="no tokenizer")
    second = Evaluation(step=200, checkpoint="c", settings="s", template_sha256="t", tasks={"zoo": {"acc": SCORE}},
                        validation=LOSS, seconds=1.5)  # fmt: skip
    evaluations.write(tmp_path, [second, first])
    lines = (tmp_path / evaluations.NAME).read_text().splitlines()
    assert lines[0] == (
        '{"step": 100, "checkpoint": "c", "asked": "s", "tasks": {}, "broken": {}, "failed": "no tokenizer"}'
    )
    keys = ["step", "checkpoint", "asked", "template_sha256", "tasks", "broken", "validation", "seconds"]
    assert list(json.loads(lines[1])) == keys and evaluations.read(tmp_path) == [first, second]


def test_answers_survive_a_line_that_a_kill_cut_short_and_another_attempt_continued(tmp_path: Path) -> None:
    reply, likelihood = Reply("a", "so\u2028it is", "terminator", 3, False), Likelihood("b", (-1.5, True))
    whole = to_lines([reply, likelihood])
    assert whole.decode().split("\n")[1] == '{"key": "b", "likelihood": [-1.5, true]}'
    (tmp_path / "journal").write_bytes(to_lines([reply]) + whole[:20] + whole)
    assert [entry.answer for entry in read_lines(Answer, tmp_path / "journal")] == [reply, likelihood]
    assert read_lines(Answer, tmp_path / "none") == []


def test_a_line_with_a_wrong_field_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"key": "a", "likelihood": [-1.5, true]}\n{"key": "a", "likelihood": [-1.5]}\n')
    with pytest.raises(SftError, match=r"x.jsonl:2: damaged: likelihood: 2 values are expected"):
        read_lines(Answer, tmp_path / "x.jsonl")


def test_samples_of_both_kinds_are_items_of_a_comparison(tmp_path: Path) -> None:
    ours = Sample(
        doc_id=3,
        filter="none",
        prompt="p",
        target="t",
        replies=("r",),
        filtered=["r"],
        scores={"acc": 1.0},
        doc={"q": 1},
    )
    theirs = HarnessSample(record={"label": "t", "doc": 9, "x": 1}, doc="id_3", target="t", scores={"acc": 0.5})
    (tmp_path / "s").write_bytes(to_lines([ours, theirs]) + b'{"native_id": 1, "metrics": {}}\n')
    first, second, early = read_lines(SampleItem, tmp_path / "s")
    assert first == SampleItem(filter="none", prompt="p", target="t", scores={"acc": 1.0}, doc={"q": 1})
    assert second == replace(first, prompt=None, scores={"acc": 0.5}, doc="id_3") and early.scores is None
    assert list(theirs.to_value()) == ["label", "doc", "x", "filter", "target", "prompt", "scores"]


def test_a_comparison_with_a_missing_field_is_refused() -> None:
    with pytest.raises(SftError, match=r"b.json: damaged: field notes is missing; next: make compare again"):
        Comparison.from_value({"runs": ["a", "b"]}, "b.json")
