"""The specification of a Beaker job against what beaker-gantry builds for the same flags, field by field, through its own dry run.

gantry is not among the packages of this project: `.venv/bin/python -m pip install beaker-gantry==3.7.0` to run this.
"""

from __future__ import annotations

import warnings

import pytest
import yaml

from beaker_place import place
from beaker_server import BUDGET
from sft.launch import job
from sft.launch.beaker import connection, scheduler

gantry = pytest.importorskip("gantry.launch", reason="beaker-gantry is not installed", exc_type=ImportError)

__all__ = ["place"]  # the fixture
pytestmark = pytest.mark.server

OURS = {"image", "command", "arguments", "envVars", "datasets", "name", "result"}
"""Fields of a task in which the two tools bring their own script; of these, what the user's flags ask for is compared."""


def ours(place, *words):
    made = job.Job.parse(
        ["runs/x", "train", "stages/train.sh", "runs/x", "--cluster", "beaker-test", *words], strict=False
    )
    return yaml.safe_load(scheduler.BeakerScheduler(made.folder, made.cluster).render(made).partition("\n")[2])


def gantrys(place, monkeypatch, tmp_path, **flags):
    from gantry import beaker_utils
    from gantry.git_utils import GitRepoState

    file = tmp_path / "gantry.yaml"
    client = connection.connect("ai2/team")
    monkeypatch.setattr(beaker_utils, "ensure_entrypoint_dataset", lambda *_, **__: type("D", (), {"id": "01ENTRY"}))
    monkeypatch.setattr(
        beaker_utils, "filter_clusters_by_tags", lambda _, clusters, __: clusters
    )  # the server's have none
    monkeypatch.setattr(GitRepoState, "is_public", True)  # it would ask GitHub
    monkeypatch.setattr(GitRepoState, "short_commit_message", lambda self: "")
    monkeypatch.setattr(GitRepoState, "is_in_tree", lambda self, path: False)
    address = "https://github.com/ann/x"
    repository = GitRepoState("ann/x", address, place.git("rev-parse", "HEAD"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gantry.launch_experiment(
            ["stages/train.sh"], name="x", workspace="ai2/team", beaker_image="ann/image", dry_run=True, yes=True, save_spec=file,
            client=client, git_repo=repository, timeout=0, **flags,
        )  # fmt: skip
    return yaml.safe_load(file.read_text())


CASES = {
    "one node": (
        'clusters = ["ai2/jupiter"]\npriority = "high"\ngpus_per_node = 8\nmin_runtime = "1h"\nretries = 2\ntime = "24h"',
        (),
        {"gpus": 8, "priority": "high", "min_runtime": "1h", "auto_resume": True, "retries": 2, "task_timeout": "24h",
         "shared_memory": "10GiB"},
    ),
    "two nodes, with cores and memory": (
        'clusters = ["ai2/jupiter", "ai2/ceres"]\ngpus_per_node = 8\npreemptible = true',
        ("nodes=2", "cpus=12", "memory_gb=64"),
        {"gpus": 8, "priority": "normal", "min_runtime": "0s", "auto_resume": True, "replicas": 2, "cpus": 12, "memory": "64GiB",
         "shared_memory": "10GiB", "leader_selection": True, "host_networking": True, "propagate_failure": True,
         "propagate_preemption": True, "synchronized_start_timeout": "90m"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_field_is_what_gantry_builds(place, monkeypatch, tmp_path, case):
    text, words, flags = CASES[case]
    place.edit('clusters = ["ai2/jupiter"]', text)
    clusters = ["ai2/jupiter", "ai2/ceres"] if "ceres" in text else ["ai2/jupiter"]
    monkeypatch.chdir(place.root)
    wanted = gantrys(
        place, monkeypatch, tmp_path, clusters=clusters, budget=BUDGET, weka=[("oe-test", place.weka)],
        env_vars=[("ODD", "a $HOME `b` 'c'")], env_secrets=[("TEST_SECRET", "ann_SECRET")], **flags,
    )  # fmt: skip
    made = ours(place, *words)
    assert {k: v for k, v in made.items() if k not in ("tasks", "description")} == {
        k: v for k, v in wanted.items() if k not in ("tasks", "description") and v != []
    }
    mine, theirs = made["tasks"][0], wanted["tasks"][0]
    assert {k: v for k, v in mine.items() if k not in OURS} == {k: v for k, v in theirs.items() if k not in OURS}
    assert mine["image"] == {"beaker": "ann/image"} and theirs["image"] == {"beaker": "01IMAGE"}  # the name, and its id
    assert mine["result"] == theirs["result"] == {"path": "/results"}
    for name in ("ODD", "TEST_SECRET"):
        assert [e for e in mine["envVars"] if e["name"] == name] == [e for e in theirs["envVars"] if e["name"] == name]
    assert [d for d in mine["datasets"] if "weka" in d["source"]] == [
        d for d in theirs["datasets"] if "weka" in d["source"]
    ]
