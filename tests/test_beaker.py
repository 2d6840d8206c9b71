"""Stages as Beaker experiments: the real client against tests/beaker_server.py, whose jobs are local processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml

from beaker_server import BUDGET, TOKEN, USER, Server, now
from conftest import REPO, Workspace
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.job import JobRecord
from sft.launch import beaker, commands, job, run
from sft.launch.beaker import connection, datasets, scheduler, specification
from sft.launch.doctor import doctor
from sft.launch.launcher import open_scheduler
from sft.recipe import recipe
from sft.runner import plan

pytestmark = pytest.mark.server

HUSH = "the-value-of-a-secret"
CLUSTER = f"""
launcher = "beaker"
clusters = ["ai2/jupiter"]
shared_disk = false
storage = "WEKA/storage"
runs = "WEKA/{{user}}/runs"
mounts = ["oe-test:WEKA"]
workspace = "ai2/team"
budget = "{BUDGET}"
image = "ann/image"
install = ["ln -s VENV .venv", 'echo "with $ODD"']
[env]
ODD = "a $HOME `b` 'c'"
[secrets]
TEST_SECRET = "{{user}}_SECRET"
"""


class Place:
    """A repository with a remote, a cluster's file, and the server; what is typed is typed there."""

    def __init__(self, workspace: Workspace, server: Server, root: Path):
        self.workspace, self.server, self.root = workspace, server, workspace.root
        self.weka = str(server.folder / "weka/oe-test")  # mounted at its own path
        Path(self.weka).mkdir(parents=True)
        text = CLUSTER.replace("WEKA", self.weka)
        self.cluster = self.root / "env" / "beaker-test.toml"
        self.cluster.write_text(text.replace("VENV", str(self.root / ".venv")))
        (self.root / ".gitignore").write_text(".venv\nruns\nlog\n__pycache__\n")
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("init", "--quiet", "--bare", str(root / "remote.git"))
        self.git("remote", "add", "origin", f"file://{root}/remote.git")
        self.push()

    def git(self, *command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *command], cwd=self.root, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def push(self) -> None:
        self.git("add", "-A")
        self.git("commit", "--quiet", "--allow-empty", "-m", "x")
        self.git("push", "--quiet", "origin", "main")

    def edit(self, old: str, new: str) -> None:
        text = self.cluster.read_text()
        assert old in text
        self.cluster.write_text(text.replace(old, new))
        self.push()

    def launch(self, script: str, *words: str, stage: str = "prepare") -> int:
        """A stage whose command is a shell script: what a job does when it ends so."""
        command = ["bash", "-c", script, "runs/x", "--cluster", "beaker-test", *words]
        return run.main("beaker", ["runs/x", stage, *command])

    @property
    def experiment(self):
        return next(reversed(self.server.experiments.values()))

    @property
    def run(self) -> Path:
        return self.root / "runs" / "x"


