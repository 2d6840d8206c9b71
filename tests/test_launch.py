"""Starting stages as jobs: records, the scheduler's answers, clusters' files, signals, and two machines' torchrun on one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import REPO
from patience import PATIENCE
from sft.common.errors import SftError
from sft.formats.job import JobRecord
from sft.launch import commands, run
from sft.launch import job as jobs
from sft.launch.job import LostConnection, Status, SubmittedJob
from sft.launch.slurm import client, scheduler
from sft.launch.slurm.script import comment
from sft.recipe import clusters, schema, time_limit

# --- records and the scheduler's answers ------------------------------------------------------------------------------


def submitted(file: Path, id: str) -> SubmittedJob:
    """A job with the record `file`; `save` writes it."""
    return SubmittedJob(file, JobRecord(id, "i", "c", ("x",), "now"))


class Answers:
    """A scheduler that gives the answers of a list; an exception among them is raised."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def _next(self, *_):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    follow = status = _next

    def tail(self, id, lines=20):
        return f"the log of {id}"

    def attempts(self, id):
        return 3


@pytest.mark.parametrize(
    ("answers", "code", "message"),
    [
        ([0, Status("done", 0)], 0, "job 7 is done"),
        ([0, Status("gone")], 0, "job 7 is done"),
        ([75, Status("failed", 75)], 75, "saved its state and asks to be run again"),
        (
            [9, Status("failed", 9, "node_fail")],
            9,
            "error: job 7 on c: failed, exit status 9 (node_fail)\nthe log of 7",
        ),
        ([1, Status("gone", None, "no trace")], 1, "gone (no trace)"),
        ([0, Status("cancelled", 0)], 130, "cancelled"),
        ([LostConnection("x"), 0, LostConnection("y"), Status("done", 0)], 0, "no answer: y; trying again in 1 s"),
    ],
)
def test_how_a_job_ended_is_reported_and_recorded(tmp_path, monkeypatch, answers, code, message):
    monkeypatch.setattr(time, "sleep", lambda s: None)
    job, said = submitted(tmp_path / "train.json", "7"), []
    assert run.follow(job, Answers(*answers), said.append) == code
    assert message in "\n".join(said)
    assert JobRecord.read(job.file).ended and JobRecord.read(job.file).attempts == 3


@pytest.mark.parametrize("problem", [LostConnection("the network is down"), SftError("no such job")])
def test_a_log_that_cannot_be_read_hides_neither_the_end_nor_its_status(tmp_path, problem):
    job, said = submitted(tmp_path / "train.json", "7"), []
    answers = Answers(9, Status("failed", 9), problem)
    answers.tail = answers._next
    assert run.follow(job, answers, said.append) == 9
    assert said == [f"error: job 7 on c: failed, exit status 9\ncannot read its log: {problem}"]
    assert JobRecord.read(job.file).ended == "failed, exit status 9"


def test_cancel_and_collect_go_through_all_runs_and_tell_what_went_wrong_at_the_end(tmp_path, monkeypatch):
    for name, stage in (("b", "prepare"), ("b", "train"), ("c", "train")):
        file = tmp_path / name / ".jobs" / f"{stage}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        submitted(file, f"{name}-{stage}").save()
    ended = []

    class Place(Answers):
        def status(self, id):
            if id == "b-prepare":
                raise SftError("b-prepare: no such cluster")
            return Status("running")

        cancel = ended.append

    monkeypatch.setattr(commands, "scheduler_of", lambda job, place: Place())
    runs = [tmp_path / name for name in "abc"]
    with pytest.raises(SftError, match=r"^b-prepare: no such cluster$"):
        commands.for_each(commands.cancel, runs[1:])
    assert ended == ["b-train", "c-train"]
    with pytest.raises(SftError) as error:
        commands.for_each(commands.collect, runs)
    assert "b-prepare: no such cluster" in str(error.value) and f"{runs[0]}/.jobs: no job of this run" in str(
        error.value
    )


def test_a_scheduler_that_never_answers_is_given_up_with_the_job_alive(monkeypatch):
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(time, "sleep", lambda s: None)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(
        SftError, match="no answer for 500 s: gone fishing; the job continues; next: run the same make again"
    ):
        jobs.retried(Answers(*[LostConnection("gone fishing")] * 99)._next, lambda text: None, 500)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": 1}', '{"job": "1", "other": 2}'])
