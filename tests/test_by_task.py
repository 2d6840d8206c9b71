"""[evaluate.by_task]: one task is asked in another way than the others; the key and the record beside the score say how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluating import ANYTHING, lines, plain_place
from sft.common.errors import SftError
from sft.evaluation import evaluate
from sft.recipe import recipe
from sft.recipe.schema import PER_TASK
from test_groups_of_tasks import folder as group_folder

REPO = Path(__file__).resolve().parents[1]
place, folder = plain_place, group_folder


def with_table(tmp_path: Path, table: str, before: str = "") -> Path:
    text = (REPO / "recipes/smoke.toml").read_text()
    if before:
        text = text.replace("[evaluate]\n", f"[evaluate]\n{before}\n")
    (tmp_path / "mine.toml").write_text(f"{text}\n{table}\n")
    return tmp_path / "mine.toml"


def test_a_tasks_own_table_is_read_converted_and_in_the_key(tmp_path: Path) -> None:
    plain = recipe.load(with_table(tmp_path, ""))
    loaded = recipe.load(with_table(tmp_path, "[evaluate.by_task.smoke_generate]\ntemperature = 1\nsamples = 4"))
    assert loaded.config("evaluate")["by_task"] == {"smoke_generate": {"temperature": 1.0, "samples": 4}}
    assert "by_task" not in plain.config("evaluate")  # runs from before the field existed stay up to date
    one, other = (loaded.evaluate.for_task(name) for name in ("smoke_generate", "smoke_choice"))
    assert (one.temperature, one.samples, other.temperature, other.samples) == (1.0, 4, -1.0, 1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[evaluate.by_task.smoke_generat]\nsamples = 2", r"\[evaluate.by_task.smoke_generat\]: no such entry in 'tasks'; did you mean 'smoke_generate'"),
        ("[evaluate.by_task.smoke_choice]\nsample = 2", "'sample' in .*: not a field of one task; did you mean 'samples'"),
        ("[evaluate.by_task.smoke_choice]\nthinking = true", r"write thinking = { smoke_choice = true } in \[evaluate\]"),
        ("[evaluate.by_task.smoke_generate]\ntop_p = 2", "'top_p' in .* = 2: at most 1 is expected"),
        ("[evaluate.by_task.smoke_generate]\nsystem_prompt = 2", "a string is expected"),
        ("[evaluate.by_task.smoke_generate]\nsamples = 2\ntemperature = 0", r"'samples' in \[evaluate.by_task.smoke_generate\] = 2: temperature = 0"),
        ("[evaluate.by_task]\nsmoke_generate = 3", "a table is expected"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_count_is_refused_with_its_place(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(SftError, match=message):
        recipe.load(with_table(tmp_path, table))


def test_a_suites_tables_count_for_the_tasks_that_the_recipe_has_and_its_own_fields_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = 'tasks = ["smoke_choice", "other"]\n[by_task.smoke_choice]\nnum_fewshot = 2\nsystem_prompt = "a"\n'
    (tmp_path / "s.toml").write_text(suite + "[by_task.other]\nsamples = 2\n")
    monkeypatch.setattr(recipe, "SUITES", tmp_path)
    own = with_table(tmp_path, '[evaluate.by_task.smoke_choice]\nsystem_prompt = "b"', 'suite = "s"')
    assert recipe.load(own).evaluate.by_task == {"smoke_choice": {"num_fewshot": 2, "system_prompt": "b"}}


@pytest.mark.seconds
def test_one_task_is_asked_in_another_way_and_its_score_says_how(place: SimpleNamespace, tmp_path: Path) -> None:
    own = {"system_prompt": "Be brief.", "max_reply_tokens": 3}
    options = replace(ANYTHING, tasks=("capitals", "colours"), by_task={"capitals": own}, limit=2)
    scored = evaluate.run_tasks(place.model, options, place.tasks, place.data, tmp_path, print)
    capitals, colours = scored.results["capitals"].asking, scored.results["colours"].asking
    assert capitals and colours
    assert (capitals.system_prompt, capitals.max_reply_tokens, colours.system_prompt) == ("Be brief.", 3, None)
    prompts = {t: [s["prompt"] for s in lines(tmp_path / f"samples/{t}.jsonl")] for t in ("capitals", "colours")}
    assert all("Be brief." in p for p in prompts["capitals"]) and not any("Be brief." in p for p in prompts["colours"])
    assert max(s["tokens"] for s in lines(tmp_path / "samples/capitals.jsonl")) <= 3


def test_the_table_of_a_group_counts_for_all_of_its_tasks(place: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    options = replace(ANYTHING, tasks=("both",), by_task={"both": {"system_prompt": "Be brief."}})
    scored = evaluate.run_tasks(place.model, options, folder, {}, tmp_path, print)
    assert {name: r.asking and r.asking.system_prompt for name, r in scored.results.items()} == {
        "first": "Be brief.",
        "second": "Be brief.",
    }


def test_thoughts_of_a_group_are_those_of_its_tasks() -> None:
    options = replace(ANYTHING, tasks=("both",), thinking={"*": False, "both": True})
    assert options.for_task("both", "first").thinking == {"*": False, "both": True, "first": True}
    assert set(PER_TASK) <= set(vars(options))
