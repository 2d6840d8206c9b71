"""What is submitted to Beaker, and what is refused before anything is: specifications, values, secrets, clusters, code."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from beaker_place import HUSH, place
from beaker_server import BUDGET, TOKEN
from conftest import REPO
from sft.common.errors import SftError
from sft.launch import beaker, job
from sft.launch.beaker import connection, scheduler, specification
from sft.launch.doctor import doctor
from sft.launch.launcher import open_scheduler

__all__ = ["place"]  # the fixture
pytestmark = pytest.mark.server

# --- refused before anything is submitted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{user}_SECRET", "{user}_NONE", "TEST_SECRET = 'ann_NONE': the workspace ai2/team has no such secret"),
        ("ai2/team", "ai2/other", "'workspace' = 'ai2/other': no such workspace"),
        (BUDGET, "ai2/oe-none", "'budget' = 'ai2/oe-none': no such budget"),
        ("ann/image", "ann/none", "'image' = 'ann/none': no such image"),
        ("ai2/jupiter", "ai2/juppiter", "'ai2/juppiter': no such cluster; there are ai2/ceres, ai2/jupiter"),
        ("oe-test:", "oe test;rm:", "'mounts' = 'oe test;rm:"),
        ('budget = "', 'budget = "$(touch /tmp/x)', "'budget'"),
        ('runs = "', 'runs = "/other', "is on none of the mounts"),
    ],
)
def test_what_the_cluster_lacks_is_reported(place, old, new, message):
    place.edit(old, new)
    with pytest.raises(SystemExit) as ended:
        place.launch("exit 0")
    assert message in str(ended.value) and "next:" in str(ended.value)
    assert not place.server.experiments


def test_a_changed_tree_and_a_commit_that_is_not_pushed_are_refused(place):
    (place.root / "lib" / "sft" / "new.py").write_text("")
    with pytest.raises(SystemExit, match=r"without the changes in lib/sft/new\.py"):
        place.launch("exit 0")
    place.git("add", "-A")
    place.git("commit", "--quiet", "-m", "y")
    with pytest.raises(SystemExit, match="is not on origin; next: git push"):
        place.launch("exit 0")
    place.git("remote", "set-url", "origin", f"https://ann:{HUSH}@example.org/x.git")
    place.git("update-ref", "refs/remotes/origin/main", "HEAD")
    with pytest.raises(SystemExit) as ended:
        place.launch("exit 0")
    assert "a name or a password" in str(ended.value) and HUSH not in str(ended.value)
    assert not place.server.experiments


def test_a_name_taken_by_an_unfinished_experiment_is_reported(place, monkeypatch, capsys):
    place.server.hold = True
    monkeypatch.setenv("DETACH", "1")
    assert place.launch("exit 3") == 0
    (place.run / ".jobs" / "prepare.json").unlink()  # submitted by another machine
    with pytest.raises(SystemExit) as ended:
        place.launch("exit 3")
    assert "exists already and has not ended" in str(ended.value) and "/ex/01EXPERIMENT" in str(ended.value)
    assert len(place.server.experiments) == 1


def test_the_doctor_says_what_a_launch_would_be_refused_for(place, monkeypatch):
    def rows(stage: str = "prepare") -> dict[str, doctor.Row]:
        made = job.Job.parse(["runs/x", "prepare", "true", "runs/x", "--cluster", "beaker-test"], strict=False)
        return {r.found: r for r in beaker.ask(doctor.Context(made.place, made.recipe, made.cluster, (stage,)))[1]}

    assert [r.state for r in rows().values()] == [doctor.OK]
    place.edit(
        'workspace = "ai2/team"',
        'workspace = "ai2/team"\nevaluate_image = "ann/gone"\nevaluate_secrets = {JUDGE = "no_key"}',
    )
    place.workspace.recipe("x", 'tasks = ["one"]', 'tasks = ["gsm8k"]\nharness = "olmo-eval"')
    assert [r.state for r in rows().values()] == [doctor.OK]  # nothing is evaluated
    wanted = ["'evaluate_image' = 'ann/gone': no such image", "'evaluate_secrets': JUDGE = 'no_key': the workspace"]
    found = rows("evaluate")
    assert [r.state for r in found.values()] == [doctor.RED, doctor.RED]
    assert all(line.startswith(start) for line, start in zip(found, wanted, strict=True))
    place.push()
    made = job.Job.parse(["runs/x", "evaluate", "true", "runs/x", "--cluster", "beaker-test"], strict=False)
    with pytest.raises(SftError) as refused:
        open_scheduler(made.cluster, made.folder).check(made)
    assert all(line in str(refused.value) for line in wanted)
    monkeypatch.setenv("SFT_USER", "bob")
    row = next(iter(rows().values()))
    assert row.state == doctor.RED and "your Beaker account is ann" in row.found and row.next == "SFT_USER=ann make …"
    monkeypatch.setenv("BEAKER_CONFIG", "/nowhere")
    monkeypatch.setattr(connection, "has_token", lambda: False)
    assert [(r.state, r.next[:13]) for r in rows().values()] == [(doctor.RED, "BEAKER_TOKEN=")]


def test_another_account_than_the_users_name_is_reported(place, monkeypatch):
    monkeypatch.setenv("SFT_USER", "bob")
    with pytest.raises(SystemExit, match="is bob, but your Beaker account is ann; next: SFT_USER=ann"):
        place.launch("exit 0")


# --- values, secrets, the specification -------------------------------------------------------------------------------

HOSTILE = ["a b", "$(touch /tmp/beaker-hostile)", "`id`", "'; exit 1; '", '"', "\\", "*", "-n", "", "--", "é\n2"]


def test_hostile_arguments_reach_the_job_unchanged(place):
    out = place.server.folder / "words"
    script = f'printf "%s\\0" "$@" >{out}; exit 3'
    command = ["bash", "-c", script, "0", *HOSTILE, "runs/x", "--cluster", "beaker-test"]
    made = job.Job.parse(["runs/x", "prepare", *command])
    backend = open_scheduler(made.cluster, made.folder)
    id = backend.submit(made)
    while backend.status(id).active:
        time.sleep(0.05)
    there = str(place.server.folder / "weka/oe-test/ann/runs/x")
    assert out.read_bytes().decode().split("\0")[:-1] == [*HOSTILE, there, "--cluster", "beaker-test"]
    assert not Path("/tmp/beaker-hostile").exists()


def test_no_secret_is_in_a_spec_a_record_a_manifest_or_a_log(place):
    done = place.workspace.make("prepare", "RECIPE=x", "CLUSTER=beaker-test")
    dry = place.workspace.make("dry-run", "STAGE=prepare", "RECIPE=x", "CLUSTER=beaker-test", "lr=2e-3")
    everything = [done.stdout, done.stderr, dry.stdout, json.dumps([e.body for e in place.server.experiments.values()])]
    everything += [p.read_text(errors="replace") for p in (place.root / "runs").rglob("*") if p.is_file()]
    assert len(everything) > 8
    for text in everything:
        assert HUSH not in text and TOKEN not in text
    job_saw = b"".join(line for r in place.server.runs.values() for _, line in r.lines)
    assert HUSH.encode() not in job_saw


def test_dry_run_prints_the_spec_that_is_submitted_and_asks_nobody(place, monkeypatch):
    monkeypatch.setenv("BEAKER_CONFIG", "/nowhere")
    dry = place.workspace.make("dry-run", "STAGE=prepare", "RECIPE=x", "CLUSTER=beaker-test").stdout
    assert not place.server.requests
    monkeypatch.setenv("BEAKER_CONFIG", place.server.environment["BEAKER_CONFIG"])
    place.workspace.make("prepare", "RECIPE=x", "CLUSTER=beaker-test")
    _, _, body = dry.partition("\n")
    assert yaml.safe_load(body[body.index("version:") :]) == place.experiment.body
    assert f"--name {place.experiment.message.name}" in dry and "--workspace ai2/team" in dry


def test_the_spec_says_what_gantry_run_would(place):
    """gantry run --weka oe-test:/weka/oe-test --env-secret TEST_SECRET=ann_SECRET --gpus 8 --priority high --budget …"""
    place.edit(
        'clusters = ["ai2/jupiter"]',
        'clusters = ["ai2/jupiter", "ai2/ceres"]\npriority = "high"\ngpus_per_node = 8\nmin_runtime = "1h"',
    )
    made = job.Job.parse(["runs/x", "train", "stages/train.sh", "runs/x", "--cluster", "beaker-test"], strict=False)
    body = yaml.safe_load(scheduler.BeakerScheduler(made.folder, made.cluster).render(made).partition("\n")[2])
    assert {k: body[k] for k in ("version", "budget")} == {"version": "v2", "budget": BUDGET}
    task = body["tasks"][0]
    arguments, environment = task["arguments"], {e["name"]: e for e in task["envVars"]}
    assert arguments[:3] == [f"{place.weka}/ann/runs/x", "train", "2"]
    assert arguments[5:] == ["stages/train.sh", f"{place.weka}/ann/runs/x", "--cluster", "beaker-test"]
    assert task["command"][:2] == ["bash", "-c"]
    assert task["command"][2] == (place.root / "env" / "beaker-job.sh").read_text()
    assert task["image"] == {"beaker": "ann/image"}
    assert task["resources"] == {"gpuCount": 8, "sharedMemory": "10GiB"}
    assert task["context"] == {"priority": "high", "minRuntime": 3600 * 10**9, "autoResume": True}
    assert task["constraints"] == {"cluster": ["ai2/jupiter", "ai2/ceres"]}
    assert task["datasets"] == [{"source": {"weka": "oe-test"}, "mountPath": place.weka}]
    assert task["result"] == {"path": "/results"}
    assert environment["TEST_SECRET"] == {"name": "TEST_SECRET", "secret": "ann_SECRET"}
    assert (
        environment["SFT_REPOSITORY"]["value"].startswith("file://") and len(environment["SFT_COMMIT"]["value"]) == 40
    )
    assert "replicas" not in task and task["hostNetworking"] is False


def test_a_secret_is_found_without_case_and_named_as_the_workspace_spells_it(place):
    """OLMo-core #666: Beaker compares the names of secrets with case over gRPC, and without over HTTP."""
    place.edit(
        'TEST_SECRET = "{user}_SECRET"', 'TEST_SECRET = "{user}_Secret"\n[optional_secrets]\nOTHER = "{user}_NONE"'
    )
    assert place.launch("exit 0") in (0, 1)
    environment = {e["name"]: e for e in place.experiment.body["tasks"][0]["envVars"]}
    assert environment["TEST_SECRET"]["secret"] == "ann_SECRET" and "OTHER" not in environment
    place.server.secrets["ANN_secret"] = "x"
    with pytest.raises(SystemExit, match="has ANN_secret, ann_SECRET, which differ in case alone"):
        place.launch("exit 1")


