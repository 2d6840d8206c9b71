"""Stages as SkyPilot's managed jobs, through a stand-in for the `sky` command (tests/sky_command.py) that runs them here."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import yaml

import warm
from conftest import REPO, Workspace
from gcs_server import Server as Bucket
from patience import PATIENCE
from pushed import Pushed
from sft.common.errors import SftError
from sft.launch import job as jobs
from sft.launch import run
from sft.launch.sky import client, scheduler, task
from sft.recipe import clusters, recipe
from sft.runner import plan
from sft.storage.transfer import open_storage

HUSH = "the-value-of-a-secret"
SHARED = """
launcher = "sky"
infra = ["k8s"]
storage = "{runs}/.storage"
[env]
ODD = "a $HOME `b` 'c'"
[secrets]
TEST_SECRET = "HUSH"
"""
FAR = SHARED.replace("storage = \"{runs}/.storage\"", 'shared_disk = false\nstorage = "gs://test/storage"\nruns = "gs://test/runs"\n'
                     'install = ["ln -s VENV .venv", \'echo "with $ODD"\']\n')  # fmt: skip


class Place(Pushed):
    """A repository with a remote and a cluster's file, and the folder of the stand-in's jobs."""

    def __init__(self, workspace: Workspace, root: Path):
        self.workspace, self.root, self.sky = workspace, workspace.root, root / "sky"
        self.cluster = self.root / "env" / "sky-test.toml"
        self.write(SHARED)

    def write(self, text: str) -> None:
        self.cluster.write_text(text.replace("VENV", str(self.root / ".venv")))

    def launch(self, script: str, *words: str, stage: str = "prepare") -> int:
        """A stage whose command is a shell script: what a job does when it ends so."""
        command = ["bash", "-c", script, "runs/x", "--cluster", "sky-test", *words]
        try:
            return run.main("sky", ["runs/x", stage, *command])
        except SystemExit:  # with an error as its text
            return 1

    def job(self, *words: str, stage: str = "train") -> jobs.Job:
        command = ["stages/train.sh", "runs/x", "--cluster", "sky-test", *words]
        return jobs.Job.parse(["runs/x", stage, *command], strict=False)

    def task(self, *words: str, stage: str = "train") -> dict:
        """The task that a dry run prints."""
        made = self.job(*words, stage=stage)
        return yaml.safe_load(scheduler.Sky(made.folder, made.cluster).render(made))

    @property
    def jobs(self) -> list[dict]:
        """The records of the stand-in's jobs, the first one first."""
        files = sorted(self.sky.glob("*/record.json"), key=lambda f: int(f.parent.name))
        return [json.loads(f.read_text()) for f in files]

    def calls(self, what: str) -> list[list[str]]:
        file = self.sky / "calls"
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [words for words in found if words[:2] == ["jobs", what]]

    def wait_for(self, state: str) -> None:
        until = time.monotonic() + PATIENCE
        while not self.jobs or self.jobs[-1]["status"] != state:
            assert time.monotonic() < until, f"not {state}: {self.jobs}"
            time.sleep(0.05)


@pytest.fixture
def place(unpushed: Place) -> Place:
    unpushed.add_remote(unpushed.sky.with_name("remote.git"))
    return unpushed