def test_a_torn_record_is_no_record(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    assert SubmittedJob.load(tmp_path / "train.json") is None
    with pytest.raises(SftError, match=r"train\.json: damaged: .*; next: remove it and run the same make again"):
        JobRecord.read(tmp_path / "train.json")


def test_the_bytes_of_a_record_are_as_they_were(tmp_path):
    submitted(tmp_path / "train.json", "7").save()
    fields = {
        "job": "7",
        "identity": "i",
        "cluster": "c",
        "command": ["x"],
        "submitted": "now",
        "ended": "",
        "attempts": 0,
    }
    assert (tmp_path / "train.json").read_text() == json.dumps(fields, indent=1) + "\n"
    assert JobRecord.read(tmp_path / "train.json").command == ("x",)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["runs/smoke", "train"], "usage"),
        (["runs/smoke", "train", "stages/train.sh", "runs/other"], "the command names runs/<run>"),
        (["runs/smoke", "report", "x", "runs/smoke"], "'report' is not a stage that runs as a job"),
        (["runs/../x", "train", "x", "runs/../x"], "not a run's name|no such recipe"),
    ],
)
def test_what_is_no_job_is_refused(argv, message, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(SftError, match=message):
        jobs.Job.parse(argv)


@pytest.fixture
def forgetful(tmp_path, monkeypatch):
    """A Slurm without accounting that knows no job any more, and the files that jobs left."""

    def answer(*command):
        raise client.UnknownJob(command[0])

    monkeypatch.setattr(client, "run", answer)
    monkeypatch.setenv("PATH", "")
    return scheduler.Slurm(tmp_path, schema.Cluster(storage="/s", launcher="slurm"))


def test_a_forgotten_job_is_judged_by_its_own_exit_status_alone(forgetful, tmp_path):
    for name, code in (("train-123", 3), ("prepare-1204", 4), ("prepare-part-120_1", 5), ("train-4", 0)):
        (tmp_path / f"{name}.exit").write_text(f"{code}\n")
    assert forgetful.status("12").state == "gone" and forgetful.status("120").exit_code == 5
    (tmp_path / "train-12.exit").write_text("0\n")
    (tmp_path / "prepare-part-7_0.exit").write_text("0\n")
    (tmp_path / "prepare-part-7_12.exit").write_text("6\n")
    assert forgetful.status("12") == Status("done", 0) and forgetful.status("123") == Status("failed", 3)
    assert forgetful.status("7") == Status("failed", 6) and forgetful.status("4") == Status("done", 0)


def test_the_end_of_an_attempt_hurries_the_follower_for_a_moment_only(forgetful, tmp_path):
    left = tmp_path / "train-12.exit"
    assert not forgetful._just_ended("12")
    left.write_text("75\n")
    assert forgetful._just_ended("12") and forgetful._just_ended("11+12") and not forgetful._just_ended("2")
    os.utime(left, (time.time() - scheduler.SETTLING_S - 1,) * 2)
    assert not forgetful._just_ended("12")


def test_a_queued_job_of_another_folder_is_no_obstacle_however_alike_their_names(tmp_path, monkeypatch):
    def job(folder, identity):
        return jobs.Job(Path(f"/a#{folder}/runs/x"), "prepare", [], None, None, None, identity)  # type: ignore[arg-type]

    queue = [f"{n}|{comment(job(*of), 'prepare')}" for n, of in ((7, ("b", "1")), (8, ("c", "2")))]
    monkeypatch.setattr(client, "run", lambda *command: "\n".join(queue))
    there = scheduler.Slurm(tmp_path, schema.Cluster(storage="/s", launcher="slurm"))
    assert there._queued(job("d", "1"), "prepare") == "" and there._queued(job("c", "2"), "prepare") == "8"
    with pytest.raises(SftError, match="job 8 named x-prepare is in the queue already"):
        there._queued(job("c", "1"), "prepare")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            'launcher = "slurm"\ninstall = ["x"]',
            "'install': for launcher = 'beaker' or 'sky' only, and this is 'slurm'",
        ),
        ('budget = "b/b"\nmounts = ["b:/b"]', "'budget', 'mounts': for launcher = 'beaker' only, and this is 'local'"),
        ('launcher = "slurm"\n[secrets]\nA = "b"', "'secrets': for launcher = 'beaker' or 'sky' only"),
        (
            'launcher = "slurm"\nevaluate_image = "a/b"',
            "'evaluate_image': for launcher = 'beaker' only, and this is 'slurm'",
        ),
        ("preemptible = true", "'preemptible': for launcher = 'beaker' only, and this is 'local'; remove it"),
        ('launcher = "beaker"\npartition = "gpu"', "'partition': for launcher = 'slurm' only, and this is 'beaker'"),
        ('time = "1:00:00"', "'time': for launcher = 'slurm' or 'beaker' only, and this is 'local'"),
        ('[env]\n"A B" = "b"', "'env': 'A B' is not a variable's name"),
        (
            '[env]\nWANDB_API_KEY = "s3cr3t"',
            "'env': WANDB_API_KEY is a secret by its name, and jobs' scripts print and keep this table; next: name it in [secrets]",
        ),
        ('[env]\nSLURM_JOB_ID = "7"', "'env': SLURM_JOB_ID: set by the scheduler"),
        ('[env]\nMASTER_ADDR = "x"', "'env': MASTER_ADDR: set by the scheduler"),
        ("stages = []", "'stages' is empty: no stage runs"),
        ('runs = "/a/../b"', "'runs' = '/a/../b': no '..'"),
        ('[env]\nA = "\\u0000"', "'env': A = '\\x00' contains a NUL"),
    ],
)
def test_a_cluster_that_says_what_its_launcher_would_ignore_is_refused(tmp_path, toml, message):
    (tmp_path / "c.toml").write_text(f'storage = "/s"\n{toml}\n')
    with pytest.raises(SftError) as error:
        clusters.load_cluster(tmp_path / "c.toml")
    assert f"{tmp_path}/c.toml: {message}" in str(error.value)


