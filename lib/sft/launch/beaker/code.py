"""The repository's code as a job on another machine gets it: a commit that the remote has, or an archive of HEAD.

A working tree with changes is refused either way, so that the commit in a manifest is the code that ran.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sft.common.errors import SftError
from sft.common.strings import first_names

ARCHIVE = "code.tar"


@dataclass(frozen=True)
class Code:
    """`repository` is the URL to fetch `commit` from; empty when the code is uploaded as the dataset `dataset`."""

    commit: str
    repository: str = ""

    @property
    def dataset(self) -> str:
        """The name of the Beaker dataset with the archive of the code; empty when a repository has it."""
        return "" if self.repository else f"olmo-sft-{self.commit[:16]}"


def git(root: Path, *command: str) -> str:
    """What a git command prints in `root`. Raises SftError when it fails."""
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SftError(f"git {' '.join(command)} in {root}: {done.stderr.strip() or done.returncode}")
    return done.stdout.rstrip()


def changed(root: Path) -> list[str]:
    """Tracked files that differ from HEAD, and new ones that are not ignored."""
    return [line[3:] for line in git(root, "status", "--porcelain").splitlines()]


def describe(root: Path, how: str, strict: bool = True) -> Code:
    """How a job gets the code of `root`: `how` is 'git' or 'dataset'.

    Raises SftError; for changed files and a commit that was not pushed only if `strict`.
    """
    try:
        commit = git(root, "rev-parse", "HEAD")
    except (SftError, FileNotFoundError) as e:
        raise SftError(f"{root}: jobs need the code in a git repository ({e}); next: git init, commit") from None
    if strict and (files := changed(root)):
        shown = first_names(files)
        raise SftError(
            f"{root}: jobs run the commit {commit[:12]}, without the changes in {shown}; next: commit or stash them"
        )
    if how == "dataset":
        return Code(commit)
    remotes = git(root, "remote").split()
    if not remotes:
        raise SftError(f'{root}: no git remote that jobs could fetch from; next: git remote add, or code = "dataset"')
    remote = "origin" if "origin" in remotes else remotes[0]
    if strict and not git(root, "branch", "--remotes", "--contains", commit, "--list", f"{remote}/*"):
        raise SftError(f'{root}: the commit {commit[:12]} is not on {remote}; next: git push, or code = "dataset"')
    return Code(commit, public_url(git(root, "remote", "get-url", remote)))


def public_url(url: str) -> str:
    """The URL of a remote for a machine without credentials. Raises SftError for a URL that contains some."""
    if match := re.fullmatch(r"(?:ssh://)?git@([A-Za-z0-9.-]+)[:/](.+)", url):
        url = f"https://{match[1]}/{match[2]}"
    if "@" in urlsplit(url).netloc:
        raise SftError(
            "the git remote's URL contains a name or a password, which a job's specification would show; next: git remote"
            " set-url with a URL without it, and GITHUB_TOKEN among the cluster's secrets"
        )
    return url


def archive(root: Path, commit: str, target: Path) -> Path:
    """Writes the commit's files as target/code.tar."""
    file = target / ARCHIVE
    git(root, "archive", "--format=tar", f"--output={file}", commit)
    return file
