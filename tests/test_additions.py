"""The recipes of CONTRIBUTING.md for a new metric and a new chat template, followed. A launcher: tests/test_launcher.py."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chat_samples import EOS, NASTY, SOURCE, chat, encoder, make_tokenizer, text_of
from conftest import REPO
from sft.formats.metrics import StepRecord
from sft.recipe.chat_templates import CONTENT, TEMPLATES, TemplateText, TurnText

DIALOG = TemplateText(
    CONTENT
    + """\
{%- for message in messages -%}
    {{- '[' + message['role'] + ']\\n' -}}
    {{- content_of(message) -}}
    {{- eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[assistant]\\n' -}}
{%- endif -%}
""",
    lambda eos: {role: TurnText(f"[{role}]\n", eos, "\n", eos, "\n") for role in ("system", "user", "assistant")},
)


def test_a_row_of_the_table_is_all_that_a_chat_template_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPLATES, "dialog", DIALOG)
    (tmp_path / "dialog.jinja").write_text(DIALOG.jinja)
    folder = make_tokenizer(tmp_path / "tokenizer")
    named, by_jinja = encoder(folder, "dialog"), encoder(folder, "dialog.jinja", lambda path: tmp_path / path)
    rows = [chat("Hi", "Hello", "Bye", "Ciao"), *(chat(text, text) for text in NASTY)]
    one, two = named.encode(rows, SOURCE), by_jinja.encode(rows, SOURCE)
    assert (one.rejects, one.ids.tolist()) == (two.rejects, two.ids.tolist()) == ([], two.ids.tolist())
    assert one.loss_mask.tolist() == two.loss_mask.tolist()
    assert (
        text_of(named, one, 0)
        == f"[user]\nHi{EOS}\n[assistant]\nHello{EOS}\n[user]\nBye{EOS}\n[assistant]\nCiao{EOS}\n"
    )
    assert text_of(named, one, 0, trained=True) == f"Hello{EOS}Ciao{EOS}"


LAST = "    checkpoint: SaveTimes | None = None"
FIELD = '    weight_norm: Annotated[float | None, Chart("weight norm, L2")] = None\n'
WRITE = """
import sys
from pathlib import Path
from published import step_record
from sft.formats.metrics import read_steps
from sft.reporting import sections
from sft.training.metrics import MetricsWriter
from sft.training.trackers import Trackers

class Printer:
    def log(self, values, step): print("tracker", step, values["weight_norm"])
    def close(self): pass

out, trackers = Path(sys.argv[1]), Trackers(print)
trackers.add("printer", Printer)
writer = MetricsWriter(out, 0, 2, print, None, trackers)
for step in (1, 2): writer.write(step_record(step, weight_norm=3.5 * step))
writer.close()
print(sections.curves(read_steps(out / "metrics.jsonl")))
"""


def test_a_field_is_all_that_file_trackers_and_report_need(tmp_path: Path) -> None:
    shutil.copytree(REPO / "lib/sft", tmp_path / "sft", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "sft/formats/metrics.py"
    assert LAST in file.read_text()
    file.write_text(file.read_text().replace(LAST, FIELD + LAST))
    environment = {"PYTHONPATH": f"{tmp_path}:{REPO / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["weight_norm"] for line in lines] == [3.5, 7.0]
    assert "tracker 2 7.0" in done.stdout and "weight norm, L2" in done.stdout


def test_the_loop_gives_every_field_of_a_step_a_value() -> None:
    tree = ast.parse((REPO / "lib/sft/training/loop.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "StepRecord"]
    assert [{word.arg for word in call.keywords} for call in calls] == [
        {field.name for field in dataclasses.fields(StepRecord)}
    ]