@pytest.fixture
def unpushed(workspace: Workspace, tmp_path_factory, monkeypatch) -> Place:
    """A place without a repository, which takes most of the time."""
    root = tmp_path_factory.mktemp("sky")
    (root / "bin").mkdir()
    (root / "sky").mkdir()
    warm.write_python(root / "python", warm.LIGHT)
    (root / "bin" / "sky").write_text(f'#!/bin/sh\nexec {root}/python {REPO}/tests/sky_command.py "$@"\n')
    (root / "bin" / "sky").chmod(0o755)
    values = {
        "PATH": f"{root}/bin:{os.environ['PATH']}",
        "SKY_FOLDER": str(root / "sky"),
        "HUSH": HUSH,
        "SFT_USER": "ann",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for name in ("DETACH", "DRY_RUN", "SHARDS", "TEST_SECRET"):
        monkeypatch.delenv(name, raising=False)
    made = Place(workspace, root)
    monkeypatch.chdir(workspace.root)
    monkeypatch.setattr(plan, "REPO", workspace.root)
    monkeypatch.setattr(recipe, "CLUSTERS", workspace.root / "env")
    monkeypatch.setattr(scheduler, "POLL_S", 0.1)
    return made


@pytest.mark.slow
def test_a_stage_runs_as_a_job_with_its_variables_and_secrets_and_is_followed(place, capfd):
    code = place.launch('echo "$ODD, $TEST_SECRET for $SFT_JOB in $PWD"; echo "[x] no luck" >&2; exit 3')
    text = capfd.readouterr().out
    assert code == 3 and f"a $HOME `b` 'c', {HUSH} for sky in {place.root}" in text and "\n[x] no luck\n" in text
    assert "pid=" not in text and "\x1b" not in text and "Waiting for task" not in text
    assert "job 1 on sky-test: failed, exit status 3 (failed: Job exited with exit code 3" in text
    assert text.count("no luck") == 2 and "the complete log: sky jobs logs --tail 0 1" in text
    made = (place.root / "runs/x/.jobs/prepare.sky.yaml").read_text()
    assert HUSH not in made and not any(HUSH in " ".join(words) for words in place.calls("launch"))
    assert place.calls("launch")[0][:6] == ["jobs", "launch", "--detach-run", "--yes", "--secret", "TEST_SECRET"]
    assert place.launch("exit 3") == 3 and len(place.jobs) == 2  # how it ended was told once


@pytest.mark.slow
def test_a_job_that_saved_starts_again_and_a_failed_one_as_often_as_retries_says(place, capfd):
    saved = "[ -e saved ] || { touch saved; exit 75; }; echo went on; false"
    place.write(SHARED.replace("infra", "retries = 1\ninfra"))
    assert place.launch(saved) == 1
    text = capfd.readouterr().out
    assert (
        place.jobs[0]["recovery_count"] == 2 and text.count("went on") >= 2
    )  # 75 is no failure, and the failure had one retry
    assert "3" in place.workspace.make("jobs").stdout.splitlines()[1].split()


@pytest.mark.slow
def test_detach_follow_cancel_and_a_lost_answer(place, capfd, monkeypatch):
    monkeypatch.setenv("DETACH", "1")
    script = "trap 'echo saving; exit 75' TERM; echo here; while sleep 0.1; do :; done"
    assert place.launch(script) == 0
    place.wait_for("RUNNING")
    assert " running" in place.workspace.make("jobs").stdout
    (place.root / "runs/x/.jobs/prepare.json").unlink()  # the answer to the launch was lost
    assert place.launch(script) == 0 and len(place.jobs) == 1 and len(place.calls("launch")) == 1
    monkeypatch.delenv("DETACH")

    def cancel() -> None:
        while not place.calls("logs"):  # the launcher follows it
            time.sleep(0.05)
        place.workspace.make("cancel", "RECIPE=x")

    thread = threading.Thread(target=cancel)
    thread.start()
    assert place.launch(script) == jobs.CANCELLED
    thread.join()
    text = capfd.readouterr().out
    assert "here" in text and "job 1 on sky-test: cancelled" in text
    assert scheduler.Sky(place.root / "runs/x/.jobs", place.job().cluster).status("17").state == "gone"


@pytest.mark.slow
def test_nodes_meet_at_the_first_one_and_the_first_one_decides_how_a_job_ends(place, capfd):
    # Another recipe than that of Beaker's tests, which may run at the same time: the port of a job follows from what it makes.
    place.workspace.recipe("x", "lr = 1e-3", "lr = 2e-3")
    place.workspace.use_python_with(
        "torch.distributed", "sft.launch.agree"
    )  # the nodes of a job that fails agree on its end
    place.workspace.make("sync", "RECIPE=x")
    words = 'echo "$SFT_NODE_RANK of $SFT_NODES, $SFT_HEAD, $SFT_PEER"'
    port = place.task("nodes=2")["envs"]["SFT_PORT"]
    assert place.launch(words, "nodes=2", stage="train") == 1  # it left no manifest
    text = capfd.readouterr().out
    assert (
        f"\n0 of 2, 127.0.0.1:{port}, 127.0.0.1\n" in text
        and f"\nnode 1: 1 of 2, 127.0.0.1:{port}, 127.0.0.1\n" in text
    )
    both = "read -r x < <(sleep 0.$SFT_NODE_RANK); [ -e saved$SFT_NODE_RANK ] || { touch saved$SFT_NODE_RANK; exit 75; }; exit 6"
    assert place.launch(both, "nodes=2", stage="train") == 6 and place.jobs[-1]["recovery_count"] == 1
    place.write(SHARED.replace("[env]", '[env]\nSFT_AGREE_S = "1"'))
    # The other node is stopped and saves. Its 75 must not restart a failed training again and again.
    other = "trap 'exit 75' TERM; while [ $SFT_NODE_RANK = 1 ]; do sleep 0.1; done; sleep 0.5; exit 4"
    assert place.launch(other, "nodes=2", stage="train") == 4 and place.jobs[-1]["recovery_count"] == 0


@pytest.mark.seconds
def test_what_the_task_asks_for(place):
    text = SHARED.replace('infra = ["k8s"]', 'infra = ["runpod", "aws/us-east-1"]\ngpus_per_node = 8\ngpu = "A100 80GB"\nuse_spot = true\n'
                          'image = "docker:a/b:c"\ndisk_gb = 500\nvolumes = ["data:/mnt/data"]\nqueue = "team"\nretries = 2\n'
                          'sky = ["--network-tier=best"]')  # fmt: skip
    place.write(text)
    made = place.task("nodes=2", "cpus=12", "memory_gb=64")
    assert made["resources"] == {
        "accelerators": "A100-80GB:8", "cpus": "12+", "memory": "64+", "use_spot": True, "image_id": "docker:a/b:c", "disk_size": 500,
        "job_recovery": {"max_restarts_on_errors": 2, "recover_on_exit_codes": [75]},
        "any_of": [{"infra": "runpod"}, {"infra": "aws/us-east-1"}],
    }  # fmt: skip
    assert made["num_nodes"] == 2 and made["volumes"] == {"/mnt/data": "data"} and "workdir" not in made
    assert (
        made["config"] == {"kubernetes": {"kueue": {"local_queue_name": "team"}}}
        and made["envs"]["ODD"] == "a $HOME `b` 'c'"
    )
    assert made["run"].startswith(
        f"set -euo pipefail\ncd {place.root}\nexec env/sky-job.sh runs/x train stages/train.sh runs/x "
    )
    shown = place.workspace.make("dry-run", "RECIPE=x", "CLUSTER=sky-test").stdout
    assert (
        "# sky jobs launch --detach-run --yes --secret TEST_SECRET --network-tier=best FILE" in shown
        and HUSH not in shown
    )
    assert "accelerators" not in place.task(stage="convert")["resources"]
    assert place.task(stage="evaluate")["resources"]["accelerators"] == "A100-80GB:1"
    assert not place.calls("launch")
    place.write(text.replace("storage =", 'shared_disk = false\nruns = "gs://b/runs"\nstorage ='))
    far = place.task()
    commit = place.git("rev-parse", "HEAD")
    assert (
        far["workdir"] == {"url": place.git("remote", "get-url", "origin"), "ref": commit}
        and far["envs"]["SFT_COMMIT"] == commit
    )
    assert (
        far["envs"]["SFT_STAGE_ADDRESS"] == f"gs://b/runs/x/train/{place.job().identity[:16]}"
        and "cd " not in far["run"]
    )
    assert made["name"].startswith("sft-x-train-") and made["name"] != far["name"]  # another place


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('["k8s"]', '["k8s; rm -rf"]', "'infra' = 'k8s; rm -rf' is not of the form"),
        ("infra =", "gpus_per_node = 8\ninfra =", "'gpu' is missing: SkyPilot asks for GPUs by their type"),
        ("infra =", "shared_disk = false\ninfra =", "'runs' is missing: jobs that do not see this disk keep runs in a bucket"),
        ("infra =", 'install = ["x"]\ninfra =', "'install': for shared_disk = false only"),
        ("infra =", 'volumes = ["data"]\ninfra =', "'volumes' = 'data' is not of the form"),
        ("infra =", 'volumes = ["data"]\ninfra =', "their mount points in jobs, e.g. my-volume:/mnt/data"),
        ("infra =", 'sky = ["--name=x"]\ninfra =', "'sky': '--name=x' is set by the launcher itself"),
        ("infra =", 'sky = ["-n x"]\ninfra =', "'sky' = '-n x' is not of the form"),
        ("infra =", 'time = "1h"\ninfra =', "'time': for launcher = 'slurm' or 'beaker' only, and this is 'sky'"),
        ("infra =", 'partition = "a"\ninfra =', "'partition': for launcher = 'slurm' only, and this is 'sky'"),
        ('"HUSH"', '"a value!"', "'secrets': TEST_SECRET = 'a value!' is not VARIABLE = \"variable of the shell"),
        ("ODD =", "TEST_SECRET =", "TEST_SECRET"),
        ('"HUSH"', '"NOT_SET"', "'secrets': not set here: NOT_SET; next: export them in the shell that runs make"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_launched(unpushed, old, new, message):
    unpushed.write(SHARED.replace(old, new))
    with pytest.raises(SftError, match=re.escape(message)):
        made = unpushed.job()
        scheduler.Sky(made.folder, made.cluster).check(made)
    assert not unpushed.calls("launch")


@pytest.mark.seconds
def test_arrays_and_code_that_is_not_committed_are_refused(place, monkeypatch):
    made = dataclasses.replace(place.job(stage="prepare"), shards=2)
    with pytest.raises(SftError, match="jobs of SkyPilot have no arrays"):
        scheduler.Sky(made.folder, made.cluster).check(made)
    place.write(FAR)
    (place.root / "lib/sft/new.py").write_text("")
    made = place.job()
    with pytest.raises(SftError, match="jobs run the commit"):
        scheduler.Sky(made.folder, made.cluster).check(made)


def test_optional_secrets_that_are_not_set_here_are_left_out(unpushed, monkeypatch):
    unpushed.write(SHARED + '[optional_secrets]\nONE = "FIRST_TOKEN"\nTWO = "SECOND_TOKEN"\n')
    monkeypatch.delenv("FIRST_TOKEN", raising=False)
    monkeypatch.setenv("SECOND_TOKEN", "x")
    assert list(task.secrets(unpushed.job().cluster)) == ["TEST_SECRET", "TWO"]


@pytest.mark.slow
def test_the_doctor_says_what_is_missing_by_name(place, monkeypatch):
    place.write(FAR)
    place.push()

    def doctor(ok: bool) -> str:
        done = place.workspace.make("doctor", "RECIPE=x", "CLUSTER=sky-test", ok=ok)
        return " ".join((done.stdout + done.stderr).split())

    table = doctor(True)
    assert "SkyPilot: k8s" in table and "0.14.1: Kubernetes [compute]" in table and "ok code commit" in table
    place.write(FAR.replace('"k8s"', '"lambda"'))
    place.push()
    assert "RED SkyPilot 0.14.1: cannot use lambda: no key. next: sky check lambda" in doctor(False)
    monkeypatch.delenv("HUSH")
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])
    table = doctor(False)
    assert "RED secrets not set here: HUSH next: export HUSH=…" in table
    assert (
        'RED scheduler sky: not found: the launcher needs SkyPilot on this machine next: pip install "skypilot[kubernetes]"'
        in table
    )