def test_without_a_budget_the_workspaces_is_charged(place):
    place.edit(f'budget = "{BUDGET}"\n', "")
    made = job.Job.parse(["runs/x", "train", "stages/train.sh", "runs/x", "--cluster", "beaker-test"], strict=False)
    opened = scheduler.BeakerScheduler(made.folder, made.cluster)
    assert "budget" not in yaml.safe_load(opened.render(made).partition("\n")[2])
    assert not opened.missing("env/beaker-test.toml", False)


def test_a_tracker_without_a_key_is_reported(place):
    recipe_file = place.root / "recipes" / "x.toml"
    recipe_file.write_text(
        recipe_file.read_text().replace("[train]", '[train]\nwandb_project = "p"\ncomet_project = "c"')
    )
    place.edit('TEST_SECRET = "{user}_SECRET"', 'TEST_SECRET = "{user}_SECRET"\nCOMET_API_KEY = "{user}_secret"')
    made = job.Job.parse(["runs/x", "train", "stages/train.sh", "runs/x", "--cluster", "beaker-test"], strict=False)
    rows = beaker.ask(doctor.Context(made.place, made.recipe, made.cluster)).rows
    notes = [row for row in rows if "offline" in row.found]
    assert [row.found for row in notes] == [
        "no WANDB_API_KEY in ai2/team: wandb_project is recorded offline, in the training folder"
    ]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("24:00:00", 86400), ("1-00:00:00", 86400), ("2-03:04:05", 183845), ("24h", 86400), ("1h30m", 5400), ("90s", 90)],
)
def test_a_duration_means_what_it_means_to_slurm_and_to_go(written, seconds):
    assert specification.duration(written) == f"{seconds}s"


