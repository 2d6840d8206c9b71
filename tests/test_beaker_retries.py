"""A training that was killed, or asks to be run again, is started again by Beaker; one that failed for good is not.

The real client against tests/beaker_server, whose jobs are local processes.
"""

from __future__ import annotations

import pytest

from beaker_place import place
from sft.launch import job
from sft.launch.beaker import states
from sft.launch.exchange import exchange
from sft.recipe.schema import Cluster

__all__ = ["place"]  # the fixture
pytestmark = pytest.mark.server

SECOND = (
    'mkdir -p "$0"; mark="$0/attempt-$BEAKER_REPLICA_RANK"; if [ -e "$mark" ]; then {then}; fi; touch "$mark"; {first}'
)
"""A script that does `first` in a task's first attempt and `then` in the later ones. $0 is the run's folder there."""


def train(place, script: str, *words: str) -> int:
    place.workspace.make("sync", "RECIPE=x", "CLUSTER=beaker-test")
    return place.launch(script, *words, stage="train")


def exits(place) -> list[int]:
    """The exit statuses of the jobs of the last experiment, in the order of their start."""
    last = place.experiment
    return [run.message.status.exit_code for run in place.server.runs.values() if run.task.experiment is last]


def test_a_training_that_asks_for_it_is_run_again_and_an_error_is_not(place, capsys):
    place.server.slow_from = 2  # the experiment is stopped before its third attempt starts
    assert train(place, SECOND.format(first="echo saved; exit 75", then="echo no such file; exit 5")) == 5
    assert place.experiment.body["retry"] == {"allowedTaskRetries": 2}  # max_restarts
    output = capsys.readouterr().out
    assert "saved" in output and "another attempt would fail in the same way: the experiment is stopped" in output
    assert "failed, exit status 5" in output and "no such file" in output  # as it came, or in the end of the log
    place.wait_for_jobs()
    assert place.experiment.cancelled and exits(place)[:2] == [75, 5] and 5 not in exits(place)[2:]
    assert train(place, "exit 6") == 6  # the next make submits it again
    assert len([n for n in place.server.experiments if n.startswith("x-train")]) == 2


def test_kills_are_counted_for_the_training_and_for_the_node(place, capsys):
    place.server.nodes = {"n1": "ai2/jupiter", "n2": "ai2/jupiter"}
    assert train(place, "kill -KILL $$") == 137
    assert exits(place) == [137] * 3 and not place.experiment.cancelled
    failures = place.run / ".jobs/failed-nodes"
    lines = [line.split() for line in failures.read_text().splitlines()]
    assert (
        [line[0] for line in lines] == ["n1"] * 3
        and len({line[1] for line in lines}) == 3
        and lines[0][2:] == ["exit", "137"]
    )
    assert train(place, "kill -KILL $$", "max_restarts=0") == 137
    assert exits(place) == [137] and "retry" not in place.experiment.body
    assert place.experiment.body["tasks"][0]["constraints"] == {"hostname": ["n2"]}


def test_an_error_of_the_user_counts_for_no_node_and_one_of_the_hardware_does(place):
    place.server.nodes = {"n1": "ai2/jupiter"}
    assert train(place, "echo Bus error; exit 1") == 1  # its words alone do not matter
    assert not (place.run / ".jobs/failed-nodes").exists()
    assert train(place, SECOND.format(first="echo 'hung: rank 3 on n1: step 7'; exit 75", then="exit 1")) == 1
    assert (place.run / ".jobs/failed-nodes").read_text().split()[0] == "n1"


@pytest.mark.processes
def test_two_nodes_end_with_one_status_and_start_again_together(place):
    """Where a process was killed, its node asks for another attempt; the other node only lost its peer."""
    (place.root / "recipes" / "x.toml").open("a").write("\n[on.beaker-test.train]\nnodes = 2\n")
    place.edit("[env]\n", '[env]\nSFT_AGREE_S = "120"\n')
    first = 'if [ "$BEAKER_REPLICA_RANK" = 1 ]; then sleep 1; exit 75; else exit 1; fi'
    assert train(place, SECOND.format(first=first, then="exit 9")) == 9
    place.wait_for_jobs()
    found = exits(place)
    assert 75 in found[:2] and 1 not in found  # 143 or 137: stopped, since the other's end came first
    assert 9 in found[2:] and 75 not in found[2:]


def test_a_node_that_says_nothing_has_no_say():
    assert exchange(1, 2, "127.0.0.1:9", "1", 0.5, required=False) == ["", "1"]


def test_a_job_that_ends_with_another_nodes_retry_waits():
    message = job.Status("pending", None, "another node failed, Beaker starts all again")
    stopped = states.pb2.Job()
    stopped.status.finalized.GetCurrentTime()
    stopped.status.canceled.GetCurrentTime()
    stopped.status.canceled_code = states.pb2.CancelationCode.CANCELATION_CODE_SIBLING_TASK_RETRY
    assert states.job_status(stopped, Cluster(storage="x"), 2, lambda _: 0) == message