@pytest.mark.server
@pytest.mark.slow
def test_without_a_shared_disk_stages_pass_through_the_bucket(place, monkeypatch):
    place.workspace.use_warm_python()  # each process imports the client of buckets
    with Bucket() as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        text = FAR.replace("[env]", f'stages = ["train", "convert"]\n[env]\nSTORAGE_EMULATOR_HOST = "{bucket.url}"')
        place.write(text.replace('storage = "gs://test/storage"', 'storage = "{runs}/.storage"'))
        place.push()
        done = place.workspace.make("train", "RECIPE=x", "CLUSTER=sky-test")
        folder = place.root / "runs/x/train"
        where = json.loads((folder / "elsewhere.json").read_text())["where"]
        assert where == f"gs://test/runs/x/train/{place.job().identity[:16]}" and "with a $HOME `b` 'c'" in done.stdout
        assert open_storage(where).read("manifest.json") == (folder / "manifest.json").read_bytes()
        assert (folder / "out").is_file() and "1 files fetched to runs/x/train" in done.stdout
        assert json.loads((folder / "manifest.json").read_text())["provenance"]["git"] == place.git("rev-parse", "HEAD")
        uploaded = {name.split("/")[2] for name in bucket.objects if name.startswith("runs/x/")}
        assert uploaded == {"prepare", "sync", "train"}
        place.workspace.make("convert", "RECIPE=x", "CLUSTER=sky-test")
        assert (place.root / "runs/x/convert/out").is_file() and len(place.jobs) == 2


