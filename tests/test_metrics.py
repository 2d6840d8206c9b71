"""The records of a training: lines of progress, and metrics.jsonl over resumes, damage and deleted checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from published import step_record
from sft.common import columns
from sft.common.errors import SftError
from sft.formats.metrics import Attempt, InitialValidation, SourceUse, read_metrics
from sft.training import metrics
from sft.training.sources import lost_sources


def test_progress_and_clock_read_well() -> None:
    record = step_record(
        7, loss=1.5, lr=1e-4, grad_norm=0.5, tokens_per_s=12345.6, padding=0.02, skipped=True, validation_loss=1.25
    )
    line = metrics.progress_line(record, 300, 12.0)
    assert line == "step   7/300  loss 1.5000  lr 1.0e-04  grad 0.50     12,346 tok/s  SKIPPED  ETA 0:58:36"
    large = replace(record, loss=12.5, grad_norm=99.5, tokens_per_s=1.5e6, mfu=0.401, skipped=False)
    assert len("[train] " + metrics.progress_line(large, 9999, 4.0)) <= columns.WIDTH
    assert metrics.clock(90061) == "25:01:01"


def test_a_resume_cuts_the_metrics_back_to_its_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    header = Attempt(1, 0, 1, "cpu", None, "formula")
    file.write_bytes(b"".join(r.to_bytes() for r in (header, *map(step_record, (1, 2, 3, 4)))) + b'{"step": 5, "lo')
    writer = metrics.MetricsWriter(tmp_path, 2, 10, print)
    writer.write(step_record(3, loss=1.0))
    writer.close()
    assert read_metrics(file) == [header, step_record(1), step_record(2), step_record(3, loss=1.0)]


@pytest.mark.parametrize("damage", ["digit", "tail", "missing", "none"])
def test_records_before_a_checkpoint_are_restored_from_its_copy(tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    writer = metrics.MetricsWriter(tmp_path, 0, 10, said.append, Attempt(1, 0, 1, "cpu", None, "formula"))
    for number in (1, 2, 3):
        writer.write(step_record(number))
    writer.seal(3)
    (tmp_path / "step3").mkdir()
    writer.write(step_record(4))
    writer.close()
    file, sealed = tmp_path / "metrics.jsonl", read_metrics(tmp_path / "metrics.jsonl")[:-1]
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage != "none":
        file.write_bytes(data[:-900] if damage == "tail" else data.replace(b'"loss": 2.0', b'"loss": 2.1', 1))
    metrics.MetricsWriter(tmp_path, 3, 10, said.append).close()
    assert read_metrics(file) == sealed
    assert len(said) == (damage != "none") and all("restored from" in line for line in said)


def test_lost_records_without_a_whole_copy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SftError, match=r"metrics.jsonl: missing, and no copy .* first 3 steps are lost; next:"):
        metrics.MetricsWriter(tmp_path, 3, 10, print)
    writer = metrics.MetricsWriter(tmp_path, 0, 10, print)
    writer.write(step_record(3))
    writer.seal(3)
    writer.close()
    copy = next((tmp_path / ".metrics").iterdir())
    copy.write_bytes(copy.read_bytes() + b" ")
    with pytest.raises(SftError, match=r"damaged, so that nothing proves .*metrics.jsonl; next:"):
        metrics.MetricsWriter(tmp_path, 3, 10, print)


def test_copies_of_deleted_checkpoints_go(tmp_path: Path) -> None:
    writer = metrics.MetricsWriter(tmp_path, 0, 10, print)
    for number in (1, 2, 3, 4):
        writer.write(step_record(number))
        writer.seal(number)
        if number < 3:
            (tmp_path / f"step{number}").mkdir()
    (tmp_path / "step1").rmdir()
    writer.seal(4)
    writer.close()
    assert {p.name.partition("-")[0] for p in (tmp_path / ".metrics").iterdir()} == {"step2", "step4"}


def test_what_each_source_lost_is_reported() -> None:
    uses = [SourceUse("easy", 1000, 40, 960, 0), SourceUse("rare", 24, 0, 48, 40), SourceUse("long", 100, 30, 70, 0)]
    assert [warning.partition(" of its")[0] for warning in lost_sources(uses)] == [
        "warning: rare lost 83%",
        "warning: long lost 30%",
    ]


@pytest.mark.parametrize(("start", "kept"), [(0, 0), (3, 1)])
def test_the_validation_of_the_starting_weights_is_measured_again_only_by_an_attempt_from_step_0(
    tmp_path: Path, start: int, kept: int
) -> None:
    first = metrics.MetricsWriter(tmp_path, 0, 8, print, Attempt(1, 0, 1, "cpu", None, "formula"))
    first.start(InitialValidation(2.5, {"a": 2.5}))
    first.close()
    metrics.MetricsWriter(tmp_path, start, 8, print).close()
    assert sum(isinstance(r, InitialValidation) for r in read_metrics(tmp_path / "metrics.jsonl")) == kept
