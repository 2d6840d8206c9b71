"""sft.formats.record: a JSON file is a dataclass. What is damaged, older or newer is one clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from sft.common.errors import SftError
from sft.formats.lines import read_lines
from sft.formats.metrics import read_metrics
from sft.formats.record import Record, to_json
from sft.formats.results import Score, TaskResult


@dataclass(frozen=True)
class Part:
    name: str
    size: int


@dataclass(frozen=True)
class Example(Record):
    NEXT: ClassVar[str] = "make example"
    title: str
    ratio: float
    parts: tuple[Part, ...]
    kind: Literal["a", "b"] = "a"
    note: str | None = None
    shape: tuple[int, int] = (0, 0)
    counts: Mapping[str, int] = field(default_factory=dict)
    extra: Any = None


@dataclass(frozen=True)
class Second(Record):
    VERSION: ClassVar[int] = 2
    NEXT: ClassVar[str] = "make second"
    title: str


FULL = Example("x", 0.5, (Part("p", 1), Part("q", 2)), "b", "é", (3, 4), {"n": 1}, [1, None])


def test_what_is_written_is_read_again_and_the_file_is_plain_json(tmp_path: Path) -> None:
    FULL.write(tmp_path / "f")
    assert Example.read(tmp_path / "f") == FULL
    text = (tmp_path / "f").read_text()
    assert json.loads(text)["parts"] == [{"name": "p", "size": 1}, {"name": "q", "size": 2}]
    assert "é" in text and text.endswith("}\n")


def test_fields_that_are_none_by_default_are_left_out() -> None:
    assert list(json.loads(Example("x", 1.0, ()).to_bytes())) == ["title", "ratio", "parts", "kind", "shape", "counts"]


def test_a_whole_number_is_read_as_a_float_but_not_true_as_a_number() -> None:
    assert Example.from_value({"title": "x", "ratio": 1, "parts": []}, "f").ratio == 1.0
    with pytest.raises(SftError, match=r"f: damaged: ratio: a number is expected, not True; next: make example"):
        Example.from_value({"title": "x", "ratio": True, "parts": []}, "f")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"titel": "x"}, "unknown field titel"),
        ({"title": 3}, "title: a string is expected, not 3"),
        ({"parts": {}}, "parts: a list is expected, not {}"),
        ({"parts": [{"name": "p"}]}, "field parts.0.size is missing"),
        ({"parts": [{"name": "p", "size": "1"}]}, "parts.0.size: a whole number is expected, not '1'"),
        ({"parts": [3]}, "parts.0: an object is expected, not 3"),
        ({"shape": [1]}, "shape: 2 values are expected, not 1"),
        ({"counts": {"n": "1"}}, "counts.n: a whole number is expected, not '1'"),
        ({"kind": "c"}, "kind: "),
        ({"note": 1}, "note: a string is expected, not 1"),
    ],
)
def test_a_wrong_value_names_its_place_and_what_was_expected(changed: dict[str, Any], message: str) -> None:
    value = {"title": "x", "ratio": 1.0, "parts": []} | changed
    with pytest.raises(SftError) as caught:
        Example.from_value(value, "runs/x/f.json")
    assert str(caught.value).startswith(f"runs/x/f.json: damaged: {message}")
    assert str(caught.value).endswith("; next: make example")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_damaged(data: bytes) -> None:
    with pytest.raises(SftError, match=r"^f: damaged: .*; next: make example$"):
        Example.from_bytes(data, "f")


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Example.read(tmp_path / "f")


def test_a_version_is_in_the_file_from_the_second_on_and_says_which_way_to_go() -> None:
    assert json.loads(Second("x").to_bytes()) == {"format": 2, "title": "x"}
    assert Second.from_bytes(Second("x").to_bytes(), "f") == Second("x")
    with pytest.raises(SftError, match="f: format 1 is older or unknown; this code reads format 2; next: make second"):
        Second.from_value({"title": "x"}, "f")
    with pytest.raises(SftError, match="f: format 3 is newer; this code reads format 2; next: update this checkout"):
        Second.from_value({"format": 3, "title": "x"}, "f")


def test_a_number_that_is_not_finite_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Example("x", float("nan"), ()).to_bytes()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1" + "0" * 400])
def test_a_number_that_cannot_be_written_is_not_read(number: str) -> None:
    score = to_json(Score(value=0.5, stderr=None, n=1))
    text = json.dumps({"metrics": {"acc": score}, "samples_sha256": "a", "task_sha256": None}).replace("0.5", number)
    with pytest.raises(SftError, match=r"t.json: damaged: .*next: "):
        TaskResult.from_bytes(text.encode(), "t.json")


def test_a_line_that_is_nested_too_deeply_is_skipped_like_one_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("[" * 100_000 + "\n")
    assert read_metrics(file) == [] and read_lines(TaskResult, file) == []
