"""A cluster without a disk that outlives its jobs: runs in a bucket, brought into each job and sent back from it."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from beaker_place import Place, place
from conftest import REPO
from gcs_server import Server as Bucket
from published import publish_step
from sft.common.errors import SftError
from sft.formats import manifest
from sft.launch import bucket_runs
from sft.storage.transfer import open_storage

pytestmark = [pytest.mark.server, pytest.mark.slow]

__all__ = ["place"]  # the fixture
LAUNCHES_ALONE = False
RUN = "smoke_steps-16"
HARDWARE = "\n[on.beaker-test.train]\nnodes = 2\nprocesses = 1\nmicrobatch_tokens = 512\nthreads = 1\n"


@pytest.fixture
def bucket(monkeypatch):
    with Bucket() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


@pytest.fixture
def augusta(place: Place, bucket: Bucket) -> Place:
    """The cluster's file as env/ai2-augusta.toml says it, with the loopback bucket; the real stages and the smoke recipe."""
    text = place.cluster.read_text()
    text = text.replace(
        f'storage = "{place.weka}/storage"', 'storage = "gs://test/{user}/olmo-sft"\nstages = ["train", "convert"]'
    )
    text = text.replace(f'runs = "{place.weka}/{{user}}/runs"', 'runs = "gs://test/{user}/olmo-sft/runs"')
    text = text.replace(f'mounts = ["oe-test:{place.weka}"]\n', "")
    text = text.replace("[env]\n", f'[env]\nSTORAGE_EMULATOR_HOST = "{bucket.url}"\nOMP_NUM_THREADS = "1"\n')
    assert place.weka not in text
    place.cluster.write_text(text)
    place.workspace.use_real_stages()
    shutil.copytree(REPO / "recipes", place.root / "recipes", dirs_exist_ok=True)
    recipe = place.root / "recipes" / "smoke.toml"
    recipe.write_text(recipe.read_text() + HARDWARE)
    place.push()
    return place


def kept_steps(bucket: Bucket) -> list[str]:
    names = [n for n in list(bucket.objects) if "/train/" in n and n.endswith("/manifest.json")]
    return sorted(n.split("/")[-2] for n in names if "step" in n.split("/")[-2])


def test_a_run_without_a_lasting_disk_survives_a_preemption_and_its_model_is_made_from_what_the_bucket_has(
    augusta, bucket
):
    words = ("RECIPE=smoke", "CLUSTER=beaker-test", "steps=16", "save_every=4", "validate_every=0")

    def preempt() -> None:
        """Both nodes, once the first step is kept."""
        while not kept_steps(bucket):
            time.sleep(0.02)
        for run in list(augusta.server.runs.values()):
            augusta.server.preempt(run)

    threading.Thread(target=preempt, daemon=True).start()
    done = augusta.workspace.make("train", *words)
    assert len(augusta.server.experiments) == 1 and len(augusta.server.runs) == 4, done.stdout
    folder = augusta.root / "runs" / RUN / "train"
    where = json.loads((folder / "elsewhere.json").read_text())["where"]
    assert where.startswith(f"gs://test/ann/olmo-sft/runs/{RUN}/train/")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    begins = [r["from_step"] for r in records if "attempt" in r]
    assert [r["attempt"] for r in records if "attempt" in r] == [1, 2], done.stdout
    assert begins[0] == 0 and 4 <= begins[1] < 16
    assert [r["step"] for r in records if "step" in r] == list(range(1, 17))
    # What the SIGTERM saved was sent too, although its step may be no multiple of save_every.
    assert f" {begins[1]}/16 " in done.stdout and f"continuing from step {begins[1]} of {where}" in done.stdout
    there = open_storage(where)
    made = manifest.load(folder / manifest.NAME)
    assert there.read(manifest.NAME) == (folder / manifest.NAME).read_bytes()
    assert {e.path for e in made.outputs} <= set(there.list())
    # Each node has written to a disk of its own and sent its part; the step is whole all the same.
    parts = {n.split("/parts/")[1].split("/")[0] for n in bucket.objects if "/parts/" in n}
    assert {p.partition("-")[0] for p in parts} >= {"step4", f"step{begins[1]}", "step16"}
    assert f"uploaded step16 to {where}" in done.stdout or "this node's part of step16" in done.stdout
    shards = {f"step16/model_and_optim/__{rank}_0.distcp" for rank in (0, 1)}
    assert shards <= {e.path for e in made.outputs} and "2 x cpu" in done.stdout

    done = augusta.workspace.make("convert", *words)
    model = augusta.root / "runs" / RUN / "convert"
    assert (model / manifest.NAME).is_file() and len(augusta.server.experiments) == 2
    whole = json.loads((model / "elsewhere.json").read_text())["where"]
    assert open_storage(whole).read(manifest.NAME) == (model / manifest.NAME).read_bytes()
    specs = [e.body["tasks"][0] for e in augusta.server.experiments.values()]
    variables = [{v["name"]: v.get("value") for v in task["envVars"]} for task in specs]
    assert variables[1]["SFT_INPUT_train"] == where and variables[1]["SFT_STAGE_ADDRESS"] == whole
    assert variables[0]["SFT_INPUT_prepare"].startswith("gs://test/ann/olmo-sft/datasets/")  # not sent a second time
    travelled = {d.message.name.rsplit("-", 1)[0] for d in augusta.server.datasets.values()}
    assert "olmo-sft-sync" in travelled and "olmo-sft-prepare" not in travelled
    # Everything again, from what the bucket has.
    shutil.rmtree(folder)
    augusta.workspace.make("fetch", "STAGE=train", *words)
    assert manifest.is_whole(folder) and {"step4", f"step{begins[1]}"} <= {p.name for p in folder.iterdir()}


