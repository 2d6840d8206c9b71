"""Stages as jobs of a real Slurm on this machine: a controller and three nodes from Debian's packages (tests/slurm.py).

The stages are a few lines on the real runner; tests/test_slurm_stages.py has the real ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import REPO, Workspace
from patience import PATIENCE
from slurm_place import program, record, slurm, start, until, workspace

__all__ = ["slurm", "workspace"]  # the fixtures
pytestmark = pytest.mark.slurm

SAVES_ON_SIGNAL = """
saved = Path('saved')
def save(*_):
    saved.write_text(os.environ['SFT_JOB'])
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
print('resuming from', saved.read_text() if saved.exists() else 'nothing', flush=True)
while not saved.exists(): time.sleep(0.05)
"""
HOSTILE = "a b'c\"d$HOME `e` %j #f;g ünï"


@pytest.fixture(scope="module")
def short_of_time(slurm, tmp_path_factory):
    """Two jobs of one minute, on a node of their own while the other tests run: one does not hear that its time is up."""
    workspace = Workspace(tmp_path_factory.mktemp("short"))
    (workspace.root / "env/mine.toml").write_text(
        'launcher = "slurm"\nstorage = "{runs}/.s"\npartition = "aside"\ntime = "1"\nnotice_s = 15\n'
        'stages = ["prepare", "train"]\n'
    )
    workspace.recipe("y", "lr = 1e-3", "lr = 2e-3\nseed = 9")
    workspace.recipe("z", 'tokenizer = "tok"', 'tokenizer = "tok"\nseed = 7')
    workspace.make("sync", "RECIPE=y")
    program(workspace, "prepare", "print('no hurry', flush=True)\ntime.sleep(600)")
    program(workspace, "train", SAVES_ON_SIGNAL)
    workspace.makes = [
        start(workspace, goal, f"RECIPE={r}", "CLUSTER=mine") for goal, r in (("prepare", "z"), ("train", "y"))
    ]
    yield workspace
    for process in workspace.makes:
        process.kill()


def test_every_stage_runs_as_a_job_and_the_second_make_submits_nothing(workspace, short_of_time):
    stages = ("prepare", "sync", "train", "convert", "evaluate")
    out = workspace.make("all", "RECIPE=x", "CLUSTER=slurm").stdout
    assert workspace.ran() == [f"{s} x" for s in (*stages, "report")]
    for stage in stages:
        assert f"[{stage}] job {record(workspace, stage).job} is done" in out
    log = next((workspace.root / "runs/x/.jobs").glob("train-*.attempt-01.log")).read_text()
    assert re.match(r"--- attempt 1 of job \d+ on n\d, ", log) and "[train] done in" in out
    workspace.make("-q", "all", "RECIPE=x", "CLUSTER=slurm")
    late = ["env/slurm.sh", "runs/x", "sync", ".venv/bin/python", "stages/sync.py", "runs/x", "--cluster", "slurm"]
    assert (
        "another make has finished it"
        in subprocess.run(late, cwd=workspace.root, capture_output=True, text=True, check=True).stdout
    )
    listed = workspace.make("jobs").stdout
    assert len(re.findall(r"^x +(?:prepare|sync|train|convert|evaluate) +slurm .* 1 +done$", listed, re.M)) == 5
    workspace.make("verify", "RUN=x")


def test_a_cluster_may_leave_stages_to_this_machine(workspace):
    (workspace.root / "env/mine.toml").write_text('launcher = "slurm"\nstorage = "{runs}/.s"\nstages = ["train"]\n')
    out = workspace.make("train", "RECIPE=x", "CLUSTER=mine").stdout
    assert [p.name for p in (workspace.root / "runs/x/.jobs").glob("*.json")] == ["train.json"]
    assert "env/local.sh runs/x sync" in out and "env/slurm.sh runs/x train" in out


def test_a_time_limit_that_ends_before_the_notice_is_refused_before_submission(workspace):
    cluster = 'launcher = "slurm"\nstorage = "{runs}/.s"\ntime = "2:00"\n'
    (workspace.root / "env/mine.toml").write_text(cluster)
    for goal in ("dry-run", "train"):
        refused = workspace.make(goal, "RECIPE=x", "CLUSTER=mine", ok=False)
        assert "time = '2:00' is 120 s, and notice_s = 120" in refused.stdout + refused.stderr
    (workspace.root / "env/mine.toml").write_text(cluster + "notice_s = 60\n")
    workspace.make("dry-run", "RECIPE=x", "CLUSTER=mine")


def test_dry_run_prints_the_script_and_submits_nothing(workspace):
    (workspace.root / "env/mine.toml").write_text(
        'launcher = "slurm"\nstorage = "{runs}/.s"\npartition = "gpu"\naccount = "a1"\nqos = "long"\ntime = "24:00:00"\n'
        'gpus_per_node = 8\nsbatch = ["--exclusive", "--constraint=ib&h100"]\n[env]\nODD = "a \'b\'"\n'
    )
    out = workspace.make(
        "dry-run", "RECIPE=x", "CLUSTER=mine", "nodes=2", "train.memory_gb=64", "cpus=12", "prepare.partition=cpu"
    ).stdout
    train = out[out.index("# train of the run x") :]
    for option in (
        "job-name=x-train", "nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "cpus-per-task=12", "mem=64G", "partition=gpu",
        "account=a1", "qos=long", "time=24:00:00", "exclusive", "constraint=ib&h100", "signal=B:USR1@120", "requeue",
    ):  # fmt: skip
        assert f"#SBATCH --{option}\n" in train, option
    assert (
        out.count("--exclusive") == 3
    )  # once in each script: `cpus` shares the node, but the cluster's own options stay
    whole = workspace.make("dry-run", "RECIPE=x", "CLUSTER=mine").stdout
    assert "#SBATCH --mem=0\n" in whole[whole.index("# train of the run x") :]
    prepare = out[: out.index("# sync of the run x")]
    assert "--partition=cpu\n" in prepare and "--gpus" not in prepare and "--nodes=1\n" in prepare
    assert not (workspace.root / "runs").exists() and workspace.ran() == []
    (workspace.root / "script").write_text("#!/bin/bash\n" + train)
    parts = subprocess.run(
        ["make", "dry-run", "STAGE=prepare", "RECIPE=x", "CLUSTER=mine"], cwd=workspace.root, env=workspace.environment | {"SHARDS": "2"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    jobs = workspace.root / "runs/x/.jobs"
    assert f"; by hand: sbatch {jobs}/prepare-part.sbatch\n" in parts
    assert (
        f"; by hand: sbatch --dependency=afterok:$(sbatch --parsable {jobs}/prepare-part.sbatch) --kill-on-invalid-dep=yes"
        f" {jobs}/prepare.sbatch\n" in parts
    )
    shellcheck = Path(sys.executable).parent / "shellcheck"
    subprocess.run([shellcheck, "script"], cwd=workspace.root, check=True)


def test_a_failed_task_is_reported_with_its_status_and_the_end_of_its_log(workspace):
    program(workspace, "prepare", "print('what went wrong')\nsys.exit(7)")
    done = workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", ok=False)
    job = record(workspace, "prepare").job
    assert f"error: job {job} on slurm: failed, exit status 7" in done.stdout
    tail = done.stdout[done.stdout.index("last lines of") :]
    assert f"runs/x/.jobs/prepare-{job}.attempt-01.log" in tail and "what went wrong" in tail
    assert "Error 7" in done.stderr and "failed, exit status 7" in workspace.make("jobs").stdout
    workspace._stage("prepare")
    assert f"job {int(job) + 1} submitted" in workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm").stdout


def test_detached_is_submitted_once_and_a_later_make_follows_the_same_job(workspace, finished):
    finished("sync")
    program(workspace, "train", "while not Path('go').exists(): time.sleep(0.05)\nopen('log', 'a').write('train x\\n')")
    workspace.ran()  # make returns although the job waits for a file that is not there yet
    out = workspace.make("train", "RECIPE=x", "CLUSTER=slurm", "DETACH=1").stdout
    job = record(workspace, "train").job
    assert f"job {job} on slurm is detached" in out and "make cancel RECIPE=x" in out
    again = workspace.make("train", "RECIPE=x", "CLUSTER=slurm", "DETACH=1").stdout
    assert f"job {job} on slurm, submitted " in again and "submitted to slurm" not in again
    two = [start(workspace, "train", "RECIPE=x", "CLUSTER=slurm") for _ in range(2)]
    for process in two:
        until(lambda p=process: f"job {job} on slurm, submitted " in p.stdout.readline(), "both to follow")
    until(lambda: "running" in workspace.make("jobs").stdout, "a node to take the job")
    (workspace.root / "go").touch()
    for process in two:
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and f"job {job} is done" in out, out
    assert workspace.ran() == ["train x"]
    workspace.make("-q", "train", "RECIPE=x", "CLUSTER=slurm")


def test_how_a_detached_job_failed_is_reported_once_even_when_slurm_has_forgotten_it(workspace, slurm):
    program(workspace, "prepare", "print('so be it')\nsys.exit(3)")
    workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", "DETACH=1")
    first = record(workspace, "prepare").job
    left = workspace.root / f"runs/x/.jobs/prepare-{first}.exit"
    until(left.exists, "the job's end")
    file = workspace.root / "runs/x/.jobs/prepare.json"
    forgotten = replace(record(workspace, "prepare"), job="99999")
    for old in left.parent.glob(f"prepare-{first}.*"):
        old.rename(old.with_name(old.name.replace(first, "99999")))
    forgotten.write(file)
    done = workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", ok=False)
    assert "job 99999 on slurm: failed, exit status 3" in done.stdout and "so be it" in done.stdout
    workspace._stage("prepare")
    assert "submitted to slurm" in workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm").stdout


def test_another_job_for_the_same_stage_is_refused_and_one_for_the_same_result_is_taken_over(workspace, slurm):
    program(workspace, "prepare", "while not Path('go').exists(): time.sleep(0.05)")
    workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", "DETACH=1")
    first = record(workspace, "prepare").job
    rows = workspace.root / "recipes/rows.jsonl"
    before = rows.read_text()
    rows.write_text('{"messages": [1]}\n')
    done = workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", ok=False)
    assert (
        f"job {first} on slurm is " in done.stderr
        and "other options or inputs; next: wait for it, or make cancel RECIPE=x" in done.stderr
    )
    (workspace.root / "runs/x/.jobs/prepare.json").unlink()
    done = workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", ok=False)
    assert f"job {first} named x-prepare is in the queue already" in done.stderr
    rows.write_text(before)
    workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", "DETACH=1")
    assert record(workspace, "prepare").job == first
    slurm.run("scancel", first)
    until(lambda: first not in slurm.run("squeue", "-h", "-o", "%i"), "the job to leave")
    (workspace.root / "runs/x/.jobs/prepare.json").unlink()
    by_hand = slurm.run("sbatch", "--parsable", str(workspace.root / "runs/x/.jobs/prepare.sbatch"))
    process = start(workspace, "prepare", "RECIPE=x", "CLUSTER=slurm")
    until(lambda: f"job {by_hand}: running" in process.stdout.readline(), "make to follow the job")
    assert record(workspace, "prepare").job == by_hand
    (workspace.root / "go").touch()
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and f"job {by_hand} is done" in out, out


def test_cancel_ends_the_job_and_everyone_who_follows_it_sees_that(workspace):
    program(workspace, "prepare", "Path('at').touch()\ntime.sleep(600)")
    process = start(workspace, "prepare", "RECIPE=x", "CLUSTER=slurm")
    until((workspace.root / "at").exists, "the stage to start")
    assert re.search(
        r"prepare: job \d+ on slurm was running and is cancelled", workspace.make("cancel", "RECIPE=x").stdout
    )
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and "on slurm: cancelled" in out
    assert "no job of this run is waiting or running" in workspace.make("cancel", "RECIPE=x", ok=False).stderr
    assert "cancelled" in workspace.make("jobs").stdout


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_come_back(workspace):
    program(workspace, "prepare", "Path('at').touch()\nwhile not Path('go').exists(): time.sleep(0.05)")
    process = subprocess.Popen(
        ["make", "prepare", "RECIPE=x", "CLUSTER=slurm"], cwd=workspace.root, env=workspace.environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    until((workspace.root / "at").exists, "the stage to start")
    os.killpg(process.pid, 2)
    out, _ = process.communicate(timeout=PATIENCE)
    job = record(workspace, "prepare").job
    assert (
        process.returncode != 0
        and f"job {job} continues; next: the same make follows it again" in out
        and "make cancel RECIPE=x" in out
    )
    (workspace.root / "go").touch()
    until(
        lambda: workspace.make("-q", "prepare", "RECIPE=x", "CLUSTER=slurm", ok=None).returncode == 0, "the job's end"
    )
    assert " done" in workspace.make("jobs").stdout


def test_a_stage_whose_time_is_up_saves_goes_back_into_the_queue_and_resumes(workspace, slurm, finished):
    finished("sync")
    program(workspace, "train", SAVES_ON_SIGNAL)
    process = start(workspace, "train", "RECIPE=x", "CLUSTER=slurm")
    logs = workspace.root / "runs/x/.jobs"
    log = until(lambda: next(logs.glob("train-*.attempt-01.log"), None), "the log")
    until(lambda: "resuming from nothing" in log.read_text(), "training")
    job = record(workspace, "train").job
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert f"resuming from {job}" in out and f"--- attempt 2 of job {job}" in out
    assert "stopped early (exit status 75): back into the queue" in out
    # The first attempt's log is as it was, beside the second's.
    assert "resuming from nothing" in log.read_text() and "attempt 2" not in log.read_text()
    assert f"resuming from {job}" in (logs / f"train-{job}.attempt-02.log").read_text()
    assert re.search(r"^x +train +slurm .* 2 +done$", workspace.make("jobs").stdout, re.M)


def test_a_job_beside_training_evaluates_its_checkpoints_and_ends_with_it(workspace, slurm, finished):
    shutil.copy(REPO / "stages/watch.py", workspace.root / "stages/watch.py")
    file = workspace.root / "stages/watch.py"
    line = "from sft.evaluation import watch\n"
    impatient = (
        f"from sft.launch import watched\n{line}watch.PAUSE, watched.EVERY_S = 0.2, 0.5\n"  # otherwise the real one
    )
    file.write_text(file.read_text().replace(line, impatient))
    workspace.recipe("x", 'tasks = ["one"]', 'tasks = ["one"]\nevery = 2')
    finished("sync")
    program(workspace, "train", "while not Path('go').exists(): time.sleep(0.05)\nsys.exit(4)")
    shown = workspace.make("dry-run", "RECIPE=x", "CLUSTER=slurm").stdout
    assert "command=(.venv/bin/python stages/watch.py --beside ID-OF-THE-TRAINING runs/x" in shown
    out = workspace.make("train", "RECIPE=x", "CLUSTER=slurm", "DETACH=1").stdout
    training, beside = (record(workspace, name).job for name in ("train", "watch"))
    assert f"job {beside} submitted to slurm, to evaluate checkpoints" in out
    log = workspace.root / f"runs/x/.jobs/watch-{beside}.attempt-01.log"
    until(log.exists, "the watcher")
    assert (
        f"job {beside} evaluates the checkpoints"
        in workspace.make("train", "RECIPE=x", "CLUSTER=slurm", "DETACH=1").stdout
    )
    assert re.search(rf"^x +watch +slurm +{beside} .* running", workspace.make("jobs").stdout, re.M)
    (workspace.root / "go").touch()
    until((log.parent / f"watch-{beside}.exit").exists, "the watcher to see that training has ended")
    assert "train: not trained from this recipe" in log.read_text()  # it failed before it had begun
    (workspace.root / "go").unlink()
    assert "exit status 4" in workspace.make("train", "RECIPE=x", "CLUSTER=slurm", ok=False).stdout
    workspace.make("train", "RECIPE=x", "CLUSTER=slurm", "DETACH=1")
    assert record(workspace, "train").job != training and record(workspace, "watch").job != beside
    assert workspace.make("cancel", "RECIPE=x").stdout.count("is cancelled") == 2


def test_hostile_paths_and_values_reach_the_job_unchanged(slurm, tmp_path):
    (tmp_path / HOSTILE / "data\nline").mkdir(parents=True)
    workspace = Workspace(tmp_path / HOSTILE)
    program(workspace, "prepare", "Path('argv').write_text(json.dumps(sys.argv[1:]))")
    data = str(workspace.root / "data\nline").replace("$", "$$")
    workspace.make(
        "prepare", "RECIPE=x", "CLUSTER=slurm", f"DATA={data}", ok=None
    )  # Make itself cannot carry a newline
    (workspace.root / "data 'line").mkdir()
    data = f"{workspace.root}/data 'line"
    done = subprocess.run(
        ["env/slurm.sh", "runs/x", "prepare", ".venv/bin/python", "stages/prepare.py", "runs/x", "--cluster", "slurm", "--data", data],
        cwd=workspace.root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((workspace.root / "argv").read_text()) == ["runs/x", "--cluster", "slurm", "--data", data]
    assert next((workspace.root / "runs/x/.jobs").glob("prepare-*.log")).is_file()


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('partition = "a\\n#SBATCH --wrap=x"', "a backslash or control character cannot be given to sbatch"),
        ('sbatch = ["rm -rf"]', "--option or --option=value is expected"),
        ('partition = "nosuch"', "invalid partition specified"),
        ("shared_disk = false", "shared_disk = false, but Slurm jobs work in this folder"),
    ],
)
def test_what_sbatch_does_not_accept_is_refused_by_name(workspace, toml, message):
    (workspace.root / "env/mine.toml").write_text(f'launcher = "slurm"\nstorage = "{{runs}}/.s"\n{toml}\n')
    done = workspace.make("prepare", "RECIPE=x", "CLUSTER=mine", ok=False)
    assert message in done.stderr and not (workspace.root / "runs/x/prepare").exists()


def test_a_job_that_ends_well_without_its_manifest_is_an_error(workspace):
    (workspace.root / "stages/prepare.py").write_text("print('believe me')\n")
    launcher = workspace.root / "lib/sft/launch/run.py"
    launcher.write_text(launcher.read_text().replace("VISIBLE_S = 10.0", "VISIBLE_S = 1.0"))
    done = workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", ok=False)
    assert "runs/x/prepare/manifest.json: the job succeeded, but this file is missing" in done.stderr


def test_the_clusters_variables_reach_the_job_unchanged(workspace):
    odd = "a 'b' \"c\" $HOME `d`\ne \\f ü"
    (workspace.root / "env/mine.toml").write_text(
        f'launcher = "slurm"\nstorage = "{{runs}}/.s"\n[env]\nODD = {json.dumps(odd)}\n'
    )
    program(workspace, "prepare", "Path('odd').write_text(os.environ['ODD'])")
    workspace.make("prepare", "RECIPE=x", "CLUSTER=mine")
    assert (workspace.root / "odd").read_text() == odd


def test_no_secret_of_the_environment_is_written_down(workspace, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    program(workspace, "prepare", "assert os.environ['WANDB_API_KEY'] == 's3cr3t'")
    out = workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm").stdout
    files = [f for f in (workspace.root / "runs").rglob("*") if f.is_file()]
    assert len(files) > 5 and "s3cr3t" not in out and not [f for f in files if b"s3cr3t" in f.read_bytes()]


def test_a_missing_scheduler_is_reported(workspace, monkeypatch):
    monkeypatch.setenv("PATH", ":".join(p for p in os.environ["PATH"].split(":") if "slurm" not in p))
    done = workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", ok=False)
    assert "sbatch: not found; next: run this on a login node" in done.stderr


def test_time_that_runs_out_is_a_new_turn_for_training_and_an_error_for_a_stage_that_cannot_save(short_of_time):
    prepare, train = short_of_time.makes
    out, _ = train.communicate(timeout=PATIENCE)
    assert train.returncode == 0 and "stopped early (exit status 75)" in out and "attempt 2 of job" in out, out
    out, _ = prepare.communicate(timeout=PATIENCE)
    assert prepare.returncode != 0 and "on mine: timeout" in out and "DUE TO TIME LIMIT" in out and "no hurry" in out, (
        out
    )


def test_a_lost_controller_is_asked_again_until_it_answers(workspace, slurm, short_of_time):
    """After the jobs that run out of time: while the controller is away, it tells none of them."""
    assert all(process.poll() is not None for process in short_of_time.makes)
    program(workspace, "prepare", "Path('at').touch()\nwhile not Path('go').exists(): time.sleep(0.05)")
    process = start(workspace, "prepare", "RECIPE=x", "CLUSTER=slurm")
    until((workspace.root / "at").exists, "the stage to start")
    slurm.stop("slurmctld")
    assert process.stdout is not None
    until(lambda: "no answer: " in process.stdout.readline(), "the lost connection to be told")
    slurm._daemon("slurmctld", "slurmctld", "-D")
    (workspace.root / "go").touch()
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "is done" in out, out