@pytest.mark.parametrize("written", ["24", "24:00", "1d", "24:00:99", "-1h", "24 h", ""])
def test_a_duration_that_beaker_would_misread_is_refused(written):
    with pytest.raises(SftError, match="next: write it as 24h"):
        specification.duration(written)


def test_a_recipes_time_is_the_specs_timeout_and_one_that_would_be_misread_is_refused_before_anything_is_asked(place):
    recipe_file = place.root / "recipes" / "x.toml"
    recipe_file.write_text(
        recipe_file.read_text() + '\n[on.beaker-test.train]\ntime = "1h30m"\n[on.beaker-test.prepare]\ntime = "24:00"\n'
    )
    place.push()
    made = job.Job.parse(["runs/x", "train", "stages/train.sh", "runs/x", "--cluster", "beaker-test"], strict=False)
    spec = yaml.safe_load(scheduler.BeakerScheduler(made.folder, made.cluster).render(made).partition("\n")[2])
    assert spec["tasks"][0]["timeout"] == 5400 * 10**9
    with pytest.raises(SystemExit, match=r"\[on\.beaker-test\.prepare\] time = .*; next: write it as 24h"):
        place.launch("exit 0")
    assert not place.server.experiments


def test_a_job_waits_for_a_bucket_before_its_stage_starts(place):
    place.edit('clusters = ["ai2/jupiter"]', 'clusters = ["ai2/jupiter"]\nstorage_wait_s = 3600')
    made = job.Job.parse(["runs/x", "train", "stages/train.sh", "runs/x", "--cluster", "beaker-test"], strict=False)
    (task,) = yaml.safe_load(scheduler.BeakerScheduler(made.folder, made.cluster).render(made).partition("\n")[2])[
        "tasks"
    ]
    assert {e["name"]: e.get("value") for e in task["envVars"]}["SFT_STORAGE_WAIT_S"] == "3600"


