"""Data sets of tasks travel through a bucket to an evaluation that cannot reach the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import REPO
from evaluating import forget_hub_settings
from gcs_server import Server
from patience import PATIENCE
from sft.common import machine
from sft.evaluation import evaluate
from sft.recipe import recipe
from sft.recipe.schema import Cluster
from sft.runner.plan import Place, task_data
from sft.sync import task_data as travelling

pytestmark = pytest.mark.server
THERE = Cluster(storage="gs://bucket/root", launcher="beaker", shared_disk=False)
TASK = """
task: capitals
dataset_path: org/capitals
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
"""
FETCHED = """
import shutil, sys
from datasets.packaged_modules.json.json import Json
made = Json(cache_dir=sys.argv[2] + ".made", dataset_name="capitals", config_name="default", hash="0123abcd", data_files={"train": [sys.argv[2]]})
made.download_and_prepare()
shutil.copytree(made.cache_dir, sys.argv[1] + "/org___capitals/default/0.0.0/0123abcd")
"""
"""What `datasets` leaves in its cache after it has fetched org/capitals from the hub."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Server:
    with Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def two_machines(tmp_path: Path, **fields: object) -> tuple[recipe.Recipe, Place, Place]:
    """A recipe, this machine and that of the job: they share nothing."""
    here, there = (tmp_path / name for name in ("here", "there"))
    for root in (here, there):
        shutil.copytree(REPO / "recipes/tasks", root / "data/my_tasks", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "data/my_tasks/capitals.yaml").write_text(TASK)
    loaded = recipe.load(REPO / "recipes/smoke.toml")
    options = replace(loaded.evaluate, tasks=("capitals",), task_dir="my_tasks", **fields)
    return replace(loaded, evaluate=options), *(
        Place(root / "runs", (root / "data",), "there") for root in (here, there)
    )


def python(*words: str, **variables: str) -> str:
    ran = subprocess.run(
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": str(REPO / "lib"), **variables},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_a_data_set_that_was_fetched_here_is_read_there_without_the_hub(bucket: Server, tmp_path: Path) -> None:
    r, here, there = two_machines(tmp_path)
    rows = [{"question": "France?", "answer": "Paris"}, {"question": "Peru?", "answer": "Lima"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    python("-c", FETCHED, str(task_data(here, r)), str(tmp_path / "rows.jsonl"))
    travelling.send(here, r, THERE, print)
    assert any(name.startswith(f"root/task-data/{task_data(here, r).name}/org___capitals/") for name in bucket.objects)
    shutil.rmtree(here.runs)
    (tmp_path / "rows.jsonl").unlink()
    folder = travelling.bring(there, r, THERE, print)
    asked = {"tasks": ["capitals"], "folder": str(there.data[0] / "my_tasks"), "data": {}, "cache": str(folder)}
    out = python("-m", "sft.evaluation.task_check", json.dumps(asked), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert json.loads(out) == {"task": "capitals", "documents": 2}


def test_the_hub_is_turned_off_only_where_the_data_came_from_the_storage(
    bucket: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_hub_settings(monkeypatch)
    r, here, there = two_machines(tmp_path)
    (task_data(here, r) / "org___x").mkdir(parents=True)
    (task_data(here, r) / "org___x/data.arrow").write_bytes(b"arrow")
    (task_data(here, r) / "org___x/data.lock").touch()
    remote = replace(r, evaluate=replace(r.evaluate, tasks=("arc_easy",)))  # a task that is not of the folder
    evaluate.go_offline(remote.evaluate, there.data[0], tmp_path, travelling.bring(there, r, THERE, print))
    assert "HF_HUB_OFFLINE" not in os.environ  # nothing was sent
    travelling.send(here, r, THERE, print)
    folder = travelling.bring(there, r, THERE, print)
    assert (folder / "org___x/data.arrow").read_bytes() == b"arrow" and not (folder / "org___x/data.lock").exists()
    bucket.objects.clear()
    assert travelling.bring(there, r, THERE, print) == folder  # it is there
    evaluate.go_offline(remote.evaluate, there.data[0], tmp_path, folder)
    assert [os.environ[name] for name in machine.OFFLINE] == ["1"] * 4
    assert os.environ["HF_DATASETS_CACHE"] == str(folder)


def test_nothing_travels_where_jobs_see_this_disk(bucket: Server, tmp_path: Path) -> None:
    r, here, _ = two_machines(tmp_path)
    task_data(here, r).mkdir(parents=True)
    (task_data(here, r) / "x").touch()
    for cluster in (replace(THERE, shared_disk=True), replace(THERE, launcher="local")):
        travelling.send(here, r, cluster, print)
    assert not bucket.objects
