"""CONTRIBUTING.md's recipes for a new chat template, model family, row format and metric, followed. A launcher: test_launcher.py."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bases
import test_families
from chat_samples import EOS, NASTY, SOURCE, chat, encoder, make_tokenizer, text_of
from conftest import REPO
from sft.formats.metrics import StepRecord
from sft.recipe.chat_templates import CONTENT, TEMPLATES, TemplateText, TurnText
from sft.recipe.families import FAMILIES, Family

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


MINISTRAL = Family(
    "ministral",
    "MinistralForCausalLM",
    FAMILIES["llama"].block,
    {"sliding_window": 4096, "layer_types": None},
    1e-6,
    n_kv_heads=8,
    bos_token_id=1,
    max_positions=131072,
    does={"prenorm": True, "qk_norm": ""},
)
CASE = {"head_dim": 16, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"] * 2}


def test_a_row_of_the_table_is_all_that_a_model_family_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "ministral", MINISTRAL)
    monkeypatch.setitem(bases.CASES, "ministral", ("ministral", CASE))
    test_families.test_values_of_missing_keys_are_those_of_transformers_class("ministral")
    for number, claim in enumerate((
        test_families.test_logits_loss_and_gradients_are_those_of_transformers_class,
        test_families.test_an_export_has_the_bits_and_the_configuration_that_transformers_writes,
        test_families.test_a_step_keeps_the_model_and_what_an_export_needs_of_its_base,
    )):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        claim(tmp_path / str(number), "ministral")


METHOD = """    def _read_dialog(self, row, column):
        roles = ("user", "assistant") * len(row[column])
        return Turns([{"role": r, "content": t} for r, t in zip(roles, row[column])], [""] * len(row[column]), 0, (column,))


"""
READ = """
from sft.chat.rows import RowReader
from sft.recipe.schema import Prepare, Source
for columns in ({}, {"dialog": "turns"}):
    source = Source(path="x", columns=columns)
    reader = RowReader(Prepare(tokenizer="t", sources=(source,)), source)
    found = reader.read_counted({columns.get("dialog", "dialog"): ["Hi", "Hello"], "topic": "t"})
    print([*(m["role"] + " " + m["content"] for m in found.messages)], found.train, found.held.unread)
"""


def python(root: Path, code: str, *arguments: str) -> str:
    """Runs code with the package in `root`, a copy of lib."""
    command = [sys.executable, "-c", code, *arguments]
    environment = {"PYTHONPATH": f"{root}:{REPO / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_of_lib(root: Path, **edits: tuple[str, str]) -> None:
    """Copies the package to root/sft, with one text replaced in some of its files, named like recipe__schema."""
    shutil.copytree(REPO / "lib/sft", root / "sft", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (old, new) in edits.items():
        file = root / "sft" / f"{name.replace('__', '/')}.py"
        text = file.read_text()
        assert text.count(old) == 1, name
        file.write_text(text.replace(old, new))


def test_a_method_its_row_and_its_column_are_all_that_a_row_format_needs(tmp_path: Path) -> None:
    text = (REPO / "lib/sft/chat/rows.py").read_text()
    table = next(line for line in text.splitlines() if line.startswith("LAYOUTS: "))
    copy_of_lib(
        tmp_path,
        recipe__schema=("COLUMNS = (", 'COLUMNS = ("dialog", '),
        chat__rows=(table, f'{METHOD.removesuffix("LAYOUTS")}{table}\n    "dialog": RowReader._read_dialog,'),
    )
    line = "['user Hi', 'assistant Hello'] [False, True] {}\n"
    assert python(tmp_path, READ) == line * 2


LAST = "    checkpoint: SaveTimes | None = None"
FIELD = '    weight_norm: Annotated[float | None, Chart("weight norm, L2")] = None\n'
WRITE = """
import sys
from pathlib import Path
from published import step_record
from sft.formats.metrics import read_metrics
from sft.reporting import trainings
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
print([chart["title"] for chart in trainings.of_one(read_metrics(out / "metrics.jsonl"))["small"] if chart])
"""


def test_a_field_is_all_that_file_trackers_and_report_need(tmp_path: Path) -> None:
    copy_of_lib(tmp_path, formats__metrics=(LAST, FIELD + LAST))
    printed = python(tmp_path, WRITE, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["weight_norm"] for line in lines] == [3.5, 7.0]
    assert "tracker 2 7.0" in printed and "weight norm, L2" in printed


def test_the_loop_gives_every_field_of_a_step_a_value() -> None:
    tree = ast.parse((REPO / "lib/sft/training/loop.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "StepRecord"]
    assert [{word.arg for word in call.keywords} for call in calls] == [
        {field.name for field in dataclasses.fields(StepRecord)}
    ]
