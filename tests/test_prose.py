"""The prose check finds what the house style forbids, where it is, and nothing in code."""

from __future__ import annotations

from pathlib import Path

import pytest

import prose
from conftest import REPO

LONG = "The " + "very " * prose.WORDS + "end."


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"Short.\n\n{LONG}", f"3: a sentence of {prose.WORDS + 2} words"),
        ("Ten words are in this sentence, which is short enough. " * 11, "1: a paragraph of 110 words"),
        ("One; two; three.", "1: 2 of ';'"),
        ("It is what that which whose that knows that.", "a chain of which"),
        ("Of a checkpoint that is new, one node keeps all.", "an inversion"),
        ("Say to whom.", "'whom'; write: who"),
        (f"| a | b |\n| --- | --- |\n| x | {LONG} |", f"3: a sentence of {prose.WORDS + 2} words"),
        (f"* Short.\n* {LONG}", f"2: a sentence of {prose.WORDS + 2} words"),
        ("Text.\n\n* item in\n  order to", "3: 'in order to'"),
    ],
)  # fmt: skip
def test_a_fault_is_found_and_its_line_is_named(tmp_path: Path, text: str, fault: str) -> None:
    (page := tmp_path / "page.md").write_text(text)
    assert any(fault in f for f in prose.faults(page)), list(prose.faults(page))


@pytest.mark.parametrize(
    "text",
    [
        f"```\n{LONG} in place of; a; b; c\n```",
        f"    make train   # {LONG}",
        f"See `{LONG}` there.",
        f"# {LONG}",
        f"[page](https://example.org/{LONG.replace(' ', '-')})",
        "First point. `train` follows. It ends, e.g. here. 30 % is enough.",
    ],
)
def test_code_headings_and_addresses_are_no_prose(tmp_path: Path, text: str) -> None:
    (page := tmp_path / "page.md").write_text(text)
    assert list(prose.faults(page)) == []


def test_messages_and_meanings_of_fields_are_checked(tmp_path: Path) -> None:
    (code := tmp_path / "code.py").write_text(
        'x = "in place of a plain constant"\nraise SftError(f"{x}: used in place of y")\na = opt("whom to ask")\n'
    )
    assert [f.split(":", 1)[1] for f in prose.faults(code)] == [
        "2: 'in place of'; write: instead of",
        "3: 'whom'; write: who",
    ]


@pytest.mark.seconds
def test_every_document_of_the_repository_holds_the_style() -> None:
    assert [fault for path in prose.sources() for fault in prose.faults(path)] == []


def test_make_check_looks_at_prose_and_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        "tests/prose.py"
        in (REPO / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0].partition("\ntest:")[0]
    )
    (page := tmp_path / "page.md").write_text("Say to whom.")
    assert prose.main([str(page)]) == 1 and "1: 'whom'" in capsys.readouterr().out
