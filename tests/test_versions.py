"""Version numbers rise with the code that they stand for: tests/versions.py says how."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, Literal

import pytest

import format_shapes
import versions
from test_layers import LIB, modules
from versions import FILE, ROOTS, WHERE, behind, complaints, current, digest


@pytest.mark.seconds
def test_no_code_changed_without_its_version_number_or_a_record_that_the_bytes_stay() -> None:
    assert complaints(json.loads(FILE.read_text()), current()) == []


def test_a_version_stands_for_the_modules_that_its_stage_imports_and_not_for_plumbing() -> None:
    assert {"sft.training.loop", "sft.model.loss", "sft.packing.packs", "sft.recipe.presets"} <= behind(ROOTS["train"])
    assert {"sft.chat.rows", "sft.recipe.chat_templates"} <= behind(ROOTS["prepare"])
    assert not [n for n in behind(ROOTS["train"]) if n.startswith(("sft.storage", "sft.runner", "sft.common"))]
    assert not [n for n in behind(ROOTS["prepare"]) if n.startswith("sft.model")]


@pytest.mark.seconds
def test_both_ways_out_are_named_and_a_raised_number_must_be_recorded() -> None:
    now = current()
    changed = {"versions": now["versions"], "modules": {**now["modules"], "sft.data.decontaminate": "0" * 12}}
    lines = complaints(changed, now)
    assert any(line.startswith("SCREENING_VERSION in lib/sft/data/preparation.py = ") for line in lines)
    assert all("raise it" in line and "make record-versions" in line for line in lines)
    older = {"versions": {**now["versions"], "sync": 0}, "modules": now["modules"]}
    assert complaints(older, now) == [
        f"VERSIONS['sync'] in lib/sft/runner/plan.py: 0 -> {now['versions']['sync']}; next: make record-versions"
    ]


CODE = '''
"""Doc."""
import os
def f(x: int, log) -> int:
    """Doc."""
    log(f"{x} rows")  # comment
    if x < 0:
        raise ValueError("negative")
    return x + 1
'''


def test_the_digest_is_of_what_code_does_and_not_of_its_prose() -> None:
    reworded = (
        CODE.replace("Doc.", "Other words.")
        .replace("rows", "lines")
        .replace("# comment", "# why")
        .replace("int", "float")
    )
    assert digest(reworded.replace("import os", "import sys").replace("negative", "below zero")) == digest(CODE)
    for old, new in (("x + 1", "x + 2"), ("x < 0", "x <= 0"), ("ValueError", "TypeError")):
        assert digest(CODE.replace(old, new)) != digest(CODE)


def test_the_record_lists_every_version() -> None:
    assert set(versions.numbers()) == set(ROOTS)


def test_every_version_that_decides_about_a_cache_is_guarded() -> None:
    named = {
        name for file in modules(LIB).values() for name in re.findall(r"^(\w+_VERSION) = \d", file.read_text(), re.M)
    }
    assert named == set(WHERE)


def test_the_reason_of_a_rejected_row_is_code_and_the_text_of_an_error_is_not() -> None:
    assert (
        digest('raise BadRow("a", "text")')
        == digest('raise BadRow("a", "other")')
        != digest('raise BadRow("b", "text")')
    )
    assert digest('raise SftError("a")') == digest('raise SftError("b")')


def test_no_file_format_changed_without_its_version_number_or_a_record_that_its_files_stay_readable() -> None:
    assert format_shapes.complaints(json.loads(format_shapes.FILE.read_text()), format_shapes.current()) == []


def made(*fields: Any) -> format_shapes.Shape:
    return format_shapes.shape(dataclasses.make_dataclass("Made", fields))


PART = dataclasses.make_dataclass("Part", [("name", str)])
LARGER = dataclasses.make_dataclass("Part", [("name", str), ("size", int)])
FIELDS = [("ratio", int), ("kind", Literal["a", "b"]), ("parts", tuple[PART, ...]), ("note", str | None, None)]


@pytest.mark.parametrize(
    ("after", "problems"),
    [
        ([*FIELDS[:3], ("note", str | None, None), ("more", int, 0)], []),
        ([*FIELDS[:3], ("note", str | None, None), ("more", LARGER | None, None)], []),
        ([("ratio", float), ("kind", Literal["a", "b", "c"]), *FIELDS[2:]], []),
        ([FIELDS[0], FIELDS[1], FIELDS[2]], ["note is gone"]),
        ([("ratio", str), *FIELDS[1:]], ["ratio: int -> str"]),
        ([FIELDS[0], ("kind", Literal["a"]), *FIELDS[2:]], ["kind: 'a' | 'b' -> 'a'"]),
        ([*FIELDS[:2], ("parts", tuple[LARGER, ...]), FIELDS[3]], ["parts[].size is new and has no default"]),
        ([*FIELDS[:3], ("note", str | None)], ["note: absent | null | str -> null | str"]),
    ],
    ids=["optional", "optional object", "wider", "gone", "type", "choice", "nested", "required"],
)
def test_a_format_may_grow_and_nothing_else_without_a_higher_version(after: list[Any], problems: list[str]) -> None:
    assert format_shapes.unreadable(made(*FIELDS), made(*after)) == problems


def test_a_changed_field_is_recorded_only_under_a_higher_version(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    now = format_shapes.current()
    assert {"dataset.DatasetInfo", "manifest.Manifest", "metrics.StepRecord", "gate.GateRecord"} <= set(now)
    base = {k: v for k, v in now["remote.Remote"]["fields"].items() if k != "dataset"}
    older = {**now, "remote.Remote": {"version": 1, "fields": {**base, "data": "str"}}}
    (line,) = format_shapes.complaints(older, now)
    assert line.startswith("lib/sft/formats/remote.py: Remote: files of version 1 are not read any more: data is gone;")
    monkeypatch.setattr(format_shapes, "FILE", tmp_path / "formats.json")
    format_shapes.FILE.write_text(json.dumps(older))
    with pytest.raises(SystemExit, match=r"raise VERSION; then make record-versions"):
        format_shapes.record()
    raised = {**now, "remote.Remote": {**now["remote.Remote"], "version": 2}}
    (line,) = format_shapes.complaints(older, raised)
    assert line.endswith("its fields or version are not the recorded ones; next: make record-versions")
