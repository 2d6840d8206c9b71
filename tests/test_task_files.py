"""Task files that lm-eval would take and score wrongly, or refuse after training: each is refused before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluating import CHOICE, REPLY
from sft.evaluation import task_check

MODULE = """
def nothing(doc, results): return None
def others(doc, results): return {"mine": 1.0}
def seven(doc): return 7
"""
METRIC = "{metric: exact_match, aggregation: mean, higher_is_better: true}"
KWARGS = 'generation_kwargs: {until: ["ZZZ"], max_gen_toks: 6, do_sample: false}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "functions.py").write_text(MODULE)
    rows = [{"question": f"Name {i}", "choices": ["red", "blue"], "gold": i, "answer": "Rome"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def checked(folder: Path, text: str) -> int | task_check.Problem:
    text = text.replace("capitals.jsonl", "rows.jsonl").replace("test: colours", "test: rows.jsonl")
    (folder / "task.yaml").write_text(text)
    return task_check.check("capitals" if "task: capitals" in text else "colours", folder, {})


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('["ZZZ"]', '[""]', "generation_kwargs.until = ['']: '' is no text"),
        ("max_gen_toks: 6", "max_gen_toks: 0", "max_gen_toks = 0, expected a number of tokens"),
        ("max_gen_toks", "max_length", "max_length = 6: not read"),
        ("do_sample: false", "tempature: 0.5", "generation_kwargs: no field 'tempature'; did you mean 'temperature'?"),
        ("do_sample: false", "do_sample: true", "do_sample with temperature = none"),
        ("doc_to_text:", "doc_to_txt:", "no field 'doc_to_txt'; did you mean 'doc_to_text'?"),
        ('doc_to_text: "{{question}}"\n', "", "doc_to_text is missing"),
        ('"{{question}}"', "qestion", "all 2 documents give the same prompt, 'qestion'"),
        ('"{{question}}"', "!function functions.seven", "all 2 documents give the same prompt, '7'"),
        ('"{{answer}}"', "anwser", "doc_to_target: anwser: no column of the documents (question, choices, gold, answer)"),
        ("test_split: test", "test_split: tset", "test_split = 'tset': dataset_kwargs.data_files has 'test'"),
        ("{test: capitals.jsonl}", "capitals.jsonl", "data_files = 'rows.jsonl': a table"),
        (KWARGS, f"{KWARGS}\nrepeats: 0", "repeats = 0"),
        (KWARGS, f"{KWARGS}\ndoc_to_text: question", "doc_to_text is written 2 times"),
        (KWARGS, f"{KWARGS}\nfilter_list: []", "filter_list: []"),
        (KWARGS, f"{KWARGS}\ninclude: absent.yaml", "absent.yaml"),
        (KWARGS, f"{KWARGS}\nprocess_docs: !function absent.f", "there is no absent.py beside it"),
        (KWARGS, f"{KWARGS}\ngen_prefix: '{{{{absent}}}}'", "its first prompt cannot be written: doc_to_prefix: UndefinedError: 'absent'"),
        (KWARGS, f"{KWARGS}\nnum_fewshot: 9\nfewshot_split: test", "its first prompt cannot be written"),
        (KWARGS, f"{KWARGS}\nfilter_list: [{{name: a, filter: [{{function: regex, regex_pattern: '(('}}]}}]", "no reply can be scored"),
        (KWARGS, f"{KWARGS}\nprocess_results: !function functions.nothing", "process_results gives None"),
        (KWARGS, f"{KWARGS}\nprocess_results: !function functions.others", "'exact_match' is no score of this task, which has mine"),
        (METRIC, f"{METRIC}\n  - {METRIC}", "'exact_match' is there 2 times"),
        ("exact_match", "nothing_such", "metric_list: no metric 'nothing_such'"),
        ("aggregation: mean", "aggregation: maen", "exact_match: no such aggregation"),
        (METRIC, "{metric: f1, aggregation: f1, higher_is_better: true}", "metric_list: f1: the scores"),
        (METRIC, METRIC.replace("}", ", ignore_cas: true}"), "no reply can be scored"),
        ("ZZZ", "YYY", None),
        (METRIC, "{metric: exact_match}", None),
    ],
)  # fmt: skip
def test_a_task_that_writes_replies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, found: str | None
) -> None:
    from sft.evaluation import tasks

    monkeypatch.setattr(tasks, "_all_tasks", lambda f: tasks.TaskManager(include_path=str(f), include_defaults=False))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problem = checked(folder, REPLY.replace(old, new))
    if found is None:
        assert problem == 2
    else:
        assert isinstance(problem, task_check.Problem)
        assert found in problem.problem and problem.next


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("doc_to_target: gold", 'doc_to_target: "green"', "document 0: doc_to_target gives 'green'"),
        ("doc_to_target: gold", 'doc_to_target: "{{gold - 1}}"', "document 0: doc_to_target gives '-1'"),
        ("doc_to_target: gold", 'doc_to_target: "{{gold * 2}}"', "document 1: doc_to_target gives 2"),
        ("doc_to_choice: choices", 'doc_to_choice: ["red"]\nlimit: 1', "no field 'limit'"),
        ("doc_to_choice: choices\ndoc_to_target: gold", 'doc_to_choice: ["red"]\ndoc_to_target: 0', "doc_to_choice gives 1 choices"),
        ("doc_to_choice: choices\n", "", "doc_to_choice is missing"),
        ("metric: acc_norm", "metric: perplexity", "'perplexity' is no score of this task"),
        ("doc_to_target: gold", 'doc_to_target: "{{choices[gold]}}"', None),
    ],
)  # fmt: skip
def test_a_task_that_compares_choices(folder: Path, old: str, new: str, found: str | None) -> None:
    problem = checked(folder, CHOICE.replace(old, new))
    if found is None:
        assert problem == 2
    else:
        assert isinstance(problem, task_check.Problem)
        assert found in problem.problem and problem.next
