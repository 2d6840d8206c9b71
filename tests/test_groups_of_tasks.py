"""Groups of tasks have lm-eval's own mean and error; tasks are checked, with their data and packages, before anything runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluating import ANYTHING, CHOICE, plain_place
from sft.evaluation import evaluate, task_check
from sft.formats.results import Results
from sft.recipe.schema import Evaluate

REPO = Path(__file__).resolve().parents[1]
place = plain_place
GROUP = """
group: both
task: [first, second]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
  - {metric: acc_norm, weight_by_size: false}
"""
CODE = """
import datasets
def rows(n):
    return [{"question": f"Name {i}", "choices": ["red", "yellow", f"b{i}"], "gold": i % 3} for i in range(n)]
def first(**_):
    return {"test": datasets.Dataset.from_list(rows(8))}
def second(**_):
    return {"test": datasets.Dataset.from_list(rows(5)[::-1])}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("group") / "tasks"
    folder.mkdir()
    (folder / "made_rows.py").write_text(CODE)
    head = "task: colours\ndataset_path: json\ndataset_kwargs: {data_files: {test: colours}}\n"
    for name in ("first", "second"):
        own = f"task: {name}\ncustom_dataset: !function made_rows.{name}\n"
        (folder / f"{name}.yaml").write_text(CHOICE.lstrip().replace(head, own))
    (folder / "both.yaml").write_text(GROUP)
    (folder / "needs.yaml").write_text(
        (folder / "first.yaml").read_text().replace("first", "needs").replace("made_rows.needs", "needs.rows")
    )
    (folder / "needs.py").write_text("import no_such_package\n")
    (folder / "splits.yaml").write_text(
        (folder / "first.yaml").read_text().replace("first", "splits").replace("made_rows.splits", "splits.rows")
    )
    (folder / "splits.py").write_text(
        "import datasets\ndef rows(**_):\n"
        "    rows = [{'question': 'x', 'choices': ['a', 'b'], 'gold': 0}]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
        "def score():\n    import nltk\n    nltk.download('punkt_tab')\n"
    )
    for name, line in (("late", "import no_such_package"), ("picky", "raise ValueError(results)")):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ncustom_dataset: !function {name}.rows\ntest_split: test\noutput_type: generate_until\n"
            f"doc_to_text: question\ndoc_to_target: question\nprocess_results: !function {name}.score\n"
            "metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]\n"
        )
        (folder / f"{name}.py").write_text(
            "import datasets\ndef rows(**_):\n    return {'test': datasets.Dataset.from_list([{'question': 'x'}])}\n"
            f"def score(doc, results):\n    {line}\n"
        )
    return folder


