"""A terminal line fits 100 columns, in what the planner prints for people."""

from __future__ import annotations

import io

import pytest

from sft.common import columns
from sft.common.strings import printable


@pytest.mark.parametrize("goal", ["help", "fields", "show", "why", "runs"])
def test_what_is_printed_for_people_fits_a_terminal(workspace, goal: str) -> None:
    told = workspace.make(goal, *(["RECIPE=x"] if goal in ("show", "why") else [])).stdout
    assert told.strip() and [line for line in told.splitlines() if len(line) > columns.WIDTH] == []


def test_a_long_head_has_its_text_on_the_next_line() -> None:
    text = columns.hanging("  make something-long       " * 2, "word " * 30)
    assert text.splitlines()[0].strip().startswith("make") and all(len(line) <= 100 for line in text.splitlines())
    assert columns.hanging("head ", "") == "head"


def test_messages_are_wrapped_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word " * 50
    assert columns.for_terminal(text) == text
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert max(map(len, columns.for_terminal(text).splitlines())) <= 100
    assert columns.for_terminal(text, io.StringIO()) == text  # a stage's log goes to another stream


def test_data_cannot_control_a_terminal() -> None:
    assert printable("é 👩‍👩‍👧\n\tx") == "é 👩‍👩‍👧\n\tx"
    told = columns.for_terminal("\x1b[31mred\r\ud800 \x9b")
    assert told == "\\x1b[31mred\\r\\ud800 \\x9b"


def test_warnings_of_libraries_in_a_stage_are_in_its_log(workspace) -> None:
    (workspace.root / "stages/prepare.py").write_text(
        "import logging, warnings\nfrom sft.runner.stage import Result, main\n"
        "def body(stage):\n    warnings.warn('old name')\n    logging.getLogger('torchao').warning('no extension')\n"
        "    (stage.out / 'out').write_text('x')\n    return Result(['out'])\n"
        "main('prepare', body)\n"
    )
    made = workspace.make("prepare", "RECIPE=x")
    assert "old name" not in made.stdout + made.stderr and "no extension" not in made.stdout + made.stderr
    text = (workspace.root / "runs/x/.work/prepare.log").read_text()
    assert "old name" in text and "torchao: WARNING: no extension" in text
