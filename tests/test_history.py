"""The history of the benches: a record for each run, and a baseline that a worse number fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import history
from conftest import REPO


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(history, "HERE", tmp_path)
    monkeypatch.setattr(history, "HISTORY", tmp_path / "history")
    monkeypatch.setattr(history, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(history, "RESULTS", tmp_path / "RESULTS.md")
    (tmp_path / "RESULTS.md").write_text(f"above\n{history.BEGIN}\nold\n{history.END}\nbelow\n")
    monkeypatch.setattr(history, "machine", lambda: "a box")
    return tmp_path


def bench(place: Path, text: str) -> None:
    (place / "bench_two_words.py").write_text(text)


def test_each_run_appends_its_numbers_with_commit_and_machine(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(place, "import json, sys; print('a table'); print(json.dumps({'ratio': 2.0, 'argv': sys.argv[1:]}))")
    assert history.main(["run", "two-words"]) == 0
    assert history.main(["run", "two-words", "--documents", "5"]) == 0
    assert capsys.readouterr().out.startswith("a table\n")
    first, second = history.records("two-words")
    assert first["numbers"]["ratio"] == 2.0 and first["machine"] == "a box" and first["options"] == []
    assert second["numbers"]["argv"] == second["options"] == ["--documents", "5"]
    text = (place / "RESULTS.md").read_text()
    assert text.startswith("above\n") and text.endswith(f"{history.END}\nbelow\n") and "old" not in text
    assert "| `make bench-two-words` | ratio 2 |" in text and "with `--documents 5`" in text
    assert set(first) == {"time", "commit", "edits", "machine", "python", "torch", "options", "numbers"}


@pytest.mark.parametrize(
    ("text", "status"), [("raise SystemExit(3)", 3), ("print('no numbers')", 1), ("print([1])", 1)]
)
def test_a_bench_that_fails_or_ends_in_no_numbers_leaves_no_record(place: Path, text: str, status: int) -> None:
    bench(place, text)
    assert history.main(["run", "two-words"]) == status
    assert history.records("two-words") == []


def keep(place: Path, machine: str = "a box", **numbers: Any) -> None:
    (place / "history").mkdir(exist_ok=True)
    with (place / "history" / "x.jsonl").open("a") as file:
        file.write(
            json.dumps(
                {
                    "time": "2026-11-30",
                    "commit": "0" * 40,
                    "edits": False,
                    "machine": machine,
                    "options": [],
                    "numbers": numbers,
                }
            )
            + "\n"
        )


@pytest.mark.parametrize(
    ("rule", "value", "status", "said"),
    [
        ({"value": 10, "noise": 0.1, "better": "higher"}, 9.1, 0, "ok"),
        ({"value": 10, "noise": 0.1, "better": "higher"}, 8.9, 1, "WORSE"),
        ({"value": 10, "noise": 0.1, "better": "higher"}, 99, 0, "ok"),
        ({"value": 10, "noise": 0.1, "better": "lower"}, 10.9, 0, "ok"),
        ({"value": 10, "noise": 0.1, "better": "lower"}, 11.5, 1, "WORSE"),
        ({"value": 10, "noise": 0.1, "better": "lower", "machine": "another"}, 99, 0, "not measured here"),
        ({"value": 10, "noise": 0.1, "better": "lower", "machine": "a box"}, 99, 1, "WORSE"),
        ({"value": 10, "noise": 0.1, "better": "lower"}, None, 1, "GONE"),
    ],
)
def test_a_number_that_is_worse_by_more_than_its_noise_fails(
    place: Path, capsys: pytest.CaptureFixture[str], rule: dict[str, Any], value: float | None, status: int, said: str
) -> None:
    (place / "baseline.json").write_text(json.dumps({"x": {"a.b": rule}}))
    keep(place, a={"b": 1000})  # an older record
    keep(place, a={"b": value})
    assert history.main(["check"]) == status
    assert said in capsys.readouterr().out


def test_results_has_the_newest_numbers_of_each_machine(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(place, a={"b": 1000.0}, equal=True)
    keep(place, a={"b": 2 / 3}, equal=False)
    keep(place, machine="another", n=1234567)
    assert history.main(["results"]) == 0
    rows = [line for line in (place / "RESULTS.md").read_text().splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[1] for row in rows] == ["a.b 0.6667, equal no", "n 1,234,567"]
    (place / "RESULTS.md").write_text("no marks")
    assert history.main(["results"]) == 1 and "RESULTS.md has no lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "first", "second"),
    [
        ({"ours": {"speed": 1000, "loss": [1, 2]}, "a peer": {"speed": 4.5, "of": {"gb": 0.5}}}, "ours", "a peer"),
        ([{"name": "x", "speed": 1000, "loss": [1, 2]}, {"speed": 4.5, "of": {"gb": 0.5}}], "1. x", "2. "),
    ],
)
def test_objects_in_an_object_or_a_list_are_a_table_of_their_own(
    place: Path, value: Any, first: str, second: str
) -> None:
    keep(place, ratio=2.5, ways=value)
    assert history.main(["results"]) == 0
    summary, below = (place / "RESULTS.md").read_text().split("`make bench-x`, 00000000:\n\n")
    assert "| `make bench-x` | ratio 2.5 | 00000000" in summary
    head = "| ways | speed | loss | of.gb |\n| --- | --- | --- | --- |\n"
    assert below.startswith(f"{head}| {first} | 1,000 | 1 / 2 |  |\n| {second} | 4.5 |  | 0.5 |\n")


def test_the_numbers_in_results_are_the_newest_of_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "HISTORY", REPO / "benchmarks" / "history")
    written = (REPO / "RESULTS.md").read_text().partition(history.BEGIN)[2].partition(history.END)[0]
    assert written == "\n" + history.table(), "next: make results"


def test_a_bench_without_a_record_or_a_baseline_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "baseline.json").write_text('{"x": {"r": {"value": 1, "noise": 0, "better": "higher"}}}')
    assert history.main(["check", "x"]) == 0 and "next: make bench-x" in capsys.readouterr().out
    assert history.main(["check", "y"]) == 1 and "no baseline of y" in capsys.readouterr().err


def test_the_baseline_names_benches_that_exist_and_numbers_that_they_gave() -> None:
    folder = REPO / "benchmarks"
    baseline = json.loads((folder / "baseline.json").read_text())
    for name, rules in baseline.items():
        assert (folder / f"bench_{name.replace('-', '_')}.py").is_file()
        kept = [json.loads(line) for line in (folder / "history" / f"{name}.jsonl").read_text().splitlines()]
        for number, rule in rules.items():
            assert rule["better"] in ("higher", "lower") and 0 <= rule["noise"] < 1
            assert any(history.find(r["numbers"], number) is not None for r in kept), number
