"""A cluster whose jobs reach no internet: what a job would fetch is named before it is submitted."""

from __future__ import annotations

import pytest

from conftest import Workspace
from sft.launch.doctor.context import NOTE, OK, RED, Context
from sft.launch.doctor.internet import internet
from sft.recipe import recipe
from sft.runner import plan

OFFLINE = 'launcher = "slurm"\nstorage = "{runs}/.s"\ninternet = false\n'


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """rows(cluster file, old and new text of the recipe): [(state, found, next)]."""
    workspace = Workspace(tmp_path)
    monkeypatch.setattr(plan, "REPO", workspace.root)
    monkeypatch.setattr(recipe, "CLUSTERS", workspace.root / "env")
    monkeypatch.chdir(workspace.root)

    def examine(cluster=OFFLINE, old="", new=""):
        (workspace.root / "env/here.toml").write_text(cluster)
        loaded = recipe.load(workspace.recipe("y", old, new), cluster="here")
        place = plan.Place(workspace.root / "runs", (), "here")
        return [(r.state, r.found, r.next) for r in internet(Context(place, loaded, place.load_cluster()))]

    return examine


def test_what_a_job_would_fetch_is_red_where_jobs_reach_no_internet(rows):
    assert [state for state, *_ in rows()] == [OK]
    hub = ('tokenizer = "tok"', 'tokenizer = "hf://ann/tok@1234"')
    [(state, found, then)] = rows(OFFLINE, *hub)
    assert state == RED and "prepare would fetch hf://ann/tok@1234 in a job" in found
    assert then == 'stages = ["train", "convert", "evaluate"] in env/here.toml'
    assert [s for s, *_ in rows(OFFLINE + 'stages = ["train", "convert", "evaluate"]\n', *hub)] == [OK]
    assert rows(OFFLINE.replace("internet = false\n", ""), *hub) == []
    base = rows(OFFLINE, 'preset = "olmo3-tiny"', 'preset = "olmo3-tiny"\nbase = "hf://ann/base"')
    assert "sync would fetch hf://ann/base" in base[0][1]


def test_trackers_and_ifevals_sentences_are_told(rows):
    notes = rows(OFFLINE, "[train]", '[train]\nwandb_project = "p"')
    assert [(s, f.partition(":")[0]) for s, f, _ in notes] == [
        (NOTE, "wandb_project"),
        (OK, "jobs reach none, and need none"),
    ]
    [(state, found, then)] = rows(OFFLINE, 'tasks = ["one"]', 'tasks = ["ifeval"]')
    assert state == RED and "punkt_tab" in found and "nltk.downloader" in then


@pytest.mark.seconds
def test_jobs_are_told_that_there_is_no_internet(tmp_path):
    workspace = Workspace(tmp_path)
    (workspace.root / "env/here.toml").write_text(OFFLINE + '[env]\nWANDB_MODE = "disabled"\n')
    script = workspace.make("dry-run", "RECIPE=x", "CLUSTER=here", "STAGE=train").stdout
    assert (
        "export HF_HUB_OFFLINE=1\n" in script
        and "export WANDB_MODE=disabled\n" in script
        and "WANDB_MODE=offline" not in script
    )
