"""Suites give a recipe its tasks."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from sft.common.errors import SftError
from sft.recipe import recipe

REPO = Path(__file__).resolve().parents[1]
SUITES = sorted((REPO / "recipes/suites").glob("*.toml"))


@pytest.mark.parametrize("file", SUITES, ids=lambda f: f.stem)
def test_every_suite_is_a_valid_evaluate_table(file: Path) -> None:
    loaded = recipe.load(REPO / "recipes/olmo3-7b.toml", overrides=[f"suite={file.stem}"])
    suite = tomllib.loads(file.read_text())
    assert loaded.evaluate.suite == file.stem
    for name, value in suite.items():
        if name != "tasks":  # the recipe names its own
            assert getattr(loaded.evaluate, name) == value


def test_a_suite_on_the_command_line_comes_before_the_recipes_own_fields_and_names_another_run() -> None:
    smoke = REPO / "recipes/smoke.toml"
    loaded = recipe.load(smoke, ["suite=quick"])
    assert (loaded.evaluate.tasks, loaded.evaluate.limit) == (("format_following",), 60)
    assert loaded.run.startswith("smoke_tasks-") and "limit-60" in loaded.run
    again = recipe.load(smoke, [f"{name}={value}" for name, value in loaded.overrides])  # as run.json records them
    assert again.run == loaded.run and again.config("evaluate") == loaded.config("evaluate")
    own = recipe.load(smoke, ["evaluate.suite=quick", "limit=3", "evaluate.tasks=smoke_choice"])
    assert (own.evaluate.tasks, own.evaluate.limit) == (("smoke_choice",), 3)


@pytest.mark.parametrize("file", SUITES, ids=lambda f: f.stem)
def test_every_suite_on_the_command_line_is_the_run_that_its_overrides_name(file: Path) -> None:
    loaded = recipe.load(REPO / "recipes/smoke.toml", [f"suite={file.stem}"])
    again = recipe.load(REPO / "recipes/smoke.toml", [f"{name}={value}" for name, value in loaded.overrides])
    assert again.run == loaded.run and again.config("evaluate") == loaded.config("evaluate")
    assert list(loaded.evaluate.tasks) == tomllib.loads(file.read_text())["tasks"]


def test_a_recipes_own_fields_win_over_its_suite_and_the_key_holds_the_fields(tmp_path: Path) -> None:
    text = (REPO / "recipes/smoke.toml").read_text()
    file = tmp_path / "mine.toml"
    line = next(line for line in text.splitlines() if line.startswith("tasks = "))
    file.write_text(text.replace(line, 'suite = "quick"\nlimit = 5'))
    loaded = recipe.load(file)
    assert (loaded.evaluate.tasks, loaded.evaluate.limit, loaded.evaluate.max_reply_tokens) == (
        ("format_following",),
        5,
        256,
    )
    assert "suite" not in loaded.config("evaluate") and loaded.config("evaluate")["tasks"] == ["format_following"]
    file.write_text(text.replace(line, 'suite = "quik"'))
    with pytest.raises(SftError, match=r"'suite' in \[evaluate\] = 'quik': no such file in .*did you mean 'quick'"):
        recipe.load(file)
