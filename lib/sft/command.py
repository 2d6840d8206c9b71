"""The installed command `sft`: Make's goals as verbs, in a checkout or anywhere else.

    sft train --recipe my-exp --lr 1e-4      =  make train RECIPE=my-exp lr=1e-4
    sft train RECIPE=my-exp lr=1e-4             the same words as Make's
    sft help                                    what verbs there are

In a checkout it runs that checkout's Make. Anywhere else it runs the package's own copy of the project: .sft/ is laid out like a
checkout of links to the package, the environment is the one that `sft` is in, and runs go to ./runs. recipes/*.toml and env/*.toml
of the current folder are added to the package's and replace those of the same name. Exit status: Make's.
Standard library only, because it starts Make and nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.common.paths import PACKAGED
from sft.runner import plan
from sft.runner.make_words import FLAGS, READERS

LAYOUT = ".sft"
OWN = ("recipes", "env")
"""Folders to which the current folder may add files."""
PATHS = ("DATA", "FROM", "SRC", "DST", "RUNS", "TOKENIZER", "ADAPTER")
"""Variables that hold paths, which are relative to the current folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs Make and returns its exit status; 2 for words that cannot be Make's."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        words = ["help"]
    if words[0] == "--version":
        import importlib.metadata  # start-up: only this option needs it

        print(f"sft {importlib.metadata.version('sft')}")
        return 0
    if shutil.which("make") is None:
        print("[sft] error: make is not installed; next: install GNU make", file=sys.stderr)
        return 2
    try:
        command = make_words(words)
    except ValueError as error:
        print(f"[sft] error: {error}; next: sft help", file=sys.stderr)
        return 2
    here = Path.cwd()
    if (project := checkout(here)) is not None:
        return subprocess.call(["make", "--no-print-directory", "-C", str(project), *absolute(command, here, project)])
    if not PACKAGED.is_dir():
        print(
            f"[sft] error: {here} is in no checkout, and this package was installed with -e; next: cd into the checkout",
            file=sys.stderr,
        )
        return 2
    folder = lay_out(here)
    environment = {**os.environ, "SFT_PROJECT": str(folder), "PYTHON": sys.executable}
    try:
        return subprocess.call(
            ["make", "--no-print-directory", "-C", str(folder), *absolute(command, here, folder)], env=environment
        )
    finally:
        hand_over(folder, here)


def make_words(words: Sequence[str]) -> list[str]:
    """The words for Make: `--lr 1e-4` and `--lr=1e-4` become `lr=1e-4`, `--recipe x` becomes `RECIPE=x`, `--yes` becomes `YES=1`.

    An option is a variable of Make's where the verb reads one of that name, else a field of the recipe. Raises ValueError for a field without
    a value.
    """
    verbs = {word for word in words if not word.startswith("--")}
    found, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            found.append(word)
            continue
        name, sign, value = word[2:].partition("=")
        variable = name.upper().replace("-", "_")
        own = variable in READERS and (not READERS[variable] or not verbs.isdisjoint(READERS[variable]))
        flag = variable in FLAGS or variable in (
            "DETACH",
            "RETRAIN",
            "ALLOW_DIRTY",
        )
        if not sign and rest and not rest[0].startswith("--") and not (own and flag):
            value = rest.pop(0)
        elif not sign and own and flag:
            value = "1"
        elif not sign:
            raise ValueError(f"--{name} has no value")
        found.append(f"{variable if own else name.replace('-', '_')}={value}")
    return found


def checkout(folder: Path) -> Path | None:
    """The checkout that a folder is in."""
    for parent in (folder, *folder.parents):
        if (parent / "Makefile").is_file() and (parent / "lib" / "sft" / "command.py").is_file():
            return parent
    return None


def absolute(words: Sequence[str], here: Path, project: Path) -> Iterator[str]:
    """The words with paths that mean the same in the folder where Make runs."""
    for word in words:
        name, sign, value = word.partition("=")
        if sign and name in PATHS and here != project:
            parts = [
                p if "://" in p or not _is_path(name, p, here) else os.path.normpath(here / p)
                for p in (value.split(":") if name == "DATA" else [value])
            ]
            word = f"{name}={':'.join(parts)}"
        yield word


def _is_path(name: str, value: str, here: Path) -> bool:
    """FROM= is also a recipe's name."""
    return bool(value) and (name != "FROM" or (here / value).exists())


def lay_out(here: Path) -> Path:
    """Makes or renews .sft/ in a folder, and returns it. Runs that exist stay."""
    folder = here / LAYOUT
    (folder / ".venv").mkdir(parents=True, exist_ok=True)
    (here / "runs").mkdir(exist_ok=True)
    link(here / "runs", folder / "runs")
    for name in ("bin", "lib", "include", "pyvenv.cfg"):
        if (source := Path(sys.prefix) / name).exists():
            link(source, folder / ".venv" / name)
    # Only sft: with other packages there, PYTHONPATH would hide that they are installed, and dill would pickle their classes by value.
    if (folder / "lib").is_symlink():  # of an older version
        (folder / "lib").unlink()
    (folder / "lib").mkdir(exist_ok=True)
    link(PACKAGED.parent, folder / "lib" / "sft")
    for item in PACKAGED.iterdir():
        if item.name not in OWN:
            link(item, folder / item.name)
    for name in OWN:  # copies, because data must not be behind a link that leaves its folder
        own = folder / name
        for old in own.glob("*.toml"):
            old.unlink()
        shutil.copytree(PACKAGED / name, own, dirs_exist_ok=True)
        for file in (here / name).glob("*.toml"):
            link(file, own / file.name)
    for kind in ("ready", "tools"):  # this environment is the one that Make would make
        (folder / ".venv" / f"{kind}-{plan.environment_digest(PACKAGED)}").touch()
    return folder


def link(source: Path, target: Path) -> None:
    """A symbolic link that replaces an older one."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    target.symlink_to(source.absolute())


def hand_over(folder: Path, here: Path) -> None:
    """Moves new recipes and cluster files from .sft/ into the current folder: `sft new` writes one."""
    for name in OWN:
        for file in (folder / name).glob("*.toml"):
            if (
                not file.is_symlink()
                and not (PACKAGED / name / file.name).exists()
                and not (here / name / file.name).exists()
            ):
                (here / name).mkdir(exist_ok=True)
                shutil.move(file, here / name / file.name)
                link(here / name / file.name, file)