def test_checkpoints_are_evaluated_inside_of_the_training_job_where_no_other_job_sees_them(augusta, bucket):
    """Two nodes with a disk each: the one that evaluates fetches the shards of the other, and nothing else, from the bucket."""
    words = ("steps=4", "save_every=2", "ephemeral_every=0", "validate_every=0", "every=2", "every_limit=1", "min_stop_rate=0",
             "max_empty_fraction=1", "validation_documents=2", "keep=1")  # fmt: skip
    done = augusta.workspace.make("train", "RECIPE=smoke", "CLUSTER=beaker-test", *words)
    assert len(augusta.server.experiments) == 1, done.stdout
    (file,) = (augusta.root / "runs").glob("smoke_*/train/evaluations.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["step"] for r in found] == [2, 4] and all(r["validation"]["documents"] == 2 for r in found), done.stdout
    parts = {n.split("/parts/")[1].split("/")[0] for n in bucket.objects if "/parts/" in n}
    assert {p.partition("-")[0] for p in parts} == {"step2", "step4"}  # each node has sent its own files
    asked = {name.split("/train/")[1].partition("/")[2] for operation, name, _ in bucket.requests if operation == "download"
             and "/train/" in name and re.search(r"/step\d+/(model_and_optim|train)/", name)}  # fmt: skip
    assert asked == {f"step{step}/model_and_optim/__1_0.distcp" for step in (2, 4)}


def test_the_best_step_is_fetched_beside_the_final_one(bucket, tmp_path):
    there, best = "gs://test/run/train/0123456789abcdef", tmp_path / "train/step2"
    bucket_runs.fetch_best_name(there, tmp_path / "train", tmp_path)
    assert not (tmp_path / "train").exists()  # training has chosen none
    made = tmp_path / "made"
    (made / "model_and_optim").mkdir(parents=True)
    (made / "model_and_optim/__0_0.distcp").write_bytes(b"weights")
    publish_step(made, 2, ["model_and_optim/__0_0.distcp"])
    bucket_runs.send_folder(made, f"{there}/step2", tmp_path)
    open_storage(there).write("BEST", b"step2\nvalidation_loss 0.5\n")
    bucket_runs.fetch_best_name(there, tmp_path / "train", tmp_path)
    bucket_runs.fetch_best(there, tmp_path / "train", tmp_path)
    assert (best / "model_and_optim/__0_0.distcp").read_bytes() == b"weights" and (best / manifest.NAME).is_file()
    open_storage(there).write("BEST", b"step4\nvalidation_loss 0.25\n")
    bucket_runs.fetch_best_name(there, tmp_path / "train", tmp_path)
    with pytest.raises(SftError, match=f"{there}/step4: not found, and BEST names it; next: checkpoint=final"):
        bucket_runs.fetch_best(there, tmp_path / "train", tmp_path)


def test_a_job_whose_inputs_are_not_those_of_its_submission_makes_nothing(augusta, bucket, monkeypatch):
    monkeypatch.setenv("SFT_STAGE_ADDRESS", "gs://test/runs/smoke/prepare/0123456789abcdef")
    command = ["x", "runs/smoke", "--cluster", "beaker-test"]
    with pytest.raises(
        SftError, match=r"this job would make [0-9a-f]{16}: its recipe or inputs are not those of the sub"
    ):
        bucket_runs.fetch(Path("runs/smoke"), "prepare", command)
    monkeypatch.setenv("SFT_INPUT_prepare", "gs://test/nothing/there")
    with pytest.raises(
        SftError, match=r"gs://test/nothing/there/manifest\.json: not found; next: on your machine remove"
    ):
        bucket_runs.fetch(Path("runs/smoke"), "sync", command)
