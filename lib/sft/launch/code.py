"""The repository's code as a job on another machine gets it: a commit that the remote has, or an archive of HEAD.

A working tree with changes is refused, so that the commit in a manifest is the code that ran. With `code = "dataset"` and
ALLOW_DIRTY=1 the files as they are travel instead: the archive holds their difference from HEAD (uncommitted.diff), and the
manifests say that the code had edits. New files outside of the folders that jobs run do not matter.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sft.common.errors import SftError
from sft.common.strings import first_names

ARCHIVE = "code.tar"
DIFF = "uncommitted.diff"
"""In an archive of a working tree with changes: its difference from HEAD."""
RUN_BY_JOBS = ("lib/", "stages/", "env/", "recipes/", "pyproject.toml", "Makefile")
"""The folders whose new files matter to a job."""
ALLOW = "ALLOW_DIRTY"


@dataclass(frozen=True)
class Code:
    """`repository` is the URL to fetch `commit` from; empty when the code is uploaded as the dataset `dataset`.

    `edits` is a digest of what differs from the commit in the archive; empty for the commit itself.
    """

    commit: str
    repository: str = ""
    edits: str = ""

    @property
    def dataset(self) -> str:
        """The name of the dataset with the archive of the code; empty when a repository has it."""
        return "" if self.repository else f"olmo-sft-{self.commit[:16]}" + (f"-{self.edits}" if self.edits else "")


def git(root: Path, *command: str) -> str:
    """What a git command prints in `root`. Raises SftError when it fails."""
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SftError(f"git {' '.join(command)} in {root}: {done.stderr.strip() or done.returncode}")
    return done.stdout.rstrip()


def changed(root: Path) -> list[str]:
    """Tracked files that differ from HEAD, and new ones, not ignored, in the folders that jobs run."""
    lines = git(root, "status", "--porcelain", "--untracked-files=all").splitlines()
    return [line[3:] for line in lines if not line.startswith("??") or line[3:].strip('"').startswith(RUN_BY_JOBS)]


def describe(root: Path, how: str, strict: bool = True) -> Code:
    """How a job gets the code of `root`: `how` is 'git' or 'dataset'.

    Raises SftError; for changed files and a commit that was not pushed only if `strict`.
    """
    try:
        commit = git(root, "rev-parse", "HEAD")
    except (SftError, FileNotFoundError) as e:
        raise SftError(f"{root}: jobs need the code in a git repository ({e}); next: git init, commit") from None
    files = changed(root)
    if files and how == "dataset" and os.environ.get(ALLOW, "0") not in ("", "0"):
        return Code(commit, edits=_digest(edits(root)))
    if strict and files:
        shown = first_names(files)
        other = f"; or {ALLOW}=1, which ships them as they are" if how == "dataset" else ""
        raise SftError(
            f"{root}: jobs run the commit {commit[:12]}, without the changes in {shown}; next: commit or stash them{other}"
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


def archive(root: Path, code: Code, target: Path) -> Path:
    """Writes the commit's files, or those of the working tree where it has edits, as target/code.tar. Raises SftError."""
    file = target / ARCHIVE
    if not code.edits:
        git(root, "archive", "--format=tar", f"--output={file}", code.commit)
        return file
    with tarfile.open(file, "w") as packed:
        for name in _files(root):
            packed.add(root / name, name, recursive=False)
        difference = edits(root)
        member = tarfile.TarInfo(DIFF)
        member.size = len(difference)
        packed.addfile(member, io.BytesIO(difference))
    if _digest(difference) != code.edits:
        raise SftError(f"{root}: its files changed while they were packed; next: run the same make again")
    return file


def _digest(difference: bytes) -> str:
    """8 hex digits that name the edits of a working tree."""
    return hashlib.sha256(difference).hexdigest()[:8]


def _files(root: Path) -> list[str]:
    """The tracked files that exist, and the new ones in the folders that jobs run."""
    tracked = git(root, "ls-files", "-z").split("\0")
    names = {n for n in tracked if n} | set(_new_files(root))
    return sorted(n for n in names if os.path.lexists(root / n))


def _new_files(root: Path) -> list[str]:
    """The files that are not tracked, not ignored, and in the folders that jobs run."""
    found = git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    return sorted(n for n in found if n.startswith(RUN_BY_JOBS))


def edits(root: Path) -> bytes:
    """The difference of the working tree from HEAD, with the new files that travel, as a patch that `git apply` takes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GIT_INDEX_FILE": f"{folder}/index"}  # the user's own index stays

        def run(*command: str, names: Sequence[str] = ()) -> bytes:
            given = "\0".join(names).encode()
            done = subprocess.run(
                ["git", "-C", str(root), *command], input=given, capture_output=True, env=environment, check=False
            )
            if done.returncode:
                raise SftError(f"git {' '.join(command)} in {root}: {done.stderr.decode(errors='replace').strip()}")
            return done.stdout

        run("read-tree", "HEAD")
        run("add", "--update", ".")
        if new := _new_files(root):
            run("add", "--pathspec-from-file=-", "--pathspec-file-nul", names=[f":(literal){name}" for name in new])
        return run("diff", "--cached", "--binary", "--no-ext-diff", "--no-color", "HEAD")
