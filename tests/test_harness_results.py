"""Scores out of the files that AI2's harnesses return; broken tasks have none."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest

from published import publish
from sft.common.errors import SftError
from sft.evaluation import collected, compare
from sft.formats.harness import ASKED, IDENTITY, RETURNED, AskedTasks
from sft.formats.job import FOLDER
from sft.formats.results import EvaluateMetrics, Results
from sft.launch.beaker import harnesses


@pytest.fixture
def stage(tmp_path):
    """collect(files, asked) on what a harness would have returned: {path: a table, or a list of rows}."""

    def run(files: dict, asked: dict[str, str], harness: str = "olmo-eval", where=tmp_path) -> EvaluateMetrics:
        returned = where / FOLDER / RETURNED
        files = {IDENTITY: "same", **files}
        for name, content in files.items():
            file = returned / name
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = content if isinstance(content, list) else [content]
            text = content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in lines)
            file.write_text(text)
        AskedTasks(asked).write(returned / ASKED)
        (where / "evaluate").mkdir(exist_ok=True)
        options = SimpleNamespace(harness=harness, max_empty_fraction=0.1, min_stop_rate=0.5)
        it = SimpleNamespace(
            recipe=SimpleNamespace(evaluate=options), run=where, identity="same", out=where / "evaluate", log=print
        )
        result = collected.collect(it)
        publish(it.out, result.outputs, metrics=result.metrics)
        return EvaluateMetrics.from_value(result.metrics, "metrics")

    return run


def returned(metrics: dict, rows: list[dict]) -> dict:
    """Files of olmo-eval for one task t."""
    return {"evaluate/metrics.json": metrics, "evaluate/predictions/m/t-predictions.jsonl": rows}


T = {"t": "evaluate"}


def row(score: float, text: str = "x") -> dict:
    return {"model_output": [{"text": text}], "instance_metrics": {"acc": {"s": score}}}


def task(value: float, n: int) -> dict:
    return {
        "tasks": [{"task": "t", "metrics": {"acc": {"s": value}}, "num_instances": n, "primary_metric": "acc:s"}],
        "errors": [],
    }


def scores(metrics: dict, primary: str | None = "acc:s", twice: bool = False) -> dict:
    entry = {"task": "t", "metrics": metrics, "num_instances": 1, "primary_metric": primary}
    return {"tasks": [entry, entry] if twice else [entry], "errors": []}


def test_a_mean_of_the_predictions_has_their_error(stage):
    score = stage(returned(task(0.3, 3), [row(0.1), row(0.3), row(0.5)]), T).tasks["t"]["acc:s"]
    assert score.stderr == pytest.approx(0.2 / math.sqrt(3)) and score.n == 3 and score.interval == "normal"


@pytest.mark.parametrize(
    ("metrics", "rows", "message"),
    [
        (task(0.0, 0), [], "no instances"),
        (task(0.5, 4), [row(1), row(0)], "2 predictions of 4 instances"),
        (task(0.5, 2), [], "no predictions"),
        (task(0.0, 2), [row(0, ""), row(0, " ")], "100% of 2 replies are empty"),
        (task(0.0, 2), [{"instance_metrics": {"acc": {"s": 0}}}] * 2, "no reply text found"),
        (task(float("nan"), 1), [row(0)], "acc:s is nan"),
        (task(None, 1), [row(0)], "acc:s is nan"),
        (scores({"acc": {"s": None}, "f1": {"s": 0.0}}), [row(0)], "acc:s is nan"),
        (scores({"f1": {"s": 0.0}}), [row(0)], "primary metric acc:s is missing"),
        (scores({"acc": {"s": 0.0}, "f1": {"s": 0.0}}, primary=None), [row(0)], "the harness names none"),
        (scores({"acc": {"s": 0.0}}, twice=True), [row(0)], "t: returned twice"),
        (task(float("inf"), 1), [row(0)], "is inf"),
        ({"tasks": [], "errors": []}, [], "t: was requested and did not return"),
        ({**task(0.5, 2), "errors": [{"task": "u", "error": "boom"}]}, [row(1), row(0)], "boom"),
    ],
)
def test_a_broken_task_has_no_score(stage, metrics, rows, message):
    with pytest.raises(SftError, match=message):
        stage(returned(metrics, rows), T)


def test_how_replies_ended_is_reported_where_the_harness_records_it(stage, tmp_path):
    def ended(reason: str, tokens: int) -> dict:
        return {**row(1), "model_output": [{"text": "x", "finish_reason": reason, "completion_tokens": tokens}]}

    stage(returned(task(1, 2), [ended("stop", 5), ended("length", 30)]), T)
    facts = Results.read(tmp_path / "evaluate/results.json").tasks["t"].generation
    assert facts.n == 2 and facts.stop_rate == 0.5 and facts.tokens.max == 30
    with pytest.raises(SftError, match=r"t: 33% of 3 replies stop by themselves, min_stop_rate is 0\.5"):
        stage(returned(task(1, 3), [ended("stop", 5), ended("length", 30), ended("length", 30)]), T)


@pytest.mark.parametrize(
    ("harness", "file", "content", "message"),
    [
        ("olmo-eval", "metrics.json", {"tasks": [{}]}, "field tasks.0.task is missing"),
        ("olmo-eval", "metrics.json", {"tasks": ["x"]}, "tasks.0: an object is expected, not 'x'"),
        ("olmo-eval", "metrics.json", {"tasks": 3}, "tasks: a list is expected, not 3"),
        ("olmo-eval", "metrics.json", {"errors": 3}, "errors: a list is expected, not 3"),
        ("olmo-eval", "metrics.json", {"tasks": [{"task": "t", "num_instances": "x"}]}, "tasks.0.num_instances: a whole number"),
        ("olmo-eval", "metrics.json", {"tasks": [{"task": "t", "metrics": [1]}]}, "tasks.0.metrics: an object is expected"),
        ("olmo-eval", "metrics.json", {"tasks": [{"task": "t", "metrics": {"acc": 1}}]}, "tasks.0.metrics.acc: an object"),
        ("olmo-eval", "metrics.json", {"tasks": [{"task": "t", "task_hash": 3}]}, "tasks.0.task_hash: a string"),
        ("olmo-eval", "metrics.json", "[" * 100_000, "not JSON"),
        ("olmo-eval", "metrics.json", [], "not JSON"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", [row(1), 3], "an object is expected"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", '\n{"half', "not JSON"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", [{"model_output": 3}], "model_output: a list is expected"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", [{"model_output": ["x"]}], "model_output.0: an object is"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", [{"instance_metrics": [1]}], "instance_metrics: an object is"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", [{"model_output": [{"sum_logits": 10**400}]}], "a float can have"),
        ("oe-eval", "task-000-t-metrics.json", {"metrics": [1]}, "metrics: an object is expected"),
        ("oe-eval", "task-000-t-metrics.json", {"num_instances": "x"}, "num_instances: a whole number"),
        ("oe-eval", "task-000-t-metrics.json", {"task_config": "x"}, "task_config: an object is expected"),
        ("oe-eval", "task-000-t-metrics.json", {"task_config": {"metadata": 3}}, "task_config.metadata: an object is"),
        ("oe-eval", "task-000-t-metrics.json", {"task_config": {"primary_metric": []}}, "task_config.primary_metric: a string"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_harness_is_refused_with_its_name_and_key(stage, tmp_path, harness, file, content, message):
    files = returned(task(1, 1), [row(1)]) if harness == "olmo-eval" else {}
    with pytest.raises(SftError, match=re.escape(message)) as error:
        stage(files | {f"evaluate/{file}": content}, T, harness)
    assert re.search(rf"/evaluate/{re.escape(file)}(:\d+)?: damaged: .*; next: make evaluate again$", str(error.value))
    assert not (tmp_path / "evaluate" / "results.json").exists()


def test_a_score_beyond_a_float_is_no_score(stage):
    with pytest.raises(SftError, match="t: acc:s is inf"):
        stage(returned(task(10**400, 1), [row(10**400)]), T)


def test_other_fields_of_a_harness_are_skipped_and_a_prediction_keeps_them(stage, tmp_path):
    metrics = task(1, 1) | {"version": 9}
    metrics["tasks"][0] |= {"latency": {"p50": 1}}
    stage(returned(metrics, [{**row(1), "trace": [1], "record": 2}]), T)
    sample = json.loads((tmp_path / "evaluate/samples/t.jsonl").read_text())
    assert sample["trace"] == [1] and sample["record"] == 2


def test_a_harness_that_returned_nothing_is_reported(tmp_path):
    with pytest.raises(SftError, match="has returned nothing for this evaluation; next:"):
        collected.returned(tmp_path, "x", "olmo-eval")


def test_suites_are_written_out_for_oe_eval_only():
    options = SimpleNamespace(harness="olmo-eval", tasks=("OLMO_3", "gsm8k", "gsm8k"))
    made = SimpleNamespace(recipe=SimpleNamespace(evaluate=options, file="x"))
    assert harnesses.tasks_of(made) == ["OLMO_3", "gsm8k"]
    options.harness = "oe-eval"
    assert len(harnesses.tasks_of(made)) == 18
    assert list(harnesses.asked(made).values()) == [f"{n:03d}" for n in range(18)]


def test_a_suite_of_olmo_eval_is_named_by_its_summary(stage):
    asked = {"s": "evaluate", "u": "evaluate"}
    with pytest.raises(SftError, match="\\n  u: was requested and did not return\\n") as error:
        stage(returned({**task(1, 1), "summary": {"t": {}, "s": {"score": 1}}}, [row(1)]), asked)
    assert "  s:" not in str(error.value)


# --- oe-eval: files as OLMES's run_eval.py names and fills them -----------------------------------------------------------


def olmes(where: str, name: str, alias: str, metrics: dict, rows: list[dict], number: int = 0) -> dict:
    """{path: content} of one task: its metrics.json names the task's configuration; replies are rows of predictions.jsonl."""
    stem = f"{where}/task-{number:03d}-{name}"
    config = {"task_name": name, "primary_metric": "exact_match", "metadata": {"alias": alias}}
    metrics = {"task_name": name, "task_hash": "a" * 32, "model_hash": "b" * 32, "model_config": {}, "task_config": config,
            "num_instances": len(rows), "metrics": metrics, "task_idx": number}  # fmt: skip
    return {f"{stem}-metrics.json": metrics, f"{stem}-predictions.jsonl": rows, f"{where}/metrics.json": {"tasks": []}}