@pytest.mark.seconds
def test_a_group_has_lm_evals_own_mean_and_error(place: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    scored = evaluate.run_tasks(place.model, ANYTHING.__class__(tasks=("both",)), folder, {}, tmp_path, print)
    assert set(scored.results) == {"first", "second"} and not scored.broken
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    theirs: Any = simple_evaluate(
        model=place.model,
        tasks=["both"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        fewshot_random_seed=1234,
    )
    ours = scored.groups["both"]
    assert ours.tasks == ("first", "second") and ours.metrics["acc"].n == 13
    for metric in ("acc", "acc_norm"):
        score = ours.metrics[metric]
        assert score.value == pytest.approx(theirs["results"]["both"][f"{metric},none"], abs=1e-12)
        assert score.stderr == pytest.approx(theirs["results"]["both"][f"{metric}_stderr,none"], abs=1e-12)
    results = Results(
        template_sha256="0", backend="hf", device="cpu", dtype="float32", tasks=scored.results, groups=scored.groups
    )
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results
    assert list(results.metrics.tasks) == ["both", "first", "second"]


REPLIES = """
task: {name}
custom_dataset: !function asks.{rows}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: question
generation_kwargs: {{until: ["{until}"], max_gen_toks: 6, {sampling}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ASKS = """
import datasets
def rows(names):
    return {"test": datasets.Dataset.from_list([{"question": f"Where is {name}?"} for name in names])}
def some(**_):
    return rows("abcde")
def others(**_):
    return rows("defg")
def fail(doc):
    if "g" in doc["question"]:
        raise KeyError("no question")
    return doc["question"]
"""


@pytest.fixture
def asking(tmp_path: Path, folder: Path) -> Path:
    """Tasks of both kinds: two that share questions, one with another stop string, a sampled one, and two that compare texts."""
    tasks = tmp_path / "tasks"
    shutil.copytree(folder, tasks)
    (tasks / "asks.py").write_text(ASKS)
    for name, rows, until, sampled in (
        ("some", "some", "ZZZ", False), ("others", "others", "ZZZ", False), ("until", "some", "a", False), ("sampled", "some", "ZZZ", True),
    ):  # fmt: skip
        sampling = "do_sample: true, temperature: 1.0" if sampled else "do_sample: false"
        text = REPLIES.format(name=name, rows=rows, until=until, sampling=sampling)
        (tasks / f"{name}.yaml").write_text(text)
    (tasks / "all.yaml").write_text("group: all\ntask: [first, some, second, others, until, sampled]\n")
    (tasks / "broken.yaml").write_text("group: broken\ntask: [some, fails, first]\n")
    fails = REPLIES.format(name="fails", rows="others", until="x", sampling="do_sample: false")
    (tasks / "fails.yaml").write_text(fails.replace("doc_to_text: question", "doc_to_text: !function asks.fail"))
    return tasks


@pytest.mark.seconds
def test_the_tasks_of_a_group_share_batches_and_are_scored_as_if_each_was_alone(
    place: SimpleNamespace, asking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[str, int]] = []
    in_batches = place.model._in_batches

    def counting(lengths: list[int], compute: Any, kind: str, total: int) -> None:
        if lengths:
            computed.append((kind, len(lengths)))
        in_batches(lengths, compute, kind, total)

    monkeypatch.setattr(place.model, "_in_batches", counting)
    options = replace(ANYTHING, tasks=("all",), batch_size=1)  # each row alone, so that a batch changes no rounding
    together = evaluate.run_tasks(place.model, options, asking, {}, tmp_path / "together", print)
    assert not together.broken and set(together.results) == {"first", "some", "second", "others", "until", "sampled"}
    # 5 + 4 replies with two of them shared, 5 with another stop string, (8 + 5) x 3 likelihoods with shared ones; then the sampled task.
    assert sorted(computed[:3]) == [("likelihoods", 24), ("replies", 5), ("replies", 7)] and computed[3:] == [
        ("replies", 5)
    ]
    for name, result in together.results.items():
        alone = evaluate.run_task(place.model, name, options, asking, {}, tmp_path / "alone")
        assert (alone.metrics, alone.samples_sha256, alone.generation, alone.reused_replies) == (
            result.metrics, result.samples_sha256, result.generation, result.reused_replies,
        )  # fmt: skip
    shutil.rmtree(tmp_path / "together/samples")
    again = evaluate.run_tasks(place.model, options, asking, {}, tmp_path / "together", print)
    assert {name: r.reused_replies for name, r in again.results.items()} == {
        "first": 24, "second": 15, "some": 5, "others": 4, "until": 5, "sampled": 5,
    }  # fmt: skip


def test_a_broken_task_leaves_the_others_of_its_group_their_scores(
    place: SimpleNamespace, asking: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    options = replace(ANYTHING, tasks=("broken",))
    scored = evaluate.run_tasks(place.model, options, asking, {}, tmp_path / "out", said.append)
    assert set(scored.results) == {"some", "first"} and list(scored.broken) == ["fails"], scored.broken
    assert "no question" in scored.broken["fails"]
    assert said[0].startswith("each task is answered by itself: broken: KeyError: 'no question'")


def test_a_group_without_all_of_its_tasks_has_no_score(place: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    from sft.evaluation.groups import group_results
    from sft.evaluation.tasks import find

    scored = evaluate.run_tasks(place.model, ANYTHING.__class__(tasks=("first",)), folder, {}, tmp_path, print)
    assert group_results(find("both", folder, {}).expand()[1], scored.results) == {}


@pytest.mark.parametrize(
    ("task", "found", "step"),
    [
        (
            "needs",
            "it needs the package no_such_package",
            "make setup, or .venv/bin/python -m pip install no_such_package",
        ),
        ("frist", "did you mean 'first'", "correct the name"),
    ],
)
def test_what_a_task_lacks_is_found_before_it_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, task: str, found: str, step: str
) -> None:
    from sft.evaluation import tasks

    monkeypatch.setattr(tasks, "_all_tasks", lambda f: tasks.TaskManager(include_path=str(f), include_defaults=False))
    problem = task_check.check(task, folder, {})
    assert isinstance(problem, task_check.Problem)
    assert found in problem.problem and step in problem.next


@pytest.mark.seconds
def test_data_of_nltk_that_would_be_fetched_in_the_middle_of_a_run_is_found_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import nltk

    from sft.evaluation import tasks

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    problem = task_check.check("splits", folder, {})
    assert isinstance(problem, task_check.Problem) and problem.problem == "nltk's punkt_tab is not here"
    shipped = task_check.check("ifeval", tasks.SHIPPED / "ifeval", {})  # before its data set is asked for
    assert shipped == problem
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
    assert task_check.check("splits", folder, {}) == 1


def test_what_only_scoring_needs_is_found_before_it_runs(folder: Path) -> None:
    problem = task_check.check("late", folder, {})
    assert isinstance(problem, task_check.Problem) and problem.problem == "it needs the package no_such_package"
    assert task_check.check("picky", folder, {}) == 1  # its code refuses the reply of the check, and no package


@pytest.mark.parametrize(
    ("task", "options", "found"),
    [
        ("picky", {"samples": 4}, "samples = 4: task picky is greedy"),
        ("picky", {"samples": 4, "temperature": 0.5}, None),
        ("first", {"num_fewshot": 2}, "num_fewshot = 2: task first has no examples"),
        ("first", {"thinking": {"first": True}}, "thinking.first = true: the task compares given texts"),
        ("picky", {"thinking": {"*": True}}, "the chat template reads none of enable_thinking, thinking"),
        ("first", {"thinking": {"*": True}}, None),
        ("first", {"by_task": {"first": {"samples": 4, "top_p": 0.5}}}, "[evaluate.by_task.first] top_p, samples: the task compares given texts"),
        ("first", {"by_task": {"first": {"system_prompt": "Hi"}}}, None),
    ],
)  # fmt: skip
def test_how_a_task_is_asked_is_checked_before_it_runs(
    folder: Path, task: str, options: dict[str, Any], found: str | None
) -> None:
    problem = task_check.check(task, folder, {}, Evaluate(**options), "{{ messages }}")
    assert (found in problem.problem) if isinstance(problem, task_check.Problem) and found else found is None


def test_a_group_is_checked_as_its_tasks(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = {"tasks": ["both"], "folder": str(folder), "data": {}, "cache": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path))
        assert task_check.main([json.dumps(asked)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"task": "both", "documents": 13}


@pytest.mark.parametrize(
    ("error", "found"),
    [
        ("GatedRepoError", "its data set is gated"),
        ("ConnectError", "its data set cannot be reached"),
        ("DatasetNotFoundError", "its data set is not there"),
    ],
)
def test_the_hub_clients_errors_are_told_apart(error: str, found: str) -> None:
    inner = type(error, (Exception,), {})("org/name")
    outer = RuntimeError("could not load")
    outer.__cause__ = inner
    assert task_check.explain(outer).problem.startswith(found)


def test_a_launch_imports_the_tasks_of_others_once_and_refuses_those_that_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.common.errors import SftError
    from sft.launch.doctor import doctor, tasks
    from sft.recipe import recipe
    from sft.runner import plan

    (tmp_path / "recipes").mkdir()
    text = (REPO / "recipes/smoke.toml").read_text()
    file = tmp_path / "recipes/mine.toml"
    file.write_text(text.replace('tasks = ["smoke_generate", "smoke_choice"]', 'tasks = ["ifeval"]'))
    loaded = recipe.load(file)
    assert loaded.evaluate.tasks == ("ifeval",)
    place, calls = plan.Place(tmp_path / "runs", (), "local"), tmp_path / "calls"
    stub = tmp_path / "python"
    monkeypatch.setattr(tasks, "PYTHON", stub)

    def answers(line: str) -> None:
        stub.write_text(f"#!/bin/sh\necho called >>{calls}\necho '{line}'\n")
        stub.chmod(0o755)

    context = doctor.Context(place, loaded, place.load_cluster(), ("train",), imports=True)
    answers('{"task": "ifeval", "problem": "it needs the package langdetect", "next": "make setup"}')
    (row,) = tasks.tasks(context)
    assert (row.state, row.found, row.next) == (
        "RED", "[evaluate] tasks: ifeval: it needs the package langdetect", "make setup")  # fmt: skip
    with pytest.raises(SftError, match="ifeval: it needs the package langdetect; next: make setup"):
        doctor.require(place, loaded, "train")
    answers('{"task": "ifeval", "documents": 541}')
    for _ in range(2):
        (row,) = tasks.tasks(context)
        assert row.state == "ok"
    assert calls.read_text().count("called") == 3  # twice refused; found right once, and remembered
    answers("nothing")
    (row,) = tasks.tasks(
        doctor.Context(place, recipe.load(file, overrides=["limit=5"]), place.load_cluster(), ("train",), imports=True)
    )
    assert row.state == "ok"  # another limit imports the same tasks


def test_a_task_of_the_folder_whose_code_needs_a_package_is_refused_without_an_import(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.launch.doctor import context, doctor, tasks
    from sft.recipe import recipe
    from sft.runner import plan

    monkeypatch.setattr(tasks, "PYTHON", REPO / ".venv/bin/python")
    monkeypatch.setattr(tasks.paths, "find", lambda *_: folder)
    place = plan.Place(tmp_path / "runs", (), "local")
    loaded = recipe.load(REPO / "recipes/smoke.toml", overrides=["tasks=needs"])
    (row,) = tasks.tasks(doctor.Context(place, loaded, place.load_cluster(), ("train",), imports=True))
    assert row.state == context.RED and "imports no_such_package, which is not installed" in row.found
    loaded = replace(loaded, evaluate=replace(loaded.evaluate, tasks=("first",), data={"frist_rows": "rows.jsonl"}))
    first, *_ = tasks.tasks(doctor.Context(place, loaded, place.load_cluster(), ("train",), imports=True))
    assert first.state == context.RED and "data.frist_rows: no task file of" in first.found