@pytest.mark.parametrize("storage", ["", "gs://b/../x", "gs://b//x", "s3://b/x\\n", "/a/./b"])
def test_a_storage_that_no_listing_would_have_is_refused(tmp_path, storage):
    (tmp_path / "c.toml").write_text(f'storage = "{storage}"\n')
    with pytest.raises(SftError, match="'storage'"):
        clusters.load_cluster(tmp_path / "c.toml")


def test_a_recipes_numbers_that_its_cluster_would_ignore_are_refused(workspace):
    file = workspace.recipe("x")
    file.write_text(file.read_text() + '[on.ai2-jupiter.train]\npartition = "gpu"\n[on.local.prepare]\ncpus = 4\n')
    message = workspace.make("show", "RECIPE=x", ok=False).stderr
    assert (
        "recipes/x.toml: 'partition' in [on.ai2-jupiter.train]: for launcher = 'slurm' only, and this is 'beaker'"
        in message
    )
    assert (
        "'cpus' in [on.local.prepare]: for launcher = 'slurm', 'beaker' or 'sky' only, and this is 'local'" in message
    )


@pytest.mark.seconds
def test_the_clusters_variables_reach_a_stage_on_this_machine(workspace):
    (workspace.root / "env/here.toml").write_text('storage = "{runs}/.s"\n[env]\nODD = "a \'$HOME\' `b`"\n')
    (workspace.root / "stages/prepare.py").write_text("import os\nprint('ODD is', os.environ['ODD'])\n")
    assert "ODD is a '$HOME' `b`\n" in workspace.make("prepare", "RECIPE=x", "CLUSTER=here", ok=None).stdout


