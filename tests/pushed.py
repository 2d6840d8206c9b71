"""A repository with a remote, to which launchers' tests push what jobs fetch."""

from __future__ import annotations

import subprocess
from pathlib import Path

from conftest import Workspace


class Pushed:
    """A repository at `root`. `add_remote` comes first."""

    root: Path

    def add_remote(self, remote: Path) -> None:
        """Makes the repository and a bare one beside it, and pushes what is there."""
        made = _template()
        subprocess.run(["cp", "-a", made / ".git", made / ".gitignore", self.root], check=True)
        subprocess.run(["cp", "-a", made.with_name("remote.git"), remote], check=True)
        self.git("remote", "add", "origin", f"file://{remote}")
        self.push()

    def git(self, *command: str) -> str:
        return _git(self.root, *command)

    def push(self) -> None:
        self.git("add", "-A")
        self.git("commit", "--quiet", "--allow-empty", "-m", "x")
        self.git("push", "--quiet", "origin", "main")


def _git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _template() -> Path:
    """A repository of a new workspace, and remote.git beside it. The first one of a process makes them: git takes a second."""
    made = Workspace.template.with_name("pushed") / "workspace"
    if not made.exists():
        made.mkdir(parents=True)
        Workspace(made)
        (made / ".gitignore").write_text(".venv\nruns\nlog\n__pycache__\n")
        _git(made, "init", "--quiet", "--initial-branch=main")
        # A copy's files have the times of the original, and other inodes: without these git reads them all again.
        for name, value in (("core.checkStat", "minimal"), ("core.trustctime", "false"), ("gc.auto", "0")):
            _git(made, "config", name, value)
        _git(made, "add", "-A")
        _git(made, "commit", "--quiet", "-m", "x")
        _git(made, "repack", "-adq")  # or each job's fetch computes the deltas of every file again, in three seconds
        _git(made, "clone", "--quiet", "--bare", str(made), str(made.with_name("remote.git")))
    return made
