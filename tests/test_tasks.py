"""sft.evaluation.tasks: hashes name all of a task that can change its score, and a finished task is reused only under the same ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import REPO
from evaluating import ANYTHING, plain_place
from sft.common import paths
from sft.common.errors import SftError
from sft.evaluation import evaluate
from sft.recipe import inputs
from sft.recipe.schema import Evaluate

BASE = """
dataset_path: json
dataset_kwargs: {data_files: {test: capitals.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function marks.score
generation_kwargs: {until: ["ZZZ"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: points, aggregation: mean, higher_is_better: true}
"""
MARKS = "def score(doc, results):\n    import rules\n    return {'points': rules.POINTS}\n"
# lm-eval does not put the folder on the path: a module that imports its neighbour must
MARKS = f"import pathlib, sys\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\n{MARKS}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mine"
    made.mkdir()
    (made / "base.yaml").write_text(BASE)
    (made / "capitals.yaml").write_text("include: base.yaml\ntask: capitals\n")
    (made / "marks.py").write_text(MARKS)
    (made / "rules.py").write_text("POINTS = 1.0\n")
    (made / "other.py").write_text("X = 1\n")
    rows = [{"question": f"What is the capital of {c}?", "answer": "Paris"} for c in "ABC"]
    (made / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def hashes(folder: Path) -> Any:
    from sft.evaluation.tasks import find

    return find("capitals", folder, {}).hashes()


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new)) and None


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (edit("capitals.yaml", "task:", "num_fewshot: 2\ntask:"), ["task_sha256"]),
        (edit("base.yaml", "max_gen_toks: 6", "max_gen_toks: 7"), ["task_sha256"]),
        (edit("marks.py", "return {", "return {'more': 1, "), ["task_sha256"]),
        (edit("rules.py", "1.0", "2.0"), ["task_sha256"]),
        (edit("capitals.jsonl", "of A", "of Z"), ["data_sha256"]),
        (edit("other.py", "1", "2"), []),
        (edit("base.yaml", "test_split", "# what is asked\ntest_split"), []),
    ],
)
def test_hashes_change_with_what_can_change_a_score_and_with_nothing_else(
    folder: Path, change: Callable[[Path], None], changed: list[str]
) -> None:
    before = hashes(folder)
    change(folder)
    after = hashes(folder)
    assert [name for name in before._fields if getattr(before, name) != getattr(after, name)] == changed


def test_hashes_do_not_depend_on_where_the_folder_is(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere" / "tasks")
    assert hashes(folder) == hashes(tmp_path / "elsewhere" / "tasks")


@pytest.mark.parametrize(
    ("written", "until"),
    [
        ('{until: ["ZZZ"], max_gen_toks: 6, do_sample: false}', ["ZZZ"]),
        ("{until: [], max_gen_toks: 6}", []),
        ("{max_gen_toks: 6}", []),
        ("{until: null, max_gen_toks: 6}", []),
        ("null", []),
    ],
)
def test_only_the_task_itself_names_strings_that_end_a_reply(folder: Path, written: str, until: list[str]) -> None:
    """lm-eval's default is the few-shot delimiter: a blank line, which would cut the reply of a chat model."""
    from sft.evaluation.tasks import find

    edit("base.yaml", '{until: ["ZZZ"], max_gen_toks: 6, do_sample: false}', written)(folder)
    assert find("capitals", folder, {}).load(seed=1).config.generation_kwargs["until"] == until


def test_a_part_outside_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "base.yaml").rename(tmp_path / "base.yaml")
    (folder / "capitals.yaml").write_text("include: ../base.yaml\ntask: capitals\n")
    with pytest.raises(SftError, match=r"base\.yaml is outside of \[evaluate\] task_dir .*; next: copy it there"):
        hashes(folder)


def test_a_folder_of_tasks_under_data_does_not_hide_those_that_are_shipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sft.evaluation import tasks

    own, shipped = tmp_path / "tasks", REPO / "recipes" / "tasks"
    own.mkdir()
    (own / "mine.yaml").write_text("task: mine\n")
    (own / "again.yaml").write_text("task: smoke_choice\n")
    expected = {
        ("mine",): own,
        ("format_following",): shipped,
        ("smoke_choice",): own,
        ("mine", "format_following"): own,
        ("arc_easy",): own,
    }
    for names, folder in expected.items():
        options = Evaluate(tasks=names)
        assert inputs.task_folder(options, lambda path: paths.find((tmp_path, REPO / "recipes"), path, "x")) == folder
    few = tasks.TaskManager(include_path=str(own), include_defaults=False)  # lm-eval's own take half a minute
    monkeypatch.setattr(tasks, "_all_tasks", lambda _: few)
    with pytest.raises(SftError, match=r"a recipe has one task_dir; next: copy format_following\.yaml"):
        tasks.find("format_following", own, {})


def test_a_task_that_lm_eval_ships_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sft.evaluation import tasks

    shipped = tasks.SHIPPED / "arc"
    monkeypatch.setattr(
        tasks, "_all_tasks", lambda _: tasks.TaskManager(include_path=str(shipped), include_defaults=False)
    )
    now = tasks.find("arc_easy", tmp_path, {}).hashes()
    monkeypatch.setattr(tasks, "LM_EVAL", "99.0")
    assert now.task_sha256 != tasks.find("arc_easy", tmp_path, {}).hashes().task_sha256


def test_a_task_file_that_cannot_be_read_is_reported(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from sft.evaluation import tasks

    monkeypatch.setattr(tasks, "_all_tasks", lambda f: tasks.TaskManager(include_path=str(f), include_defaults=False))
    (folder / "towns.yaml").write_text("task: [towns\n")
    with pytest.raises(SftError, match=r"no task 'towns' in .*towns\.yaml: while parsing a flow sequence"):
        tasks.find("towns", folder, {})
    (folder / "towns.yaml").write_text("task: cities\n")
    with pytest.raises(SftError, match=r"no task 'towns' in .*towns\.yaml names 'cities'"):
        tasks.find("towns", folder, {})


place = plain_place


def test_a_finished_task_is_reused_until_its_code_changes(place: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    def once() -> Any:
        return evaluate.run_task(place.model, "capitals", ANYTHING, folder, {}, tmp_path / "out")

    first = once()
    assert first.metrics["points"].value == 1.0 and once() == first
    edit("marks.py", "rules.POINTS", "0.25")(folder)
    again = once()
    assert again.metrics["points"].value == 0.25 and again.task_sha256 != first.task_sha256
    assert again.reused_replies == 3  # the model is not asked again for what it has answered


def asked(folder: Path, **options: Any) -> Any:
    """How the task is asked under the recipe's options, and the arguments that the model gets."""
    from sft.evaluation.asking import ask
    from sft.evaluation.tasks import find

    task = find("capitals", folder, {}).load(seed=1)
    return ask(task, Evaluate(tasks=("capitals",), **options), max_length=4096), task.config.generation_kwargs


def test_the_recipe_decides_how_long_and_how_freely_a_model_replies(folder: Path) -> None:
    own, arguments = asked(folder)
    assert (own.until, own.max_reply_tokens, own.temperature) == (("ZZZ",), 6, 0.0)
    sampled, arguments = asked(folder, max_reply_tokens=99, temperature=0.6, top_p=0.9)
    assert (sampled.max_reply_tokens, sampled.temperature, sampled.top_p) == (99, 0.6, 0.9)
    assert arguments == {"until": ["ZZZ"], "max_gen_toks": 99, "do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("written", "limit"),
    [("{do_sample: false}", 1024), ("{max_new_tokens: 70}", 70), ("{max_tokens: 9, max_gen_toks: 8}", 8)],
)
def test_a_task_without_a_limit_does_not_get_one_that_cuts_answers(folder: Path, written: str, limit: int) -> None:
    edit("base.yaml", '{until: ["ZZZ"], max_gen_toks: 6, do_sample: false}', written)(folder)
    how, arguments = asked(folder)
    assert how.max_reply_tokens == arguments["max_gen_toks"] == limit
    assert not {"max_new_tokens", "max_tokens"} & set(arguments)


def test_a_task_that_samples_can_be_asked_greedily(folder: Path) -> None:
    edit("base.yaml", "do_sample: false", "do_sample: true, temperature: 0.8, top_p: 0.5")(folder)
    how, _ = asked(folder)
    assert (how.temperature, how.top_p) == (0.8, 0.5)
    how, arguments = asked(folder, temperature=0.0)
    assert (how.temperature, how.top_p) == (0.0, None) and arguments["do_sample"] is False


def test_examples_never_come_from_the_test_questions(folder: Path) -> None:
    with pytest.raises(SftError, match="num_fewshot = 2: task capitals has no examples apart from its test questions"):
        asked(folder, num_fewshot=2)
    edit("base.yaml", "test_split: test", "test_split: test\nfewshot_config: {samples: [{question: Q, answer: A}]}")(
        folder
    )
    how, _ = asked(folder, num_fewshot=1, fewshot_as_multiturn=False)
    assert how.multiturn is False
