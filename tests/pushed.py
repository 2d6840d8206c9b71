"""A repository with a remote, to which launchers' tests push what jobs fetch."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Pushed:
    """A repository at `root`. `add_remote` comes first."""

    root: Path

    def add_remote(self, remote: Path) -> None:
        """Makes the repository and a bare one beside it, and pushes what is there."""
        (self.root / ".gitignore").write_text(".venv\nruns\nlog\n__pycache__\n")
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("init", "--quiet", "--bare", str(remote))
        self.git("remote", "add", "origin", f"file://{remote}")
        self.push()

    def git(self, *command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *command], cwd=self.root, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def push(self) -> None:
        self.git("add", "-A")
        self.git("commit", "--quiet", "--allow-empty", "-m", "x")
        self.git("push", "--quiet", "origin", "main")
