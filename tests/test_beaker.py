"""Stages as Beaker experiments: the real client against tests/beaker_server, whose jobs are local processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from beaker_place import place
from beaker_server import now
from conftest import REPO
from sft.formats import manifest
from sft.formats.elsewhere import Elsewhere
from sft.formats.evaluations import Evaluation
from sft.formats.job import JobRecord
from sft.formats.lines import to_lines
from sft.launch import commands, job, run
from sft.launch.beaker import connection

__all__ = ["place"]  # the fixture
pytestmark = pytest.mark.server

# --- a run through Beaker ---------------------------------------------------------------------------------------------


def test_stages_run_there_come_back_and_the_next_stage_here_accepts_them(place):
    done = place.workspace.make("train", "RECIPE=x", "CLUSTER=beaker-test")
    assert len(place.server.experiments) == 3, done.stdout  # prepare, sync, train
    there = place.server.folder / "weka/oe-test/ann/runs/x"
    for stage in ("prepare", "sync", "train"):
        assert manifest.is_whole(place.run / stage) and manifest.is_whole(there / stage)
        assert Elsewhere.of(place.run / stage) == Elsewhere(str(there / stage), ())
        assert JobRecord.read(place.run / ".jobs" / f"{stage}.json").ended == "done"
    made = manifest.load(place.run / "prepare" / "manifest.json")
    assert made.provenance.git == place.git("rev-parse", "HEAD")
    assert "with a $HOME `b` 'c'" in done.stdout and "files returned" in done.stdout
    assert not (place.root / "log").exists()  # nothing ran here
    place.workspace.make("train", "RECIPE=x", "CLUSTER=beaker-test")
    assert len(place.server.experiments) == 3
    place.workspace.make("convert", "RECIPE=x")  # on this machine, from what came back
    assert place.workspace.ran() == ["convert x"]


def test_real_stages_run_there_and_the_real_sync_here_verifies_every_byte(place):
    for folder in ("stages", "recipes"):
        shutil.copytree(
            REPO / folder, place.root / folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    recipe_file = place.root / "recipes" / "smoke.toml"
    recipe_file.write_text(
        recipe_file.read_text() + "\n[on.beaker-test.train]\nprocesses = 1\nmicrobatch_tokens = 512\nthreads = 1\n"
    )
    place.workspace.use_warm_python()
    # Jobs clone the repository. This brings what numba has compiled, which takes fifteen seconds.
    place.edit('install = ["', f'install = ["cp -a {place.root}/lib .", "')
    done = place.workspace.make("train", "RECIPE=smoke", "CLUSTER=beaker-test", "steps=3", "validate_every=0")
    assert len(place.server.experiments) == 3 and "step" in done.stdout
    made = manifest.load(place.root / "runs" / "smoke_steps-3" / "train" / "manifest.json")
    assert made.metrics and manifest.is_whole(place.root / "runs" / "smoke_steps-3" / "train")
    sync = [".venv/bin/python", "stages/sync.py", "runs/smoke_steps-3", "steps=3"]
    done = subprocess.run(sync, cwd=place.root, capture_output=True, text=True)
    assert done.returncode == 0 and "[sync] done" in done.stdout, done.stdout + done.stderr


def test_an_earlier_stage_made_here_travels_with_the_job_and_code_as_a_dataset(place):
    place.edit('launcher = "beaker"', 'launcher = "beaker"\ncode = "dataset"\nstages = ["sync"]')
    place.git("remote", "remove", "origin")
    place.workspace.make("sync", "RECIPE=x", "CLUSTER=beaker-test")
    assert place.workspace.ran() == ["prepare x"]
    there = place.server.folder / "weka/oe-test/ann/runs/x"
    assert (
        manifest.is_whole(there / "prepare")
        and manifest.is_whole(there / "sync")
        and manifest.is_whole(place.run / "sync")
    )
    names = sorted(d.message.name for d in place.server.datasets.values() if not d.message.name.startswith("results"))
    assert [n.rsplit("-", 1)[0] for n in names] == ["olmo-sft", "olmo-sft-prepare"]
    assert manifest.load(place.run / "sync" / "manifest.json").provenance.git == place.git("rev-parse", "HEAD")


def test_outputs_that_stay_there_are_reported_and_not_missing(place):
    place.workspace.make("prepare", "RECIPE=x", "CLUSTER=beaker-test")
    (place.run / "prepare" / "out").unlink()
    assert "out is missing" in place.workspace.make("verify", "RUN=x", ok=False).stdout
    where = Elsewhere.of(place.run / "prepare").where
    Elsewhere(where, ("out",)).write(place.run / "prepare" / "elsewhere.json")
    assert f"0 files verified; 1 are elsewhere: {where} (out)" in place.workspace.make("verify", "RUN=x").stdout
    code = "from sft.runner.cli import parse_run\nfrom sft.runner.stage import open_stage\nwith open_stage('sync', parse_run('sync', ['runs/x'])) as s: s.folder('prepare')"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        place.workspace.python(code)
    assert f"1 outputs are elsewhere, in {where}" in failed.value.stderr


def test_checkpoints_are_evaluated_by_an_experiment_beside_training_and_their_scores_come_back(place):
    place.cluster.write_text(place.cluster.read_text().replace("[env]", "[env]\n" + "\n".join(
        f'{name} = "{value}"' for name, value in place.server.environment.items())))  # fmt: skip
    place.workspace.recipe("x", 'tasks = ["one"]', 'tasks = ["one"]\nevery = 2')
    scores = to_lines([Evaluation(step=2, checkpoint="c", settings="s", tasks={})])
    watch = (
        (REPO / "stages/watch.py")
        .read_text()
        .replace("ended = watched.job_ended(", "watched.EVERY_S = 0.2; ended = watched.job_ended(")
    )
    watch = watch.replace("watch.watch(stage, ", "seen(stage, ").replace("\nif __name__", """