@pytest.mark.seconds
def test_an_archive_of_the_commit_travels_as_a_folder(place):
    place.write(FAR.replace("[env]", 'code = "dataset"\n[env]'))
    place.push()
    made = place.job()
    scheduler.Sky(made.folder, made.cluster).check(made)
    folder = Path(place.task()["workdir"])
    tracked = set(place.git("ls-files").splitlines())
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == tracked
    assert place.git("rev-parse", "HEAD")[:12] in folder.name and os.access(folder / "env/sky-job.sh", os.X_OK)


def test_reasons_and_states_are_read_as_skypilot_writes_them():
    codes = {"Job exited with exit code 3 (user program failure)": 3, "Job exited with exit codes [0, 137, 3]": 3,
             "exit codes [0, 143]": 143, "no room anywhere": 1}  # fmt: skip
    assert {reason: client.exit_code(reason) for reason in codes} == codes
    assert client.status_of({"status": "RECOVERING", "recovery_count": 1}).active
    assert client.status_of({"status": "FAILED_SETUP", "failure_reason": "x"}).state == "failed"
    with pytest.raises(SftError, match=r"has the state 'DREAMING'; next: sky --version"):
        client.status_of({"status": "DREAMING"})


def test_a_silent_server_is_asked_again_and_an_unknown_answer_is_an_error(place, monkeypatch):
    def answers(text: str) -> None:
        folder = Path(os.environ["PATH"].partition(":")[0])
        (folder / "sky").write_text(f"#!/bin/sh\n{text}\n")

    answers("echo 'sky.exceptions.ApiServerConnectionError: Could not connect to SkyPilot API server' >&2; exit 1")
    with pytest.raises(jobs.LostConnection, match="Could not connect"):
        client.queue()
    answers("echo 'ValueError: no such option' >&2; exit 1")
    with pytest.raises(SftError, match=r"sky jobs queue .* failed with exit status 1:\nValueError: no such option"):
        client.queue()
    answers("echo nothing")
    with pytest.raises(SftError, match="not the list of jobs, but 'nothing"):
        client.queue()
    answers("echo started a server; echo '[]'")
    assert client.queue() == []


def test_the_example_files_are_right() -> None:
    for name in ("sky-kubernetes", "sky-spot"):
        task.check_cluster(name, clusters.load_cluster(REPO / "env" / f"{name}.toml"))
