"""A terminal line fits 100 columns, in what the planner prints for people."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE
from sft.common import columns
from sft.common.strings import printable


@pytest.mark.seconds
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_command_line_can_be_copied_from_a_terminal_and_fits_it() -> None:
    words = ["env/local.sh", *(f"--option-{n}" for n in range(20)), "it's one word"]
    shown = columns.command(words, Terminal())
    assert len(shown.splitlines()) > 2 and max(map(len, shown.splitlines())) <= columns.WIDTH
    done = subprocess.run(
        ["bash", "-c", shown.replace("env/local.sh", "printf '%s\\n'", 1)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == words[1:]
    assert columns.command(words, io.StringIO()).count("\n") == 0


def test_a_table_that_is_too_wide_has_its_first_and_last_columns_cut() -> None:
    job = "01JQABCDEFGHJKMNPQRSTVWXYZ"
    rows = [("RUN", "JOB", "STATE"), ("r" * 90, job, "failed " * 20), ("x", job, "done")]
    lines = columns.table(rows).splitlines()
    assert max(map(len, lines)) <= columns.WIDTH and job in lines[1] and "…" in lines[1] and lines[2].endswith("done")


def test_data_cannot_control_a_terminal() -> None:
    assert printable("é 👩‍👩‍👧\n\tx") == "é 👩‍👩‍👧\n\tx"
    told = columns.for_terminal("\x1b[31mred\r\ud800 \x9b")
    assert told == "\\x1b[31mred\\r\\ud800 \\x9b"


@pytest.mark.seconds
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


@pytest.mark.seconds
def test_warnings_of_transformers_are_in_the_log_though_it_prints_by_itself(tmp_path: Path) -> None:
    """When it is imported, it gives its logger a handler that prints."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom sft.common.library_logs import quiet_libraries\n"
        "quiet_libraries(Path(sys.argv[1]))\nfrom transformers.utils import logging\n"
        "logging.get_logger('transformers.models.x').warning('falls back')\n"
    )
    log = tmp_path / "log"
    made = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, timeout=PATIENCE)
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    assert set(log.read_text().splitlines()) == {"transformers.models.x: WARNING: falls back"}