def seen(stage, ended):
    (stage.run / "watching").touch()
    while not ended():
        time.sleep(0.05)
    (stage.out / "evaluations.jsonl").write_bytes(SCORES)

if __name__""".replace("SCORES", repr(scores)), 1)  # fmt: skip
    (place.root / "stages/watch.py").write_text(watch)
    train = place.root / "stages/train.py"
    waits = "    import time\n    while not (stage.run / 'watching').exists(): time.sleep(0.05)\n"
    train.write_text(train.read_text().replace("def body(stage):\n", f"def body(stage):\n{waits}"))
    place.push()
    done = place.workspace.make("train", "RECIPE=x", "CLUSTER=beaker-test")
    training, beside = (e for n, e in place.server.experiments.items() if n.startswith(("x-train", "x-watch")))
    watch_job = JobRecord.read(place.run / ".jobs/watch.json")
    assert watch_job.job == beside.message.id and "to evaluate checkpoints: 1 node, no GPUs each" in done.stdout
    words = beside.spec.tasks[0].arguments
    assert words[words.index("--beside") + 1] == training.message.id and words[1] == "watch"
    assert not any("olmo-sft-prepare" in str(d.source) for d in beside.spec.tasks[0].datasets)
    place.wait_for_jobs()
    out = place.workspace.make("collect", "RECIPE=x", "CLUSTER=beaker-test").stdout
    assert "evaluations.jsonl fetched to runs/x/train" in out
    assert (place.run / "train/evaluations.jsonl").read_bytes() == scores
    assert manifest.is_whole(place.run / "train")


# --- how a job ends ---------------------------------------------------------------------------------------------------


def test_a_failed_task_is_reported_with_the_end_of_its_log(place, capsys):
    assert place.launch("echo working; echo 'no space left'; exit 3") == 3
    output = capsys.readouterr().out
    assert "failed, exit status 3" in output and output.count("no space left") == 2 and "/ex/01EXPERIMENT" in output
    assert place.launch("exit 4") == 4  # a new attempt has a new name
    assert [n.rpartition("-")[2] for n in place.server.experiments][1:] == ["1"]


def test_one_that_ends_well_without_a_manifest_has_failed(place, capsys):
    assert place.launch("true") != 0
    assert "left no manifest" in capsys.readouterr().out


def test_a_cancelled_one_is_reported(place, capsys, monkeypatch):
    monkeypatch.setenv("DETACH", "1")
    assert place.launch("echo up; exec sleep 60") == 0
    monkeypatch.delenv("DETACH")
    commands.cancel(Path("runs/x"))
    assert place.launch("echo up; exec sleep 60") == job.CANCELLED
    output = capsys.readouterr().out
    assert "is cancelled" in output and "cancelled, exit status 130 (stopped by ann)" in output
    assert len(place.server.experiments) == 1


def test_a_timeout_is_reported(place, capsys):
    place.edit('workspace = "ai2/team"', 'workspace = "ai2/team"\ntime = "1s"')
    assert place.launch("exec sleep 60") == 124
    assert "timeout, exit status 124 (took longer than its timeout)" in capsys.readouterr().out


def test_a_preempted_one_saves_and_goes_on_by_itself(place, capsys):
    script = """trap 'echo saved; exit 75' TERM; mkdir -p "$0"; [ -e "$0/again" ] && exit 5
                touch "$0/again"; echo up; while :; do sleep 0.05; done"""

    def preempt() -> None:
        while not any(line == b"up\n" for run in list(place.server.runs.values()) for _, line in run.lines):
            time.sleep(0.02)
        place.server.preempt(place.server.runs[min(place.server.runs)])

    thread = threading.Thread(target=preempt)
    thread.start()
    assert place.launch(script) == 5  # what the second job says
    thread.join()
    output = capsys.readouterr().out
    assert "saved" in output and len(place.server.runs) == 2 and len(place.server.experiments) == 1
    assert JobRecord.read(place.run / ".jobs" / "prepare.json").attempts == 2  # make jobs tells it


def test_a_preempted_one_that_is_never_started_again_ends_when_it_is_cancelled(place, capsys):
    place.server.stranded = True

    def preempt_and_cancel() -> None:
        while not any(line == b"up\n" for run in list(place.server.runs.values()) for _, line in run.lines):
            time.sleep(0.02)
        run = place.server.runs[min(place.server.runs)]
        place.server.preempt(run)
        while not run.message.status.HasField("finalized"):
            time.sleep(0.02)
        asked = place.server.requests.count("GetWorkload")
        while (
            place.server.requests.count("GetWorkload") < asked + 5
        ):  # the follower has seen it preempted: it asks twice in a turn
            time.sleep(0.02)
        commands.cancel(Path("runs/x"))

    thread = threading.Thread(target=preempt_and_cancel)
    thread.start()
    assert place.launch("echo up; exec sleep 60") == job.CANCELLED
    thread.join()
    output = capsys.readouterr().out
    assert "preempted (preempted), Beaker starts it again" in output and "cancelled, exit status 130" in output
    assert len(place.server.runs) == 1


def test_beakers_own_retries_are_waited_for(place, capsys):
    place.edit('workspace = "ai2/team"', 'workspace = "ai2/team"\nretries = 2')
    assert place.launch("echo one more; exit 6") == 6
    assert len(place.server.runs) == 3 and place.experiment.body["retry"] == {"allowedTaskRetries": 2}
    assert "one more" in capsys.readouterr().out


def test_a_node_that_fails_stops_the_others_and_is_the_one_reported(place, capsys):
    # Another recipe than that of other tests with two nodes: the port of a job follows from what it makes.
    recipe = place.workspace.recipe("x", "lr = 1e-3", "lr = 3e-3")
    recipe.write_text(recipe.read_text() + "\n[on.beaker-test.train]\nnodes = 2\n")
    place.push()
    place.workspace.make("sync", "RECIPE=x", "CLUSTER=beaker-test")
    place.edit("[env]\n", '[env]\nSFT_AGREE_S = "1"\n')  # the first node says nothing
    script = '[ "$BEAKER_REPLICA_RANK" = 0 ] && exec sleep 60; echo "rank $BEAKER_REPLICA_RANK of $BEAKER_REPLICA_COUNT breaks"; exit 9'
    assert place.launch(script, stage="train") == 9
    assert "rank 1 of 2 breaks" in capsys.readouterr().out
    task = place.experiment.body["tasks"][0]
    wanted = {"replicas": 2, "leaderSelection": True, "hostNetworking": True, "propagateFailure": True,
              "propagatePreemption": True, "synchronizedStartTimeout": 90 * 60 * 10**9}  # fmt: skip
    assert {k: task[k] for k in wanted} == wanted


# --- the connection ---------------------------------------------------------------------------------------------------


def test_a_connection_that_comes_back_loses_no_line_and_repeats_none(place, capsys):
    place.server.fault("StreamJobLogs", "break", after=2)
    place.server.fault("StreamJobLogs", "unavailable")
    place.server.fault("ListJobs", "unavailable")
    assert place.launch("for i in 1 2 3 4 5; do echo line $i; sleep 0.1; done; exit 3") == 3
    lines = [line for line in capsys.readouterr().out.partition("error:")[0].splitlines() if line.startswith("line")]
    assert lines == [f"line {i}" for i in range(1, 6)]


def test_a_connection_that_stays_lost_is_reported_and_the_job_is_found_again(place, capsys, monkeypatch):
    monkeypatch.setenv("DETACH", "1")
    assert place.launch("sleep 3; exit 7") == 0
    monkeypatch.delenv("DETACH")
    monkeypatch.setattr(connection, "PATIENCE_S", 0.5)
    real = job.retried
    monkeypatch.setattr(run, "retried", lambda action, log, patience_s=0.0: real(action, log, 0.0))
    place.server.fault("GetWorkload", "unavailable", times=-1)
    with pytest.raises(SystemExit) as ended:
        place.launch("sleep 3; exit 7")
    assert "the job continues" in str(ended.value) and "connection reset" in str(ended.value)
    place.server.faults.clear()
    assert place.launch("sleep 3; exit 7") == 7
    assert len(place.server.experiments) == 1


def test_a_client_is_closed_before_python_ends(place, monkeypatch):
    """gRPC's open channels can keep a finished program from ending."""
    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    client = connection.connect("ann/workspace")
    assert client.service is not None and client._channel is not None
    for function in at_exit:
        function()
    assert client._channel is None


