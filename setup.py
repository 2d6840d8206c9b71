"""Puts the project's files into the package, so that the installed command `sft` has stages, recipes and clusters. The rest is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ("Makefile", "pyproject.toml", "stages", "env", "recipes")


def copy_project(root: Path, target: Path) -> None:
    """Copies FILES of a checkout into a folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (root / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "mine")
            shutil.copytree(root / name, target / name, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy2(root / name, target / name)


class WithProject(build_py):
    """An editable install has the checkout, and copies nothing."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            copy_project(Path(__file__).parent, Path(self.build_lib) / "sft" / "project")


if __name__ == "__main__":
    setup(cmdclass={"build_py": WithProject})