def reply(number: int, score: float, text: str = "So 4.") -> dict:
    return {"doc_id": number, "native_id": f"id_{number}", "metrics": {"exact_match": score}, "label": "4",
            "model_output": [{"continuation": text, "num_tokens": 3, "sum_logits": -1.5}]}  # fmt: skip


def choice(number: int, score: int) -> dict:
    return {"doc_id": number, "native_id": number, "metrics": {"exact_match": score}, "label": 1,
            "model_output": [{"sum_logits": -1.0, "num_tokens": 1}, {"sum_logits": -2.0, "num_tokens": 1}]}  # fmt: skip


def both(score: float | None) -> dict:
    return {"exact_match": score, "primary_score": score}


def test_every_task_of_oe_eval_has_its_score_though_their_files_have_the_same_names(stage, tmp_path):
    asked = {"gsm8k::tulu": "000", "gsm8k::zs": "001", "agi_eval_english:1shot::olmes": "002"}
    files = {
        **olmes("000", "gsm8k", "gsm8k::tulu", both(0.5), [reply(0, 1), reply(1, 0)]),
        **olmes("001", "gsm8k", "gsm8k::zs", {**both(0.0), "extra": {"tokens": 3}}, [reply(0, 0)]),
        **olmes("002", "agi_eval_lsat-ar", "agi_eval_lsat-ar:1shot::olmes", both(1.0), [choice(0, 1)]),
        **olmes("002", "agi_eval_sat-math", "agi_eval_sat-math:1shot::olmes", both(0.0), [choice(0, 0)], number=1),
    }
    found = stage(files, asked, "oe-eval")
    hashes = found.hashes.tasks
    assert {name: score["exact_match"].value for name, score in found.tasks.items()} == {
        "gsm8k::tulu": 0.5, "gsm8k::zs": 0.0, "agi_eval_lsat-ar:1shot::olmes": 1.0, "agi_eval_sat-math:1shot::olmes": 0.0,
    }  # fmt: skip
    assert all(list(score) == ["exact_match"] for score in found.tasks.values())
    assert found.tasks["gsm8k::tulu"]["exact_match"].stderr == pytest.approx(0.5) and list(hashes) == list(found.tasks)
    assert hashes["gsm8k::tulu"].task_sha256 == "a" * 32
    assert hashes["gsm8k::tulu"].samples_sha256 != hashes["gsm8k::zs"].samples_sha256
    assert len((tmp_path / "evaluate" / "samples" / "gsm8k_tulu.jsonl").read_text().splitlines()) == 2