def test_an_answer_lost_on_submission_submits_nothing_twice(place, capsys):
    place.server.fault("create", "lost")
    assert place.launch("sleep 1; exit 3") == 3
    assert len(place.server.experiments) == 1


def test_an_earlier_attempt_that_ended_is_not_taken_for_one_whose_answer_was_lost(place):
    assert place.launch("exit 3") == 3
    place.server.fault("create", "dropped")
    assert place.launch("exit 4") == 4
    assert [e.message.name[-2:] for e in place.server.experiments.values()][1:] == ["-1"]


@pytest.mark.parametrize("hours", [0, 2])
def test_an_upload_by_another_is_waited_for_and_one_that_was_killed_is_replaced(place, hours):
    place.edit('launcher = "beaker"', 'launcher = "beaker"\ncode = "dataset"')
    other = place.server.make_dataset(f"olmo-sft-{place.git('rev-parse', 'HEAD')[:16]}")
    other.message.created.FromSeconds(int(time.time()) - 3600 * hours)

    def finish() -> None:
        place.git("archive", "--format=tar", f"--output={other.folder / 'code.tar'}", "HEAD")
        other.message.committed.CopyFrom(now())

    thread = threading.Timer(1, finish)
    thread.start()
    assert place.launch("exit 5") == 5
    thread.join()
    assert (other.message.id in place.server.datasets) == (hours == 0)


