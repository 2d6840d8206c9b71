"""Trackers, each by its own library: what was logged reads back, and none of them can stop training."""

from __future__ import annotations

import json
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from published import step_record
from sft.formats.metrics import StepRecord, read_steps
from sft.formats.steps import TRACKERS
from sft.recipe.schema import Train
from sft.training import metrics
from sft.training.trackers import Trackers

IDENTITY = "0123456789abcdef" * 4
RECORDS = [
    step_record(step, loss=4.0 / step, grad_norm=math.inf, sources={"a": 1.0, "b": 2.0 * step}) for step in (1, 2, 3)
]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", "")  # so that it is as before after the test
    for name in ("WANDB_API_KEY", "COMET_API_KEY", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)


def logged(out: Path, start: int = 0, records: list[StepRecord] = RECORDS, **fields: Any) -> list[str]:
    said: list[str] = []
    trackers = Trackers.start(Train(**fields), "run", IDENTITY, {"train": {"lr": 1e-4}}, out, start, said.append)
    for record in records:
        trackers.record(record.to_value())
    trackers.close()
    assert {p.name for p in out.glob("*")} <= set(TRACKERS), "other names in train's folder are refused by convert"
    return said


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_tensorboard_reads_back_what_was_logged_also_over_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra 'trackers')")
    assert logged(tmp_path, tensorboard=True) == []
    assert dict(scalars(tmp_path / "tensorboard", "loss")) == pytest.approx({1: 4.0, 2: 2.0, 3: 4 / 3})
    assert scalars(tmp_path / "tensorboard", "sources/b") == [(1, 2.0), (2, 4.0), (3, 6.0)]
    again = [step_record(2, loss=7.0), step_record(3, loss=8.0)]  # from the checkpoint of step 1
    assert logged(tmp_path, start=1, records=again, tensorboard=True) == []
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 4.0), (2, 7.0), (3, 8.0)]
    for _ in range(2):  # killed before the first checkpoint: the starting weights are measured again
        logged(tmp_path / "b", records=[step_record(0, loss=9.0)], tensorboard=True)
    assert scalars(tmp_path / "b" / "tensorboard", "loss") == [(0, 9.0)]


@pytest.mark.seconds
def test_comet_archives_what_was_logged_and_nothing_about_the_machine(tmp_path: Path) -> None:
    pytest.importorskip("comet_ml", reason="comet-ml is not installed (extra 'trackers')")
    said = logged(tmp_path, comet_project="tests")
    assert len(said) == 1
    assert "COMET_API_KEY is not set" in said[0]
    [archive] = (tmp_path / "comet").glob("1/*.zip")
    with zipfile.ZipFile(archive) as z:
        messages = [json.loads(line) for line in z.read("messages.json").splitlines()]
        experiment = json.loads(z.read("experiment.json"))
    found = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    losses = {m["step"]: m["metricValue"] for m in found if m["metricName"] == "loss"}
    assert losses == pytest.approx({1: 4.0, 2: 2.0, 3: 4 / 3})
    assert {m["metricName"] for m in found} >= {"sources/a", "sources/b", "lr"}
    assert experiment["project_name"] == "tests"
    assert experiment["offline_id"] == IDENTITY[:40]
    text = json.dumps(messages)
    assert sys.executable not in text
    assert "train|lr" in text or "train_lr" in text
    logged(tmp_path, start=1, records=[step_record(2, loss=7.0)], comet_project="tests")
    [again] = (tmp_path / "comet").glob("2/*.zip")
    assert archive.is_file()
    with zipfile.ZipFile(again) as z:
        assert json.loads(z.read("experiment.json"))["offline_id"] == IDENTITY[:40]
        assert b'"metricValue":7.0' in z.read("messages.json")


@pytest.mark.slow
def test_trackio_keeps_all_steps_of_two_attempts_once_in_a_local_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio_client", reason="trackio is not installed (extra 'trackers')")
    zero = step_record(0, loss=9.0)
    assert logged(tmp_path, records=[zero, *RECORDS], trackio_project="my.project") == []
    logged(tmp_path, records=[zero, *RECORDS], trackio_project="my.project")  # killed before its first checkpoint
    again = [step_record(2, loss=7.0), step_record(3, loss=8.0)]  # from the checkpoint of step 1
    assert logged(tmp_path, start=1, records=again, trackio_project="my.project") == []
    assert (tmp_path / "trackio").is_dir() and capfd.readouterr().out == ""
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_logs("my.project", "run")
    assert [(row["step"], row["loss"]) for row in found] == [(0, 9.0), (1, 4.0), (2, 7.0), (3, 8.0)]
    assert found[1]["sources/b"] == 2.0
    config = SQLiteStorage.get_run_config("my.project", "run")
    assert config is not None and config["train"] == {"lr": 1e-4}


@pytest.mark.slow
def test_wandb_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    [said] = logged(tmp_path, wandb_project="tests")
    assert "WANDB_API_KEY is not set" in said
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-0123456789abcdef.wandb")
    wandb.teardown()  # its process writes the last block when it ends
    assert b"sources/b" in file.read_bytes()


class Broken:
    def __init__(self, closes: bool = False) -> None:
        self.logged, self.closes = 0, closes

    def log(self, values: Any, step: int) -> None:
        self.logged += 1
        if not self.closes:
            raise ConnectionError("no route to host")

    def close(self) -> None:
        raise ConnectionError("still none")


def test_a_tracker_that_fails_is_reported_once_and_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    trackers = Trackers(said.append)
    fails, fails_to_close = Broken(), Broken(closes=True)
    trackers.add("a", lambda: fails)
    trackers.add("b", lambda: fails_to_close)
    trackers.add("c", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    writer = metrics.MetricsWriter(tmp_path, 0, 3, said.append, trackers=trackers)
    for record in RECORDS:
        writer.write(record)
    writer.close()
    assert (fails.logged, fails_to_close.logged) == (1, 3)
    assert said == [
        "warning: [train] c: ZeroDivisionError: division by zero; training continues without it",
        "warning: [train] a: ConnectionError: no route to host; training continues without it",
        "warning: [train] b: ConnectionError: still none; training continues without it",
    ]
    assert read_steps(tmp_path / "metrics.jsonl") == RECORDS


@pytest.mark.parametrize(
    ("fields", "package"),
    [
        ({"wandb_project": "x"}, "wandb"),
        ({"tensorboard": True}, "tensorboard"),
        ({"comet_project": "x"}, "comet_ml"),
        ({"trackio_project": "x"}, "trackio"),
    ],
)
def test_a_missing_package_is_reported_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    *_, said = logged(tmp_path, **fields)
    assert "is not installed; training continues without it" in said
    assert "pip install" in said
