"""Resolves file names from recipes and manifests, and keeps them under their root. Standard library only."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Sequence
from pathlib import Path

from sft.common.errors import SftError

PACKAGED = Path(__file__).resolve().parents[1] / "project"
"""The files of the project in an installed package (setup.py puts them there). A checkout has none."""
REPO = Path(os.environ.get("SFT_PROJECT") or (PACKAGED if PACKAGED.is_dir() else PACKAGED.parents[2])).absolute()
"""The root of this checkout, or the folder that the installed command `sft` lays out like one (sft.command)."""
REMOTE = re.compile(r"(gs|hf|s3)://")
STORAGE_WAIT = "SFT_STORAGE_WAIT_S"
"""The variable that has `storage_wait_s` of the cluster's file, for every process of a stage."""
BUCKETS = ("gs://", "s3://")
"""How the address of a folder in a bucket begins."""


def check_relative(path: str, what: str) -> str:
    """Returns `path` if it is a plain relative POSIX path. Otherwise raises SftError, which names `what`."""
    parts = path.split("/")
    if (
        not path
        or "\0" in path
        or "\\" in path
        or path.startswith(("/", "~"))
        or any(p in ("", ".", "..") for p in parts)
    ):
        raise SftError(
            f"{what}: {path!r} is not a plain relative path (no leading '/', '..', '//', '~' or '\\');"
            " next: write it relative to a folder and name that folder with DATA=/that/folder"
        )
    return path


def find(roots: Sequence[Path], path: str, what: str) -> Path:
    """The file or folder `path` under the first root that has it. Raises SftError if none has it or if a link leaves the root."""
    check_relative(path.rstrip("/"), what)
    for root in roots:
        candidate = root / path
        if candidate.exists():
            if not candidate.resolve().is_relative_to(root.resolve()):
                raise SftError(
                    f"{what}: {candidate} is a link that leaves {root}; next: add the folder it points into to DATA"
                )
            return candidate
    tried = ", ".join(str(r) for r in roots)
    then = "add this folder: DATA=." if Path(path).exists() else "name its folder with DATA=/its/folder"
    raise SftError(f"{what}: no file or folder {path!r} under {tried}; next: {then} (several: DATA=a:b)")


def for_user(text: str) -> str:
    """`text` with '{user}' replaced by SFT_USER, else the login name."""
    return text.replace("{user}", os.environ.get("SFT_USER") or getpass.getuser()) if "{user}" in text else text


def inside(root: Path, path: str, what: str) -> Path:
    """`root/path`, which need not exist. Raises SftError if the name or a link on the way leaves the root."""
    joined = root / check_relative(path, what)
    if not joined.resolve().is_relative_to(root.resolve()):
        raise SftError(f"{what}: {path!r} leaves {root} through a link")
    return joined