OLMES_FINE = olmes("000", "gsm8k", "gsm8k::tulu", both(0.0), [reply(0, 0)])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (OLMES_FINE, "b: was requested and did not return"),
        (OLMES_FINE | olmes("001", "b", "b", both(None), [reply(0, 0)]), "b: exact_match is nan"),
        (OLMES_FINE | olmes("001", "b", "b", {"exact_match": None, "f1": 0.0}, [reply(0, 0)]), "b: exact_match is nan"),
        (OLMES_FINE | olmes("001", "b", "b", {"f1": 0.0}, [reply(0, 0)]), "b: the primary metric primary_score is missing"),
        (OLMES_FINE | olmes("001", "b", "b", both(0.0), []), "b: no instances"),
        (OLMES_FINE | olmes("001", "b", "b", both(0.0), [reply(0, 0, "")]), "b: 100% of 1 replies are empty"),
        (OLMES_FINE | olmes("001", "b", "c", both(0.0), [reply(0, 0)]) | olmes("001", "d", "c", both(0.0), [reply(0, 0)], 1),
         "c: returned twice"),
    ],
)  # fmt: skip
def test_a_broken_task_of_oe_eval_has_no_score(stage, tmp_path, files, message):
    with pytest.raises(SftError, match=message) as error:
        stage(files, {"a": "000", "b": "001"}, "oe-eval")
    assert "\n  a:" not in str(error.value) and not (tmp_path / "evaluate" / "results.json").exists()