@pytest.mark.processes
def test_ranks_that_save_are_waited_for_however_many_signals_arrive(tmp_path):
    """Slurm signals every process of a step, and train.sh hands it on: the second signal must not end torchrun's wait."""
    (tmp_path / "rank.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    time.sleep(1.5)\n"
        "    pathlib.Path('saved-' + os.environ['RANK']).touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('at-' + os.environ['RANK']).touch()\n"
        "time.sleep(60)\n"
    )
    env = {**os.environ, "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGUSR1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sft.launch.torchrun", "--standalone", "--nproc-per-node", "2", "rank.py"],
        cwd=tmp_path, env=env, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + PATIENCE
    while not all((tmp_path / f"at-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    for sent in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(sent)
        time.sleep(0.2)
    assert process.wait(timeout=PATIENCE) != 0
    assert sorted(p.name for p in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


@pytest.mark.seconds
def test_a_signal_to_every_process_leaves_the_log_its_last_words(tmp_path):
    """What Slurm does to a step: the helpers that copy a rank's output get the signal too."""
    process = subprocess.Popen(
        [sys.executable, "-c",
         "import pathlib, signal, time\nfrom sft.training.logs import record\n"
         "signal.signal(signal.SIGTERM, lambda *_: None)\n"
         "file = record(pathlib.Path('.'), 1, 0)\nprint('first', flush=True)\ntime.sleep(1)\n"
         "while not pathlib.Path('sent').exists(): time.sleep(0.05)\ntime.sleep(0.5)\nprint('last words', flush=True)"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "first\n"
    time.sleep(0.5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    helpers = [int(pid) for pid in children.read_text().split()]
    assert helpers
    for pid in (*helpers, process.pid):
        os.kill(pid, signal.SIGTERM)
    (tmp_path / "sent").touch()
    assert process.communicate(timeout=PATIENCE)[0] == "last words\n" and process.returncode == 0
    assert next((tmp_path / "logs").iterdir()).read_text() == "first\nlast words\n"


# --- two machines -----------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_two_machines_of_two_processes_meet_as_one_world_with_ranks_in_the_nodes_order(workspace):
    """stages/train.sh twice, as a launcher starts it on two nodes; the program behind torchrun only says who it is."""
    root = workspace.root
    (root / "stages/train.sh").write_bytes((REPO / "stages/train.sh").read_bytes())
    (root / "who.py").write_text(
        "import json, os, sys\n"
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'GROUP_RANK', 'SFT_NODE_RANK')\n"
        "open('who-' + os.environ['RANK'], 'w').write(json.dumps({n: int(os.environ[n]) for n in names}))\n"
    )
    (root / ".venv/bin/python").write_text(  # behind torchrun, sft.training becomes who.py
        f'#!/bin/sh\ncase "$2" in sft.launch.processes) echo 2 1 ;; *)\n'
        f'    for a do shift; [ "$a" = sft.training ] && a=who; set -- "$@" "$a"; done\n'
        f'    PYTHONPATH=lib:. exec {sys.executable} "$@" ;; esac\n'
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [
        subprocess.Popen(
            ["stages/train.sh", "runs/x"], cwd=root, env={**os.environ, "SFT_NODES": "2", "SFT_NODE_RANK": str(n), "SFT_HEAD": head}
        )
        for n in (1, 0)
    ]  # fmt: skip
    assert [node.wait(timeout=PATIENCE) for node in nodes] == [0, 0]
    who = [json.loads((root / f"who-{rank}").read_text()) for rank in range(4)]
    assert [(w["RANK"], w["SFT_NODE_RANK"], w["LOCAL_RANK"], w["WORLD_SIZE"]) for w in who] == [
        (0, 0, 0, 4), (1, 0, 1, 4), (2, 1, 0, 4), (3, 1, 1, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("script", ["stages/train.sh", "env/beaker-job.sh"])
def test_a_command_that_ends_before_the_shell_looks_keeps_its_status(script: str, tmp_path: Path) -> None:
    text = (REPO / script).read_text()
    slow = 'kill() { sleep 0.2; builtin kill "$@"; }\n'  # by then bash has collected the child
    if script == "stages/train.sh":
        waiting = text[text.index("status=0\n") : text.index('[ -e "$1/train')]
        program = f"{slow}(exit 7) &\nchild=$!\n{waiting}exit $status\n"
    else:
        program = (
            slow
            + text[text.index("forward_signals() {") : text.index("\n}\n") + 3]
            + "forward_signals bash -c 'exit 7'\n"
        )
    assert subprocess.run(["bash", "-c", program], cwd=tmp_path).returncode == 7


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("1", 60),
        ("2:30", 150),
        ("1:00:00", 3600),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("2-00:00:05", 172805),
        ("infinite", None),
        ("", None),
    ],
)
def test_slurms_notation_of_time(limit: str, expected: int | None) -> None:
    assert time_limit.seconds(limit) == expected
