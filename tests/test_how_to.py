"""Every recipe and command of the how-to pages is one that Make plans: fields, values, files and goals are those of the code."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sft.__main__ as program
from conftest import REPO
from sft.recipe import recipe
from test_documents import made

PAGES = sorted((REPO / "docs" / "how-to").glob("*.md"))
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
OTHERS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), *sorted((REPO / "docs" / "explain").glob("*.md"))]
EXAMPLES = {"my-cluster", "c"}
"""Names of clusters that pages use for the reader's own."""
OF_A_STEP = ("continue=", "base=runs/", "MODEL=", "SRC=")
"""Words that name a step, which the plan would open: `test_documents` checks these commands."""


def place(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of a page beside those that are shipped, with a file for each path under `data` that it names."""
    blocks = dict(BLOCK.findall(page.read_text()))
    name, text = re.fullmatch(r"# recipes/([\w-]+)\.toml\n(.*)", blocks["toml"], re.DOTALL).groups()  # type: ignore[union-attr]
    recipes, data = tmp_path / "recipes", tmp_path / "data"
    recipes.mkdir()
    data.mkdir()
    for shipped in (REPO / "recipes").iterdir():
        (recipes / shipped.name).symlink_to(shipped)
    (recipes / f"{name}.toml").write_text(text)
    (data / "mine.jinja").write_text(blocks.get("jinja", ""))
    (data / "tasks").mkdir()
    (data / "tasks" / "mine.yaml").write_text(blocks.get("yaml", ""))
    for row in re.findall(r"\"([\w.]+\.jsonl)\"", text):
        (data / row).write_text("{}\n")
    (data / "more").mkdir()
    (data / "more" / "rows.jsonl").write_text("{}\n")
    monkeypatch.setattr(program, "RECIPES", recipes)
    return recipes / f"{name}.toml"


def shell(page: Path) -> Iterator[list[str]]:
    """The words of each make command in the shell's blocks of a page. Commands that name a step or a placeholder are left out."""
    text = page.read_text()
    blocks = [found for language, found in BLOCK.findall(text) if language == "bash"]
    blocks += re.findall(r"(?:^    make .*\n)+", text, re.MULTILINE)
    for words in made(line.strip() for block in blocks for line in block.splitlines()):
        named = any(word.startswith(OF_A_STEP) or "…" in word or "*" in word for word in words)
        if words and not named:
            yield words


def plan(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Asks the planner, as Make does before anything runs. Fails with its message."""
    goals = [w for w in words if "=" not in w]
    given = dict(w.split("=", 1) for w in words if "=" in w)
    overrides = " ".join(f"{name}={value}".replace(" ", "\\ ") for name, value in given.items())
    argv = ["plan", "--goals", " ".join(goals), "--runs", str(folder / "runs"), "--data", str(folder / "data")]
    argv += ["--recipe", given.get("RECIPE", ""), "--overrides", overrides]
    cluster = given.get("CLUSTER", "local")
    argv += ["--cluster", "slurm" if cluster in EXAMPLES else cluster]
    monkeypatch.setattr(sys, "argv", ["sft", *argv])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # main() ends its process at a broken pipe
    try:
        program.main()
    except SystemExit as end:
        assert not end.code, f"make {shlex.join(words)}: {end.code}"
    assert capsys.readouterr().out.startswith("plan-ok"), words


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_make_plans_every_command_of_a_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place(page, tmp_path, monkeypatch)
    assert recipe.load(file, (), "local").run == "my-exp"
    commands = list(shell(page))
    assert len(commands) >= 2
    for words in commands:
        plan(words, tmp_path, monkeypatch, capsys)


@pytest.mark.seconds
@pytest.mark.parametrize("page", OTHERS, ids=lambda p: p.stem)
def test_make_plans_the_commands_of_the_other_pages(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their recipes are copies of one that is shipped."""
    place(PAGES[0], tmp_path, monkeypatch)
    for name in ("my-exp", "my-scores", "x"):
        (tmp_path / "recipes" / f"{name}.toml").write_text((REPO / "recipes" / "smollm2-gsm8k.toml").read_text())
    shutil.copytree(REPO / "recipes" / "smoke" / "tokenizer", tmp_path / "data" / "dolma2-tokenizer")
    (tmp_path / "data" / "gsm8k").mkdir()
    for name in ("train", "test"):
        (tmp_path / "data" / "gsm8k" / f"{name}.jsonl").write_text("{}\n")
    for words in shell(page):
        plan(words, tmp_path, monkeypatch, capsys)


def test_a_wrong_field_or_goal_of_a_page_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (REPO / "docs" / "how-to" / "sweep.md").read_text()
    for wrong, right in (("seq_len = 2048", "seq_length = 2048"), ("make runs ", "make ruins ")):
        folder = tmp_path / right[:3]
        folder.mkdir()
        (page := folder / "page.md").write_text(text.replace(wrong, right))
        with pytest.raises((AssertionError, recipe.SftError), match=r"seq_length|ruins"):
            test_make_plans_every_command_of_a_page(page, folder, monkeypatch, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_has_goal_recipe_commands_and_what_one_sees(page: Path) -> None:
    text = page.read_text()
    parts = ["Goal: ", "## The recipe", "## The commands", "## What you see", "## Read on"]
    assert [part for part in parts if part not in text] == []
    assert len(text.splitlines()) <= 80, "a page is about a screen"