def test_a_job_runs_the_working_tree_as_it_is_where_edits_are_allowed_and_its_diff_is_recorded(place, monkeypatch):
    place.edit('launcher = "beaker"', 'launcher = "beaker"\ncode = "dataset"\nstages = ["prepare"]')
    (place.root / "lib/sft/edited.py").write_text("TEXT = 'from a new file'\n")
    file = place.root / "stages/prepare.py"
    file.write_text(file.read_text().replace("stage.identity)", "__import__('sft.edited').edited.TEXT)"))
    refused = place.workspace.make("prepare", "RECIPE=x", "CLUSTER=beaker-test", ok=False)
    assert (
        "without the changes in stages/prepare.py, lib/sft/edited.py" in refused.stderr
        and "ALLOW_DIRTY=1" in refused.stderr
    )
    place.workspace.make("prepare", "RECIPE=x", "CLUSTER=beaker-test", "ALLOW_DIRTY=1")
    assert (place.run / "prepare/out").read_text() == "from a new file"
    made = manifest.load(place.run / "prepare/manifest.json").provenance
    assert made.dirty and made.git == place.git("rev-parse", "HEAD")
    shutil.copy(place.run / ".jobs/prepare.diff", place.root / ".git/edits")
    place.git("stash", "--include-untracked")
    place.git("apply", "--index", str(place.root / ".git/edits"))
    assert place.git("diff", "--cached", "--name-only").split() == ["lib/sft/edited.py", "stages/prepare.py"]