@pytest.mark.parametrize(
    ("suite", "absent", "message"),
    [
        ("mmlu:mc::tulu", [3], "mmlu:mc::tulu: 56 of its 57 tasks returned; missing are the numbers 3"),
        (
            "mmlu:cot::summarize",
            [56],
            "56 of its 57 tasks returned; missing are the numbers 56",
        ),  # no gap tells of the last
        (
            "mmlu_pro:cot::llama3.1",
            range(1, 14),
            "1 of its 14 tasks returned; missing are the numbers 1, 2, 3, 4, 5, 6, 7, 8",
        ),
        ("bfcl_all::std", [0], "bfcl_all::std: 4 of its 5 tasks returned; missing are the numbers 0"),
    ],
)
def test_a_suite_without_one_of_its_tasks_is_broken_and_has_no_mean_of_the_others(
    stage, tmp_path, suite, absent, message
):
    name, _, variant = suite.partition(":")
    files = {}
    for n in range(collected.PARTS.get(name, 5)):
        if n not in absent:
            files |= olmes("000", f"{name}_{n}", f"{name}_{n}:{variant}", both(1.0), [choice(0, 1)], n)
    with pytest.raises(SftError, match=message):
        stage(files, {suite: "000"}, "oe-eval")
    assert not (tmp_path / "evaluate" / "results.json").exists()


def test_a_whole_suite_has_the_scores_of_all_its_tasks(stage):
    files = {}
    for n in range(7):
        files |= olmes("000", f"minerva_math_{n}", f"minerva_math_{n}::tulu", both(1.0), [reply(0, 1)], n)
    found = stage(files, {"minerva_math::tulu": "000"}, "oe-eval")
    assert len(found.tasks) == 7


def test_scores_of_oe_eval_are_compared_item_by_item(stage, tmp_path):
    right = {"a": [1, 1, 1, 1, 1, 1, 1, 0], "b": [0, 0, 0, 0, 0, 0, 1, 0]}
    for run, values in right.items():
        files = olmes("000", "gsm8k", "g", both(sum(values) / 8), [reply(i, v) for i, v in enumerate(values)])
        stage(files, {"gsm8k::tulu": "000"}, "oe-eval", tmp_path / run)
    only = compare.compare([tmp_path / "a", tmp_path / "b"]).rows
    assert [(r.metric, r.n, r.value) for r in only] == [("exact_match", 8, -0.75)]
    assert only[0].p == pytest.approx(2 * 0.5**6)  # six discordant pairs, all one way
    stage(
        olmes("000", "gsm8k", "g", both(1.0), [reply(i, 1) for i in range(4)]),
        {"gsm8k::tulu": "000"},
        "oe-eval",
        tmp_path / "c",
    )
    limited = compare.compare([tmp_path / "b", tmp_path / "c"])
    assert limited.rows[0].n == 4 and "only the 4 common items of 8" in " ".join(limited.notes)