@pytest.mark.parametrize("file", sorted((REPO / "env").glob("ai2-*.toml")), ids=lambda f: f.stem)
def test_every_shipped_beaker_cluster_makes_a_spec(place, file):
    shutil.copy(file, place.root / "env")
    place.push()
    made = job.Job.parse(["runs/x", "train", "stages/train.sh", "runs/x", "--cluster", file.stem], strict=False)
    backend = scheduler.BeakerScheduler(made.folder, made.cluster)
    (task,) = yaml.safe_load(backend.render(made).partition("\n")[2])["tasks"]
    name = file.stem.replace("-", "/", 1)
    assert task["constraints"] == {"cluster": [name]} and task["resources"]["gpuCount"] == 8
    environment = {e["name"]: e.get("secret") for e in task["envVars"]}
    assert environment["BEAKER_TOKEN"] == "ann_BEAKER_TOKEN" and environment["HF_TOKEN"] == "HF_TOKEN"
    if file.stem == "ai2-augusta":  # it has no disk that outlives a job
        values = {e["name"]: e.get("value") for e in task["envVars"]}
        assert values["SFT_STAGE_ADDRESS"] == f"gs://ai2-llm/ann/olmo-sft/runs/x/train/{made.identity[:16]}"
        assert task["arguments"][0] == "runs/x" and "datasets" not in task
        return
    assert "/weka/oe-training-default" in [d["mountPath"] for d in task["datasets"]]
    assert task["arguments"][0] == "/weka/oe-training-default/ai2-llm/ann/olmo-sft/runs/x"


def test_optional_secrets_are_attached_where_the_workspace_has_them(place):
    place.cluster.write_text(
        place.cluster.read_text() + '[optional_secrets]\nWANDB_API_KEY = "{user}_W"\nCOMET_API_KEY = "{user}_C"\n'
    )
    place.push()
    place.server.secrets["ann_W"] = "w"
    assert place.launch('[ -n "$WANDB_API_KEY" ] && [ -z "${COMET_API_KEY:-}" ] && exit 3') == 3
    assert [e["secret"] for e in place.experiment.body["tasks"][0]["envVars"] if "secret" in e] == [
        "ann_SECRET",
        "ann_W",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('gpu = "A100"', "'gpu' = 'A100': the GPUs of ai2/jupiter are NVIDIA H100"),
        ("gpus_per_node = 16", "'gpus_per_node' = 16: a node of ai2/jupiter has 8"),
        ('gpu = "H100"\ngpus_per_node = 8', None),
    ],
)
def test_the_gpus_of_the_clusters_file_are_compared_with_beakers(place, line, message):
    place.edit('workspace = "ai2/team"', f'workspace = "ai2/team"\n{line}')
    made = job.Job.parse(["runs/x", "prepare", "true", "runs/x", "--cluster", "beaker-test"], strict=False)
    backend = scheduler.BeakerScheduler(made.folder, made.cluster)
    assert backend.missing("F", False) == ([f"F: {message}"] if message else [])
    assert backend.gpus() == {"ai2/jupiter": (8, "NVIDIA H100")}
    case = doctor.Context(made.place, made.recipe, made.cluster)
    assert beaker.ask(case)[0] == "NVIDIA H100"


def test_a_commit_of_another_remote_is_not_pushed(place):
    place.git("remote", "add", "fork", "https://example.org/fork")
    place.git("commit", "--quiet", "--allow-empty", "-m", "z")
    place.git("update-ref", "refs/remotes/fork/main", "HEAD")
    with pytest.raises(SystemExit, match="is not on origin; next: git push"):
        place.launch("exit 0")


def test_a_hub_of_ssh_is_fetched_by_https():
    from sft.launch.code import public_url

    assert public_url("git@github.com:org/x.git") == "https://github.com/org/x.git"
    assert public_url("https://github.com/org/x") == "https://github.com/org/x"
    with pytest.raises(SftError):
        public_url("https://token@github.com/org/x")