@pytest.fixture
def place(workspace, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("beaker")
    with Server(folder) as server:
        server.secrets = {f"{USER}_SECRET": HUSH}
        for name, value in {**server.environment, "SFT_USER": USER}.items():
            monkeypatch.setenv(name, value)
        for name in ("BEAKER_TOKEN", "BEAKER_ADDR", "DETACH", "DRY_RUN"):
            monkeypatch.delenv(name, raising=False)
        made = Place(workspace, server, tmp_path_factory.mktemp("remote"))
        monkeypatch.chdir(workspace.root)
        monkeypatch.setattr(plan, "REPO", workspace.root)
        monkeypatch.setattr(recipe, "CLUSTERS", workspace.root / "env")
        for module in (scheduler, datasets):
            monkeypatch.setattr(module, "POLL_S", 0.2)
        yield made


# --- a run through Beaker ---------------------------------------------------------------------------------------------


def test_stages_run_there_come_back_and_the_next_stage_here_accepts_them(place):
    done = place.workspace.make("train", "RECIPE=x", "CLUSTER=beaker-test")
    assert len(place.server.experiments) == 3, done.stdout  # prepare, sync, train
    there = place.server.folder / "weka/oe-test/ann/runs/x"
    for stage in ("prepare", "sync", "train"):
        assert manifest.is_whole(place.run / stage) and manifest.is_whole(there / stage)
        where = json.loads((place.run / stage / "elsewhere.json").read_text())
        assert where == {"where": str(there / stage), "outputs": []}
        assert json.loads((place.run / ".jobs" / f"{stage}.json").read_text())["ended"] == "done"
    made = manifest.load(place.run / "prepare" / "manifest.json")
    assert made.provenance["git"] == place.git("rev-parse", "HEAD")
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
    place.push()
    done = place.workspace.make("train", "RECIPE=smoke", "CLUSTER=beaker-test", "steps=3", "validate_every=0")
    assert len(place.server.experiments) == 3 and "step" in done.stdout
    made = manifest.load(place.root / "runs" / "smoke_steps-3" / "train" / "manifest.json")
    assert made.metrics and manifest.is_whole(place.root / "runs" / "smoke_steps-3" / "train")
    done = place.workspace.make("sync", "RECIPE=smoke", "steps=3")
    assert "env/local.sh runs/smoke_steps-3 sync" in done.stdout and "prepare.py" not in done.stdout


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
    assert manifest.load(place.run / "sync" / "manifest.json").provenance["git"] == place.git("rev-parse", "HEAD")


def test_outputs_that_stay_there_are_told_and_not_missing(place):
    place.workspace.make("prepare", "RECIPE=x", "CLUSTER=beaker-test")
    (place.run / "prepare" / "out").unlink()
    assert "out is missing" in place.workspace.make("verify", "RUN=x", ok=False).stdout
    file = place.run / "prepare" / "elsewhere.json"
    where = json.loads(file.read_text())["where"]
    file.write_text(json.dumps({"where": where, "outputs": ["out"]}))
    assert f"0 files verified; 1 are elsewhere: {where} (out)" in place.workspace.make("verify", "RUN=x").stdout
    code = "from sft.runner.cli import parse_run\nfrom sft.runner.stage import open_stage\nwith open_stage('sync', parse_run('sync', ['runs/x'])) as s: s.folder('prepare')"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        place.workspace.python(code)
    assert f"1 outputs are elsewhere, in {where}" in failed.value.stderr


def test_checkpoints_are_evaluated_by_an_experiment_beside_training_and_their_scores_come_back(place):
    place.cluster.write_text(place.cluster.read_text().replace("[env]", "[env]\n" + "\n".join(
        f'{name} = "{value}"' for name, value in place.server.environment.items())))  # fmt: skip
    place.workspace.recipe("x", 'tasks = ["one"]', 'tasks = ["one"]\nevery = 2')
    watch = (REPO / "stages/watch.py").read_text().replace("how.beside)", "how.beside, 0.2)")
    watch = watch.replace("watch.watch(stage, ", "seen(stage, ").replace("\nif __name__", """
def seen(stage, ended):
    (stage.run / "watching").touch()
    while not ended():
        time.sleep(0.05)
    (stage.out / "evaluations.jsonl").write_text('{"step": 2}')

if __name__""", 1)  # fmt: skip
    (place.root / "stages/watch.py").write_text(watch)
    train = place.root / "stages/train.py"
    waits = "    import time\n    while not (stage.run / 'watching').exists(): time.sleep(0.05)\n"
    train.write_text(train.read_text().replace("def body(stage):\n", f"def body(stage):\n{waits}"))
    place.push()
    done = place.workspace.make("train", "RECIPE=x", "CLUSTER=beaker-test")
    training, beside = (e for n, e in place.server.experiments.items() if n.startswith(("x-train", "x-watch")))
    told = json.loads((place.run / ".jobs/watch.json").read_text())
    assert told["job"] == beside.message.id and "to evaluate checkpoints: 1 node, no GPUs each" in done.stdout
    words = beside.spec.tasks[0].arguments
    assert words[words.index("--beside") + 1] == training.message.id and words[1] == "watch"
    assert not any("olmo-sft-prepare" in str(d.source) for d in beside.spec.tasks[0].datasets)
    out = place.workspace.make("collect", "RECIPE=x", "CLUSTER=beaker-test").stdout
    assert "evaluations.jsonl fetched to runs/x/train" in out
    assert (place.run / "train/evaluations.jsonl").read_text() == '{"step": 2}'
    assert manifest.is_whole(place.run / "train")


# --- how a job ends ---------------------------------------------------------------------------------------------------


def test_a_failed_task_is_told_with_the_end_of_its_log(place, capsys):
    assert place.launch("echo working; echo 'no space left'; exit 3") == 3
    told = capsys.readouterr().out
    assert "failed, exit status 3" in told and told.count("no space left") == 2 and "/ex/01EXPERIMENT" in told
    assert place.launch("exit 4") == 4  # a new attempt has a new name
    assert [n.rpartition("-")[2] for n in place.server.experiments][1:] == ["1"]


def test_one_that_ends_well_without_a_manifest_has_failed(place, capsys):
    assert place.launch("true") != 0
    assert "left no manifest" in capsys.readouterr().out


def test_a_cancelled_one_is_told(place, capsys, monkeypatch):
    monkeypatch.setenv("DETACH", "1")
    assert place.launch("echo up; exec sleep 60") == 0
    monkeypatch.delenv("DETACH")
    commands.cancel(Path("runs/x"))
    assert place.launch("echo up; exec sleep 60") == job.CANCELLED
    told = capsys.readouterr().out
    assert "is cancelled" in told and "cancelled, exit status 130 (stopped by ann)" in told
    assert len(place.server.experiments) == 1


def test_a_timeout_is_told(place, capsys):
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
    told = capsys.readouterr().out
    assert "saved" in told and len(place.server.runs) == 2 and len(place.server.experiments) == 1
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
        time.sleep(0.5)  # the follower sees it preempted
        commands.cancel(Path("runs/x"))

    thread = threading.Thread(target=preempt_and_cancel)
    thread.start()
    assert place.launch("echo up; exec sleep 60") == job.CANCELLED
    thread.join()
    told = capsys.readouterr().out
    assert "preempted (preempted), Beaker starts it again" in told and "cancelled, exit status 130" in told
    assert len(place.server.runs) == 1


def test_beakers_own_retries_are_waited_for(place, capsys):
    place.edit('workspace = "ai2/team"', 'workspace = "ai2/team"\nretries = 2')
    assert place.launch("echo one more; exit 6") == 6
    assert len(place.server.runs) == 3 and place.experiment.body["retry"] == {"allowedTaskRetries": 2}
    assert "one more" in capsys.readouterr().out


def test_a_node_that_fails_stops_the_others_and_is_the_one_told(place, capsys):
    (place.root / "recipes" / "x.toml").open("a").write("\n[on.beaker-test.prepare]\nnodes = 2\n")
    place.push()
    script = '[ "$BEAKER_REPLICA_RANK" = 0 ] && exec sleep 60; echo "rank $BEAKER_REPLICA_RANK of $BEAKER_REPLICA_COUNT breaks"; exit 9'
    assert place.launch(script) == 9
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


def test_a_connection_that_stays_lost_is_told_and_the_job_is_found_again(place, capsys, monkeypatch):
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
            .replace("Result(['out']", "Result(['out', 'big']")
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
    while not all(r.message.status.HasField("finalized") for r in place.server.runs.values()):
        time.sleep(0.05)
    place.server.fault("download", "corrupt", times=1)
    done = place.workspace.make("collect", "RECIPE=x", "CLUSTER=beaker-test", ok=False)
    assert "Checksum" in done.stderr and not (place.run / "prepare").exists()
    place.workspace.make("collect", "RECIPE=x", "CLUSTER=beaker-test")
    assert manifest.is_whole(place.run / "prepare") and len(place.server.experiments) == 1


# --- refused before anything is submitted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "told"),
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
def test_what_the_cluster_lacks_is_told(place, old, new, told):
    place.edit(old, new)
    with pytest.raises(SystemExit) as ended:
        place.launch("exit 0")
    assert told in str(ended.value) and "next:" in str(ended.value)
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


def test_a_name_taken_by_an_unfinished_experiment_is_told(place, monkeypatch, capsys):
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


def test_another_account_than_the_users_name_is_told(place, monkeypatch):
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
    ("line", "told"),
    [
        ('gpu = "A100"', "'gpu' = 'A100': the GPUs of ai2/jupiter are NVIDIA H100"),
        ("gpus_per_node = 16", "'gpus_per_node' = 16: a node of ai2/jupiter has 8"),
        ('gpu = "H100"\ngpus_per_node = 8', None),
    ],
)
def test_the_gpus_of_the_clusters_file_are_compared_with_beakers(place, line, told):
    place.edit('workspace = "ai2/team"', f'workspace = "ai2/team"\n{line}')
    made = job.Job.parse(["runs/x", "prepare", "true", "runs/x", "--cluster", "beaker-test"], strict=False)
    backend = scheduler.BeakerScheduler(made.folder, made.cluster)
    assert backend.missing("F", False) == ([f"F: {told}"] if told else [])
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
    from sft.launch.beaker.code import public_url

    assert public_url("git@github.com:org/x.git") == "https://github.com/org/x.git"
    assert public_url("https://github.com/org/x") == "https://github.com/org/x"
    with pytest.raises(SftError):
        public_url("https://token@github.com/org/x")
