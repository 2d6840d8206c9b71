"""The installed command `sft`: its words, and a folder that is no checkout."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO
from sft import command


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ("train --recipe x --lr 1e-4", "train RECIPE=x lr=1e-4"),
        ("train --recipe=x --train.seed=3 DETACH=1", "train RECIPE=x train.seed=3 DETACH=1"),
        ("delete --run x --yes", "delete RUN=x YES=1"),
        ("train --recipe x --steps 5 --global-batch-tokens 4096", "train RECIPE=x steps=5 global_batch_tokens=4096"),
        ("overfit --recipe x --steps 5", "overfit RECIPE=x STEPS=5"),  # a variable of this verb, a field of the other
        ("to-hf --src a --dst b --tokenizer t", "to-hf SRC=a DST=b TOKENIZER=t"),
        ("train --detach --recipe x", "train DETACH=1 RECIPE=x"),
        ("compare --a x --b y", "compare A=x B=y"),
    ],
)
def test_options_are_makes_words(words: str, made: str) -> None:
    assert command.make_words(words.split()) == made.split()


def test_a_field_needs_a_value() -> None:
    with pytest.raises(ValueError, match="--lr has no value"):
        command.make_words(["train", "--lr"])


def test_paths_mean_the_same_where_make_runs(tmp_path: Path) -> None:
    (tmp_path / "a.yml").touch()
    words = ["prepare", "DATA=one:/two", "FROM=smoke", "lr=1e-4"]
    assert list(command.absolute(words, tmp_path, tmp_path / ".sft")) == [
        "prepare",
        f"DATA={tmp_path}/one:/two",
        "FROM=smoke",
        "lr=1e-4",
    ]
    assert list(command.absolute(["FROM=a.yml"], tmp_path, tmp_path / ".sft")) == [f"FROM={tmp_path}/a.yml"]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder of packages with this one in it, as a wheel has it."""
    site = tmp_path / "site"
    shutil.copytree(REPO / "lib" / "sft", site / "sft", ignore=shutil.ignore_patterns("__pycache__"))
    runpy.run_path(str(REPO / "setup.py"), run_name="setup")["copy_project"](REPO, site / "sft" / "project")
    return site


def run(site: Path, here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "SFT_PROJECT"))}
    code = "import sys; from sft.command import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=here, env={**environment, "PYTHONPATH": str(site)},
                          capture_output=True, text=True, check=False)  # fmt: skip


@pytest.mark.seconds
def test_outside_a_checkout_recipes_of_the_package_and_of_the_folder_are_found(tmp_path: Path, installed: Path) -> None:
    here = tmp_path / "mine"
    here.mkdir()
    done = run(installed, here, "new", "--from", "smoke", "--recipe", "my-exp", "--lr", "1e-3")
    assert done.returncode == 0, done.stderr
    assert "lr = 0.001" in (here / "recipes" / "my-exp.toml").read_text()
    shown = run(installed, here, "show", "--recipe", "my-exp")
    assert shown.returncode == 0 and "lr = 0.001" in shown.stdout
    (here / "env").mkdir()
    (here / "env" / "box.toml").write_text('storage = "{runs}/.storage"\ngpu_memory_gb = 24.0\n')
    planned = run(installed, here, "-n", "prepare", "--recipe", "my-exp", "--cluster", "box")
    assert planned.returncode == 0, planned.stderr
    assert "stages/prepare.py runs/my-exp" in planned.stdout and "--cluster 'box'" in planned.stdout
    assert "env/setup.sh" not in planned.stdout  # the environment is the one that sft is in
    assert os.access(here / ".sft" / "env" / "local.sh", os.X_OK)
    lib = here / ".sft" / "lib"  # other packages there would no longer count as installed
    assert not lib.is_symlink() and [p.name for p in lib.iterdir()] == ["sft"]
    refused = run(installed, here, "train", "--recipe", "my-exp", "--lrr", "1")
    assert refused.returncode == 2 and "no such field" in refused.stderr
    assert sorted(p.name for p in here.iterdir()) == [".sft", "env", "recipes", "runs"]


@pytest.mark.seconds
def test_in_a_checkout_it_is_that_checkouts_make(tmp_path: Path, installed: Path) -> None:
    done = run(installed, REPO / "docs", "show", "--recipe", "smoke")
    assert done.returncode == 0 and "# run runs/smoke" in done.stdout
    assert not (REPO / "docs" / ".sft").exists()
