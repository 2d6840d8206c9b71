"""A repository whose cluster is the Beaker of tests/beaker_server, and the fixture `place` of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from beaker_server import BUDGET, USER, Server
from conftest import Workspace
from patience import PATIENCE
from pushed import Pushed
from sft.launch import run
from sft.launch.beaker import datasets, scheduler
from sft.recipe import recipe
from sft.runner import plan

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

LAUNCHES = ("torch.distributed", "sft.launch.agree", "sft.launch.beaker.checks", "sft.launch.beaker.scheduler")
"""What Beaker's launcher imports, and what nodes meet with."""


class Place(Pushed):
    """A repository with a remote, a cluster's file, and the server; what is typed is typed there."""

    def __init__(self, workspace: Workspace, server: Server, root: Path):
        self.workspace, self.server, self.root = workspace, server, workspace.root
        self.weka = str(server.folder / "weka/oe-test")  # mounted at its own path
        Path(self.weka).mkdir(parents=True)
        text = CLUSTER.replace("WEKA", self.weka)
        self.cluster = self.root / "env" / "beaker-test.toml"
        self.cluster.write_text(text.replace("VENV", str(self.root / ".venv")))
        self.add_remote(root / "remote.git")

    def edit(self, old: str, new: str) -> None:
        text = self.cluster.read_text()
        assert old in text
        self.cluster.write_text(text.replace(old, new))
        self.push()

    def launch(self, script: str, *words: str, stage: str = "prepare") -> int:
        """A stage whose command is a shell script: what a job does when it ends so."""
        command = ["bash", "-c", script, "runs/x", "--cluster", "beaker-test", *words]
        return run.main("beaker", ["runs/x", stage, *command])

    def wait_for_jobs(self, seconds: float = PATIENCE) -> None:
        """Waits until every job on the server has ended."""
        until = time.monotonic() + seconds
        while not all(run.message.status.HasField("finalized") for run in list(self.server.runs.values())):
            assert time.monotonic() < until, f"a job is still active after {seconds} s"
            time.sleep(0.05)

    @property
    def experiment(self):
        return next(reversed(self.server.experiments.values()))

    @property
    def run(self) -> Path:
        return self.root / "runs" / "x"


@pytest.fixture
def place(workspace, tmp_path_factory, monkeypatch, request):
    folder = tmp_path_factory.mktemp("beaker")
    with Server(folder) as server:
        server.secrets = {f"{USER}_SECRET": HUSH}
        for name, value in {**server.environment, "SFT_USER": USER}.items():
            monkeypatch.setenv(name, value)
        for name in ("BEAKER_TOKEN", "BEAKER_ADDR", "DETACH", "DRY_RUN"):
            monkeypatch.delenv(name, raising=False)
        if getattr(request.module, "LAUNCHES_ALONE", True):  # else a test chooses what its processes are forked from
            workspace.use_python_with(*LAUNCHES)
        made = Place(workspace, server, tmp_path_factory.mktemp("remote"))
        monkeypatch.chdir(workspace.root)
        monkeypatch.setattr(plan, "REPO", workspace.root)
        monkeypatch.setattr(recipe, "CLUSTERS", workspace.root / "env")
        for module in (scheduler, datasets):
            monkeypatch.setattr(module, "POLL_S", 0.2)
        yield made