def test_files_over_32_mib_travel_in_pieces_both_ways(place):
    """The code as an archive, an earlier stage, and a result; one piece's answer never comes, and the client sends it again."""
    place.edit('launcher = "beaker"', 'launcher = "beaker"\ncode = "dataset"\nstages = ["sync"]')
    big = os.urandom(1 << 20) * 33
    for name in ("prepare", "sync"):
        file = place.root / "stages" / f"{name}.py"
        body = "(stage.out / 'out').write_text(stage.identity)"
        assert body in file.read_text()
        file.write_text(
            file.read_text()
            .replace(body, body + "\n    (stage.out / 'big').write_bytes(open('big', 'rb').read())")
            .replace("Result(['out'", "Result(['big', 'out'")
        )
    (place.root / "big").write_bytes(big)
    place.push()
    place.server.fault("piece", "dropped")
    place.workspace.make("sync", "RECIPE=x", "CLUSTER=beaker-test")
    assert place.server.requests.count("piece") == 5  # two files of two pieces each, and the one that was dropped
    folders = {d.message.name.rsplit("-", 1)[0]: d.folder for d in place.server.datasets.values()}
    assert (folders["olmo-sft-prepare"] / "big").read_bytes() == big
    assert manifest.is_whole(place.run / "sync") and (place.run / "sync" / "big").read_bytes() == big


def test_results_that_arrive_damaged_are_refused_and_what_was_here_stays(place):
    place.workspace.make("prepare", "RECIPE=x", "CLUSTER=beaker-test", "DETACH=1")
    assert not (place.run / "prepare").exists()
    place.wait_for_jobs()
    place.server.fault("download", "corrupt", times=1)
    done = place.workspace.make("collect", "RECIPE=x", "CLUSTER=beaker-test", ok=False)
    assert "Checksum" in done.stderr and not (place.run / "prepare").exists()
    place.workspace.make("collect", "RECIPE=x", "CLUSTER=beaker-test")
    assert manifest.is_whole(place.run / "prepare") and len(place.server.experiments) == 1
