"""The documentation as a site: its reference is complete, its links hold, and troubleshooting knows the messages of the code."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import REPO
from sft.recipe import schema
from sft.recipe.options import name_of
from sft.runner import asked

PAGES: dict[str, str] = runpy.run_path(str(REPO / "docs" / "site.py"))["pages"]()


def test_the_reference_has_every_field_and_every_goal() -> None:
    recipe, cluster = PAGES["reference/recipe.md"], PAGES["reference/cluster.md"]
    for cls in (*schema.TABLES.values(), schema.Source, schema.Hardware):
        missing = [name_of(f) for f in dataclasses.fields(cls) if f"| `{name_of(f)}`" not in recipe]
        assert missing == [], cls.__name__
    assert [f.name for f in dataclasses.fields(schema.Cluster) if f"| `{f.name}`" not in cluster] == []
    listed = {
        word
        for row in re.findall(r"^\| `make ([^`]*)`", PAGES["reference/commands.md"], re.MULTILINE)
        for word in row.split()
    }
    unlisted = {
        g for g in asked.known_goals(REPO / "Makefile") if g not in listed and not g.startswith(("bench-", "slurm-"))
    }
    assert unlisted == set(), "next: a comment ## behind the goal in the Makefile"


def test_every_page_is_in_the_navigation() -> None:
    text = (REPO / "mkdocs.yml").read_text()
    named = set(re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE))
    written = {str(p.relative_to(REPO / "docs")) for p in (REPO / "docs").rglob("*.md")}
    assert named == written | PAGES.keys(), "next: name the page in nav of mkdocs.yml"
    assert yaml.safe_load(text)["strict"] is True


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_server(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="make setup installs it with the tools of the tests")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")], cwd=REPO,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) >= 18
    for page in built:
        loaded = re.findall(r'<(?:script|img|link)[^>]*?(?:src|href)="(https?:[^"]*)"', page.read_text())
        assert loaded == [], page.name


def test_troubleshooting_knows_messages_that_the_code_has() -> None:
    code = "\n".join(p.read_text() for p in sorted((REPO / "lib" / "sft").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*(?:f|rf)?"', "", code)
    page = (REPO / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) >= 20
    for message in messages:
        parts = [p for p in re.split(r"'[^']*'|\[[^\]]*\]", message) if len(p.strip()) > 5] or [message]
        assert all(p.strip() in joined for p in parts), message
